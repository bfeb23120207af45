"""The trainer: a resumed run is the uninterrupted run to the bit; stops, crashes, signals."""

import dataclasses
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from hibio import keys
from hibio.checkpoint import NAME, find_checkpoint, load_trainer_state, read_log
from hibio.config.files import ConfigError, dump_config, load_config
from hibio.config.run import RunConfig
from hibio.config.training import ObjectiveConfig, StageConfig
from hibio.run import Job, build, expand
from hibio.training.engine import NotFiniteError
from hibio.training.trainer import Trainer
from tests.hibio.toy import MASKED, REGION, run_config

ROOT = Path(__file__).resolve().parents[2]
N_STEPS = 8  # 1 epoch of stage omics and 3 of stage region, 2 steps each


def one_job(stores: Path, out: Path, **changes) -> Job:
    (job,) = expand(run_config(stores, out, **changes))
    return job


def everything(trainer: Trainer) -> dict:
    """All that a run leaves: weights, optimizer, regions, position, log."""
    log = read_log(trainer.folder / "log.jsonl")
    return {
        "weights": dict(trainer.model.state_dict()),
        "optimizer": trainer.engine.state(),
        "regions": trainer.regions.state(),
        "position": [trainer.step, trainer.stage, trainer.epoch, trainer.batch],
        "log": [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in log],
    }


def assert_same(left, right, where: str = "") -> None:
    """Equal to the last bit, tensor by tensor."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for place, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}/{place}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


@pytest.fixture(scope="module")
def whole(toy_stores, tmp_path_factory) -> dict:
    """What a run without interruption leaves."""
    trainer = build(one_job(toy_stores, tmp_path_factory.mktemp("whole")))
    assert trainer.plan.n_steps() == N_STEPS
    assert trainer.fit()
    return everything(trainer)


def test_the_run_does_what_the_stages_say(whole):
    log = whole["log"]
    assert [record["step"] for record in log] == list(range(N_STEPS))
    assert [record["stage"] for record in log] == ["omics"] * 2 + ["region"] * 6
    assert [record["epoch"] for record in log] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [set(record["terms"]) for record in log] == [set(MASKED)] * 2 + [set(REGION)] * 6
    for record in log:
        weights = MASKED if record["stage"] == "omics" else REGION
        total = sum(weights[name] * value for name, value in record["terms"].items())
        assert record["total"] == pytest.approx(total, rel=1e-5)
        assert record["n"] == 70
    assert whole["position"] == [N_STEPS, 2, 0, 0]
    for rebuilds in whole["regions"].values():
        assert rebuilds.shape == (3, 3, 70)  # the first trees and two rebuilds, three levels
        assert not torch.equal(rebuilds[0], rebuilds[1])


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 6, 7])
def test_a_resumed_run_is_the_whole_run_to_the_bit(toy_stores, tmp_path, whole, cut):
    """Cut inside a stage, at its end (2), and just before a rebuild of the regions (4, 6)."""
    job = one_job(toy_stores, tmp_path)
    first = build(job)
    assert first.fit(until_step=cut) is False
    assert not job.finished
    del first
    second = build(job, resume=True)
    assert second.step == cut
    assert second.fit()
    assert job.finished
    assert_same(everything(second), whole)


def test_many_interruptions_make_no_difference(toy_stores, tmp_path, whole):
    job = one_job(toy_stores, tmp_path)
    for step in (2, 3, 5, 6):
        build(job, resume=True).fit(until_step=step)
    last = build(job, resume=True)
    assert last.fit()
    assert_same(everything(last), whole)


def test_a_crash_goes_back_to_the_last_checkpoint(toy_stores, tmp_path, whole, monkeypatch):
    job = one_job(toy_stores, tmp_path, checkpoint_every=4)
    trainer = build(job)
    step = trainer.engine.step

    def fails_at_five(loss, lr):
        if trainer.step == 5:
            raise RuntimeError("the machine is gone")
        return step(loss, lr)

    monkeypatch.setattr(trainer.engine, "step", fails_at_five)
    with pytest.raises(RuntimeError, match="gone"):
        trainer.fit()
    again = build(job, resume=True)
    assert again.step == 4  # of the last checkpoint
    assert len(read_log(job.folder / "log.jsonl")) == 5  # step 4 will be repeated
    assert again.fit()
    assert_same(everything(again), whole)


IN_STEPS = (
    StageConfig("omics", None, MASKED, steps=2),
    StageConfig("region", None, REGION, rebuild_every=2, steps=6),
)


def test_a_length_in_steps_is_that_length_in_epochs(toy_stores, tmp_path, whole):
    trainer = build(one_job(toy_stores, tmp_path, stages=IN_STEPS))
    assert trainer.fit()
    assert_same(everything(trainer), whole)


def test_a_stage_may_end_inside_an_epoch_and_resumes_anywhere(toy_stores, tmp_path):
    """3 + 4 steps of epochs of two; trees are due every third step and wait for an epoch's end."""
    stages = tuple(
        dataclasses.replace(stage, steps=steps, rebuild_every=every)
        for stage, steps, every in zip(IN_STEPS, (3, 7), (0, 3), strict=True)
    )
    straight = build(one_job(toy_stores, tmp_path / "straight", stages=stages))
    assert straight.fit()
    told = everything(straight)
    assert [(r["stage"], r["epoch"]) for r in told["log"]] == [
        *(("omics", epoch) for epoch in (0, 0, 1)),
        *(("region", epoch) for epoch in (0, 0, 1, 1, 2, 2, 3)),
    ]
    assert {len(trees) for trees in told["regions"].values()} == {3}  # first, after 4, after 6
    job = one_job(toy_stores, tmp_path / "cut", stages=stages, checkpoint_every=1)
    for step in (1, 3, 4, 6, 7):
        build(job, resume=True).fit(until_step=step)
    last = build(job, resume=True)
    assert last.fit()
    assert_same(everything(last), told)


