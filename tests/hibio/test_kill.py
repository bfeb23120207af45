"""Runs that are killed, stopped, out of disk, or given a NaN: nothing is lost."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hibio.bank import read_bank
from hibio.checkpoint import (
    NAME,
    PREVIOUS,
    damaged_files,
    load_trainer_state,
    read_log,
    verify_files,
)
from hibio.cli.command import STOPPED
from hibio.config.files import dump_config
from hibio.config.training import StageConfig
from hibio.run import Job, build, expand, train_all
from hibio.training.engine import NotFiniteError
from hibio.training.log import RunLog
from hibio.training.process_group import ProcessGroup, on_stop, stops_at_once
from tests.hibio.killed_training import POINTS
from tests.hibio.test_trainer import assert_same
from tests.hibio.toy import MASKED, SPOT, run_config

ROOT = Path(__file__).resolve().parents[2]
JOB = "hibio/fold-patient03/seed-0"


# ------------------------------------------------------------------ killed
@pytest.mark.timeout(180)
def test_a_run_killed_at_every_point_ends_as_the_whole_run(toy_stores, tmp_path):
    """In a row, each in a resumed process; then weights, optimizer, log and bank are the same."""
    command = [sys.executable, "-m", "tests.hibio.killed_training", toy_stores, tmp_path, *POINTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    killed = " ".join(["-9"] * len(POINTS))
    assert f"ended: 0 {killed} 0" in done.stdout, done.stdout + done.stderr
    whole, survived = (tmp_path / name / JOB for name in ("whole", "killed"))
    assert_same_run(survived, whole)
    left = {path.name for path in survived.iterdir()}
    assert left == {"checkpoint", "checkpoint.previous", "log.jsonl"}


def assert_same_run(one: Path, other: Path) -> None:
    """Everything that two runs leave is the same to the last bit."""
    for folder in (one / NAME, other / NAME):
        assert damaged_files(folder) == {}
    assert_same(*(load_file(folder / NAME / "model.safetensors") for folder in (one, other)))
    assert_same(load_trainer_state(one / NAME), load_trainer_state(other / NAME))
    banks = [vars(read_bank(folder / NAME / "bank.h5")) for folder in (one, other)]
    for name, value in banks[0].items():
        same = value != banks[1][name]
        assert same.nnz == 0 if name == "tfidf" else not same.any()
    logs = [read_log(folder / "log.jsonl") for folder in (one, other)]
    timeless = [[{k: r[k] for k in r if "seconds" not in k} for r in log] for log in logs]
    assert timeless[0] == timeless[1]
    assert len(logs[0]) == 6


def test_the_log_is_replaced_as_a_whole_on_resume(tmp_path, monkeypatch):
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(5))
    (tmp_path / "log.jsonl").write_text(lines + '{"step": 5, "ter')

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        RunLog(tmp_path, after_step=3)
    assert len(read_log(tmp_path / "log.jsonl")) == 5
    monkeypatch.undo()
    RunLog(tmp_path, after_step=3).close()
    assert (tmp_path / "log.jsonl").read_text() == lines[: lines.index('{"step": 3}')]


# ------------------------------------------------------------------ stopped
def start(config, tmp_path: Path, *more: str) -> "subprocess.Popen[str]":
    dump_config(config, tmp_path / "run.yaml")
    command = [sys.executable, "train.py", "--config", str(tmp_path / "run.yaml"), *more]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_until(process: "subprocess.Popen[str]", ready) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None and not ready():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]
    assert ready()


@pytest.mark.timeout(180)
def test_ctrl_c_finishes_the_step_saves_and_exits_with_zero(toy_stores, tmp_path):
    """And the command that it prints goes on from there. SIGTERM is in test_trainer."""
    config = run_config(
        toy_stores, tmp_path / "run", stages=(StageConfig("omics", 9_999, MASKED),), bank=False
    )
    process = start(config, tmp_path)
    log = tmp_path / "run" / JOB / "log.jsonl"
    wait_until(process, lambda: log.is_file() and len(read_log(log)) >= 3)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == STOPPED, told
    assert "Traceback" not in told
    assert f"--config {tmp_path}/run/config.yaml --resume {tmp_path}/run" in told
    verify_files(tmp_path / "run" / JOB / NAME)
    state = load_trainer_state(tmp_path / "run" / JOB / NAME)
    assert state["step"] == len(read_log(log)) >= 3


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_before_the_first_step_exits_as_stopped_too(toy_stores, tmp_path, number):
    """While slides are read and artifacts fitted: no step to finish, nothing to save."""
    process = start(run_config(toy_stores, tmp_path / "run"), tmp_path)
    wait_until(process, lambda: (tmp_path / "run" / "config.yaml").is_file())
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == STOPPED, told
    assert f"--resume {tmp_path}/run" in told
    assert "Traceback" not in told


def test_a_signal_after_the_last_step_is_not_forgotten(toy_stores, tmp_path, monkeypatch):
    """It comes while the last checkpoint is written: that is finished, then the run stops."""
    config = run_config(toy_stores, tmp_path, stages=(StageConfig("spot", 1, SPOT),))
    (job,) = expand(config)
    trainer = build(job)
    write_config = trainer.write_config

    def signalled(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write_config(path)

    trainer.write_config = signalled
    monkeypatch.setattr("hibio.run.build", lambda *_, **__: trainer)
    with pytest.raises(InterruptedError, match=r"step 2 of 2 .*--resume"):
        train_all(config)
    assert job.finished
    assert not (job.folder / NAME / "bank.h5").exists()
    monkeypatch.undo()
    train_all(config, resume=True)
    assert damaged_files(job.folder / NAME) == {}
    assert (job.folder / NAME / "bank.h5").exists()


def test_a_signal_while_the_processes_agree_is_not_forgotten(toy_stores, tmp_path):
    """It comes after this process has told the others that it goes on."""
    stages = (StageConfig("spot", 2, SPOT),)
    (job,) = expand(run_config(toy_stores, tmp_path, stages=stages, bank=False))
    trainer = build(job)

    class Waiting(ProcessGroup):
        def any(self, flag: bool) -> bool:
            if trainer.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return flag

    trainer.group = Waiting()
    assert not trainer.fit()
    assert (trainer.step, trainer.plan.n_steps(), trainer.interrupted) == (2, 4, True)


def test_signals_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []
    with on_stop(lambda: seen.append("asked")):
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["asked"]
        with pytest.raises(KeyboardInterrupt):  # the second one stops at once
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(InterruptedError, match="go on so"), stops_at_once(lambda: "go on so"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_is_lost_in_a_callback_comes_again(capsys):
    """Python only prints what is raised in a weakref callback, and goes on."""

    class Thing:
        pass

    def lose_it() -> None:
        thing = Thing()
        callback = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del thing
        assert callback() is None
        reached.append("went on")
        time.sleep(20)

    reached: list[str] = []
    with pytest.raises(InterruptedError, match="go on so"), stops_at_once(lambda: "go on so"):
        lose_it()
    assert reached == ["went on"]
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------ out of disk
FULL = """
import resource, sys
from hibio.cli import main
from hibio.training import checkpoint
from pathlib import Path
save = checkpoint.save_file
def limited(weights, path):
    if (path.parents[1] / "checkpoint").exists():  # from the second checkpoint on
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    save(weights, path)
checkpoint.save_file = limited
sys.exit(main(["train", "--config", sys.argv[1]]))
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("limit", [3_000, 150_000])
def test_a_full_disk_leaves_the_last_checkpoint(toy_stores, tmp_path, limit):
    """The system refuses files over the limit: the weights, or the larger state of the trainer."""
    config = run_config(toy_stores, tmp_path / "run", checkpoint_every=2)
    dump_config(config, tmp_path / "run.yaml")
    code = FULL.format(limit=limit)
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hibio:")]
    assert "could not be written" in line
    assert "checkpoint is whole, as it was" in line
    assert "MiB are free" in line
    folder = tmp_path / "run" / JOB
    verify_files(folder / NAME)
    assert not (folder / "checkpoint.tmp").exists()  # gives its space back
    (job,) = expand(config)
    assert build(job, resume=True).step == 2


