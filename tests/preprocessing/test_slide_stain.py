"""The stain of one slide to the reference: constants, both methods, nothing from other slides."""

from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from preprocessing import DataError, SlideStore
from preprocessing.stain import (
    REFERENCE_COLOURS,
    REFERENCE_STAIN,
    measure_colours,
    measure_stain,
    normalise_stain,
    sample_patches,
    stain_normaliser,
    transfer_colours,
)

METHODS = ("macenko", "reinhard")


def slide(seed: int = 0, *, violet: bool = False, n: int = 6) -> np.ndarray:
    """Patches (n, 48, 48, 3) of the same kind of tissue, stained in one of two ways."""
    vectors = np.array([[0.62, 0.70, 0.35], [0.22, 0.85, 0.48]])
    vectors = np.array([[0.75, 0.60, 0.30], [0.40, 0.80, 0.35]]) if violet else vectors
    strength = np.array([1.3, 0.9]) if violet else np.array([0.8, 0.5])
    amount = np.random.default_rng(seed).uniform(0.15, 1.0, (n, 48, 48, 2))
    amount[:, :, :6, 1] = 0
    amount[:, :, 6:12, 0] = 0
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.rint(255 * 10 ** (-(amount * strength) @ vectors)).astype(np.uint8)


def test_the_reference_colours_are_those_of_the_reference_stain():
    share = np.linspace(0.0, 1.0, 201) ** 3
    amount = np.stack(np.meshgrid(share, share), axis=2) * REFERENCE_STAIN.strength_2
    light = np.rint(255 * 10 ** (-amount @ REFERENCE_STAIN.vectors_23)).astype(np.uint8)
    found = measure_colours(light)
    np.testing.assert_allclose(REFERENCE_COLOURS.mean_3, found.mean_3, atol=0.004)
    np.testing.assert_allclose(REFERENCE_COLOURS.sd_3, found.sd_3, rtol=0.03)


def test_none_changes_nothing_and_needs_no_stain():
    glass = np.full((2, 8, 8, 3), 250, dtype=np.uint8)
    np.testing.assert_array_equal(stain_normaliser("none", glass)(glass), glass)


def test_the_methods_are_the_plain_functions_on_what_the_slide_shows():
    patches = slide()
    macenko = normalise_stain(patches, measure_stain(patches), REFERENCE_STAIN)
    reinhard = transfer_colours(patches, measure_colours(patches), REFERENCE_COLOURS)
    np.testing.assert_array_equal(stain_normaliser("macenko", patches)(patches), macenko)
    np.testing.assert_array_equal(stain_normaliser("reinhard", patches)(patches), reinhard)
    assert np.abs(macenko.astype(int) - patches).mean() > 5
    assert np.abs(reinhard.astype(int) - patches).mean() > 5


@pytest.mark.parametrize("method", METHODS)
def test_two_stainings_of_one_tissue_come_together(method):
    first, second = slide(), slide(violet=True)
    moved = [stain_normaliser(method, one)(one).astype(float) for one in (first, second)]
    apart = np.abs(first.astype(float) - second).mean()
    assert np.abs(moved[0] - moved[1]).mean() < 0.35 * apart


@pytest.mark.parametrize("method", METHODS)
def test_a_normaliser_treats_each_patch_alone_and_is_small(method):
    patches = slide()
    normaliser = stain_normaliser(method, patches)
    whole = normaliser(patches)
    assert len(ForkingPickler.dumps(normaliser)) < 2000  # goes to workers, without the sample
    np.testing.assert_array_equal(normaliser(patches[1:3]), whole[1:3])
    assert normaliser(patches[:0]).shape == (0, 48, 48, 3)


def test_large_samples_are_thinned_and_say_the_same():
    many = np.concatenate([slide(seed, n=40) for seed in range(4)])
    few = stain_normaliser("reinhard", slide(9, n=40))(slide())
    assert np.abs(stain_normaliser("reinhard", many)(slide()).astype(int) - few).max() <= 3


@pytest.mark.parametrize("method", [*METHODS, "vahadane"])
def test_what_is_refused(method):
    glass = np.full((2, 32, 32, 3), 250, dtype=np.uint8)
    words = "choose none, macenko or reinhard" if method == "vahadane" else "stained"
    with pytest.raises(DataError, match=words):
        stain_normaliser(method, glass)


def test_the_sample_is_spread_over_the_slide(toy_stores: Path):
    with SlideStore(toy_stores / "sim001.h5") as store:
        sample, patches = sample_patches(store), store.patches()
    assert len(sample) == 64
    np.testing.assert_array_equal(sample[0], patches[0])
    np.testing.assert_array_equal(sample[-1], patches[-1])
