"""Running a grid: train and measure what is not done yet, then join the table.

Targets, vocabulary and gene sets of a fold are those that the reference row fits on the training
slides, so that rows with other genes or other gene sets are measured by the same ruler.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from eval.ablation.config import BASELINES, GridConfig, load_grid
from eval.ablation.plan import GridJob, make_cohort, plan
from eval.ablation.report import write_tables
from eval.ablation.table import is_done, state, write_scores
from eval.embed import Checkpoint, load_checkpoint
from eval.folds.assemble import IMPUTATION, representations, slide_data, stored_features
from eval.folds.baselines import baselines, random_sets, raw_features
from eval.folds.fold import Fold, Representation
from eval.folds.hidden_genes import hide, with_representations
from eval.results import NO_FOLD, TaskResult
from eval.settings import task_configs
from eval.tasks import find_task
from hibio.artifacts import Artifacts
from hibio.checkpoint import NAME as CHECKPOINT
from hibio.checkpoint import read_log, write_provenance
from hibio.config.files import ConfigError, dump_config
from hibio.data.splits import SlideEntry
from hibio.run import fitted, split_of, train_job


def run(options: argparse.Namespace) -> int:
    """Run, list or report a grid as the options of `hibio ablate` say."""
    grid = load_grid(options.config, options.set, options.out)
    if options.list:
        print(listing(grid, plan(grid, options.data)))
        return 0
    report = run_grid(
        grid,
        options.data,
        index=options.index,
        parts=options.parts,
        report_only=options.report_only,
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


@dataclass(frozen=True)
class Ruler:
    """What the rows of one fold are measured with; nothing in it depends on a row or a seed.

    Attributes:
        fold: slides and targets, without models.
        entries: every slide of the fold.
        artifacts: of the reference row.
        raw: stored image features, which stand beside an embedding in some read-outs; or None.
    """

    fold: Fold
    entries: tuple[SlideEntry, ...]
    artifacts: Artifacts
    raw: Representation | None


def make_ruler(job: GridJob, tasks: Collection[str]) -> Ruler:
    """Fit the reference's artifacts on the training slides and read the slides of the fold.

    Args:
        job: any job of the fold.
        tasks: names of the tasks; ``imputation`` hides genes.

    Raises:
        ConfigError: the fold holds no slide out that can be measured.
    """
    reference = job.reference
    split = split_of(reference.config, reference.fold)
    train_entries, test_entries = split.train, split.test
    if reference.fold == NO_FOLD:  # the transductive setting: measured on what was trained on
        train_entries, test_entries = (), split.train
    if not test_entries:
        raise ConfigError(f"fold {reference.fold} of {job.cell.name} holds no slide out")
    artifacts = fitted(reference)
    train = tuple(slide_data(entry, artifacts) for entry in train_entries)
    test = tuple(slide_data(entry, artifacts) for entry in test_entries)
    entries = (*train_entries, *test_entries)
    hidden = None
    if IMPUTATION in tasks:
        hidden = hide(train, test, artifacts.genes, artifacts.tfidf.transform)
    fold = Fold(
        name=reference.fold,
        seed=reference.seed,
        genes=artifacts.genes,
        train=train,
        test=test,
        anchors=artifacts.anchors,
        factors=artifacts.factors,
        hidden=hidden,
    )
    features = stored_features(entries, reference.config.data.image)
    raw = None
    if features is not None:
        raw = raw_features((*train, *test), features, artifacts.factors)
    return Ruler(fold, entries, artifacts, raw)


def measure(
    ruler: Ruler, checkpoint: Checkpoint, configs: Mapping[str, Any]
) -> tuple[list[TaskResult], float]:
    """Run tasks on one trained row.

    Args:
        ruler: of its fold.
        checkpoint: the trained row.
        configs: task -> its config.

    Returns:
        Results that hold this row alone, and the seconds it took.
    """
    started = time.perf_counter()
    row = checkpoint.variant
    models = representations(checkpoint, ruler.entries, ruler.artifacts)
    fold = dataclasses.replace(
        ruler.fold, seed=checkpoint.seed, models=tuple(models), raw_features=ruler.raw
    )
    if fold.hidden is not None:
        hidden = with_representations(
            fold.hidden, [checkpoint], ruler.entries, ruler.artifacts, with_baselines=False
        )
        fold = dataclasses.replace(fold, hidden=hidden)
    results = []
    for name, config in _bar(configs):
        with threadpool_limits(1):
            result = find_task(name).run(fold, config)
        own = {model: values for model, values in result.models.items() if model == row}
        results.append(
            dataclasses.replace(result, models=own, rows={row: result.rows[row]} if own else {})
        )
    return results, time.perf_counter() - started


def measure_baselines(ruler: Ruler, configs: Mapping[str, Any]) -> tuple[list[TaskResult], float]:
    """Run tasks on everything that needs no training: once a fold.

    Args:
        ruler: of the fold.
        configs: task -> its config.
    """
    started = time.perf_counter()
    fold, artifacts = ruler.fold, ruler.artifacts
    fitted_on = fold.train or fold.test
    held_out = fold.test if fold.train else ()
    models = list(baselines(fitted_on, held_out, artifacts.factors))
    models += [] if ruler.raw is None else [ruler.raw]
    random = None
    if artifacts.database is not None:
        idf, genes = np.asarray(artifacts.tfidf.idf), list(artifacts.genes)
        random = random_sets(artifacts.database, genes, idf, fitted_on, fold.seed)
    fold = dataclasses.replace(fold, models=tuple(models), random_sets=random)
    if fold.hidden is not None:
        hidden = with_representations(
            fold.hidden, [], ruler.entries, artifacts, with_baselines=True
        )
        fold = dataclasses.replace(fold, hidden=hidden)
    results = []
    for name, config in _bar(configs):
        with threadpool_limits(1):
            results.append(find_task(name).run(fold, config))
    return results, time.perf_counter() - started


def _bar(configs: Mapping[str, Any]) -> tqdm[tuple[str, Any]]:
    return tqdm(configs.items(), desc="measure", disable=None, leave=False)


class Bench:
    """Runs jobs one after another and keeps the ruler of the fold that they share.

    Args:
        tasks: names of the evaluation tasks.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self._key: tuple[str, str] | None = None
        self._ruler: Ruler | None = None

    def ruler(self, job: GridJob) -> Ruler:
        """What the job's fold is measured with, made when the fold changes."""
        key = (job.cell.name, job.job.fold)
        if self._ruler is None or self._key != key:
            self._ruler, self._key = make_ruler(job, self.tasks), key
        return self._ruler

    def run(self, job: GridJob) -> Path:
        """Train (or continue) and measure one job; returns its scores.

        Raises:
            InterruptedError: stopped by a signal; the training is saved.
        """
        configs = task_configs(job.evaluate, self.tasks)
        if job.row == BASELINES:
            results, seconds = measure_baselines(self.ruler(job), configs)
            return write_scores(job, {"measure_s": seconds}, results)
        train_s = self._train(job)
        checkpoint = load_checkpoint(job.folder / CHECKPOINT)
        results, seconds = measure(self.ruler(job), checkpoint, configs)
        _refuse_nothing(job, results)
        facts = {
            "n_parameters": sum(p.numel() for p in checkpoint.model.parameters()),
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
) -> Path | None:
    """Run a grid, or a part of it; what is done already is kept.

    Args:
        grid: the ablation.
        data: folder of stores.
        index: run only this job (or part), from 1; the table is then left to ``report_only``.
        parts: see `part_of`.
        report_only: run nothing, join what is done.

    Returns:
        The report, or None where only a part was run.

    Raises:
        ConfigError: see `plan`; or nothing is done yet and ``report_only`` is on.
        InterruptedError: stopped by a signal; everything is saved.
    """
    jobs = plan(grid, data)
    chosen = [] if report_only else part_of(jobs, index, parts)
    grid.out.mkdir(parents=True, exist_ok=True)
    if index is None and not report_only:
        dump_config(grid, grid.out / "grid.yaml")
        write_provenance(grid.out / "provenance.json")
    bench = Bench(list(grid.tasks))
    for job in chosen:
        if job.cell.cohort is not None:
            make_cohort(job.cell.cohort)
        if not is_done(job, bench.tasks):
            print(f"[{job.number}/{len(jobs)}] {job.name}", flush=True)
            bench.run(job)
    if index is not None and not report_only:
        return None
    return write_tables(grid, jobs)
