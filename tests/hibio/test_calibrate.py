"""What a model starts from, and still has after 200 steps: no summand, bias or message vanishes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from hibio import keys
from hibio.checkpoint import read_log
from hibio.config.model import OmicsConfig
from hibio.config.training import OptimConfig, SamplerConfig, StageConfig
from hibio.encoders.base import OmicsContext, even_out
from hibio.encoders.omics import GraphHierarchyEncoder
from hibio.run import build, expand
from hibio.training.engine import TorchEngine
from hibio.training.objective import gradient_shares
from tests.hibio.toy import MASKED, OMICS, SPOT, make_slide, run_config, whole_batch

TENTH = 0.1


@pytest.fixture(scope="module")
def batch(toy_stores, toy_artifacts):
    return whole_batch(make_slide(toy_stores, toy_artifacts))


def shares_of_genes(tower: GraphHierarchyEncoder, batch) -> dict[str, float]:
    """Share of each summand in the sum of their variances over spots and genes."""
    present = batch.gene_SK < tower.n_genes
    with torch.no_grad():
        parts = tower.gene_summands(batch.gene_SK, batch.value_SK)
    return shares({name: one[present] for name, one in parts.items()})


def shares(parts: dict[str, torch.Tensor]) -> dict[str, float]:
    found = {name: float(one.var(dim=0, correction=0).sum()) for name, one in parts.items()}
    return {name: value / sum(found.values()) for name, value in found.items()}


def shares_of_spots(tower: GraphHierarchyEncoder, batch) -> dict[str, float]:
    """The same of the spot token; the messages of all layers count together."""
    messages: list[torch.Tensor] = []
    hooks = [
        layer.cross.value.register_forward_hook(
            lambda module, inputs, output, gate=layer.cross.gate_up: messages.append(gate * output)
        )
        for layer in tower.layers
    ]
    with torch.no_grad():
        tower(batch)
        parts = tower.spot_summands(batch)
    for hook in hooks:
        hook.remove()
    found = {name: float(one.var(dim=0, correction=0).sum()) for name, one in parts.items()}
    genes = sum(float(one.var(dim=0, correction=0).sum()) for one in messages)
    total = sum(found.values()) + genes
    return {name: value / total for name, value in {**found, "genes": genes}.items()}


def drawn(batch, n_genes: int, k: int, rank: int, power: float):
    """Spots of another vocabulary, with smooth vectors: factors that nearly share an axis."""
    rng = np.random.default_rng(rank)
    factors = rng.normal(size=(n_genes, rank)).astype(np.float32)
    factors[:, 0] += 8.0
    gene = np.stack([rng.choice(n_genes, k, replace=False) for _ in range(batch.n_spots)])
    value = -np.sort(-(rng.gamma(4.0, size=gene.shape) ** power), axis=1)
    vector = batch.vector_SV.numpy() @ rng.normal(size=(batch.vector_SV.shape[1], rank))
    edge = rng.integers(0, n_genes + 1, size=(1, n_genes, 9))
    context = OmicsContext(n_genes, k, factors, edge, rng.gamma(1.0, size=edge.shape))
    arrays = {
        "gene_SK": gene,
        "value_SK": value.astype(np.float32),
        "vector_SV": vector.astype(np.float32),
    }
    tensors = {name: torch.from_numpy(one) for name, one in arrays.items()}
    return context, dataclasses.replace(batch, **tensors)


@pytest.mark.parametrize(
    ("width", "heads", "rank", "k", "power"),
    [(8, 2, 3, 5, 1.0), (64, 4, 20, 48, 1.0), (192, 6, 60, 24, 4.0), (32, 1, 8, 90, 0.1)],
)
@pytest.mark.parametrize("identity", ["factors", "table"])
def test_every_summand_starts_with_a_tenth(batch, width, heads, rank, k, power, identity):
    context, spots = drawn(batch, 300, k, rank, power)
    torch.manual_seed(0)
    tower = GraphHierarchyEncoder(
        OmicsConfig(width=width, heads=heads, layers=2, identity=identity), context
    ).eval()
    before = min(shares_of_genes(tower, spots).values())
    tower.calibrate(spots)
    genes, tokens = shares_of_genes(tower, spots), shares_of_spots(tower, spots)
    assert before < TENTH < min(genes.values()), genes
    assert min(tokens.values()) > TENTH, tokens
    assert len(genes) == len(tokens) == 3
    present = spots.gene_SK < 300
    with torch.no_grad():
        for name, one in tower.gene_summands(spots.gene_SK, spots.value_SK).items():
            wanted = pytest.approx(1 / 3, rel=1e-2), name
            assert (float(one[present].var(dim=0, correction=0).mean()), name) == wanted
            assert float(one[present].mean(dim=0).abs().max()) < 2e-2, name


@pytest.mark.parametrize("switch", [{"skip": False}, {"cross": False}, {"identity": "none"}])
@pytest.mark.parametrize("empty", [False, True])
def test_what_is_not_there_is_not_calibrated(toy_artifacts, batch, switch, empty):
    """Fewer summands, spots without a gene, one value for all: nothing is divided by 0."""
    tower = GraphHierarchyEncoder(
        dataclasses.replace(OMICS, **switch), OmicsContext.of(toy_artifacts)
    )
    gene = torch.full_like(batch.gene_SK, 400) if empty else batch.gene_SK
    flat = dataclasses.replace(batch, gene_SK=gene, value_SK=torch.ones_like(batch.value_SK))
    for spots in (flat, batch):
        tower.calibrate(spots)
        assert all(bool(torch.isfinite(one).all()) for one in tower.parameters())
    assert tower.training


def spread_of_rows(table: torch.Tensor, present: torch.Tensor) -> float:
    """Root mean square over pairs of a gene and another, from the mean over the others."""
    squares = []
    for spot, seen in zip(table.tolist(), present.tolist(), strict=True):
        own = [i for i, one in enumerate(seen) if one]
        for i in own:
            row = [spot[i][j] for j in own if j != i]
            squares += [(value - sum(row) / len(row)) ** 2 for value in row]
    return math.sqrt(sum(squares) / len(squares))


def test_the_bias_of_the_gene_graph_starts_as_wide_as_the_logits(toy_artifacts, batch):
    torch.manual_seed(0)
    tower = GraphHierarchyEncoder(OMICS, OmicsContext.of(toy_artifacts)).eval()
    some = batch.gene_SK.clone()
    some[::3, 11:] = 400
    spots = dataclasses.replace(batch, gene_SK=some)
    tower.calibrate(spots)
    layer, present = tower.layers[0].gene_attention, some < 400
    with torch.no_grad():
        token = sum(tower.gene_summands(some, spots.value_SK).values())
        edge = tower.pair_weights(some, spots.spot_group_S)
        logit = layer.logits(token)
    assert float((edge > 0).float().mean()) > 0.05
    for head, scale in enumerate(layer.bias_scale_H.tolist()):
        found = scale * spread_of_rows(edge, present)
        assert found == pytest.approx(spread_of_rows(logit[:, head], present), rel=1e-4)


def test_even_out_closed_form():
    rows = torch.tensor([[1.0, 4.0], [3.0, 0.0]])  # variances 1 and 4
    table = torch.nn.Embedding(3, 2, padding_idx=2)
    table.weight.data[:2] = rows
    even_out(table, rows, 10.0)
    assert torch.equal(table.weight, torch.tensor([[-2.0, 4.0], [2.0, -4.0], [0.0, 0.0]]))
    linear = torch.nn.Linear(1, 2)
    inputs = torch.tensor([[0.0], [1.0]])
    even_out(linear, linear(inputs).detach(), 3.0)
    got = linear(inputs).detach()
    torch.testing.assert_close(got.mean(dim=0), torch.zeros(2), atol=1e-6, rtol=0)
    assert float(got.var(dim=0, correction=0).mean()) == pytest.approx(3.0)


@pytest.fixture(scope="module")
def trained(toy_stores, tmp_path_factory):
    """200 steps of the alignment and of the masked terms, and the log."""
    stage = StageConfig("both", 100, {**SPOT, **MASKED}, lr=2e-3)
    config = run_config(toy_stores, tmp_path_factory.mktemp("long"), stages=(stage,), bank=False)
    (job,) = expand(dataclasses.replace(config, sampler=SamplerConfig(batch_spots=70)))
    trainer = build(job)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    sample = trainer.plan.dataset.sample(trainer.model.halo)
    assert trainer.fit()
    trainer.model.eval()
    return trainer, before, sample, read_log(trainer.folder / "log.jsonl")


def test_no_summand_vanishes_in_200_steps(trained, record_property):
    trainer, before, sample, log = trained
    assert len(log) == 200
    tower = trainer.model.omics
    for name, found in (
        ("genes", shares_of_genes(tower, sample)),
        ("spots", shares_of_spots(tower, sample)),
    ):
        record_property(name, str(found))
        assert min(found.values()) > 0.05, (name, found)


def test_the_gene_graph_learns_at_its_own_rate(trained):
    """Moved by a tenth of where it began at least, where the stage's own rate moves hundredths."""
    trainer, before, _, _ = trained
    for name, now in trainer.model.named_parameters():
        if name.endswith("bias_scale_H"):
            moved = (now.detach() - before[name]).abs() / before[name]
            assert float(moved.mean()) > 0.1, (name, moved)


