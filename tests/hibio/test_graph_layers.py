"""Layers of the graph-hierarchy encoder against explicit formulas and loops; pooling too."""

import math

import pytest
import torch

from hibio.encoders import layers as biased_attention
from hibio.encoders import layers as spot_attention
from hibio.encoders.base import AttentionPool, neighbour_mean
from hibio.encoders.genes import MIN_ROWS, RowLinear, Scratch
from hibio.encoders.layers import CrossMessages, GeneAttention, HierarchyLayer, SpotAttention

S, K, N, D, H = 5, 7, 3, 12, 3


@pytest.fixture(autouse=True)
def _double():
    """Loops in float64, so that nothing but a wrong formula can make a difference."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def some_genes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    present = torch.rand(S, K) < 0.7
    present[:, 0] = True
    return torch.randn(S, K, D), present, torch.rand(S, K, K)


def softmax(values: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = [value.exp() for value in values]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("with_graph", [True, False])
@torch.no_grad()
def test_gene_attention_against_the_formula(with_graph):
    layer = GeneAttention(D, H, 0.0)
    layer.bias_scale_H.normal_()
    token, present, edge = some_genes()
    got = layer(token, present, edge if with_graph else None)
    query, key, value = layer.query_key_value(layer.norm(token)).chunk(3, dim=2)
    d = D // H
    for s in range(S):
        rows = []
        for i in range(K):
            heads = []
            for h in range(H):
                part = slice(h * d, (h + 1) * d)
                seen = [j for j in range(K) if present[s, j]]
                logit = [query[s, i, part] @ key[s, j, part] / math.sqrt(d) for j in seen]
                if with_graph:
                    bias = layer.bias_scale_H[h] * edge[s, i]
                    logit = [one + bias[j] for one, j in zip(logit, seen, strict=True)]
                weight = softmax(logit)
                heads.append(sum(w * value[s, j, part] for w, j in zip(weight, seen, strict=True)))
            rows.append(torch.cat(heads))
        torch.testing.assert_close(got[s], layer.out(torch.stack(rows)))


def some_spots() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    neighbour = torch.tensor([[1, 2, -1], [0, -1, -1], [0, 3, 4], [2, -1, -1], [-1, -1, -1]])
    distance = torch.where(neighbour >= 0, 20.0 + 500.0 * torch.rand(S, N), float("inf"))
    return torch.randn(S, D), neighbour, distance


def slow_distance_bias(layer: SpotAttention, distance_um: float) -> torch.Tensor:
    centre = torch.linspace(math.log(5.0), math.log(1000.0), 8)
    base = torch.exp(-2.0 * (math.log(max(distance_um, 1.0)) - centre) ** 2)
    return layer.distance_bias.weight @ base


@torch.no_grad()
def test_spot_attention_against_the_formula(monkeypatch):
    monkeypatch.setattr(spot_attention, "SPOTS_AT_A_TIME", 2)
    layer = SpotAttention(D, H, 0.0)
    layer.distance_bias.weight.normal_()
    layer.gate.normal_()
    token, neighbour, distance = some_spots()
    got = layer(token, neighbour, distance)
    normed = layer.norm(token)
    key, value = layer.key_value(normed).chunk(2, dim=1)
    query = layer.query(normed)
    d = D // H
    for s in range(S):
        seen = [(s, None)] + [
            (int(n), float(u)) for n, u in zip(neighbour[s], distance[s], strict=True) if n >= 0
        ]
        heads = []
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            logit = []
            for n, um in seen:
                bias = 0.0 if um is None else slow_distance_bias(layer, um)[h]
                logit.append(query[s, part] @ key[n, part] / math.sqrt(d) + bias)
            weight = softmax(logit)
            heads.append(sum(w * value[n, part] for w, (n, _) in zip(weight, seen, strict=True)))
        torch.testing.assert_close(got[s], layer.gate * layer.out(torch.cat(heads)))


@torch.no_grad()
def test_a_spot_without_neighbours_attends_to_itself_only():
    layer = SpotAttention(D, H, 0.0)
    token, neighbour, distance = some_spots()
    value = layer.key_value(layer.norm(token)).chunk(2, dim=1)[1]
    got = layer(token, neighbour, distance)
    torch.testing.assert_close(got[4], layer.gate * layer.out(value[4]))
    changed = token.clone()
    changed[:4] += 1.0
    assert torch.equal(layer(changed, neighbour, distance)[4], got[4])


@torch.no_grad()
def test_distances_matter_only_once_their_bias_is_learned():
    layer = SpotAttention(D, H, 0.0)
    token, neighbour, distance = some_spots()
    assert torch.equal(layer(token, neighbour, distance), layer(token, neighbour, distance * 2))
    layer.distance_bias.weight.normal_()
    assert not torch.allclose(
        layer(token, neighbour, distance), layer(token, neighbour, distance * 2)
    )


@torch.no_grad()
def test_cross_messages_against_loops():
    layer = CrossMessages(D, 0.0)
    layer.gate_up.normal_()
    layer.gate_down.normal_()
    gene, present, _ = some_genes()
    present[3] = False  # a spot without genes
    spot = torch.randn(S, D)
    new_spot, new_gene = layer(spot, gene, present)
    for s in range(S):
        query = layer.score(layer.norm_spot(spot[s]))
        seen = [k for k in range(K) if present[s, k]]
        normed = [layer.norm_gene(gene[s, k]) for k in seen]
        weight = softmax([query @ one / math.sqrt(D) for one in normed]) if seen else []
        pooled = sum((w * layer.value(one) for w, one in zip(weight, normed, strict=True)), 0.0)
        expected = spot[s] + layer.gate_up * pooled
        torch.testing.assert_close(new_spot[s], expected)
        down = layer.gate_down * layer.to_gene(layer.norm_spot(expected))
        torch.testing.assert_close(new_gene[s], gene[s] + down)


@torch.no_grad()
def test_switches_of_a_layer():
    gene, present, edge = some_genes()
    token, neighbour, distance = some_spots()
    whole = HierarchyLayer(D, H, 0.0, spatial_graph=True, cross=True)
    flat = HierarchyLayer(D, H, 0.0, spatial_graph=False, cross=False)
    moved_gene, moved_spot = gene + 1.0 * torch.randn(S, K, D), token + torch.randn(S, D)
    spot_0, gene_0 = whole(token, gene, present, edge, neighbour, distance)
    assert not torch.allclose(
        whole(token, moved_gene, present, edge, neighbour, distance)[0], spot_0
    )
    assert not torch.allclose(
        whole(moved_spot, gene, present, edge, neighbour, distance)[1], gene_0
    )
    spot_0, gene_0 = flat(token, gene, present, edge, neighbour, distance)
    assert torch.equal(flat(token, moved_gene, present, edge, neighbour, distance)[0], spot_0)
    assert torch.equal(flat(moved_spot, gene, present, edge, neighbour, distance)[1], gene_0)
    alone = flat(token[:1], gene[:1], present[:1], edge[:1], neighbour[:1], distance[:1])
    torch.testing.assert_close(alone[0][0], spot_0[0])


@pytest.mark.parametrize("masked", [False, True])
def test_neighbour_mean_against_a_loop(masked):
    vector, neighbour, _ = some_spots()
    usable = torch.tensor([True, False, True, False, True]) if masked else None
    got = neighbour_mean(vector, neighbour, usable)
    for s in range(S):
        near = [int(n) for n in neighbour[s] if n >= 0 and (usable is None or usable[n])]
        expected = torch.stack([vector[n] for n in near]).mean(0) if near else vector[s]
        torch.testing.assert_close(got[s], expected)


@torch.no_grad()
def test_pooling_against_a_loop():
    pool = AttentionPool(D)
    spot, group = torch.randn(9, D), torch.tensor([2, 0, -1, 2, 0, 2, -1, 0, 3])
    got = pool(spot, group, 5)
    for region in range(5):
        member = [s for s in range(9) if group[s] == region]
        if not member:
            assert not got[region].any()
            continue
        weight = softmax([pool.score(spot[s]).squeeze() for s in member])
        expected = sum(w * spot[s] for w, s in zip(weight, member, strict=True))
        torch.testing.assert_close(got[region], expected)


@torch.no_grad()
def test_pooling_of_one_spot_is_the_spot_and_large_scores_do_not_overflow():
    pool = AttentionPool(D)
    spot = torch.randn(3, D)
    torch.testing.assert_close(pool(spot, torch.arange(3), 3), spot)
    pool.score[2].weight.mul_(1e6)
    pool.score[2].bias.fill_(-5e3)
    got = pool(spot, torch.zeros(3, dtype=torch.long), 1)
    assert torch.isfinite(got).all()
    best = int(pool.score(spot).argmax())
    torch.testing.assert_close(got[0], spot[best], atol=1e-4, rtol=0)


def test_pooling_carries_gradients_to_members_only():
    pool = AttentionPool(D)
    spot = torch.randn(4, D, requires_grad=True)
    pool(spot, torch.tensor([0, 0, -1, 1]), 2).square().sum().backward()
    assert spot.grad[[0, 1, 3]].abs().sum(dim=1).gt(0).all()
    assert not spot.grad[2].any()
    assert all(p.grad.abs().sum() > 0 for n, p in pool.named_parameters() if n != "score.2.bias")


def infer(layer: GeneAttention, *inputs: torch.Tensor | None) -> torch.Tensor:
    with torch.inference_mode():
        return layer(*inputs)


@pytest.mark.parametrize("with_graph", [True, False])
@pytest.mark.parametrize("large", [False, True])
def test_own_attention_is_that_of_torch(monkeypatch, with_graph, large):
    """Values and gradients, one spot at a time, with logits that overflow, a spot of padding."""
    monkeypatch.setattr(biased_attention, "LOGIT_NUMBERS", 1)
    layer = GeneAttention(D, H, 0.0)
    token, present, edge = some_genes()
    present[2] = False
    with torch.no_grad():
        layer.bias_scale_H.normal_()
        if large:
            layer.query_key_value.weight.mul_(100.0)
    inputs = (present, edge if with_graph else None)
    probe = torch.randn(S, K, D)
    results = []
    for by_torch in (False, True):
        if by_torch:
            plain = lambda p, seen, edges, _: layer._on_device(p, seen, edges)  # noqa: E731
            monkeypatch.setattr(biased_attention.LearnedMix, "apply", plain)
        leaf = token.clone().requires_grad_()
        layer.zero_grad()
        got = layer(leaf, *inputs)
        (got * probe).sum().backward()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([got.detach(), leaf.grad, *grads])
    assert len(results[0]) == 2 + 6 + with_graph
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected)
    torch.testing.assert_close(infer(layer, token, *inputs), results[0][0])


def test_gradients_of_the_own_attention_against_differences():
    packed = torch.randn(3, 2, H, 4, 4).permute(0, 1, 2, 4, 3).requires_grad_()
    seen, edge = torch.ones(2, 4, dtype=torch.bool), torch.rand(2, 4, 4)
    seen[0, 2:] = False
    scale = torch.randn(H, requires_grad=True)
    call = biased_attention.LearnedMix.apply
    assert torch.autograd.gradcheck(lambda p, s: call(p, seen, edge, s), (packed, scale))
    assert torch.autograd.gradcheck(lambda p: call(p, seen, None, scale.detach()), (packed,))


def test_half_precision_is_close():
    torch.set_default_dtype(torch.float32)
    layer = GeneAttention(D, H, 0.0)
    token, present, edge = some_genes()
    expected = infer(layer, token, present, edge)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(token, present, edge)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.03, rtol=0.03)
    got.sum().backward()
    assert layer.bias_scale_H.grad is not None


def test_inference_takes_used_buffers_and_leaves_its_inputs_alone():
    layer, scratch = GeneAttention(D, H, 0.0), Scratch()
    token, present, edge = some_genes()
    kept = [one.clone() for one in (token, present, edge)]
    first = infer(layer, token, present, edge, scratch).clone()
    infer(layer, 9 * token[:2], present[:2], edge[:2], scratch)
    assert torch.equal(infer(layer, token, present, edge, scratch), first)
    assert all(torch.equal(a, b) for a, b in zip((token, present, edge), kept, strict=True))


def test_layers_learn_the_same_with_and_without_their_own_products():
    """RowLinear against nn.Linear: rows enough for oneDNN, float32, also from a view."""
    torch.set_default_dtype(torch.float32)
    own, plain = RowLinear(24, 40), torch.nn.Linear(24, 40)
    plain.load_state_dict(own.state_dict())
    rows = torch.randn(3, 2 * MIN_ROWS, 24).transpose(0, 1)
    results = []
    for layer in (own, plain):
        leaf = rows.clone().requires_grad_()
        result = layer(leaf[1::2])
        result.square().sum().backward()
        results.append([result, leaf.grad, layer.weight.grad, layer.bias.grad])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_only_the_first_spots_move_when_their_neighbours_alone_are_given():
    layer = HierarchyLayer(D, H, 0.0, spatial_graph=True, cross=True)
    token, neighbour, distance = some_spots()
    whole = layer.move_spots(token, neighbour, distance)
    torch.testing.assert_close(layer.move_spots(token, neighbour[:2], distance[:2]), whole[:2])
