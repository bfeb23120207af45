"""Patches that a test paints: glass, pen, blur, stain; and the streaming sums against slow ones."""

import numpy as np
import pytest
from scipy import ndimage

from preprocessing import DataError, SlideStore
from preprocessing.qc.patches import focus, measure_patches, patch_quality
from tests.preprocessing.qc_stores import write_slide

PX = 64
PINK, VIOLET = (225, 150, 190), (120, 80, 160)
INK = {"blue": (40, 90, 190), "green": (40, 150, 90), "black": (25, 24, 26)}


def tissue(n: int = 6, seed: int = 0) -> np.ndarray:
    """Patches (n, 64, 64, 3) of violet nuclei on a pink ground."""
    rng = np.random.default_rng(seed)
    nuclei = ndimage.gaussian_filter(rng.random((n, PX, PX)), (0, 2, 2)) > 0.52
    patches = np.where(nuclei[..., None], VIOLET, PINK) + rng.integers(-15, 15, (n, PX, PX, 3))
    return np.clip(patches, 0, 255).astype(np.uint8)


def glass(n: int = 2) -> np.ndarray:
    noise = np.random.default_rng(1).integers(-3, 3, (n, PX, PX, 1))
    return (240 + np.repeat(noise, 3, axis=-1)).astype(np.uint8)


def painted(colour: tuple[int, int, int]) -> np.ndarray:
    """One patch whose left half is ink."""
    patch = tissue(1)
    patch[:, :, : PX // 2] = colour
    return patch


def test_focus_equals_a_slow_laplacian():
    patches = tissue(3)
    for patch, value in zip(patches, focus(patches), strict=True):
        grey = patch.astype(float) @ [0.299, 0.587, 0.114]
        slow = [
            grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
            for y in range(1, PX - 1)
            for x in range(1, PX - 1)
        ]
        assert value == pytest.approx(np.var(slow), rel=1e-4)


def test_focus_in_closed_form():
    stripes = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 100  # grey 100, 0, 100, ...: the Laplacian is -200 or 200
    assert focus(stripes)[0] == pytest.approx(200**2, rel=1e-4)
    assert focus(np.full((1, 8, 8, 3), 77, dtype=np.uint8))[0] == pytest.approx(0, abs=1e-6)


def test_a_blurred_patch_is_less_sharp_and_brightness_does_not_matter():
    sharp = tissue(4)
    blurred = ndimage.gaussian_filter(sharp, (0, 2, 2, 0))
    assert (focus(blurred) < 0.1 * focus(sharp)).all()
    dark = (sharp // 2 + 10).astype(np.uint8)
    np.testing.assert_allclose(focus(dark + 60), focus(dark), rtol=1e-4)
    np.testing.assert_allclose(focus(sharp[:, ::-1]), focus(sharp), rtol=1e-4)


def test_glass_and_tissue():
    measured = measure_patches([tissue(), glass()], 8).spots
    assert (measured["glass"][:6] < 0.05).all()
    assert (measured["glass"][6:] == 1).all()
    assert (measured["pen"] == 0).all()


@pytest.mark.parametrize("ink", INK)
def test_each_ink_is_found(ink):
    measured = measure_patches([painted(INK[ink])], 1).spots
    assert measured["pen"][0] == pytest.approx(0.5)
    assert measured[f"pen_{ink}"][0] == pytest.approx(0.5)
    assert measured["glass"][0] < 0.05


def test_dark_crowded_nuclei_are_no_ink():
    rng = np.random.default_rng(0)
    nuclei = ndimage.gaussian_filter(rng.random((4, PX, PX)), (0, 1, 1)) > 0.45
    patches = np.where(nuclei[..., None], (45, 62, 120), (190, 180, 215)).astype(np.uint8)
    assert (measure_patches([patches], 4).spots["pen"] < 0.1).all()  # QcConfig.pen


def test_sums_over_blocks_equal_all_at_once():
    patches = np.concatenate([tissue(9), glass()])
    whole = measure_patches([patches], 11)
    pieces = measure_patches([patches[:4], patches[4:5], patches[5:]], 11)
    np.testing.assert_allclose(whole.spots, pieces.spots, rtol=1e-5)
    np.testing.assert_allclose(whole.rgb_mean, pieces.rgb_mean)
    pixels = tissue(9)[:, ::2, ::2].reshape(-1, 3).astype(float)
    np.testing.assert_allclose(whole.rgb_mean, pixels.mean(axis=0), rtol=0.01)
    np.testing.assert_allclose(whole.rgb_sd, pixels.std(axis=0), rtol=0.02)
    slow = -np.log10(np.maximum(pixels, 1) / 255).mean()
    assert whole.density == pytest.approx(slow, rel=0.01)
    assert whole.stains is not None


def test_only_glass():
    measured = measure_patches([glass(3)], 3)
    assert np.isnan(measured.rgb_mean).all()
    assert np.isnan(measured.density)
    assert measured.stains is None


def test_a_store(tmp_path):
    patches = np.concatenate([tissue(40), glass(30)])  # more than one block
    with SlideStore(write_slide(tmp_path, "a", patches=patches)) as store:
        measured = patch_quality(store)
    assert len(measured.spots) == 70
    assert (measured.spots["glass"] > 0.9).tolist() == [False] * 40 + [True] * 30
    with (
        SlideStore(write_slide(tmp_path, "b", n_spots=5)) as counts_only,
        pytest.raises(DataError, match="no patches"),
    ):
        patch_quality(counts_only)
