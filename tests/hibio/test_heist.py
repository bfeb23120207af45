"""The reference mode: every part against loops written from the report, closed forms, rules."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from hibio.batch import SlideBatch
from hibio.config.files import ConfigError
from hibio.config.model import OmicsConfig
from hibio.encoders import heist as heist_layers
from hibio.encoders.base import OmicsContext
from hibio.encoders.genes import GeneGraphs, OmicsMask
from hibio.encoders.heist import (
    CrossGate,
    GeneGraphConvolution,
    HeistEncoder,
    HeistLayer,
    NeighbourSum,
    NormedPerceptron,
    SlideAttention,
    gene_edges,
    place_encoding,
    rank_encoding,
    standardised_places,
)
from tests.hibio.heist_loops import (
    array,
    slow_edges,
    slow_encode,
    slow_gate,
    slow_gene_convolution,
    slow_neighbour_sum,
    slow_perceptron,
    slow_slide_attention,
)
from tests.hibio.toy import OMICS, make_model, make_slide, permuted, whole_batch

PUBLISHED = {"identity": "none", "skip": False, "dropout": 0.0}
CONFIG = OmicsConfig(width=8, layers=3, heads=2, variant="heist", **PUBLISHED)
G, K, S = 12, 7, 9
EXACT = {"atol": 2e-5, "rtol": 2e-5}


def context(seed: int = 0) -> OmicsContext:
    """Two gene graphs with four partners a gene, a quarter of them padding."""
    rng = np.random.default_rng(seed)
    edge = np.stack([[rng.permutation(G)[:4] for _ in range(G)] for _ in range(2)])
    weight = rng.uniform(0.1, 1.0, edge.shape).astype(np.float32)
    gone = rng.random(edge.shape) < 0.25
    edge[gone], weight[gone] = G, 0.0
    return OmicsContext(G, K, np.zeros((G, 3), np.float32), edge.astype(np.int64), weight)


def make_batch(seed: int = 0) -> SlideBatch:
    """Nine spots on two slides, some with few genes, one with none, one without neighbours."""
    rng = np.random.default_rng(seed)
    gene = np.stack([rng.permutation(G)[:K] for _ in range(S)])
    value = -np.sort(-rng.uniform(0.1, 1.0, (S, K)), axis=1).astype(np.float32)
    for spot, n in ((1, 4), (4, 1), (6, 0)):
        gene[spot, n:], value[spot, n:] = G, 0.0
    slide = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    neighbour = np.array(
        [rng.choice(np.flatnonzero((slide == slide[i]) & (np.arange(S) != i)), 3) for i in range(S)]
    )
    neighbour[::2, 2] = -1
    neighbour[3] = -1
    return SlideBatch(
        gene_SK=torch.from_numpy(gene),
        value_SK=torch.from_numpy(value),
        vector_SV=torch.zeros(S, 3),
        vector_scale_SV=torch.ones(S, 3),
        neighbour_SN=torch.from_numpy(neighbour),
        distance_um_SN=torch.ones(S, 3),
        xy_um_S2=torch.from_numpy(rng.uniform(0, 900, (S, 2)).astype(np.float32)),
        slide_of_spot_S=torch.from_numpy(slide),
        spot_group_S=torch.from_numpy(rng.integers(0, 2, S)),
        core_S=torch.ones(S, dtype=torch.bool),
        region_of_spot_LS=torch.zeros(1, S, dtype=torch.long),
        slide_ids=("a", "b"),
    )


def make_encoder(seed: int = 0, **changes) -> HeistEncoder:
    """An encoder whose every parameter is away from its starting value."""
    torch.manual_seed(seed)
    encoder = HeistEncoder(dataclasses.replace(CONFIG, **changes), context()).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


# ------------------------------------------------------------------ parts
@torch.no_grad()
def test_parts_of_the_spot_level_against_loops():
    torch.manual_seed(1)
    batch, spots = make_batch(), torch.randn(S, 8)
    rows = list(array(spots))
    part = NeighbourSum(8)
    part.eps.fill_(0.3)
    neighbours = [[j for j in row if j >= 0] for row in batch.neighbour_SN.tolist()]
    expected = slow_neighbour_sum(part, rows, neighbours)
    np.testing.assert_allclose(array(part(spots, batch.neighbour_SN)), expected, **EXACT)
    attention = SlideAttention(8, 2)
    slide = batch.slide_of_spot_S
    same = slide[:, None] == slide[None, :]
    expected = slow_slide_attention(attention, rows, slide.tolist())
    np.testing.assert_allclose(array(attention(spots, same)), expected, **EXACT)
    expected = slow_slide_attention(attention, rows, [0] * S)
    np.testing.assert_allclose(array(attention(spots, None)), expected, **EXACT)


@torch.no_grad()
def test_parts_of_the_gene_level_against_loops():
    torch.manual_seed(2)
    genes = torch.randn(2, 5, 8)
    edges = [[[1, 2], [0], [0, 4], [], [2]], [[], [], [], [], []]]
    mask = torch.zeros(2, 5, 5, dtype=torch.bool)
    for i, partners in enumerate(edges[0]):
        mask[0, i, partners] = True
    part = GeneGraphConvolution(8, 2)
    expected = [slow_gene_convolution(part, list(array(genes[s])), edges[s]) for s in range(2)]
    np.testing.assert_allclose(array(part(genes, mask)), expected, **EXACT)
    perceptron = NormedPerceptron(8, 0.0)
    expected = [[slow_perceptron(perceptron, x) for x in array(row)] for row in genes]
    np.testing.assert_allclose(array(perceptron(genes)), expected, **EXACT)


@torch.no_grad()
def test_the_cross_gate_only_scales_its_target():
    torch.manual_seed(3)
    gate, target, source = CrossGate(8), torch.randn(4, 5, 8), torch.randn(4, 8)
    expected = [
        [slow_gate(gate, x, s) for x in array(row)]
        for row, s in zip(target, array(source), strict=True)
    ]
    found = gate(target, source)
    np.testing.assert_allclose(array(found), expected, **EXACT)
    torch.testing.assert_close(gate(target, -3 * source), -3 * found)  # no softmax, no norm
    for layer in (gate.query, gate.key, gate.value):
        layer.weight.copy_(torch.eye(8))
    ones = torch.ones(1, 1, 8)
    torch.testing.assert_close(gate(ones, ones[0]), ones * math.sqrt(8))  # 8 / sqrt(8)


def test_edges_are_those_of_the_group_in_both_directions():
    told, batch = context(), make_batch()
    graphs = GeneGraphs(told)
    found = gene_edges(graphs, batch.gene_SK, batch.spot_group_S)
    expected = torch.zeros(S, K, K, dtype=torch.bool)
    for s in range(S):
        names = [g for g in batch.gene_SK[s].tolist() if g < G]
        for i, partners in enumerate(slow_edges(told, names, int(batch.spot_group_S[s]))):
            expected[s, i, partners] = True
    assert torch.equal(found, expected)
    assert 0.1 < found.float().mean() < 0.7
    other = gene_edges(graphs, batch.gene_SK, 1 - batch.spot_group_S)
    assert not torch.equal(other, found)


# ------------------------------------------------------------------ the whole encoder
MASK = OmicsMask(
    torch.rand(S, K, generator=torch.Generator().manual_seed(3)) < 0.3, torch.arange(S) % 4 == 1
)


@pytest.mark.parametrize(("mask", "code"), [(None, "released"), (MASK, "fixed"), (None, "fixed")])
@torch.no_grad()
def test_the_encoder_against_loops(mask, code):
    encoder, batch = make_encoder(rank_code=code).double(), make_batch()
    batch = dataclasses.replace(  # the released code has angles of ten thousands
        batch, value_SK=batch.value_SK.double(), xy_um_S2=batch.xy_um_S2.double()
    )
    expected, spots, genes = slow_encode(encoder, batch, context(), mask)
    spot, gene = encoder.encode(batch, mask)
    assert spot.shape == (S, 16)
    assert gene.shape == (S, K, 16)
    np.testing.assert_allclose(array(spot), expected, atol=2e-4)
    for i, row in enumerate(genes):
        for k, token in enumerate(row):  # padding stands last
            joined = np.concatenate([token, spots[i]])
            np.testing.assert_allclose(array(gene[i, k]), joined, atol=2e-4)


@torch.no_grad()
def test_order_of_spots_and_of_a_slide_in_the_batch_does_not_matter():
    encoder, batch = make_encoder(), make_batch()
    order = np.random.default_rng(2).permutation(S)
    found = encoder(permuted(batch, order))
    torch.testing.assert_close(found, encoder(batch)[order], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_slides_of_a_batch_do_not_mix():
    encoder, batch = make_encoder(), make_batch()
    first, second = batch.slide_of_spot_S == 0, batch.slide_of_spot_S == 1
    plain = encoder(batch)
    other = dataclasses.replace(
        batch,
        value_SK=torch.where(second[:, None], batch.value_SK**2, batch.value_SK),
        xy_um_S2=torch.where(second[:, None], batch.xy_um_S2.flip(1) * 9, batch.xy_um_S2),
    )
    changed = encoder(other)
    torch.testing.assert_close(changed[first], plain[first], atol=1e-4, rtol=1e-4)
    assert (changed[second] - plain[second]).abs().max() > 1e-2
    alone = one_slide(batch, 0)
    torch.testing.assert_close(encoder(alone), plain[first], atol=1e-4, rtol=1e-4)


def one_slide(batch: SlideBatch, slide: int) -> SlideBatch:
    """The share of one slide (its spots stand together)."""
    rows = torch.nonzero(batch.slide_of_spot_S == slide)[:, 0]
    part = {
        field.name: value[rows]
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
        and field.name != "region_of_spot_LS"
    }
    first = int(rows[0]) if len(rows) else 0
    neighbour = part["neighbour_SN"]
    part["neighbour_SN"] = torch.where(neighbour >= 0, neighbour - first, -1)
    region = batch.region_of_spot_LS[:, rows]
    return dataclasses.replace(batch, **part, region_of_spot_LS=region)


@torch.no_grad()
def test_attention_reaches_the_whole_slide_and_places_lose_their_micrometres():
    """Both published: dense attention, and standardising per axis."""
    encoder, batch = make_encoder(), make_batch()
    batch = dataclasses.replace(batch, neighbour_SN=torch.full_like(batch.neighbour_SN, -1))
    plain = encoder(batch)
    value = batch.value_SK.clone()
    value[0, 0] *= 4
    changed = (encoder(dataclasses.replace(batch, value_SK=value)) - plain).abs().amax(dim=1)
    assert (changed[batch.slide_of_spot_S == 0] > 1e-5).all()
    moved = batch.xy_um_S2 * torch.tensor([10.0, 0.5]) + torch.tensor([300.0, -70.0])
    stretched = encoder(dataclasses.replace(batch, xy_um_S2=moved))
    torch.testing.assert_close(stretched, plain, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_padding_takes_no_part():
    encoder, batch = make_encoder(), make_batch()
    padding = batch.gene_SK == G
    other = dataclasses.replace(batch, value_SK=batch.value_SK + 7.0 * padding)
    plain, _ = encoder.encode(batch)
    assert torch.equal(encoder(other), plain)
    wide = dataclasses.replace(
        batch,
        gene_SK=torch.nn.functional.pad(batch.gene_SK, (2, 5), value=G),
        value_SK=torch.nn.functional.pad(batch.value_SK, (2, 5)),
    )
    torch.testing.assert_close(encoder(wide), plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_gene_graph_is_that_of_the_group():
    encoder, batch = make_encoder(), make_batch()
    plain = encoder(batch)
    swapped = encoder(dataclasses.replace(batch, spot_group_S=1 - batch.spot_group_S))
    assert (swapped - plain).abs().max() > 1e-2
    graphs = encoder.gene_graphs
    graphs.edge_TGE.copy_(graphs.edge_TGE.flip(0))
    graphs.weight_TGE.copy_(graphs.weight_TGE.flip(0))
    again = encoder(dataclasses.replace(batch, spot_group_S=1 - batch.spot_group_S))
    assert torch.equal(again, plain)
    graphs.weight_TGE.mul_(5.0)  # the mask is hard: what an edge weighs is not read
    assert torch.equal(
        encoder(dataclasses.replace(batch, spot_group_S=1 - batch.spot_group_S)), plain
    )


@torch.no_grad()
def test_a_masked_gene_or_spot_does_not_leak():
    encoder, batch = make_encoder(), make_batch()
    present = batch.gene_SK < G
    mask = OmicsMask((MASK.gene_SK | MASK.spot_S[:, None]) & present, MASK.spot_S)
    hidden = dataclasses.replace(
        batch, value_SK=torch.where(mask.gene_SK, torch.rand(S, K), batch.value_SK)
    )
    for found, expected in zip(
        encoder.encode(hidden, mask), encoder.encode(batch, mask), strict=True
    ):
        assert torch.equal(found, expected)
    assert not torch.allclose(encoder.encode(batch)[0], encoder.encode(batch, mask)[0])


def test_gradients_reach_every_parameter():
    encoder = make_encoder().train()
    spot, gene = encoder.encode(make_batch(), MASK)
    (spot.square().sum() + (gene**3).sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # softmax does not see what all keys share
        keys_only = "query_key_value" in name and name.endswith("bias")
        assert keys_only or parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_pieces_of_a_slide_give_the_same(monkeypatch):
    encoder, batch = make_encoder(), make_batch()
    plain = encoder.encode(batch)
    monkeypatch.setattr(heist_layers, "CPU_TOKENS", 2 * K)
    for found, expected in zip(encoder.encode(batch), plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nothing_to_read_is_finite():
    encoder, batch = make_encoder(), make_batch()
    empty = dataclasses.replace(
        batch,
        gene_SK=torch.full_like(batch.gene_SK, G),
        value_SK=batch.value_SK * 0,
        neighbour_SN=torch.full_like(batch.neighbour_SN, -1),
        xy_um_S2=torch.zeros(S, 2),
        slide_of_spot_S=torch.arange(S),
    )
    assert all(torch.isfinite(x).all() for x in encoder.encode(empty))
    none = one_slide(batch, 7)
    assert [tuple(x.shape) for x in encoder.encode(none)] == [(0, 16), (0, K, 16)]


@torch.no_grad()
def test_inside_the_model_slides_are_embedded_in_one_piece(toy_stores, toy_artifacts):
    omics = dataclasses.replace(OMICS, variant="heist", **PUBLISHED)
    model = make_model(toy_artifacts, omics=omics)
    slide = make_slide(toy_stores, toy_artifacts)
    assert isinstance(model.omics, HeistEncoder)
    assert model.halo == -1
    whole = model.encode_slide(slide)
    assert whole.tower.shape == (slide.n_spots, 2 * OMICS.width)
    np.testing.assert_array_equal(model.encode_slide(slide, tile_spots=20).omics, whole.omics)
    batch = whole_batch(slide)
    present = batch.gene_SK < model.artifacts.n_genes
    view = model.masked_view(
        batch, OmicsMask(present & (batch.gene_SK % 3 == 0), batch.core_S & False)
    )
    assert view.value_SK.shape == batch.gene_SK.shape


# ------------------------------------------------------------------ closed forms
def test_encodings_closed_form():
    rank, three = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([3])
    s, c = math.sin, math.cos
    expected = [[0, 1, 0, 1], [s(1), c(1), s(0.01), c(0.01)], [s(2), c(2), s(0.02), c(0.02)]]
    found = rank_encoding(rank, three, 4, "fixed")[0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    # ranks at 0, 1/2 and 1; rates 0 and 10000 * 2 * 2 / 2
    expected = [[0, 1, 0, 1], [0, 1, s(1e4), c(1e4)], [0, 1, s(2e4), c(2e4)]]
    found = rank_encoding(rank, three, 4, "released")[0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    alone = rank_encoding(rank[:, :1], torch.tensor([1]), 4, "released")[0]
    torch.testing.assert_close(alone, torch.tensor([[0.0, 1, 0, 1]]))
    places = place_encoding(torch.tensor([[1.5, -2.0]]), 8)
    x = [s(1.5), c(1.5), s(1.5e-4), c(1.5e-4)]
    y = [s(-2.0), c(-2.0), s(-2e-4), c(-2e-4)]
    torch.testing.assert_close(places, torch.tensor([x + y]))


def test_the_published_encoding_of_places_uses_16_of_128_columns():
    """The report: too low frequencies, only 16 columns vary by more than 0.05 over a tile."""
    place = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    place = standardised_places(place, torch.zeros(4000, dtype=torch.long))
    assert int((place_encoding(place, 128).std(dim=0) > 0.05).sum()) == 16


def test_places_are_standardised_per_axis_and_slide():
    xy = torch.tensor([[0.0, 5.0], [10.0, 5.0], [1e5, 2.0], [1e5 + 30, 4.0], [1e5 + 60, 6.0]])
    found = standardised_places(xy, torch.tensor([4, 4, 1, 1, 1]))
    far = math.sqrt(1.5)
    expected = [[-1, 0], [1, 0], [-far, -far], [0, 0], [far, far]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)


def test_parameters_of_the_published_shape():
    """The report: 10.42 million with 10 layers of width 128 and a projection head of 16,512."""
    layer = HeistLayer(128, 8, 0.0)
    assert sum(p.numel() for p in layer.parameters()) == 1_036_673
    encoder = HeistEncoder(OmicsConfig(width=128, layers=10, heads=8, **PUBLISHED), context())
    tokens = 2 * 128  # the learned mask tokens are ours
    published = sum(p.numel() for p in encoder.parameters()) - tokens + 128 * 128 + 128
    assert round(published / 1e6, 2) == 10.42
    assert (encoder.embed_dim, encoder.hops, encoder.n_genes) == (256, -1, G)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 6}, "width is 6.*multiple of 4"),
        ({"identity": "factors"}, "identity is 'factors'; set model.omics.identity: none"),
        ({"skip": True}, "skip is True; set model.omics.skip: false, or variant: hibio"),
        ({"cross": False, "gene_graph": False}, "gene_graph is False, cross is False; set"),
        ({"spatial_graph": False}, "set model.omics.spatial_graph: true"),
    ],
)
def test_settings_that_the_reference_mode_does_not_have(change, words):
    with pytest.raises(ConfigError, match=words):
        HeistEncoder(dataclasses.replace(CONFIG, **change), context())


def test_weights_of_the_older_arithmetic_are_refused():
    encoder = make_encoder()
    older = {
        name.replace("norm_pre", "norm_in").replace("norm_post", "norm_out"): weight
        for name, weight in encoder.state_dict().items()
    }
    with pytest.raises(ConfigError, match=r"older HiBio.*Train it again"):
        encoder.load_state_dict(older)


@pytest.mark.parametrize("other", [{"variant": "hibio"}, {"name": "mlp", "variant": "heist"}])
def test_the_rank_code_is_of_this_variant_alone(other):
    with pytest.raises(ValueError, match=r"rank_code is of .*variant: heist; leave it out"):
        OmicsConfig(rank_code="released", **other)
