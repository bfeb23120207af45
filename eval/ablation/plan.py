"""The jobs of an ablation, numbered from 1: cell x fold x row x seed, in an order that never moves.

A cell is one combination of the swept values, of simulated cohorts too; rows are compared within a
cell. Seeds of a row stand together, so that the artifacts that they share are fitted once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval.ablation.config import BASELINES, CohortsConfig, GridConfig, axis_name, refuse_equal_rows
from eval.settings import task_configs
from hibio.config.files import ConfigError, changed, explained, load_config, to_dict
from hibio.config.run import RunConfig
from hibio.config.schema import SchemaError, build_section
from hibio.data.splits import expand_folds, read_entries, with_counts
from hibio.run import Job
from pathways import load_pathways
from preprocessing.errors import DataError
from preprocessing.patches import PatchConfig
from preprocessing.run import prepare
from preprocessing.simulate import SimulateConfig, simulate_cohort
from preprocessing.store.read import stores_in

ONE_CELL = "all"  # its name where nothing is swept


@dataclass(frozen=True)
class Cohort:
    """What is simulated and where its stores lie.

    Attributes:
        point: swept simulator setting -> value.
        config: all simulator settings.
        patch: of the stores.
        stores: folder of the stores; whole as soon as it exists.
    """

    point: Mapping[str, Any]
    config: SimulateConfig
    patch: PatchConfig
    stores: Path

    @property
    def patients(self) -> tuple[str, ...]:
        """Patient names, as the simulator gives them."""
        return tuple(f"patient{number + 1:02d}" for number in range(self.config.n_patients))


def cohorts_of(config: CohortsConfig, out: Path) -> Iterator[Cohort]:
    """The cohorts of a grid, which go below its folder ``out``; none of them simulated yet.

    Raises:
        ConfigError: a setting that the simulator does not have, or out of its range.
    """
    patch = PatchConfig(config.patch_um, config.patch_px)
    preset = {} if config.like is None else asdict(SimulateConfig.like(config.like))
    for values in itertools.product(*config.sweep.values()):
        point = dict(zip(config.sweep, values, strict=True))
        try:
            settings = build_section(SimulateConfig, {**preset, **config.simulate, **point})
        except SchemaError as problem:
            raise ConfigError(f"cohorts.simulate: {problem}") from problem
        text = json.dumps([asdict(settings), asdict(patch)], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        yield Cohort(point, settings, patch, out / "cohorts" / digest)


def make_cohort(cohort: Cohort) -> None:
    """Simulate and prepare a cohort where that is not done; safe beside other processes.

    It is made in a folder of this process and renamed when it is whole, so that a killed run
    leaves no half cohort, and two processes at worst make it twice.

    Raises:
        DataError: the simulator or the preparation refuses.
    """
    if cohort.stores.is_dir():
        return
    settings = ", ".join(f"{name} {value}" for name, value in cohort.point.items())
    print(f"simulate a cohort of {cohort.config.n_slides} slides ({settings or 'one'})", flush=True)
    own = cohort.stores.with_name(f".{cohort.stores.name}.{os.getpid()}.part")
    shutil.rmtree(own, ignore_errors=True)
    try:
        database = load_pathways("default")
        programmes = {name: list(database.genes_of(name)) for name in database.names}
        manifest = simulate_cohort(own / "slides", programmes, cohort.config)
        report = prepare(manifest, own / "stores", patch=cohort.patch)
        if report.failed:
            raise DataError(f"a simulated cohort could not be prepared:\n{report}")
        shutil.copy2(own / "slides" / "truth.json", own / "stores" / "truth.json")
        _take_name(own / "stores", cohort.stores)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _take_name(made: Path, final: Path) -> None:
    try:
        made.rename(final)
    except OSError:
        if not final.is_dir():  # else another process was faster; both hold the same
            raise


@dataclass(frozen=True)
class Cell:
    """One combination of the swept values.

    Attributes:
        name: of its folder; ``all`` where nothing is swept.
        point: axis -> value.
        cohort: what is simulated for it; None for given stores.
        stores: its stores.
        sweep: dotted config key -> value.
    """

    name: str
    point: Mapping[str, Any]
    cohort: Cohort | None
    stores: Path
    sweep: Mapping[str, Any]


@dataclass(frozen=True)
class GridJob:
    """One training and its evaluation, or the baselines of one fold.

    Attributes:
        number: from 1, for ``--index``.
        cell: where it stands.
        row: its row; ``baselines`` for those.
        job: what `hibio.run` trains; of the baselines, the reference (never trained).
        reference: the job whose fitted artifacts the fold is measured with.
        evaluate: task -> settings that it is measured with in place of the defaults.
    """

    number: int
    cell: Cell
    row: str
    job: Job
    reference: Job
    evaluate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where its checkpoint and its scores go."""
        return self.job.folder

    @property
    def name(self) -> str:
        """cell/row/fold-X/seed-N."""
        return "/".join(self.folder.parts[-4:])