def test_the_rate_of_the_graph_is_a_factor_of_the_stages(trained):
    module = trained[0].engine.module
    engine = TorchEngine(module, OptimConfig(graph_rate=7.0), "cpu")
    named = {id(p): name for name, p in module.named_parameters()}
    rates = {named[id(p)]: g["rate"] for g in engine.optimizer.param_groups for p in g["params"]}
    assert rates.keys() == engine.trained.keys()
    assert {name for name, rate in rates.items() if rate == 7.0} == {
        f"model.omics.layers.{layer}.gene_attention.bias_scale_H" for layer in range(2)
    }


def test_the_masked_term_has_a_target_to_learn(trained, toy_artifacts):
    """The loss starts at the variance of the target, 1, and is not spent in a few steps."""
    log = trained[3]
    first = np.mean([record["terms"][keys.TERM_MASKED] for record in log[:4]])
    last = np.mean([record["terms"][keys.TERM_MASKED] for record in log[-20:]])
    assert first == pytest.approx(1.0, abs=0.4)
    assert 0.1 < last < first


def test_shares_of_the_gradient_are_in_the_log(trained):
    log = trained[3]
    looked = {
        record["step"]: record["gradient_shares"] for record in log if "gradient_shares" in record
    }
    assert sorted(looked) == [0, 50, 100, 150]
    for found in looked.values():
        assert set(found) == {*SPOT, *MASKED}
        assert sum(found.values()) == pytest.approx(1.0)
        assert min(found.values()) > 0.005


