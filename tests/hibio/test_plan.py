"""The plan of steps: one global batch however many processes share it; reading ahead."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from hibio.config.files import ConfigError
from hibio.config.training import ObjectiveConfig, SamplerConfig, StageConfig
from hibio.data.counts import ordered_map
from hibio.data.dataset import PreparedSlides
from hibio.data.splits import read_entries
from hibio.training.objective import Objective
from hibio.training.plan import Plan, own_micro_batches
from hibio.training.process_group import ProcessGroup
from hibio.training.region_state import RegionState
from hibio.training.trainer import parameter_use
from preprocessing.store.read import stores_in
from tests.hibio.toy import MASKED, REGION, REGIONS, SPOT, make_model

STAGES = (StageConfig("omics", 1, MASKED), StageConfig("region", 2, REGION))


@pytest.fixture(scope="module")
def dataset(toy_stores, toy_artifacts):
    return PreparedSlides(read_entries(stores_in(toy_stores))[:2], toy_artifacts, "handcrafted")


@pytest.fixture(scope="module")
def objective(toy_artifacts):
    return Objective(make_model(toy_artifacts), ObjectiveConfig(query_genes=3), REGIONS.levels)


def make_plan(dataset, objective, rank=0, size=1, n=4, prefetch=0, spots=18) -> Plan:
    sampler = SamplerConfig(batch_spots=spots, batches_per_step=n)
    regions = RegionState(REGIONS, dataset)
    group = ProcessGroup(rank, size)
    return Plan(STAGES, sampler, dataset, regions, objective, 0, group, prefetch=prefetch)


def told(micro) -> tuple:
    """A micro-batch by what is in it."""
    batch = micro.batch
    arrays = (batch.gene_SK, batch.value_SK, batch.query_gene_SQ, micro.slide_key_B)
    return micro.index, micro.seed, batch.slide_ids, tuple(a.numpy().tobytes() for a in arrays)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_one_global_batch(dataset, objective, size):
    """Together they have the micro-batches of one process, with the same views and seeds."""
    whole = list(make_plan(dataset, objective).epoch(STAGES[0], 0, 0, 0))
    shared = [
        list(make_plan(dataset, objective, rank, size).epoch(STAGES[0], 0, 0, 0))
        for rank in range(size)
    ]
    assert len(whole) == 2  # 8 batches, 4 a step
    for number, step in enumerate(whole):
        assert [micro.index for micro in step.micros] == [0, 1, 2, 3]
        parts = [part[number] for part in shared]
        assert all(len(part.micros) == 4 // size for part in parts)
        assert {part.seed for part in parts} == {step.seed}
        found = sorted(told(micro) for part in parts for micro in part.micros)
        assert found == sorted(told(micro) for micro in step.micros)
    seeds = [micro.seed for step in whole for micro in step.micros] + [s.seed for s in whole]
    assert len(set(seeds)) == len(seeds)


def test_one_batch_a_step_has_the_seed_of_the_step(dataset, objective):
    plan = make_plan(dataset, objective, n=1)
    (first, *_) = plan.epoch(STAGES[0], 0, 0, 5)
    expected = int(np.random.SeedSequence([0, 5]).generate_state(1)[0])
    assert first.micros[0].seed == expected


def test_an_epoch_goes_on_where_it_was_left(dataset, objective):
    plan = make_plan(dataset, objective, n=2)
    whole = [[told(m) for m in step.micros] for step in plan.epoch(STAGES[0], 1, 0, 10)]
    rest = [[told(m) for m in step.micros] for step in plan.epoch(STAGES[0], 1, 2, 12)]
    assert len(whole) == 4
    assert rest == whole[2:]


def test_left_over_batches_are_dropped_and_are_others_every_epoch(dataset, objective):
    plan = make_plan(dataset, objective, n=3)
    assert plan.steps(STAGES[0]) == 2  # of 8 batches
    assert plan.n_steps() == 2 + 2 * 2
    epochs = []
    for epoch in range(4):
        steps = plan.epoch(STAGES[0], epoch, 0, 0)
        seen = [set(core.tolist()) for step in steps for slide, core in step.shares if slide == 0]
        epochs.append(frozenset().union(*seen))
    assert len(set(epochs)) > 1


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (7, 3), (8, 4), (9, 20), (23, 5), (6, 0)])
def test_a_length_in_steps_against_counting(dataset, objective, steps, every):
    """Epochs of four steps: the last one is cut, and trees that are due wait for an epoch's end."""
    plan = make_plan(dataset, objective, n=2)
    stage = StageConfig("s", None, SPOT, rebuild_every=every, steps=steps)
    assert plan.length(stage) == steps
    assert plan.steps(stage) == 4
    taken, epoch, due = 0, 0, False
    while taken < steps:
        assert plan.rebuilds(stage, epoch) == due
        due = False
        assert plan.end(stage, epoch) == min(4, steps - taken)
        for _ in range(plan.end(stage, epoch)):
            taken += 1
            due |= every > 0 and taken % every == 0
        epoch += 1
    assert plan.end(stage, epoch) == 0


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_reading_ahead_changes_nothing(dataset, objective, prefetch):
    plain = [
        told(m) for s in make_plan(dataset, objective).epoch(STAGES[0], 0, 0, 0) for m in s.micros
    ]
    ahead = make_plan(dataset, objective, prefetch=prefetch).epoch(STAGES[0], 0, 0, 0)
    assert [told(m) for step in ahead for m in step.micros] == plain


