"""`python -m tests.hibio.killed_training STORES OUT POINT...`: a run that dies at each point.

First the run goes through without a kill, into OUT/whole; then into OUT/killed, in a process of
its own for each point, which kills itself there; then once more to the end. Each process is a fork
of this one, which has imported everything and started no thread.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._dynamo  # the optimizer imports it when it begins: here once, so that no fork has to

from hibio import run as run_module
from hibio.checkpoint import NAME, PREVIOUS
from hibio.config.run import RunConfig
from hibio.config.training import StageConfig
from hibio.run import train_all
from hibio.training import checkpoint, log
from tests.hibio.toy import MASKED, REGION, run_config


def die() -> None:
    """As `kill -9` does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def half_the_weights() -> None:
    """Half of the weights are written, of a checkpoint that is not the first."""
    save_file = checkpoint.save_file

    def half(weights: dict[str, torch.Tensor], path: Path) -> None:
        save_file(weights, path)
        if (path.parents[1] / NAME).exists():
            os.truncate(path, path.stat().st_size // 2)
            die()

    checkpoint.save_file = half


def between_the_renames() -> None:
    """The old checkpoint has left its name, the new one has not taken it."""
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if target.name == PREVIOUS:
            die()
        return moved

    Path.rename = renamed  # type: ignore[method-assign]


def without_checksums() -> None:
    """The checkpoint is written, its checksums are not."""
    checkpoint.write_checksums = lambda folder: die()


def before_logging() -> None:
    """The weights are updated, the second step is not logged."""
    write, calls = log.RunLog.write, []

    def second(self: log.RunLog, record: dict[str, object]) -> None:
        calls.append(1)
        if len(calls) == 2:
            die()
        write(self, record)

    log.RunLog.write = second  # type: ignore[method-assign]


def in_the_log() -> None:
    """The log is being rewritten after a resume."""
    atomic_path = log.atomic_path

    @contextmanager
    def torn(path: Path) -> Iterator[Path]:
        with atomic_path(path) as temporary:
            yield temporary
            die()

    log.atomic_path = torn


def before_the_sum_of_the_bank() -> None:
    """The bank is there, its checksum is not."""
    run_module.add_checksum = lambda path: die()


POINTS: dict[str, Callable[[], None]] = {
    "weights": half_the_weights,
    "renames": between_the_renames,
    "checksums": without_checksums,
    "step": before_logging,
    "log": in_the_log,
    "bank": before_the_sum_of_the_bank,
}


def config_of(stores: Path, out: Path) -> RunConfig:
    """A toy run of six steps, one thread, saved after every epoch (two steps)."""
    stages = (StageConfig("omics", 1, MASKED), StageConfig("region", 2, REGION, rebuild_every=1))
    return run_config(stores, out, stages=stages, checkpoint_every=2, threads=1)


def in_child(work: Callable[[], object]) -> int:
    """Start a fork that does the work; gives its id. It exits with 0, or 1 after an error."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except Exception:  # noqa: BLE001 - shown, and told by the exit code
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def train(stores: Path, out: Path, point: str) -> int:
    """Train in a fork, dying at a point; gives how it ended, as `Popen.returncode` does."""

    def work() -> None:
        POINTS.get(point, lambda: None)()
        train_all(config_of(stores, out), resume=out.exists())

    return os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])


if __name__ == "__main__":
    stores, out = Path(sys.argv[1]), Path(sys.argv[2])
    ended = [train(stores, out / "whole", "none")]
    ended += [train(stores, out / "killed", point) for point in (*sys.argv[3:], "none")]
    print("ended:", *ended)
