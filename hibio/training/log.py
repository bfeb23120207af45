"""Where the numbers of every step go: ``log.jsonl``, and trackers that people look at."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from hibio.checkpoint import read_log
from hibio.config.files import ConfigError
from preprocessing.files import atomic_path

IDS = "trackers.json"  # of a run folder: what each tracker calls the run, so that it goes on


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of a run.

    Attributes:
        folder: of the run; the last three parts of its path are its name.
        after_step: the first step that will be written; above 0 in a run that goes on.
        settings: plain values of its configuration.
        known: what the tracker called the run when it began; "" where it is new.
    """

    folder: Path
    after_step: int
    settings: Mapping[str, Any]
    known: str = ""

    @property
    def name(self) -> str:
        """variant/fold-X/seed-N."""
        return "/".join(self.folder.parts[-3:])


class Tracker(Protocol):
    """What writes a run's numbers to where people look at them.

    Attributes:
        run_id: what it calls the run.
    """

    run_id: str

    def write(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of one step, by name."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder."""

    run_id = ""  # the folder says which run it is

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.after_step)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Tracker`."""
        self._board.close()


class Wandb:
    """A run of Weights & Biases; its own variables (WANDB_PROJECT, WANDB_MODE) say where."""

    def __init__(self, run: Tracked) -> None:
        import wandb

        self.run_id = run.known or uuid.uuid4().hex[:16]
        try:
            self._run = wandb.init(
                id=self.run_id,
                resume="allow",
                name=run.name,
                dir=str(run.folder),
                config=dict(run.settings),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"log.to: wandb does not begin ({error}); log in with `wandb login`, or keep the "
                "run on this machine with WANDB_MODE=offline"
            ) from error

    def write(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class MLflow:
    """A run of MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where."""

    def __init__(self, run: Tracked) -> None:
        import mlflow

        try:
            self._client = mlflow.MlflowClient()
            self.run_id = run.known or self._begin(mlflow, run)
            self._client.update_run(self.run_id, status="RUNNING")
        except mlflow.MlflowException as error:
            raise ConfigError(
                f"log.to: mlflow does not begin ({error}); set MLFLOW_TRACKING_URI to the address "
                "of a tracking server"
            ) from error

    def _begin(self, mlflow: Any, run: Tracked) -> str:
        named = os.environ.get("MLFLOW_EXPERIMENT_NAME", "hibio")
        experiment = mlflow.set_experiment(named)
        begun = self._client.create_run(experiment.experiment_id, run_name=run.name)
        self._client.log_dict(begun.info.run_id, dict(run.settings), "config.json")
        return str(begun.info.run_id)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._client.log_metric(self.run_id, name, value, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self.run_id)


#: Entry of ``log.to`` -> what writes there; each is the name of the package that it needs.
TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
}


def require_trackers(names: Sequence[str]) -> None:
    """See before a run begins that it can be logged.

    Raises:
        ConfigError: the package of a tracker is not installed.
    """
    for name in names:
        if name in TRACKERS and find_spec(name) is None:
            raise ConfigError(
                f'log.to: {name} is not installed: pip install "hibio[tracking]", or take it out'
            )


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step by the names that trackers show: terms, ``run/``, shares of each."""
    run = ("total", "lr", "gradient_norm", "temperature")
    shares = record.get("gradient_shares", {})
    return {
        **record["terms"],
        **{f"run/{name}": record[name] for name in run},
        **{f"gradient_share/{name}": value for name, value in shares.items()},
    }


class RunLog:
    """Appends one record a step to ``log.jsonl``, and tells trackers.

    Args:
        folder: run folder, into which ``log.jsonl`` is written.
        after_step: records at or after this step are dropped first (a resumed run repeats them),
            and a torn last line; the log is replaced as a whole, so a kill leaves one or the other.
        to: entries of :data:`TRACKERS`; what else is named (``jsonl``) is written anyway.
        settings: plain values of the run's configuration, for trackers.
    """

    def __init__(
        self,
        folder: Path,
        after_step: int = 0,
        to: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = [record for record in read_log(path) if record["step"] < after_step]
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        self._trackers = _begin(folder, after_step, to, settings or {})
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """One step: ``step``, ``stage``, ``epoch``, ``total``, ``terms``, ``lr``, ``seconds``..."""
        self._file.write(json.dumps(record) + "\n")
        for tracker in self._trackers:
            tracker.write(scalars(record), record["step"])

    def close(self) -> None:
        """Flush and close all."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _begin(
    folder: Path, after_step: int, to: Sequence[str], settings: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers of a run, which goes on in them where it goes on here."""
    names = [name for name in TRACKERS if name in to]
    path = folder / IDS
    known = json.loads(path.read_text()) if after_step and path.is_file() else {}
    told = {name: Tracked(folder, after_step, settings, known.get(name, "")) for name in names}
    trackers = {name: TRACKERS[name](one) for name, one in told.items()}
    ids = {**known, **{name: one.run_id for name, one in trackers.items() if one.run_id}}
    if ids != known:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(ids) + "\n")
    return list(trackers.values())