@pytest.mark.parametrize(("prefetch", "what"), [(0, "current"), (2, "current"), (2, "sampling")])
def test_an_error_while_reading_names_the_slide(dataset, objective, monkeypatch, prefetch, what):
    plan = make_plan(dataset, objective, prefetch=prefetch)

    def gone(slide):
        raise OSError("the disk is gone")

    monkeypatch.setattr(plan.regions, what, gone)
    with pytest.raises(ConfigError, match=r"reading slides sim00\d failed: the disk is gone"):
        list(plan.epoch(STAGES[0], 0, 0, 0))


@pytest.mark.parametrize(
    ("n", "size", "words"),
    [
        (1, 2, r"batches_per_step is 1, which 2 processes .* multiple of 2, for example 2,"),
        (6, 4, r"multiple of 4, for example 4 or 8,"),
    ],
)
def test_batches_that_processes_cannot_share(n, size, words):
    with pytest.raises(ConfigError, match=words):
        own_micro_batches(n, ProcessGroup(0, size))
    assert own_micro_batches(8, ProcessGroup(0, 4)) == 2


def test_an_epoch_that_is_too_short_for_a_step(dataset, objective):
    plan = make_plan(dataset, objective, n=9)
    with pytest.raises(ConfigError, match=r"'omics': an epoch has 8 batches.*at most 8"):
        plan.n_steps()


def test_stages_with_and_without_images_are_told(dataset, objective):
    pathway = StageConfig("p", 1, {"pathway/kl": 1.0})
    plan = make_plan(dataset, objective)
    plan.stages = (*STAGES, pathway)
    assert plan.mixed_stages() == []
    entries = dataset.entries
    blind = PreparedSlides(
        [entries[0], dataclasses.replace(entries[1], has_image=False)], dataset.artifacts, None
    )
    plan.dataset = blind
    assert plan.mixed_stages() == ["p"]


# ------------------------------------------------------------------ which parameters a stage uses
def test_the_parameters_that_a_stage_uses_and_the_model_left_as_it_was(dataset, objective):
    plan = make_plan(dataset, objective)
    plan.stages = (*STAGES, StageConfig("spot", 1, SPOT))
    module = objective.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    used = parameter_use(module, plan)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert used.keys() == dict(module.named_parameters()).keys()
    of_part = {
        part: {pattern for name, pattern in used.items() if name.startswith(f"model.{part}")}
        for part in ("vision", "decoder", "pool", "log_scale_anchor", "expression_head")
    }
    assert of_part == {
        "vision": {(False, True, True)},
        "decoder": {(True, False, False)},
        "pool": {(False, True, False)},
        "log_scale_anchor": {(False, True, False)},
        "expression_head": {(False, True, True)},
    }


# ------------------------------------------------------------------ reading ahead
@pytest.mark.parametrize("depth", [0, 1, 2, 50])
def test_results_come_in_order_and_no_more_are_made_than_asked_for(depth):
    made = []
    results = ordered_map(lambda i: (made.append(i), i * i)[1], range(20), ahead=depth)
    for number in range(5):
        assert next(results) == number**2
        assert len(made) <= number + 1 + depth
    results.close()
    assert len(made) <= 5 + depth
    assert list(ordered_map(str, range(4), ahead=depth)) == ["0", "1", "2", "3"]
    assert list(ordered_map(str, [], ahead=depth)) == []


@pytest.mark.parametrize("depth", [0, 3])
def test_an_error_comes_when_its_turn_comes(depth):
    def read(number):
        if number == 2:
            raise KeyError("two")
        return number

    results = ordered_map(read, range(9), ahead=depth)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="two"):
        next(results)


def test_no_thread_is_left_behind():
    before = threading.active_count()
    results = ordered_map(lambda i: i, range(100), ahead=4)
    next(results)
    results.close()
    assert threading.active_count() == before
