"""Where the numbers of a run go: log.jsonl, and trackers, by fakes and, offline, by themselves."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hibio.checkpoint import read_log
from hibio.config.files import ConfigError
from hibio.config.run import LogConfig
from hibio.run import build, expand, train_all
from hibio.training import log as log_module
from hibio.training.log import IDS, RunLog
from tests.hibio.toy import run_config

RECORD: dict[str, Any] = {
    "step": 7,
    "terms": {"spot/contrastive": 2.5, "image/expression": 1.25},
    "total": 3.75,
    "lr": 1e-3,
    "gradient_norm": 0.5,
    "temperature": 0.1,
    "gradient_shares": {"spot/contrastive": 0.75},
}
#: What a tracker shows of it.
SHOWN = {
    "spot/contrastive": 2.5,
    "image/expression": 1.25,
    "run/total": 3.75,
    "run/lr": 1e-3,
    "run/gradient_norm": 0.5,
    "run/temperature": 0.1,
    "gradient_share/spot/contrastive": 0.75,
}


def written(folder, *to: str, step: int = 7, after_step: int = 0) -> None:
    """A log of one record."""
    log = RunLog(folder, after_step, to, {"seed": 3})
    log.write({**RECORD, "step": step})
    log.close()


def test_tensorboard_has_every_term_and_setting(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    written(tmp_path, "jsonl", "tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert {name: value[0].step for name, value in values.items()} == dict.fromkeys(SHOWN, 7)
    assert {name: value[0].value for name, value in values.items()} == pytest.approx(SHOWN)
    assert read_log(tmp_path / "log.jsonl") == [RECORD]
    assert not (tmp_path / IDS).exists()


class FakeWandb(SimpleNamespace):
    """What of wandb is used, and what it was told."""

    Error = RuntimeError

    def __init__(self) -> None:
        super().__init__(runs=[], logged=[], finished=0)

    def init(self, **told: Any) -> Any:
        self.runs.append(told)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((values, step)), finish=self._finish
        )

    def _finish(self) -> None:
        self.finished += 1


def test_wandb_is_told_every_step_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "hibio/fold-A/seed-0"
    written(folder, "wandb")
    written(folder, "wandb", step=8, after_step=8)
    written(folder, "wandb")  # begun anew
    assert fake.logged == [(SHOWN, 7), (SHOWN, 8), (SHOWN, 7)]
    assert fake.finished == 3
    first, second, third = fake.runs
    assert (first["name"], first["config"]) == ("hibio/fold-A/seed-0", {"seed": 3})
    assert first["id"] == second["id"] != third["id"]
    assert json.loads((folder / IDS).read_text()) == {"wandb": third["id"]}


def test_a_tracker_that_does_not_begin_says_what_to_do(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setattr(fake, "init", lambda **told: (_ for _ in ()).throw(RuntimeError("no key")))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ConfigError, match=r"no key.*wandb login.*WANDB_MODE=offline"):
        written(tmp_path, "wandb")


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    written(tmp_path, "wandb")
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert run.name.endswith(json.loads((tmp_path / IDS).read_text())["wandb"])


def test_mlflow_itself_in_files(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    folder = tmp_path / "hibio/fold-A/seed-0"
    written(folder, "mlflow")
    written(folder, "mlflow", step=8, after_step=8)
    client = mlflow.MlflowClient()
    (experiment,) = (one for one in client.search_experiments() if one.name == "mine")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("hibio/fold-A/seed-0", "FINISHED")
    assert run.data.metrics == pytest.approx(SHOWN)
    history = client.get_metric_history(run.info.run_id, "run/total")
    assert [one.step for one in history] == [7, 8]


class FakeMlflow:
    """What of mlflow is used, and what it was told."""

    MlflowException = RuntimeError

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.experiment = ""

    def MlflowClient(self) -> Any:
        def begun(experiment_id: str, run_name: str) -> Any:
            self.told.append(("begun", experiment_id, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        return SimpleNamespace(
            create_run=begun,
            update_run=lambda run_id, status: self.told.append(("update", run_id, status)),
            log_dict=lambda run_id, what, file: self.told.append(("config", run_id, what)),
            log_metric=lambda run_id, name, value, step: self.told.append((run_id, name, step)),
            set_terminated=lambda run_id: self.told.append(("end", run_id)),
        )

    def set_experiment(self, name: str) -> Any:
        self.experiment = name
        return SimpleNamespace(experiment_id="e1")


def test_mlflow_is_told_every_step_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    folder = tmp_path / "hibio/fold-A/seed-0"
    written(folder, "mlflow")
    begun = [("begun", "e1", "hibio/fold-A/seed-0"), ("config", "r1", {"seed": 3})]
    ended = [("end", "r1")]
    middle = [("r1", name, 7) for name in SHOWN]
    assert fake.told == [*begun, ("update", "r1", "RUNNING"), *middle, *ended]
    assert fake.experiment == "hibio"
    fake.told.clear()
    written(folder, "mlflow", step=8, after_step=8)
    assert fake.told == [("update", "r1", "RUNNING"), *(("r1", n, 8) for n in SHOWN), *ended]


def test_a_run_tells_its_trackers_and_names_what_is_missing(toy_stores, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(log_module, "find_spec", lambda name: None if name == "mlflow" else name)
    config = run_config(toy_stores, tmp_path, log=LogConfig(("jsonl", "mlflow")))
    with pytest.raises(ConfigError, match=r"mlflow is not installed: pip install \"hibio\[track"):
        train_all(config)
    assert not (tmp_path / "config.yaml").exists()
    config = run_config(toy_stores, tmp_path, log=LogConfig(("jsonl", "wandb")))
    (job,) = expand(config)
    build(job).fit(until_step=2)
    assert [step for _, step in fake.logged] == [0, 1]
    assert fake.runs[0]["config"]["log"] == {"to": ["jsonl", "wandb"]}


def test_the_log_that_everything_reads_is_always_written():
    with pytest.raises(ValueError, match="keep jsonl"):
        LogConfig(("tensorboard",))
