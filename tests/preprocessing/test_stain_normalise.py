"""Macenko normalisation against pictures that the test mixes from known stains."""

import numpy as np
import pytest

from preprocessing import DataError
from preprocessing.stain import Stain, measure_stain, normalise_stain


def unit(*rows: tuple[float, float, float]) -> np.ndarray:
    values = np.array(rows)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


SOURCE = Stain(unit((0.65, 0.70, 0.29), (0.35, 0.85, 0.40)), np.array([1.0, 0.8]))
TARGET = Stain(unit((0.70, 0.60, 0.35), (0.25, 0.90, 0.30)), np.array([0.8, 0.9]))


def amounts(n: int = 4000, seed: int = 0) -> np.ndarray:
    """Amounts (n, 2) of both stains; some pixels hold one only."""
    values = np.random.default_rng(seed).uniform(0.25, 0.9, (n, 2))
    values[: n // 8, 1] = 0
    values[n // 8 : n // 4, 0] = 0
    return values


def painted(amount: np.ndarray, stain: Stain) -> np.ndarray:
    light = 255 * 10 ** (-amount @ stain.vectors_23)
    return np.rint(light).astype(np.uint8).reshape(-1, 20, 20, 3)


def test_the_closed_form():
    amount = amounts()
    before = painted(amount, SOURCE)
    wanted = painted(amount * TARGET.strength_2 / SOURCE.strength_2, TARGET)
    copy = before.copy()
    after = normalise_stain(before, SOURCE, TARGET)
    assert after.shape == before.shape
    assert np.abs(after.astype(int) - wanted.astype(int)).max() <= 3  # rounding to 0..255 twice
    np.testing.assert_array_equal(before, copy)


def test_the_same_stain_and_white_stay():
    before = painted(amounts(), SOURCE)
    again = normalise_stain(before, SOURCE, SOURCE)
    assert np.abs(again.astype(int) - before.astype(int)).max() <= 2
    white = np.full((1, 8, 8, 3), 255, dtype=np.uint8)
    np.testing.assert_array_equal(normalise_stain(white, SOURCE, TARGET), white)


def test_a_patch_does_not_depend_on_its_neighbours():
    before = painted(amounts(), SOURCE)
    whole = normalise_stain(before, SOURCE, TARGET)
    np.testing.assert_array_equal(normalise_stain(before[3], SOURCE, TARGET), whole[3])


def test_what_was_measured_brings_two_slides_together():
    first, second = painted(amounts(20_000), SOURCE), painted(amounts(20_000, 1), TARGET)
    found = measure_stain(first)
    np.testing.assert_allclose(found.vectors_23, SOURCE.vectors_23, atol=0.03)
    assert found.strength_2 == pytest.approx([0.89, 0.89], abs=0.04)
    moved = normalise_stain(first, found, measure_stain(second))
    apart = np.abs(first.mean(axis=(0, 1, 2)) - second.mean(axis=(0, 1, 2))).max()
    together = np.abs(moved.mean(axis=(0, 1, 2)) - second.mean(axis=(0, 1, 2))).max()
    assert together < 2 < apart


def test_what_is_refused():
    with pytest.raises(DataError, match="too few stained pixels"):
        measure_stain(np.full((2, 32, 32, 3), 250, dtype=np.uint8))
    with pytest.raises(DataError, match="nearly the same"):
        Stain(unit((0.6, 0.7, 0.3), (0.6, 0.7, 0.3)), np.ones(2))
    with pytest.raises(DataError, match="expected above 0"):
        Stain(SOURCE.vectors_23, np.array([1.0, 0.0]))
    with pytest.raises(DataError, match=r"expected \(2, 3\)"):
        Stain(SOURCE.vectors_23.T, np.ones(2))
