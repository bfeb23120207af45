"""Changes of patches while training: each against a plain loop, and the draw by spot alone."""

import dataclasses

import numpy as np
import pytest

from hibio.config.run import AugmentConfig, DataConfig
from hibio.config.schema import build_section
from hibio.data.collate import Augment, Views, collate
from hibio.data.slide import PreparedSlide
from preprocessing.stain import scaled_stains
from tests.hibio.toy import make_slide, run_config

BOTH = Augment(turns=True, stain=0.2, seed=3, step=7)


@pytest.fixture(scope="module")
def slide(toy_stores, toy_artifacts) -> PreparedSlide:
    return make_slide(toy_stores, toy_artifacts, image="patches")


def batch_of(slide: PreparedSlide, core: list[int], augment: Augment | None):
    regions = np.zeros((1, slide.n_spots), dtype=np.int64)
    return collate(
        [(slide, regions, np.array(core))], 1, Views(np.random.default_rng(0), augment=augment)
    )


def stained_slowly(patch: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """One pixel after the other: amounts of the stains by solving, then multiplied."""
    hematoxylin, eosin = np.array([0.56, 0.72, 0.41]), np.array([0.22, 0.80, 0.56])
    basis = [v / np.linalg.norm(v) for v in (hematoxylin, eosin)]
    rest = np.cross(*basis)
    basis.append(rest / np.linalg.norm(rest))
    result = np.empty_like(patch)
    for place in np.ndindex(patch.shape[:2]):
        density = -np.log10(np.maximum(patch[place], 1) / 255.0)
        amounts = np.linalg.solve(np.array(basis).T, density)
        changed = sum(a * f * v for a, f, v in zip(amounts, factor, basis, strict=True))
        result[place] = np.rint(255.0 * 10.0 ** -np.maximum(changed, 0.0))
    return result


def test_stain_against_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (3, 5, 5, 3), dtype=np.uint8)
    factor = np.exp(0.3 * rng.standard_normal((3, 3)))
    found = scaled_stains(patches, factor)
    for patch, one, expected in zip(found, factor, patches, strict=True):
        difference = patch.astype(int) - stained_slowly(expected, one).astype(int)
        assert np.abs(difference).max() <= 1  # float32


def test_stain_by_one_changes_nothing_and_glass_stays_white():
    patches = np.random.default_rng(1).integers(1, 256, (2, 6, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(scaled_stains(patches, np.ones((2, 3))), patches)
    glass = np.full((1, 4, 4, 3), 255, np.uint8)
    np.testing.assert_array_equal(scaled_stains(glass, np.array([[2.0, 0.5, 3.0]])), glass)
    darker = scaled_stains(patches, np.full((2, 3), 1.5))
    assert (darker <= patches).all()  # more of everything lets less light through
    assert (darker < patches).any()


def test_turns_against_a_loop_and_all_eight_are_drawn():
    rng = np.random.default_rng(2)
    patches = rng.integers(0, 256, (64, 4, 4, 3), dtype=np.uint8)
    wide = rng.integers(0, 256, (64, 4, 4, 3), dtype=np.uint8)
    turned, context = dataclasses.replace(BOTH, stain=0.0)("s", np.arange(64), [patches, wide])
    seen = set()
    for place in range(64):
        kinds = []
        for kind in range(8):
            expected = patches[place]
            for _ in range(kind % 4):
                expected = np.transpose(expected, (1, 0, 2))[::-1]  # a quarter turn to the left
            expected = expected[:, ::-1] if kind >= 4 else expected
            if np.array_equal(turned[place], expected):
                kinds.append(kind)
        assert len(kinds) == 1
        seen.add(kinds[0])
        alike = np.rot90(wide[place], kinds[0] % 4)  # the context turns with its patch
        np.testing.assert_array_equal(context[place], alike[:, ::-1] if kinds[0] >= 4 else alike)
    assert seen == set(range(8))


def test_a_spot_draws_by_seed_step_slide_and_itself_alone(slide):
    whole = batch_of(slide, [4, 9, 2, 30], BOTH).patches_SCHW[:4]
    alone = batch_of(slide, [2], BOTH).patches_SCHW[:1]
    assert np.array_equal(whole[2], alone[0])  # whoever shares its batch
    plain = batch_of(slide, [4, 9, 2, 30], None).patches_SCHW[:4]
    for change in ({"seed": 4}, {"step": 8}):
        other = batch_of(slide, [4, 9, 2, 30], dataclasses.replace(BOTH, **change))
        assert not np.array_equal(other.patches_SCHW[:4], whole)
    assert not np.array_equal(whole, plain)
    renamed = dataclasses.replace(slide, slide_id="another")
    assert not np.array_equal(batch_of(renamed, [2], BOTH).patches_SCHW[0], alone[0])


def test_nothing_but_the_patches_is_changed(slide):
    changed, plain = batch_of(slide, [4, 9], BOTH), batch_of(slide, [4, 9], None)
    for field in dataclasses.fields(changed):
        value, other = getattr(changed, field.name), getattr(plain, field.name)
        if field.name != "patches_SCHW" and hasattr(value, "numpy"):
            np.testing.assert_array_equal(value.numpy(), other.numpy(), err_msg=field.name)


def test_stored_features_and_senseless_spreads_are_refused(toy_stores, tmp_path):
    with pytest.raises(ValueError, match=r"augment changes patches, and image is 'handcrafted'"):
        DataConfig(toy_stores, augment=AugmentConfig(turns=True))
    data = DataConfig(toy_stores, image="patches", augment=AugmentConfig(turns=True, stain=0.1))
    assert run_config(toy_stores, tmp_path, data=data).data.augment.active


def test_old_configurations_have_none():
    old = {"stores": "stores", "image": "patches"}
    assert not build_section(DataConfig, old).augment.active