# ------------------------------------------------------------------ not finite
def test_a_planted_nan_stops_before_the_update_and_is_kept(toy_stores, tmp_path):
    """The file names the slide; after it is prepared again, the run goes on to the same end."""
    stores = tmp_path / "stores"
    stores.mkdir()
    for path in toy_stores.glob("*.h5"):
        (stores / path.name).write_bytes(path.read_bytes())
    job = one_job(stores, tmp_path / "run")
    good = build(one_job(stores, tmp_path / "good"))
    good.fit()
    trainer = build(job)
    broken = dataclasses.replace(
        trainer.plan.dataset[1],
        features_SF=np.full_like(trainer.plan.dataset[1].features_SF, np.nan),
    )
    trainer.plan.dataset._slides[1] = broken
    with pytest.raises(NotFiniteError, match=r"slides sim002, .*not_finite\.json.*then resume"):
        trainer.fit()
    kept = json.loads((job.folder / "not_finite.json").read_text())
    assert kept["offending_slides"] == ["sim002"]
    assert kept["step"] == trainer.step
    assert kept["stage"] == "spot"
    assert kept["terms"]["spot/contrastive"] == "nan"
    (slide,) = kept["slides"]
    assert slide["inputs_not_finite"]["features_SF"] >= len(slide["spots"]) > 0
    assert set(slide["spots"]) <= set(range(70))
    assert kept["seed"] == 0
    assert isinstance(kept["step_seed"], int)
    for value in trainer.model.state_dict().values():
        assert torch.isfinite(value).all()
    again = build(job, resume=True)  # reads the slide from its store, which is sound
    assert again.step <= kept["step"]
    again.fit()
    assert_same(again.model.state_dict(), good.model.state_dict())


def one_job(stores: Path, out: Path) -> Job:
    stages = (StageConfig("spot", 3, SPOT),)
    (job,) = expand(run_config(stores, out, stages=stages, checkpoint_every=2))
    return job


def test_a_diverging_step_names_all_its_slides(toy_stores, tmp_path):
    """Where every input is fine, each slide of the step may be the cause."""
    trainer = build(one_job(toy_stores, tmp_path))
    with torch.no_grad():
        trainer.model.log_scale.fill_(float("nan"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(NotFiniteError):
        trainer.fit()
    kept = json.loads((trainer.folder / "not_finite.json").read_text())
    assert kept["offending_slides"] == [slide["slide_id"] for slide in kept["slides"]]
    assert kept["slides"][0]["inputs_not_finite"] == {}
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())
    assert trainer.step == 0
    assert not (trainer.folder / PREVIOUS).exists()
