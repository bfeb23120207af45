"""The omics branch: pair weights against loops, padding, invariances, switches, the baseline."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hibio.config.data import GenesConfig
from hibio.config.files import ConfigError
from hibio.config.model import OmicsConfig
from hibio.data.collate import collate, with_halo
from hibio.data.counts import ArrayCounts
from hibio.data.slide import PreparedSlide, expression_slide
from hibio.encoders import genes as gene_pairs
from hibio.encoders import omics
from hibio.encoders.base import OmicsContext, neighbour_mean
from hibio.encoders.genes import OmicsMask, relative_values
from hibio.encoders.heist import HeistEncoder
from hibio.encoders.omics import MlpOmicsEncoder, build_omics_encoder
from preprocessing.store import SlideStore
from tests.hibio.toy import (
    OMICS,
    make_model,
    make_slide,
    permuted,
    regions_of,
    whole_batch,
)


@pytest.fixture(scope="module")
def slide(toy_stores, toy_artifacts) -> PreparedSlide:
    return make_slide(toy_stores, toy_artifacts)


@pytest.fixture(scope="module")
def batch(slide):
    """A whole slide, with fewer genes in some spots so that there is padding."""
    batch = whole_batch(slide)
    n_genes = 400
    for spot in range(0, batch.n_spots, 3):
        batch.gene_SK[spot, 16 - spot % 13 :] = n_genes
        batch.value_SK[spot, 16 - spot % 13 :] = 0.0
    return batch


@pytest.fixture(scope="module")
def model(toy_artifacts):
    return make_model(toy_artifacts)


def encoder(artifacts, **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(OMICS, **changes)
    return build_omics_encoder(config, OmicsContext.of(artifacts)).eval()


def test_pair_weights_against_a_triple_loop(toy_artifacts, monkeypatch):
    """Two graphs, spots of both; positions looked up one spot at a time."""
    monkeypatch.setattr(gene_pairs, "POSITION_NUMBERS", 1)
    context = OmicsContext.of(toy_artifacts)
    edge, weight = context.edge_TGE[0], context.weight_TGE[0]
    context = dataclasses.replace(
        context,
        edge_TGE=np.stack([edge, np.roll(edge, 7, axis=0)]),
        weight_TGE=np.stack([weight, np.roll(weight, 7, axis=0) * 2]),
    )
    tower = build_omics_encoder(OMICS, context)
    rng = np.random.default_rng(0)
    connected = np.flatnonzero((weight > 0).any(axis=1))
    gene = np.stack([rng.choice(connected, 16, replace=False) for _ in range(6)])
    gene[0, :4] = [connected[0], *edge[connected[0]][:3]]  # edges for certain
    gene[1, 10:] = 400
    gene[2, :] = 400
    group = np.array([0, 0, 0, 1, 1, 1])
    gene[3] = gene[0]
    gene[3, :4] = [connected[0] + 7, *edge[connected[0]][:3]]
    expected = np.zeros((6, 16, 16))
    for s in range(6):
        for i, one in enumerate(gene[s]):
            for j, other in enumerate(gene[s]):
                if one < 400 and other < 400:
                    place = context.edge_TGE[group[s], one] == other
                    expected[s, i, j] = context.weight_TGE[group[s], one][place].sum()
    assert (expected[0] > 0).sum() >= 3
    assert (expected[3] > 0).sum() >= 3
    got = tower.pair_weights(torch.from_numpy(gene), torch.from_numpy(group))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


def halo_batch(slide, n_core: int, hops: int):
    return collate([(slide, regions_of(slide), np.arange(n_core))], hops)


@pytest.mark.parametrize("switch", [{}, {"gene_graph": False}, {"spatial_graph": False}])
def test_inference_in_parts_is_training_in_one(toy_artifacts, batch, monkeypatch, switch):
    """Also of the masked view; parts of three spots."""
    tower = encoder(toy_artifacts, **switch)
    monkeypatch.setitem(omics.PART_NUMBERS, "cpu", 3 * 16 * (omics.PART_TENSORS * 16 + 2 * 16))
    mask = OmicsMask(torch.rand(batch.gene_SK.shape) < 0.3, torch.rand(batch.n_spots) < 0.2)
    for hidden in (None, mask):
        expected = tower.encode(batch, hidden)
        assert expected[0].requires_grad
        with torch.inference_mode():
            got = tower.encode(batch, hidden)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other.detach(), atol=1e-5, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(tower(batch), tower(batch.to("cpu")))
        torch.testing.assert_close(tower(batch), tower.encode(batch)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("switch", [{}, {"spatial_graph": False}, {"layers": 1}])
def test_core_spots_of_a_tile_are_those_of_the_whole_slide(toy_artifacts, slide, switch):
    tower = encoder(toy_artifacts, **switch)
    for parameter in (p for n, p in tower.named_parameters() if "gate" in n):
        torch.nn.init.normal_(parameter)
    tile = halo_batch(slide, 12, tower.hops)
    assert tile.n_spots < slide.n_spots
    whole = tower(whole_batch(slide)).detach()[:12]
    shuffled = permuted(tile, np.random.default_rng(0).permutation(tile.n_spots))
    with torch.inference_mode():
        torch.testing.assert_close(tower(tile)[:12], whole, atol=1e-5, rtol=0)
        core = shuffled.core_S  # not core first: every spot is computed
        order = shuffled.xy_um_S2[core].sum(dim=1).argsort()
        expected = whole[tile.xy_um_S2[:12].sum(dim=1).argsort()]
        torch.testing.assert_close(tower(shuffled)[core][order], expected, atol=1e-5, rtol=0)


def test_halo_spots_are_updated_only_as_deep_as_the_core_needs(toy_artifacts, slide):
    tower = encoder(toy_artifacts)  # two layers
    tile = halo_batch(slide, 12, tower.hops)
    ring = len(with_halo(slide.neighbour_SN, np.arange(12), 1))
    assert tower._needed(tile) == [ring, ring, 12]
    assert tower._needed(whole_batch(slide)) == [slide.n_spots] * 3
    assert encoder(toy_artifacts, spatial_graph=False)._needed(tile) == [12, 12, 12]


def test_message_passing_with_the_same_weights_gives_the_same(monkeypatch):
    """The version that benchmarks/omics.py compares speed with."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = importlib.import_module("omics")
    cells = importlib.import_module("synthetic")
    torch.manual_seed(0)
    tower = build_omics_encoder(OMICS, cells.draw_context(24)).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    few = cells.whole_batch(cells.draw_section(40, 24, padding=True))
    with torch.inference_mode():
        got = tower(few)
        for at_a_time in (1, 16):
            expected = benchmark.MessagePassing(tower, at_a_time)(few)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_the_variant_names_the_encoder(toy_artifacts):
    tower = encoder(toy_artifacts, variant="heist", identity="none", skip=False)
    assert isinstance(tower, HeistEncoder)
    assert tower.hops == -1


