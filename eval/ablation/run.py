"""Running a grid: train and measure what is not done yet, then join the table.

Targets, vocabulary and gene sets of a fold are those that the reference row fits on the training
slides, so that rows with other genes or other gene sets are measured by the same ruler.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from eval.ablation.config import BASELINES, GridConfig, load_grid
from eval.ablation.plan import GridJob, make_cohort, plan
from eval.ablation.report import FILES, write_tables
from eval.ablation.table import is_done, state, write_scores
from eval.embed import Checkpoint, load_checkpoint
from eval.folds.assemble import Ruler, make_ruler
from eval.results import NO_FOLD, TaskResult
from eval.settings import find_task, task_configs
from eval.tables import open_folder
from hibio.checkpoint import NAME as CHECKPOINT
from hibio.checkpoint import PROVENANCE, read_log, steps_taken, write_provenance
from hibio.config.files import ConfigError, dump_config
from hibio.data.splits import Split
from hibio.run import fitted, split_of, train_job
from preprocessing.files import locked, refuse_others
from preprocessing.workers import each


def run(options: argparse.Namespace) -> int:
    """Run, list or report a grid as the options of `hibio ablate` say."""
    grid = load_grid(options.config, options.set, options.out)
    if options.list:
        print(listing(grid, plan(grid, options.data)))
        return 0
    index, parts, report_only = options.index, options.parts, options.report_only
    report = run_grid(
        grid,
        options.data,
        index=index,
        parts=parts,
        report_only=report_only,
        workers=options.workers,
        scheduler=options.scheduler,
    )
    again = f"hibio ablate --config {options.config}"
    again += f" --data {options.data}" if options.data else ""
    again += f" --out {options.out}" if options.out else ""
    again += "".join(f" --set '{setting}'" for setting in options.set)
    if report is None:
        print(f"done; when every job is: {again} --report-only")
    else:
        print(f"wrote {grid.out / 'table.csv'}\nreport: {report}")
    return 0


def ruler_of(job: GridJob, tasks: Collection[str]) -> Ruler:
    """Fit the reference's artifacts on the training slides and read the slides of a job's fold.

    Raises:
        ConfigError: the fold holds no slide out that can be measured.
    """
    reference = job.reference
    split = split_of(reference.config, reference.fold)
    seen = {entry.slide_id for entry in split.seen_patients}
    if seen:
        unseen = tuple(entry for entry in split.test if entry.slide_id not in seen)
        test = unseen or split.test  # rows of both kinds would be one mean
        told = "not measured" if unseen else "there are no others, so results are on seen patients"
        print(f"fold {reference.fold}: slides of trained patients ({', '.join(seen)}): {told}")
        split = dataclasses.replace(split, test=test)
    if reference.fold == NO_FOLD and not split.test:  # transductive: measured on training slides
        split = Split(reference.fold, (), split.train)
    if not split.test:
        raise ConfigError(f"fold {reference.fold} of {job.cell.name} holds no slide out")
    image = reference.config.data.image
    return make_ruler(split, fitted(reference), image, tasks)


def measure(
    ruler: Ruler, configs: Mapping[str, Any], checkpoint: Checkpoint | None, seed: int
) -> tuple[list[TaskResult], float]:
    """Run tasks on one trained row, or without a checkpoint on everything that needs no training.

    Returns:
        Results that hold this row alone (or all baselines), and the seconds it took.
    """
    started = time.perf_counter()
    trained = [] if checkpoint is None else [checkpoint]
    fold = ruler.with_models(trained, seed, with_baselines=checkpoint is None)
    results = []
    for name, config in tqdm(configs.items(), desc="measure", disable=None, leave=False):
        with threadpool_limits(1):
            result = find_task(name).run(fold, config)
        if checkpoint is not None:
            row = checkpoint.variant
            own = {m: values for m, values in result.models.items() if m == row}
            rows = {row: result.rows[row]} if own else {}
            result = dataclasses.replace(result, models=own, rows=rows)
        results.append(result)
    return results, time.perf_counter() - started


class Bench:
    """Runs jobs one after another and keeps the ruler of the fold that they share."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self._key: tuple[str, str] | None = None
        self._ruler: Ruler | None = None

    def ruler(self, job: GridJob) -> Ruler:
        """What the job's fold is measured with, made when the fold changes."""
        key = (job.cell.name, job.job.fold)
        if self._ruler is None or self._key != key:
            self._ruler, self._key = ruler_of(job, self.tasks), key
        return self._ruler

    def run(self, job: GridJob) -> Path:
        """Train (or continue) and measure one job; returns its scores.

        Raises:
            InterruptedError: stopped by a signal; the training is saved.
        """
        configs = task_configs(job.evaluate, self.tasks)
        if job.row == BASELINES:
            results, seconds = measure(self.ruler(job), configs, None, job.reference.seed)
            return write_scores(job, {"measure_s": seconds}, results)
        train_s = self._train(job)
        checkpoint = load_checkpoint(job.folder / CHECKPOINT)
        results, seconds = measure(self.ruler(job), configs, checkpoint, checkpoint.seed)
        _refuse_nothing(job, results)
        facts = {
            "n_parameters": sum(p.numel() for p in checkpoint.model.parameters()),
            "steps": steps_taken(job.folder / CHECKPOINT),
            "train_s": train_s,
            "measure_s": seconds,
        }
        return write_scores(job, facts, results)

    def _train(self, job: GridJob) -> float:
        """Seconds of the training: of this process, and of the steps that were done before it.

        What is fitted on the training slides before the first step is shared by the rows of a
        fold, so it is not counted: the row that came first would look slow.
        """
        before = sum(record["seconds"] for record in read_log(job.folder / "log.jsonl"))
        if job.job.finished:
            return before
        if not job.job.started:
            fitted(job.job)
        started = time.perf_counter()
        train_job(job.job, resume=True)
        return before + time.perf_counter() - started