def test_shares_of_the_gradient_are_looked_at_as_often_as_asked(toy_stores, tmp_path):
    """With GradCache too; looking changes no number of the training."""
    logs = []
    for every in (0, 2):
        config = run_config(
            toy_stores,
            tmp_path / str(every),
            optim=OptimConfig(shares_every=every),
            sampler=SamplerConfig(batch_spots=35, batches_per_step=2),
        )
        (job,) = expand(config)
        build(job).fit(until_step=3)
        logs.append(read_log(job.folder / "log.jsonl"))
    assert ["gradient_shares" in record for record in logs[0]] == [False] * 3
    assert ["gradient_shares" in record for record in logs[1]] == [True, False, True]
    for one, other in zip(*logs, strict=True):
        assert one["terms"] == other["terms"]
        assert one["gradient_norm"] == other["gradient_norm"]


def test_shares_of_the_gradient_against_each_gradient_alone():
    shared, own = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.ones(3))
    terms = {
        "a": (3 * shared).sum(),  # gradient (3, 3) of the shared ones
        "b": (shared**2).sum() / 2 + 100 * own.sum(),  # (1, 2); what is its own does not count
        "c": torch.tensor(5.0),  # of no parameter
    }
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    norms = [math.sqrt(18), 2 * math.sqrt(5), 0.0]
    found = gradient_shares(terms, weights, [shared, own])
    assert list(found.values()) == pytest.approx([one / sum(norms) for one in norms])
    alone = gradient_shares({"b": terms["b"]}, {"b": 2.0}, [shared, own])
    assert alone == {"b": pytest.approx(1.0)}
    sum(terms.values()).backward()  # the graph is still there