@torch.no_grad()
def test_values_of_padding_change_nothing(model, batch):
    padding = batch.gene_SK == model.artifacts.n_genes
    assert padding.any()
    other = dataclasses.replace(batch, value_SK=batch.value_SK + 7.0 * padding)
    assert torch.equal(model.omics(batch), model.omics(other))


@torch.no_grad()
def test_more_padding_changes_nothing(toy_artifacts, batch):
    artifacts = dataclasses.replace(
        toy_artifacts,
        settings=dataclasses.replace(toy_artifacts.settings, genes=GenesConfig(keyword_genes=24)),
    )
    tower = encoder(artifacts)
    wide = dataclasses.replace(
        batch,
        gene_SK=torch.nn.functional.pad(batch.gene_SK, (0, 8), value=400),
        value_SK=torch.nn.functional.pad(batch.value_SK, (0, 8)),
    )
    torch.testing.assert_close(tower(wide), tower(batch), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_spot_without_any_gene_is_finite(model, batch):
    empty = dataclasses.replace(
        batch, gene_SK=torch.full_like(batch.gene_SK, 400), value_SK=batch.value_SK * 0
    )
    assert torch.isfinite(model.omics(empty)).all()


@torch.no_grad()
def test_moving_and_turning_the_slide_changes_nothing(toy_artifacts, toy_stores):
    """Places are jittered first: which of two neighbours at one distance is taken is arbitrary."""
    with SlideStore(toy_stores / "sim001.h5") as store:
        names = store.gene_names.tolist()
        counts = store.counts()[:, [names.index(g) for g in toy_artifacts.genes]]
        xy = store.xy_um + np.random.default_rng(0).normal(scale=5.0, size=store.xy_um.shape)
    angle = 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    model = make_model(toy_artifacts)
    near = {"slide_id": "x", "matched": 400, "measured": 400}
    plain, moved, scaled = (
        model.encode_slide(
            expression_slide(ArrayCounts(counts), place, toy_artifacts, **near)
        ).omics
        for place in (xy, xy @ turn.T + [5e4, -3e3], xy * 3)
    )
    np.testing.assert_allclose(moved, plain, atol=1e-4)
    assert np.abs(scaled - plain).max() > 1e-2  # distances in micrometres do matter


@torch.no_grad()
def test_absolute_position_is_never_read(model, batch):
    other = dataclasses.replace(batch, xy_um_S2=torch.randn_like(batch.xy_um_S2))
    assert torch.equal(model.omics(batch), model.omics(other))


@torch.no_grad()
def test_depth_of_a_spot_cancels_in_the_values(model, batch):
    other = dataclasses.replace(batch, value_SK=batch.value_SK * 3.0)
    torch.testing.assert_close(model.omics(other), model.omics(batch), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "none"},
        {"identity": "table"},
        {"skip": False},
        {"gene_graph": False},
        {"spatial_graph": False},
        {"cross": False},
    ],
)
@torch.no_grad()
def test_every_switch_runs_and_changes_the_result(toy_artifacts, batch, change):
    plain, other = encoder(toy_artifacts), encoder(toy_artifacts, **change)
    shared = {k: v for k, v in plain.state_dict().items() if k in other.state_dict()}
    shared = {k: v for k, v in shared.items() if v.shape == other.state_dict()[k].shape}
    other.load_state_dict(shared, strict=False)
    got = other(batch)
    assert got.shape == (batch.n_spots, 16)
    assert not torch.allclose(got, plain(batch), atol=1e-3)
    assert torch.isfinite(got).all()


