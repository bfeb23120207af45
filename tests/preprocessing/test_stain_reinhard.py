"""Reinhard's colour transfer against a loop over pixels, what it must reach, and invariances."""

import numpy as np
import pytest

from preprocessing import DataError
from preprocessing.stain import Colours, measure_colours, transfer_colours

SOURCE = Colours(np.array([-0.6, -0.10, 0.01]), np.array([0.25, 0.05, 0.010]))
TARGET = Colours(np.array([-0.5, -0.05, 0.02]), np.array([0.20, 0.03, 0.008]))


def tissue(seed: int = 0, px: int = 40, exposure: float = 1.0) -> np.ndarray:
    """Patches (4, px, px, 3) of two stains in random amounts, with some noise."""
    rng = np.random.default_rng(seed)
    amount = rng.uniform(0.2, 0.9, (4, px, px, 2))
    light = 255 * 10 ** (-amount @ np.array([[0.6, 0.7, 0.35], [0.25, 0.8, 0.45]]))
    return np.clip(exposure * (light + rng.normal(0, 2, light.shape)), 0, 255).astype(np.uint8)


def slow(pixel: np.ndarray, source: Colours, target: Colours) -> list[int]:
    """One pixel, equations 4 to 8 of the paper one after the other."""
    red, green, blue = (max(int(value), 1) / 255 for value in pixel)
    long = np.log10(0.3811 * red + 0.5783 * green + 0.0402 * blue)
    medium = np.log10(0.1967 * red + 0.7244 * green + 0.0782 * blue)
    short = np.log10(0.0241 * red + 0.1288 * green + 0.8444 * blue)
    lab = [
        (long + medium + short) / 3**0.5,
        (long + medium - 2 * short) / 6**0.5,
        (long - medium) / 2**0.5,
    ]
    light, yellow, green_red = (
        (value - source.mean_3[i]) * target.sd_3[i] / source.sd_3[i] + target.mean_3[i]
        for i, value in enumerate(lab)
    )
    shared, split = light * 3**0.5 / 3, yellow * 6**0.5 / 6
    cones = [
        10 ** (shared + split + green_red * 2**0.5 / 2),
        10 ** (shared + split - green_red * 2**0.5 / 2),
        10 ** (shared - 2 * split),
    ]
    to_cones = [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]]
    rgb = np.linalg.solve(np.array(to_cones), np.array(cones))
    weight = min(-np.log10(max(int(pixel.min()), 1) / 255) / 0.15, 1)
    parts = zip(rgb, pixel, strict=True)
    return [round(weight * min(max(255 * v, 0), 255) + (1 - weight) * int(p)) for v, p in parts]


def test_equals_one_pixel_at_a_time():
    patches = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3)).astype(np.uint8)
    copy = patches.copy()
    moved = transfer_colours(patches, SOURCE, TARGET)
    expected = [slow(pixel, SOURCE, TARGET) for pixel in patches.reshape(-1, 3)]
    assert np.abs(moved.reshape(-1, 3).astype(int) - expected).max() <= 1  # halves
    assert (moved.reshape(-1, 3) == expected).mean() > 0.98
    np.testing.assert_array_equal(patches, copy)


def test_measured_colours_are_those_of_the_definition():
    patches = tissue()
    found = measure_colours(patches)
    stained = (patches < 255 * 10**-0.15).all(axis=-1)
    log = np.log10(
        (patches[stained] / 255.0)
        @ np.array([[0.3811, 0.1967, 0.0241], [0.5783, 0.7244, 0.1288], [0.0402, 0.0782, 0.8444]])
    )
    light = log.sum(axis=1) / 3**0.5
    assert found.mean_3[0] == pytest.approx(light.mean(), abs=1e-4)
    assert found.sd_3[0] == pytest.approx(light.std(), abs=1e-4)
    assert found.mean_3[2] == pytest.approx(((log[:, 0] - log[:, 1]) / 2**0.5).mean(), abs=1e-4)
    glass = np.full((3, 40, 40, 3), 250, dtype=np.uint8)
    again = measure_colours(np.concatenate([patches, glass]))
    np.testing.assert_array_equal(again.mean_3, found.mean_3)  # glass takes no part


def test_the_slide_has_the_wanted_colours_afterwards():
    wanted = Colours(np.array([-0.9, -0.05, 0.02]), np.array([0.15, 0.03, 0.008]))  # none pale
    patches = tissue()
    moved = measure_colours(transfer_colours(patches, measure_colours(patches), wanted))
    np.testing.assert_allclose(moved.mean_3, wanted.mean_3, atol=0.01)
    np.testing.assert_allclose(moved.sd_3, wanted.sd_3, rtol=0.1)


def test_its_own_colours_change_nothing_and_pixels_stand_alone():
    patches = tissue()
    same = transfer_colours(patches, SOURCE, SOURCE)
    assert np.abs(same.astype(int) - np.maximum(patches, 1)).max() <= 1
    whole = transfer_colours(patches, SOURCE, TARGET)
    np.testing.assert_array_equal(transfer_colours(patches[2, 5:7], SOURCE, TARGET), whole[2, 5:7])


def test_white_stays_white_and_glass_nearly():
    white = np.full((1, 8, 8, 3), 255, dtype=np.uint8)
    np.testing.assert_array_equal(transfer_colours(white, SOURCE, TARGET), white)
    glass = transfer_colours(np.full((1, 8, 8, 3), 245, dtype=np.uint8), SOURCE, TARGET)
    assert np.abs(glass.astype(int) - 245).max() <= 8


def test_a_darker_scan_gives_the_same_picture():
    """Exposure shifts the lightness only, which is moved back."""
    light, dark = tissue(), tissue(exposure=0.7)
    moved = [transfer_colours(one, measure_colours(one), TARGET) for one in (light, dark)]
    apart = np.abs(light.astype(int) - dark.astype(int)).mean()
    assert apart > 20
    assert np.abs(moved[0].astype(int) - moved[1].astype(int)).mean() < 0.15 * apart


def test_what_is_refused():
    with pytest.raises(DataError, match=r"only 0 of 64 sampled pixels are stained"):
        measure_colours(np.full((1, 8, 8, 3), 250, dtype=np.uint8))
    with pytest.raises(DataError, match="of one colour"):
        measure_colours(np.full((1, 20, 20, 3), 90, dtype=np.uint8))
    with pytest.raises(DataError, match=r"expected \(3,\)"):
        Colours(np.zeros(2), np.ones(3))
