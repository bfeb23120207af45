"""Optical density and the stain vectors of a slide, against stains that the test mixes."""

import numpy as np
import pytest

from preprocessing.stain import optical_density, stain_colour, stain_vectors

HEMATOXYLIN = np.array([0.65, 0.70, 0.29]) / np.linalg.norm([0.65, 0.70, 0.29])
EOSIN = np.array([0.07, 0.99, 0.11]) / np.linalg.norm([0.07, 0.99, 0.11])


def mixed(n: int = 20_000, seed: int = 0, vectors=(HEMATOXYLIN, EOSIN)) -> np.ndarray:
    """Densities (n, 3) of pixels with some of both stains, a part of them with one only."""
    rng = np.random.default_rng(seed)
    amount = rng.uniform(0.3, 1.2, (n, 2))
    amount[: n // 10, 1] = 0.0
    amount[n // 10 : n // 5, 0] = 0.0
    return (amount @ np.stack(vectors) + rng.normal(0, 0.003, (n, 3))).astype(np.float32)


def test_optical_density_equals_the_formula():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    slow = [[-np.log10(max(int(v), 1) / 255) for v in row] for row in pixels]
    np.testing.assert_allclose(optical_density(pixels), slow, atol=1e-6)
    assert optical_density(np.array([255, 0], dtype=np.uint8)).tolist() == pytest.approx(
        [0, 2.40654], abs=1e-5
    )


def test_mixed_stains_are_found_again():
    strong = (HEMATOXYLIN, np.array([0.35, 0.85, 0.40]) / np.linalg.norm([0.35, 0.85, 0.40]))
    found = stain_vectors(mixed(vectors=strong))
    assert found is not None
    assert found.hematoxylin @ strong[0] > 0.999
    assert found.eosin @ strong[1] > 0.999
    for vector in (found.hematoxylin, found.eosin):
        assert np.linalg.norm(vector) == pytest.approx(1)


def test_neither_order_nor_background_matter():
    density = mixed()
    found = stain_vectors(density)
    glass = np.full((5000, 3), 0.02, dtype=np.float32)
    again = stain_vectors(np.concatenate([glass, density[::-1]]))
    assert found is not None
    assert again is not None
    assert again.n_pixels == found.n_pixels
    np.testing.assert_allclose(again.hematoxylin, found.hematoxylin, atol=1e-6)
    np.testing.assert_allclose(again.eosin, found.eosin, atol=1e-6)


def test_nothing_is_said_of_glass_or_of_one_colour():
    assert stain_vectors(np.full((5000, 3), 0.05, dtype=np.float32)) is None
    assert stain_vectors(mixed(150)) is None
    assert stain_vectors(np.tile(np.float32([0.4, 0.5, 0.3]), (500, 1))) is None


def test_swatches():
    assert stain_colour(np.array([1.0, 0.0, 0.0]), 2.0) == (3, 255, 255)
