"""The run's log: JSON lines for programs, TensorBoard for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hibio.training_log import read_log
from preprocessing.atomic import atomic_path


class RunLog:
    """Appends one record a step to ``log.jsonl`` and to TensorBoard.

    Args:
        folder: run folder; ``log.jsonl`` and ``tensorboard/`` are written into it.
        after_step: records at or after this step are dropped first (a resumed run repeats them),
            and a torn last line; the log is replaced as a whole, so a kill leaves one or the other.
    """

    def __init__(self, folder: Path, after_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = [record for record in read_log(path) if record["step"] < after_step]
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step)

    def write(self, record: dict[str, Any]) -> None:
        """One step: ``step``, ``stage``, ``epoch``, ``total``, ``terms``, ``lr``, ``seconds``..."""
        self._file.write(json.dumps(record) + "\n")
        step = record["step"]
        for name, value in record["terms"].items():
            self._board.add_scalar(name, value, step)
        for name in ("total", "lr", "gradient_norm", "temperature"):
            self._board.add_scalar(f"run/{name}", record[name], step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()
