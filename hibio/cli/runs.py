"""`hibio runs`: every run below a folder, how far it is, what it says, and what to do next."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hibio.cli.command import Command

_GRID = "grid.yaml"  # of the folder of a grid


@dataclass(frozen=True)
class RunRow:
    """One run or grid.

    Attributes:
        folder: its ``out``.
        state: ``running``, ``stopped``, ``trained``, ``measured``, or ``broken``.
        jobs: how many are finished, and of how many ("?" where the stores are not there).
        seconds: of all steps that were taken.
        headline: task, metric and mean of the model, of the first task that was measured.
        next: a command, or a file to look at.
    """

    folder: Path
    state: str
    jobs: str
    seconds: float
    headline: str
    next: str


def run_rows(folder: Path) -> list[RunRow]:
    """The runs and grids in and below a folder, by name; a grid's own jobs are a part of it.

    Raises:
        ConfigError: no such folder, or none in it.
    """
    from hibio.checkpoint import CONFIG, PROVENANCE
    from hibio.config.files import ConfigError

    grids = sorted(path.parent for path in folder.rglob(_GRID))
    told = sorted(path.parent for path in folder.rglob(PROVENANCE))
    runs = [one for one in told if (one / CONFIG).is_file() and not {*one.parents} & {*grids}]
    if not grids and not runs:
        raise ConfigError(f"{folder}: no run there; give the 'out' of `hibio train`, or one above")
    return sorted([*map(_grid_row, grids), *map(_run_row, runs)], key=lambda row: str(row.folder))


def _run_row(folder: Path) -> RunRow:
    from hibio.checkpoint import CONFIG
    from hibio.config.files import ConfigError, load_saved
    from hibio.config.run import RunConfig
    from preprocessing.files import holder

    seconds = 0.0
    try:
        seconds = _seconds(folder.glob("*/fold-*/seed-*/log.jsonl"))
        config = load_saved(RunConfig, folder / CONFIG)
        done, of = _finished(folder), _planned(config)
    except ConfigError as error:
        return RunRow(folder, "broken", "", seconds, "", str(error))
    here, config_file = shlex.quote(str(folder)), shlex.quote(str(folder / CONFIG))
    resume = f"hibio train --config {config_file} --resume {here}"
    stores, out = (shlex.quote(str(one)) for one in (config.data.stores, folder / "eval"))
    measure = f"hibio eval --checkpoint {here} --data {stores} --out {out}"
    state, then = ("trained", measure) if of is None or done >= of else ("stopped", resume)
    found = _newest_results(folder)
    if found is not None and state == "trained":
        state, then = "measured", str(found.parent / "report.html")
    if (owner := holder(folder)) is not None:
        state, then = "running", owner
    jobs = f"{done}/{'?' if of is None else of}"
    return RunRow(folder, state, jobs, seconds, _headline(found), then)


def _grid_row(folder: Path) -> RunRow:
    from hibio.checkpoint import PROVENANCE
    from hibio.config.files import ConfigError
    from preprocessing.files import LOCK, holder

    try:
        seconds = _seconds(folder.rglob("log.jsonl"))
    except ConfigError as error:
        return RunRow(folder, "broken", "", 0.0, "", str(error))
    provenance = _read(folder / PROVENANCE)
    results = folder / "results.json"
    facts = _read(results).get("data", {})
    missing, of = facts.get("n_missing"), facts.get("n_jobs", "?")
    headline = _headline(results)
    if missing == 0:
        return RunRow(folder, "measured", f"{of}/{of}", seconds, headline, f"{folder}/report.html")
    done = "?" if missing is None else of - missing
    owners = (holder(lock.parent) for lock in folder.rglob(LOCK))
    if (owner := next(filter(None, owners), None)) is not None:
        return RunRow(folder, "running", f"{done}/{of}", seconds, headline, owner)
    again = str(provenance.get("command", "hibio ablate, as it was begun"))
    return RunRow(folder, "stopped", f"{done}/{of}", seconds, headline, again)


def _seconds(logs: Iterable[Path]) -> float:
    from hibio.checkpoint import read_log

    return sum(float(record.get("seconds", 0.0)) for log in logs for record in read_log(log))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _finished(folder: Path) -> int:
    """How many jobs of a run came to their end.

    Raises:
        ConfigError: a checkpoint is damaged.
    """
    from hibio.checkpoint import find_checkpoint, load_trainer_state

    found = map(find_checkpoint, folder.glob("*/fold-*/seed-*"))
    return sum(bool(load_trainer_state(one)["finished"]) for one in found if one is not None)


def _planned(config: Any) -> int | None:
    """How many jobs a run has; None where its stores are not there to count the patients in."""
    from hibio.config.files import ConfigError
    from hibio.run import expand
    from preprocessing.errors import DataError

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what is left out was told when it began
            return len(expand(config))
    except (ConfigError, DataError, OSError):
        return None


def _newest_results(folder: Path) -> Path | None:
    """The results that were written last, of ``hibio eval`` into a folder of the run."""
    found = list(folder.glob("*/results.json"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _headline(results: Path | None) -> str:
    from eval.results import headlines, task_record

    content = {} if results is None else _read(results)
    for task, metric in headlines(content):
        record = task_record(content, task)
        own = record.models.get(record.main, {}).get(metric)
        if own is not None:
            return f"{task} {metric} {own['mean']:.3f}"
    return ""


def format_rows(rows: Sequence[RunRow]) -> Iterator[str]:
    """Aligned lines; what to do next stands below each."""
    table = [("run", "state", "jobs", "seconds", "headline")]
    table += [(str(r.folder), r.state, r.jobs, f"{r.seconds:.0f}", r.headline) for r in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for number, line in enumerate(table):
        cells = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()
        if number:
            yield f"    {rows[number - 1].next}"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="DIR")


def run(options: argparse.Namespace) -> int:
    """``hibio runs``."""
    print("\n".join(format_rows(run_rows(options.folder))))
    return 0


COMMANDS = (
    Command(
        "runs",
        "list the runs in a folder: state, jobs, seconds, headline, and what to do next",
        "hibio runs runs",
        run,
        _arguments,
    ),
)
