"""Regions of prepared slides: what is fused, the four kinds, how trees follow the training."""

import dataclasses

import numpy as np
import pytest
import torch

from hibio.config.data import RegionsConfig
from hibio.config.schema import SchemaError, build_section
from hibio.data.dataset import PreparedSlides
from hibio.data.slide import PreparedSlide
from hibio.data.splits import read_entries
from hibio.model import SlideEmbedding
from hibio.regions import match_labels, slide_regions
from hibio.training.region_state import RegionState, _small
from preprocessing.store.read import stores_in
from tests.hibio.toy import LEVELS, REGIONS, make_model, make_slide


@pytest.fixture(scope="module")
def slide(toy_stores, toy_artifacts):
    return make_slide(toy_stores, toy_artifacts)


@pytest.fixture(scope="module")
def embedding(toy_artifacts, slide) -> SlideEmbedding:
    return make_model(toy_artifacts).encode_slide(slide)


def regions_of(slide: PreparedSlide, config: RegionsConfig, *embeddings_SD) -> np.ndarray:
    return slide_regions(slide.fused(*embeddings_SD), slide.xy_um, slide.graph, config)


def test_the_first_trees_are_of_the_smoothed_spot_vector(slide):
    fused = slide.fused()
    for spot in (0, 33, 69):
        near = [n for n in slide.neighbour_SN[spot] if n >= 0]
        mean = slide.vector_SV[[spot, *near]].mean(axis=0)
        other = slide.vector_SV[[1, *[n for n in slide.neighbour_SN[1] if n >= 0]]].mean(axis=0)
        scale = np.linalg.norm(mean - other) / np.linalg.norm(fused[spot] - fused[1])
        if spot == 0:
            first = scale
        assert scale == pytest.approx(first, rel=1e-4)  # equal up to one factor for the slide
    assert np.square(fused - fused.mean(axis=0)).sum(axis=1).mean() == pytest.approx(1.0, rel=1e-4)


def test_later_trees_join_three_parts_of_equal_weight(slide, embedding):
    fused = slide.fused(embedding.omics, embedding.image)
    parts = np.split(fused, np.cumsum([8, 16]), axis=1)
    assert [part.shape[1] for part in parts] == [8, 16, 16]
    for part in parts:
        spread = np.square(part - part.mean(axis=0)).sum(axis=1).mean()
        assert spread == pytest.approx(1.0, rel=1e-4)


def test_a_slide_without_counts_has_regions_from_its_image(slide, embedding):
    blank = dataclasses.replace(slide, has_counts=False)
    assert blank.fused(None, embedding.image).shape == (70, 16)
    assert regions_of(blank, REGIONS, None, embedding.image).shape == (3, 70)


@pytest.mark.parametrize("kind", ["tree", "grid", "shuffled", "leiden"])
def test_every_kind_has_a_label_for_every_spot_at_every_level(slide, kind):
    levels = regions_of(slide, RegionsConfig(LEVELS, kind))
    assert levels.shape == (3, 70)
    counts = [len(np.unique(level)) for level in levels]
    assert counts == sorted(counts, reverse=True)  # fine to coarse
    assert counts[0] > counts[2] >= 1


def test_shuffled_regions_keep_the_sizes_and_the_nesting_of_the_tree(slide):
    tree = regions_of(slide, RegionsConfig(LEVELS, "tree"))
    shuffled = regions_of(slide, RegionsConfig(LEVELS, "shuffled"))
    for one, other in zip(tree, shuffled, strict=True):
        assert sorted(np.bincount(one)) == sorted(np.bincount(other))
    assert np.mean(tree[0] == shuffled[0]) < 0.5
    for levels in (tree, shuffled):
        for region in np.unique(levels[0]):
            assert len(np.unique(levels[1][levels[0] == region])) == 1


@pytest.mark.parametrize(
    ("diameters", "kind"), [((), "tree"), ((600.0, 300.0), "tree"), ((300.0,), "louvain")]
)
def test_settings_out_of_range(diameters, kind):
    with pytest.raises(
        SchemaError, match=r"diameters_um (is empty|must rise)|tree, grid, shuffled, leiden"
    ):
        build_section(RegionsConfig, {"diameters_um": list(diameters), "kind": kind})


def test_levels_are_named_by_their_size():
    assert RegionsConfig().levels == ("300um", "600um", "1200um")


# ------------------------------------------------------------------ the state in training
@pytest.fixture
def state(toy_stores, toy_artifacts) -> RegionState:
    entries = read_entries(stores_in(toy_stores))[:2]
    return RegionState(REGIONS, PreparedSlides(entries, toy_artifacts, "handcrafted"))


def test_a_tree_is_built_when_asked_for_and_batches_are_of_the_middle_level(state, monkeypatch):
    built = []

    def counted(self, slide, *embeddings_SD):
        built.append(slide.slide_id)
        return regions_of(slide, self.config, *embeddings_SD)

    monkeypatch.setattr(RegionState, "_regions", counted)
    first = state.current(1)
    np.testing.assert_array_equal(state.sampling(1), first[1])
    assert built == ["sim002"]
    assert first.dtype == np.int64
    state.first_trees = 1
    state.current(0)
    np.testing.assert_array_equal(state.current(1), first)  # built again, the same
    assert built == ["sim002", "sim001", "sim002"]
    assert state.state() == {}  # nothing that cannot be built again


def test_only_the_first_slides_keep_all_their_rebuilds(state, toy_artifacts):
    model = make_model(toy_artifacts)
    state.history_slides = 1
    for _ in range(2):
        state.rebuild(model, [0, 1])
    saved = state.state()
    assert [len(saved[name]) for name in ("sim001", "sim002")] == [3, 1]
    for slide, name in enumerate(("sim001", "sim002")):
        assert saved[name].dtype == torch.int16
        np.testing.assert_array_equal(state.current(slide), saved[name][-1].numpy())


def test_many_regions_need_wider_numbers():
    assert _small(np.array([[0, 40_000]])).tolist() == [[0, 40_000]]


def test_a_rebuild_is_the_tree_of_the_embeddings_with_names_kept(state, toy_artifacts, slide):
    model = make_model(toy_artifacts)
    before = state.current(0)
    state.rebuild(model, [0])
    after = state.current(0)
    embedding = model.encode_slide(slide)
    fresh = regions_of(slide, REGIONS, embedding.omics, embedding.image)
    for level, now, new in zip(before, after, fresh, strict=True):
        np.testing.assert_array_equal(now, match_labels(level, new))
    assert np.mean(before == after) > np.mean(before == fresh)
    assert len(state.rebuilt[0]) == 2


def test_state_round_trip(state, toy_artifacts):
    model = make_model(toy_artifacts)
    state.current(1)
    state.rebuild(model, [0])
    saved = state.state()
    assert set(saved) == {"sim001"}
    assert saved["sim001"].shape == (2, 3, 70)
    other = RegionState(REGIONS, state.dataset)
    other.load_state(saved)
    for name, value in other.state().items():
        assert torch.equal(value, saved[name])
    for slide in (0, 1):
        np.testing.assert_array_equal(other.current(slide), state.current(slide))
