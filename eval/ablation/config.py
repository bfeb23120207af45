"""The configuration of an ablation: which rows are compared, over which cohorts, by which numbers.

``configs/ablation/*.yaml`` holds such files; `docs/ablation.md` explains each key by an example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.errors import FoldError
from eval.settings import find_task
from hibio.config.files import ConfigError, find_config, load_config
from preprocessing.errors import did_you_mean

BASELINES = "baselines"


@dataclass(frozen=True)
class CohortsConfig:
    """Simulated cohorts in place of stores, one for every combination of the swept knobs.

    Attributes:
        simulate: settings of the simulator (`preprocessing.simulate.SimulateConfig`).
        like: name of the cohort whose settings stand where ``simulate`` and ``sweep`` say nothing
            (`SimulateConfig.like`); null for the simulator's defaults.
        sweep: simulator setting -> values.
        patch_um: width of the patches, micrometres; null: the pitch of the simulated array.
        patch_px: and in pixels.
    """

    simulate: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    patch_um: float | None = None
    patch_px: int = 32
    like: str | None = None


@dataclass(frozen=True)
class TermConfig:
    """One part of the method, for the map of where it pays.

    Attributes:
        row: the row that has it.
        control: the row with the matched control in its place.
    """

    row: str
    control: str


@dataclass(frozen=True)
class GridConfig:
    """An ablation.

    Attributes:
        run: configuration that every row starts from, relative to the grid's file, or a shipped
            one's name.
        out: folder of the jobs, the table and the report.
        rows: name -> dotted config key -> value; see `hibio.config.files.changed`.
        reference: the row that the others are compared with, on the same slides.
        tasks: evaluation task -> metrics of it that are tabled; the first one leads.
        settings: dotted config key -> value for every row (``seeds`` and ``folds`` too).
        evaluate: ``TASK.key`` -> value, how every row is measured; see `eval.settings`.
        sweep: dotted config key -> values; every row is run at every combination.
        cohorts: simulated cohorts; null for the stores of ``--data``.
        groups: heading -> rows, the order of the table; rows in no group come last.
        terms: heading -> row and control, for the figures of gain over the reference.
        baselines: also the baselines that need no training, once a fold.
        level: coverage of the bootstrap intervals.
        draws: of the bootstrap.
    """

    run: Path
    out: Path
    rows: dict[str, dict[str, Any]]
    reference: str
    tasks: dict[str, tuple[str, ...]]
    settings: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    cohorts: CohortsConfig | None = None
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    terms: dict[str, TermConfig] = field(default_factory=dict)
    baselines: bool = False
    level: float = 0.95
    draws: int = 2000

    def __post_init__(self) -> None:
        self._check_names()
        self._check_tasks()
        sweeps = {**self.sweep, **({} if self.cohorts is None else self.cohorts.sweep)}
        for name, values in sweeps.items():
            if not values or any(values.count(value) > 1 for value in values):
                raise ValueError(f"sweep.{name} needs values that differ, found {list(values)}")
        if not 0.0 < self.level < 1.0 or self.draws < 100:
            raise ValueError(f"level {self.level} must lie in (0, 1), draws {self.draws} above 99")

    def _check_names(self) -> None:
        for name in self.rows:
            if name == BASELINES or not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(
                    f"rows.{name}: a row's name is letters, digits, - and _, and not {BASELINES!r}"
                )
        asked = [("reference", self.reference)]
        asked += [(f"groups.{g}", row) for g, rows in self.groups.items() for row in rows]
        for title, term in self.terms.items():
            asked += [(f"terms.{title}.row", term.row), (f"terms.{title}.control", term.control)]
        for where, row in asked:
            if row not in self.rows:
                hint = did_you_mean(row, list(self.rows), cutoff=0.5)
                raise ValueError(
                    f"{where} names the row {row!r}, which is not there{hint} (rows: "
                    f"{', '.join(self.rows) or 'none'})"
                )
        grouped = [row for rows in self.groups.values() for row in rows]
        twice = sorted({row for row in grouped if grouped.count(row) > 1})
        if twice:
            raise ValueError(f"groups name the row {twice[0]!r} twice; a row is in one group")

    def _check_tasks(self) -> None:
        if not self.tasks or not all(self.tasks.values()):
            raise ValueError(
                "tasks needs a task and its metrics, e.g. retrieval: [image_to_omics/recall@10%]"
            )
        for name in self.tasks:
            try:
                pooled = find_task(name).pooled
            except FoldError as error:
                raise ValueError(f"tasks: {error}") from error
            if pooled:
                raise ValueError(
                    f"tasks: {name} scores all folds of a seed together, which single jobs cannot; "
                    "run `hibio eval --checkpoint OUT/CELL` on the folder of a cell for it"
                )

    @property
    def ordered_rows(self) -> tuple[str, ...]:
        """The rows, group by group; those in no group last."""
        grouped = [row for rows in self.groups.values() for row in rows]
        return (*grouped, *(row for row in self.rows if row not in grouped))

    def group_of(self, row: str) -> str:
        """Heading that a row stands under; "" for none."""
        return next((group for group, rows in self.groups.items() if row in rows), "")


def load_grid(path: Path, overrides: Iterable[str] = (), out: Path | None = None) -> GridConfig:
    """Read a YAML grid; ``run`` becomes a path from here.

    Overrides such as ``"settings.threads=1"`` are applied last, ``out`` replaces that of the file.

    Raises:
        ConfigError: unreadable, an unknown key, a row or task that is not there.
    """
    path = find_config(path)
    grid = load_config(GridConfig, path, overrides)
    run = find_config(grid.run, path.parent)
    return dataclasses.replace(grid, run=run, out=out or grid.out)


def axis_name(key: str, others: Mapping[str, Any]) -> str:
    """Short name of a swept key: its last part, or all of it where another key ends alike."""
    short = key.rpartition(".")[2]
    alike = [other for other in others if other.rpartition(".")[2] == short]
    return short if len(alike) == 1 else key


def refuse_equal_rows(resolved: Mapping[str, Any]) -> None:
    """Two rows with the same settings, row -> plain configuration, measure nothing and count twice.

    Raises:
        ConfigError: two of them are equal.
    """
    names = list(resolved)
    for position, name in enumerate(names):
        for other in names[:position]:
            if resolved[name] == resolved[other]:
                raise ConfigError(
                    f"rows {other!r} and {name!r} have the same settings; remove one, or check "
                    "the keys of both"
                )