def test_the_seed_decides_everything(toy_stores, tmp_path, whole):
    again = build(one_job(toy_stores, tmp_path / "a"))
    again.fit()
    assert_same(everything(again), whole)
    other = build(one_job(toy_stores, tmp_path / "b", seeds=(1,)))
    other.fit()
    assert not torch.equal(other.model.own_head.weight, again.model.own_head.weight)


def test_a_finished_run_is_left_as_it_is(toy_stores, tmp_path, whole):
    job = one_job(toy_stores, tmp_path)
    build(job).fit()
    state = load_trainer_state(job.folder / NAME)
    assert state["finished"] is True
    again = build(job, resume=True)
    assert again.fit()
    assert_same(everything(again), whole)


def test_a_stop_at_the_very_last_step_is_finished(toy_stores, tmp_path):
    job = one_job(toy_stores, tmp_path)
    assert build(job).fit(until_step=N_STEPS) is True
    assert job.finished


def test_without_a_checkpoint_a_resume_begins_anew(toy_stores, tmp_path):
    trainer = build(one_job(toy_stores, tmp_path), resume=True)
    assert trainer.step == 0
    assert trainer.resume() is False


def test_a_loss_that_is_not_finite_stops_and_names_the_slide(toy_stores, tmp_path, monkeypatch):
    job = one_job(toy_stores, tmp_path, checkpoint_every=1)
    trainer = build(job)
    slide = trainer.plan.dataset[0]
    broken = dataclasses.replace(slide, features_SF=np.full_like(slide.features_SF, np.nan))
    monkeypatch.setitem(trainer.plan.dataset._slides, 0, broken)
    with pytest.raises(
        NotFiniteError, match=r"stage 'region', slides sim001, .*hibio check"
    ) as told:
        trainer.fit()
    assert "spot/contrastive" in str(told.value)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    good = load_trainer_state(find_checkpoint(job.folder))
    assert good["step"] <= trainer.step
    assert build(job, resume=True).step == good["step"]


@pytest.mark.parametrize(("radius", "acts"), [(0.0, True), (60.0, False), (101.0, True)])
def test_a_spatial_contrast_within_whose_radius_there_is_nothing_is_refused(
    toy_stores, tmp_path, radius, acts
):
    stages = (StageConfig("s", 1, {keys.TERM_SPATIAL: 1.0}),)
    objective = ObjectiveConfig(contrast_um=radius)
    job = one_job(toy_stores, tmp_path, stages=stages, objective=objective)
    told = nullcontext() if acts else pytest.raises(ConfigError, match=r"60 um: the nearest are")
    with told:
        build(job)


def test_a_stage_with_images_needs_a_slide_with_one(toy_stores, tmp_path):
    trainer = build(one_job(toy_stores, tmp_path))
    entries = [dataclasses.replace(e, has_image=False) for e in trainer.plan.dataset.entries]
    trainer.plan.dataset.entries = tuple(entries)
    with pytest.raises(ConfigError, match="stage 'region' needs images, and no training slide"):
        trainer.fit()


def test_regions_keep_their_names_over_rebuilds_and_stay_small_numbers(whole):
    for rebuilds in whole["regions"].values():
        first, second = rebuilds[0][0].numpy(), rebuilds[1][0].numpy()
        kept = np.isin(second, first)
        assert kept.mean() > 0.5
        assert (first == second).mean() > 1 / len(np.unique(first))  # better than by chance


def test_the_log_survives_a_torn_last_line(toy_stores, tmp_path, whole):
    job = one_job(toy_stores, tmp_path)
    build(job).fit(until_step=3)
    with (job.folder / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "stage": "reg')
    last = build(job, resume=True)
    last.fit()
    assert_same(everything(last), whole)


@pytest.mark.parametrize("line", ['{"step": 1', "[1]", "3", '{"seconds": "x"}', '"x"'])
def test_a_log_torn_in_the_middle_is_an_error(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{line}\n{{"step": 2}}\n')
    with pytest.raises(ConfigError, match=r"log\.jsonl: line 1 is no record"):
        read_log(tmp_path / "log.jsonl")
    assert read_log(tmp_path / "none.jsonl") == []


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits_with_its_code(toy_stores, tmp_path, number):
    stages = run_config(toy_stores, tmp_path).stages
    endless = (dataclasses.replace(stages[0], epochs=100_000),)
    config = run_config(toy_stores, tmp_path / "run", stages=endless, bank=False)
    dump_config(config, tmp_path / "long.yaml")
    command = [sys.executable, "train.py", "--config", str(tmp_path / "long.yaml")]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        log = tmp_path / "run" / "hibio" / "fold-patient03" / "seed-0" / "log.jsonl"
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            if log.is_file() and len(log.read_text().splitlines()) >= 3:
                break
            time.sleep(0.05)
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 3, told
    assert "Traceback" not in told
    assert "--resume" in told
    (job,) = expand(load_config(RunConfig, tmp_path / "run" / "config.yaml"))
    resumed = build(job, resume=True)
    assert resumed.step == len(read_log(job.folder / "log.jsonl")) >= 3
    assert resumed.fit(until_step=resumed.step + 2) is False
    assert [r["step"] for r in read_log(job.folder / "log.jsonl")] == list(range(resumed.step))
