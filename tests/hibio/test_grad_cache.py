"""A step in parts is the step at once: gradients, statistics, slides and regions in two parts."""

import dataclasses

import numpy as np
import pytest
import torch

from hibio import keys
from hibio.config.model import OmicsConfig, VisionConfig
from hibio.config.training import ObjectiveConfig, StageConfig
from hibio.data.collate import Views, collate
from hibio.model import HiBio
from hibio.training.engine import NotFiniteError, OptimConfig, TorchEngine
from hibio.training.grad_cache import RunningStatistics, take_step
from hibio.training.objective import TOTAL, Objective
from hibio.training.process_group import ProcessGroup
from hibio.training.step_outputs import MicroBatch, join, read_micro_batch
from tests.hibio.toy import loss_of, make_model, make_slide, regions_of

LEVELS = ("250um", "500um")
CONFIG = ObjectiveConfig(negatives="mixed", anchors_per_step=8, query_genes=4)
EVERY_TERM = StageConfig("all", 1, dict.fromkeys(keys.TERMS, 0.5))
#: Terms without random draws of their own.
FIXED = (
    keys.TERM_SPOT,
    keys.TERM_PATHWAY,
    keys.TERM_REGION,
    keys.TERM_MEMBER,
    keys.TERM_DECORRELATION,
    keys.TERM_EXPRESSION,
)


@pytest.fixture(scope="module")
def slides(toy_stores, toy_artifacts):
    return [make_slide(toy_stores, toy_artifacts, name) for name in ("sim001", "sim002")]


def micro(slides, parts, index: int = 0, hops: int = 1) -> MicroBatch:
    """Core spots of slides, by their place in ``slides``."""
    views = Views(np.random.default_rng(index), keep_counts=0.7, query_genes=4)
    places = [place for place, _ in parts]
    read = [(slides[place], regions_of(slides[place]), np.asarray(core)) for place, core in parts]
    return read_micro_batch(places, read, hops, views, index=index, seed=100 + index)


def module_of(model: HiBio, config: ObjectiveConfig = CONFIG) -> Objective:
    return Objective(model.train(), config, LEVELS)


def gradients_of_step(module, stage, micros, monkeypatch) -> tuple[dict, float]:
    """What reaches the optimiser, unclipped, and the loss."""
    engine = TorchEngine(module, OptimConfig(clip=1e9), "cpu")
    found: dict[str, torch.Tensor | None] = {}

    def capture(*_):
        found.update({n: p.grad if p.grad is None else p.grad.clone() for n, p in named(module)})

    monkeypatch.setattr(engine.optimizer, "step", capture)
    result = take_step(engine, stage, micros, seed=7, lr=1e-3)
    return found, float(result.total)


def named(module):
    return list(module.named_parameters())


def at_once(module, stage, micros) -> tuple[dict, float]:
    """The same by one graph through all micro-batches."""
    rows = [module(stage, one) for one in micros]
    total = module(stage, None, rows, 7)[TOTAL]
    total.backward()
    return {name: p.grad for name, p in named(module)}, float(total.detach())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gradients_in_two_passes_are_those_of_one_graph(toy_artifacts, slides, monkeypatch, n):
    """With dropout, masks, thinned views and fresh anchors: every draw is repeated."""
    parts = [[(0, range(0, 25))], [(1, range(10, 40))], [(0, range(25, 60)), (1, range(40, 50))]]
    micros = [micro(slides, part, index) for index, part in enumerate(parts[:n])]
    expected, loss = at_once(module_of(make_model(toy_artifacts)), EVERY_TERM, micros)
    module = module_of(make_model(toy_artifacts))
    found, other = gradients_of_step(module, EVERY_TERM, micros, monkeypatch)
    assert other == pytest.approx(loss, rel=1e-6)
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * largest), name


@pytest.mark.parametrize("config", [CONFIG, ObjectiveConfig(), ObjectiveConfig(negatives="all")])
def test_the_loss_is_of_the_union_of_the_micro_batches(toy_artifacts, slides, config):
    """Two micro-batches that cut slides and regions in two are one batch of all their spots."""
    model = make_model(toy_artifacts)
    config = dataclasses.replace(config, anchors_per_step=1000)
    stage = StageConfig("fixed", 1, dict.fromkeys(FIXED, 1.0))
    objective, hops = Objective(model, config, LEVELS), model.halo
    with torch.no_grad():
        parts = [[(0, range(0, 30)), (1, range(0, 20))], [(1, range(20, 70)), (0, range(30, 70))]]
        rows = [
            objective.outputs(micro(slides, part, i, hops), stage) for i, part in enumerate(parts)
        ]
        found = objective.terms(join(rows), stage)
        whole = [(one, regions_of(one), np.arange(70)) for one in slides]
        expected = loss_of(objective, collate(whole, hops), stage)
    assert found.n == expected.n == 140
    assert set(found.terms) == set(FIXED)
    for name, value in expected.terms.items():
        assert float(found.terms[name]) == pytest.approx(float(value), rel=2e-5), name


def test_parts_of_a_region_meet_and_equal_labels_of_other_slides_do_not(slides):
    first = micro(slides, [(1, range(0, 30)), (0, range(0, 10))], 0).identity_rows()
    second = micro(slides, [(0, range(10, 70))], 1).identity_rows()
    region_of_slide = regions_of(slides[0])
    keys_0 = torch.cat([first["region"][first["slide"] == 0], second["region"]])
    for level in range(2):
        expected = torch.from_numpy(region_of_slide[level])
        same = keys_0[:, level, None] == keys_0[None, :, level]
        assert torch.equal(same, expected[:, None] == expected[None])
    other = first["region"][first["slide"] == 1]
    assert not torch.isin(other, keys_0).any()