def plan(grid: GridConfig, data: Path | None = None) -> list[GridJob]:
    """Every job, on the stores in ``data`` or ``data.stores``; nothing is simulated or fitted yet.

    Raises:
        ConfigError: a row that no configuration can be built from, two equal rows, no store, or
            both stores and simulated cohorts.
    """
    if data is not None and grid.cohorts is not None:
        raise ConfigError(
            "this grid simulates its cohorts, so --data cannot be used; leave it out, or remove "
            "the grid's section 'cohorts'"
        )
    base = {**to_dict(load_config(RunConfig, grid.run)), "variants": {}}
    base = changed(base, grid.settings, "settings")
    evaluate = changed({}, grid.evaluate, "evaluate")
    task_configs(evaluate, grid.tasks)  # refused before anything is trained
    jobs: list[GridJob] = []
    for cell in _cells(grid, base, data):
        jobs += _cell_jobs(grid, cell, base, first=len(jobs) + 1)
    return [dataclasses.replace(job, evaluate=evaluate) for job in jobs]


def _cells(grid: GridConfig, base: Mapping[str, Any], data: Path | None) -> Iterator[Cell]:
    cohorts: list[Cohort | None] = [None]
    if grid.cohorts is not None:
        cohorts = [*cohorts_of(grid.cohorts, grid.out)]
    keys = {**grid.sweep, **({} if grid.cohorts is None else grid.cohorts.sweep)}
    for cohort in cohorts:
        for values in itertools.product(*grid.sweep.values()):
            sweep = dict(zip(grid.sweep, values, strict=True))
            point = {axis_name(key, keys): value for key, value in sweep.items()}
            point |= {} if cohort is None else dict(cohort.point)
            name = ",".join(f"{axis}={_word(value)}" for axis, value in point.items())
            stores = cohort.stores if cohort else data or Path(base["data"]["stores"])
            yield Cell(name or ONE_CELL, point, cohort, stores, sweep)


def _word(value: Any) -> str:
    """A swept value as part of a folder's name."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in str(value))


def _cell_jobs(
    grid: GridConfig, cell: Cell, base: Mapping[str, Any], first: int
) -> Iterator[GridJob]:
    folder = grid.out / cell.name
    configs = {row: _row_config(grid, cell, base, row) for row in grid.ordered_rows}
    refuse_equal_rows({row: {**to_dict(c), "variant": ""} for row, c in configs.items()})
    reference = configs[grid.reference]
    number = itertools.count(first)

    def job(config: RunConfig, row: str, fold: str, seed: int) -> Job:
        place = folder / row / f"fold-{fold}" / f"seed-{seed}"
        return Job(dataclasses.replace(config, folds=(fold,), seeds=(seed,)), fold, seed, place)

    for fold in _folds(cell, reference.folds):
        measured = job(reference, grid.reference, fold, reference.seeds[0])
        for row, config in configs.items():
            for seed in config.seeds:
                yield GridJob(next(number), cell, row, job(config, row, fold, seed), measured)
        if grid.baselines:
            own = job(reference, BASELINES, fold, reference.seeds[0])
            yield GridJob(next(number), cell, BASELINES, own, measured)


def _row_config(grid: GridConfig, cell: Cell, base: Mapping[str, Any], row: str) -> RunConfig:
    where = f"rows.{row}"
    data = changed(changed(base, grid.rows[row], where), cell.sweep, "sweep")
    data |= {"variant": row, "out": str(grid.out / cell.name)}
    data["data"]["stores"] = str(cell.stores)
    try:
        config = build_section(RunConfig, data)
    except SchemaError as problem:
        raise ConfigError(f"{where}: {explained(problem)}") from problem
    if to_dict(config)["folds"] != base["folds"]:
        raise ConfigError(f"{where}: folds must be the same for every row; set settings.folds")
    return config


def _folds(cell: Cell, folds: tuple[str, ...]) -> list[str]:
    if cell.cohort is not None:
        return list(cell.cohort.patients) if list(folds) == ["each"] else list(folds)
    return expand_folds(with_counts(read_entries(stores_in(cell.stores)), "training"), folds)