def _refuse_nothing(job: GridJob, results: Sequence[TaskResult]) -> None:
    """A row without a single value is a mistake in the grid, not a result."""
    if not any(result.models for result in results):
        notes = "; ".join(note for result in results for note in result.notes)
        raise ConfigError(f"{job.name}: no task gave a value ({notes}); choose other tasks")


def part_of(jobs: Sequence[GridJob], index: int | None, parts: int | None) -> list[GridJob]:
    """The jobs that this process runs.

    Args:
        jobs: all of them.
        index: from 1: of a job, or of a part when ``parts`` is given; None for all.
        parts: into how many runs of neighbouring jobs the list is cut (neighbours share what is
            fitted on a fold).

    Raises:
        ConfigError: an index outside the list, or parts without an index.
    """
    if index is None:
        if parts is not None:
            raise ConfigError("--parts needs --index: which of the parts to run, from 1")
        return list(jobs)
    n_parts = len(jobs) if parts is None else parts
    if not 1 <= n_parts <= len(jobs):
        raise ConfigError(f"--parts {n_parts}: the grid has {len(jobs)} jobs; give 1 to that many")
    if not 1 <= index <= n_parts:
        raise ConfigError(f"--index {index}: the numbers go from 1 to {n_parts}; see --list")
    bounds = [round(part * len(jobs) / n_parts) for part in range(n_parts + 1)]
    return list(jobs[bounds[index - 1] : bounds[index]])


def listing(grid: GridConfig, jobs: Sequence[GridJob]) -> str:
    """A line a job: number, cell, row, fold, seed, state."""
    tasks = list(grid.tasks)
    width = max(len(job.name) for job in jobs)
    return "\n".join(f"{j.number:>5}  {j.name:<{width}}  {state(j, tasks)}" for j in jobs)


def run_grid(
    grid: GridConfig,
    data: Path | None = None,
    *,
    index: int | None = None,
    parts: int | None = None,
    report_only: bool = False,
    workers: int = 0,
    scheduler: str | None = None,
) -> Path | None:
    """Run a grid, or a part of it; what is done already is kept.

    Args:
        grid: the ablation.
        data: folder of stores.
        index: run only this job (or part), from 1; the table is then left to ``report_only``.
        parts: see `part_of`.
        report_only: run nothing, join what is done.
        workers: processes, each on one job at a time; see `preprocessing.workers.each`.
        scheduler: address of a Dask cluster that takes their place.

    Returns:
        The report, or None where only a part was run.

    Raises:
        ConfigError: see `plan`; or nothing is done yet and ``report_only`` is on.
        InterruptedError: stopped by a signal; everything is saved.
    """
    jobs = plan(grid, data)
    chosen = [] if report_only else part_of(jobs, index, parts)
    signs = {grid.out / PROVENANCE: '"packages"', grid.out / "results.json": '"n_missing"'}
    refuse_others(signs, [grid.out / name for name in ("grid.yaml", *FILES)])
    open_folder(grid.out)
    if index is None and not report_only:
        write_provenance(grid.out / PROVENANCE)  # first: it says who made the others
        dump_config(grid, grid.out / "grid.yaml")
    bench = Bench(list(grid.tasks))
    for job in tqdm(chosen, desc="ablate", unit="job", disable=None):
        if job.cell.cohort is not None:
            make_cohort(job.cell.cohort)
    if workers or scheduler:
        todo = [job for job in chosen if not is_done(job, bench.tasks)]
        calls = {job.name: partial(run_grid, grid, data, index=job.number) for job in todo}
        each(calls, workers, scheduler, "ablate", "job")
    for job in chosen:
        if not is_done(job, bench.tasks):
            with tqdm.external_write_mode():
                print(f"[{job.number}/{len(jobs)}] {job.name}", flush=True)
            with locked(job.folder):
                bench.run(job)
    if index is not None and not report_only:
        return None
    return write_tables(grid, jobs)