@torch.no_grad()
def test_without_genes_and_neighbours_only_the_vector_speaks(toy_artifacts, batch):
    tower = encoder(toy_artifacts, cross=False, spatial_graph=False)
    other = dataclasses.replace(
        batch, value_SK=batch.value_SK.flip(1), gene_SK=batch.gene_SK.flip(1)
    )
    assert torch.equal(tower(batch), tower(other))
    moved = dataclasses.replace(batch, vector_SV=batch.vector_SV + 1.0)
    assert not torch.allclose(tower(batch), tower(moved))


@torch.no_grad()
def test_mlp_baseline_reads_vector_and_neighbour_mean(toy_artifacts, batch):
    tower = encoder(toy_artifacts, name="mlp")
    assert isinstance(tower, MlpOmicsEncoder)
    around = neighbour_mean(batch.vector_SV, batch.neighbour_SN)
    expected = tower.layers(torch.cat([batch.vector_SV, around], dim=1))
    assert torch.equal(tower(batch), expected)


def test_unknown_encoder_lists_the_choices(toy_artifacts):
    with pytest.raises(ConfigError, match=r"did you mean 'graph_hierarchy'\? .*mlp"):
        encoder(toy_artifacts, name="graph_hierachy")
    with pytest.raises(ConfigError, match="cannot be imported"):
        encoder(toy_artifacts, name="no_such_lab.module:Tower")


def test_width_must_divide_into_heads():
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 4"):
        OmicsConfig(width=10, heads=4)


def test_relative_values_closed_form():
    value = torch.tensor([[4.0, 2.0, 9.0], [0.0, 0.0, 0.0]])
    shown = torch.tensor([[True, True, False], [False, False, False]])
    expected = torch.tensor([[4 / 3, 2 / 3, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(relative_values(value, shown), expected)
