"""The omics branch: pair weights against loops, padding, invariances, switches, the baseline."""

import dataclasses

import numpy as np
import pytest
import torch

from hibio.config import ConfigError
from hibio.data.slide import PreparedSlide, expression_slide
from hibio.encoders.base import OmicsContext
from hibio.encoders.mlp import MlpOmicsEncoder, neighbour_mean
from hibio.encoders.omics import OmicsConfig, build_omics_encoder, relative_values
from preprocessing.store import SlideStore
from tests.hibio.toy import OMICS, make_model, make_slide, whole_batch


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


def test_pair_weights_against_a_triple_loop(toy_artifacts):
    tower = encoder(toy_artifacts)
    graph = toy_artifacts.gene_graph
    rng = np.random.default_rng(0)
    connected = np.flatnonzero((graph.weight > 0).any(axis=1))
    gene = np.stack([rng.choice(connected, 16, replace=False) for _ in range(6)])
    first = int(connected[0])
    gene[0, :4] = [first, *graph.neighbour[first][:3]]  # edges for certain
    gene[1, 10:] = 400
    gene[2, :] = 400
    expected = np.zeros((6, 16, 16))
    for s in range(6):
        for i, one in enumerate(gene[s]):
            for j, other in enumerate(gene[s]):
                if one < 400 and other < 400:
                    place = np.flatnonzero(graph.neighbour[one] == other)
                    expected[s, i, j] = graph.weight[one][place].sum()
    assert (expected[0] > 0).sum() >= 3
    got = tower.pair_weights(torch.from_numpy(gene.astype(np.int64)))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


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
        settings={**toy_artifacts.settings, "genes": {"keyword_genes": 24}},
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
        model.encode_slide(expression_slide(counts, place, toy_artifacts, **near)).omics
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