def test_the_reductions_are_by_global_counts(toy_artifacts, slides):
    """A mean over unequal micro-batches is over spots, not over micro-batches."""
    objective = Objective(make_model(toy_artifacts), CONFIG, LEVELS)
    stage = StageConfig("one", 1, {keys.TERM_EXPRESSION: 1.0})
    parts = [micro(slides, [(0, range(0, 10))], 0), micro(slides, [(1, range(0, 50))], 1)]
    with torch.no_grad():
        rows = [objective.outputs(part, stage) for part in parts]
        alone = [float(objective.terms(one, stage).total) for one in rows]
        both = float(objective.terms(join(rows), stage).total)
    assert both == pytest.approx((10 * alone[0] + 50 * alone[1]) / 60, rel=1e-5)
    assert both != pytest.approx(sum(alone) / 2, rel=1e-3)


def test_a_micro_batch_without_images_takes_part_in_what_needs_none(toy_artifacts, slides):
    objective = Objective(make_model(toy_artifacts), CONFIG, LEVELS)
    stage = StageConfig("pathways", 1, {keys.TERM_PATHWAY: 1.0})
    seen, blind = micro(slides, [(0, range(0, 30))], 0), micro(slides, [(1, range(0, 30))], 1)
    blind = dataclasses.replace(blind, batch=dataclasses.replace(blind.batch, features_SF=None))
    with torch.no_grad():
        rows = [objective.outputs(part, stage) for part in (seen, blind)]
        assert rows[0].keys() == rows[1].keys()
        assert rows[1]["has_image"].sum() == 0
        out = objective.terms(join(rows), stage)
    assert out.n == 60
    assert torch.isfinite(out.total)


# ------------------------------------------------------------------ batch normalisation
def test_running_statistics_do_not_depend_on_the_order_or_the_passes(toy_artifacts, toy_stores):
    vision = VisionConfig(name="timm", timm_name="test_resnet")
    patched = [
        make_slide(toy_stores, toy_artifacts, name, "patches") for name in ("sim001", "sim002")
    ]
    stage = StageConfig("spot", 1, {keys.TERM_SPOT: 1.0})

    def after(parts) -> tuple[dict, dict]:
        model = make_model(toy_artifacts, vision=vision)
        before = {name: value.clone() for name, value in model.vision.named_buffers()}
        engine = TorchEngine(module_of(model), OptimConfig(), "cpu")
        micros = [micro(patched, [part], index) for index, part in enumerate(parts)]
        take_step(engine, stage, micros, seed=0, lr=1e-9)
        return before, dict(model.vision.named_buffers())

    halves = [(0, range(0, 30)), (1, range(0, 30))]
    before, both = after(halves)
    _, swapped = after(halves[::-1])
    alone = [after([half])[1] for half in halves]
    moved = 0
    for name, value in both.items():
        if "running" in name:
            assert torch.allclose(value, swapped[name], atol=1e-6)
            assert torch.allclose(value, (alone[0][name] + alone[1][name]) / 2, atol=1e-6)
            moved += int(not torch.equal(value, before[name]))
        elif "tracked" in name:
            assert int(value) == int(before[name]) + 1
    assert moved > 5


def test_one_batch_moves_the_statistics_as_torch_does():
    layers = [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)]
    rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    layers[0](rows)
    statistics = RunningStatistics(layers[1], ProcessGroup())
    with statistics.not_counted():
        layers[1](rows + 100)
    with statistics.of_one_batch():
        layers[1](rows)
    statistics.combine(1)
    for name, value in layers[0].named_buffers():
        assert torch.equal(value, layers[1].get_buffer(name))


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize("n", [1, 2])
def test_a_bad_micro_batch_stops_the_step_before_any_update(toy_artifacts, slides, n):
    model = make_model(toy_artifacts)
    engine = TorchEngine(module_of(model), OptimConfig(), "cpu")
    micros = [micro(slides, [(index, range(0, 30))], index) for index in range(n)]
    features = torch.full_like(micros[0].batch.features_SF, float("nan"))
    broken = dataclasses.replace(micros[0].batch, features_SF=features)
    micros[0] = dataclasses.replace(micros[0], batch=broken)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotFiniteError, match="the loss is nan; nothing was updated"):
        take_step(engine, EVERY_TERM, micros, seed=0, lr=1e-2)
    trained = {name for name, _ in model.named_parameters()}
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in trained)
    assert all(p.grad is None for p in model.parameters())
    assert engine.state() == {"state": {}}


# ------------------------------------------------------------------ checkpointed layers
def test_layers_computed_again_give_the_same_gradient(toy_artifacts, slides):
    one = micro(slides, [(0, range(0, 30))])
    sizes = {"width": 16, "layers": 2, "heads": 2}
    found = []
    for again in (False, True):
        model = make_model(toy_artifacts, omics=OmicsConfig(**sizes, checkpoint=again))
        module = module_of(model)
        total = module(EVERY_TERM, one, seed=7)[TOTAL]
        total.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 40
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    with pytest.raises(ValueError, match="checkpoint is of the layers"):
        OmicsConfig(name="mlp", checkpoint=True)
