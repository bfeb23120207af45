"""The table of an ablation: every value, means, spread, and the paired difference to the reference.

A difference is taken on the same slide of the same fold, seeds averaged first, and its interval
draws slides again (`eval.intervals.paired_bootstrap`): it speaks of the slides, not of new cohorts,
and slides of one patient are more alike than it knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from eval.glossary import lower_is_better
from eval.intervals import PairedInterval, holm, paired_bootstrap
from hibio.ablation.config import BASELINES, GridConfig
from hibio.ablation.plan import GridJob
from hibio.ablation.scores import Scores, is_current, read_scores
from hibio.config import ConfigError
from hibio.schema import nearest

PLACE = ["fold", "unit"]
VALUE_COLUMNS = [
    *("cell", "row", "task", "metric", "fold", "seed", "unit", "value", "chance", "quantity"),
]
COST_COLUMNS = ["cell", "row", "seed", "fold", "n_parameters", "train_s", "measure_s"]


@dataclass(frozen=True)
class Tables:
    """What the jobs that are done say.

    Attributes:
        values: one line a value: `VALUE_COLUMNS`; ``unit`` is the slide (or patient) that it is
            of, ``quantity`` what was measured there.
        costs: one line a trained job: `COST_COLUMNS`.
        summary: one line a cell, row, task and metric; see `summarise`.
        missing: names of the jobs that are not done.
    """

    values: pd.DataFrame
    costs: pd.DataFrame
    summary: pd.DataFrame
    missing: tuple[str, ...]


def make_tables(grid: GridConfig, jobs: Sequence[GridJob]) -> Tables:
    """Join the scores of all jobs that are done.

    Raises:
        ConfigError: no job is done, or a metric of the grid is in none of them.
    """
    values: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    missing = []
    for job in jobs:
        scores = _current(job)
        if scores is None:
            missing.append(job.name)
            continue
        values += _values(job, scores)
        if job.row != BASELINES:
            costs.append({name: scores.facts[name] for name in COST_COLUMNS})
    if not values:
        raise ConfigError(
            f"none of the {len(jobs)} jobs of {grid.out} is done; run `hibio ablate` without "
            "--report-only first"
        )
    frame = pd.DataFrame(values, columns=VALUE_COLUMNS)
    _check_metrics(grid, frame)
    cost = pd.DataFrame(costs, columns=COST_COLUMNS)
    summary = summarise(grid, frame, cost, points_of(jobs))
    return Tables(frame, cost, summary, tuple(missing))


def points_of(jobs: Sequence[GridJob]) -> dict[str, dict[str, Any]]:
    """Cell -> axis -> value, in the order of the jobs."""
    return {job.cell.name: dict(job.cell.point) for job in jobs}


def _current(job: GridJob) -> Scores | None:
    """Scores of a job that were made with the settings of now."""
    scores = read_scores(job)
    if scores is None or not (job.cell.cohort is None or job.cell.stores.is_dir()):
        return None
    return scores if is_current(job, scores) else None


def _values(job: GridJob, scores: Scores) -> Iterator[dict[str, Any]]:
    for task, result in scores.tasks.items():
        for model, metrics in result["models"].items():
            for metric, entry in metrics.items():
                for key, value in zip(entry["keys"], entry["values"], strict=True):
                    fold, seed, unit = key.split("/", 2)
                    yield {
                        "cell": job.cell.name,
                        "row": model,
                        "task": task,
                        "metric": metric,
                        "fold": fold,
                        "seed": int(seed),
                        "unit": unit,
                        "value": np.nan if value is None else float(value),
                        "chance": entry.get("chance"),
                        "quantity": entry["unit"],
                    }


def _check_metrics(grid: GridConfig, values: pd.DataFrame) -> None:
    for task, metrics in grid.tasks.items():
        known = sorted(values.loc[values.task == task, "metric"].unique())
        for metric in metrics:
            if metric not in known:
                near = nearest(metric, known)
                hint = f"; did you mean {near!r}?" if near else ""
                raise ConfigError(
                    f"tasks.{task}: no done job has the metric {metric!r}{hint} (metrics: "
                    f"{', '.join(known) or 'none'})"
                )


def summarise(
    grid: GridConfig,
    values: pd.DataFrame,
    costs: pd.DataFrame,
    points: dict[str, dict[str, Any]],
) -> pd.DataFrame:
    """One line a cell, row, task and metric.

    Args:
        grid: metrics, order of the rows, reference, bootstrap.
        values: `VALUE_COLUMNS`.
        costs: `COST_COLUMNS`.
        points: cell -> axis -> value.

    Returns:
        The axes; ``group``, ``row``, ``task``, ``metric``; ``mean``, ``std`` and ``n`` of all
        defined values, ``std_seeds`` of the seeds' means; ``values``; ``difference``, ``low``,
        ``high``, ``p``, ``p_holm`` (over the rows of a cell and metric), ``units`` and ``better``
        (units where the row is better) against the reference; ``n_parameters`` and ``train_s``
        (mean of the row's jobs).
    """
    lines: list[dict[str, Any]] = []
    for cell, point in points.items():
        for task, metrics in grid.tasks.items():
            for metric in metrics:
                mine = values.task.eq(task) & values.metric.eq(metric) & values.cell.eq(cell)
                found = values[mine & values.value.notna()]
                block = _block(grid, found, task, metric)
                lines += [{"cell": cell, **point, **line} for line in block]
    summary = pd.DataFrame(lines)
    if summary.empty:
        return summary
    per_row = costs.groupby(["cell", "row"], as_index=False)[["n_parameters", "train_s"]].mean()
    return summary.merge(per_row, on=["cell", "row"], how="left")


def _block(
    grid: GridConfig, found: pd.DataFrame, task: str, metric: str
) -> Iterator[dict[str, Any]]:
    """The lines of one cell and metric."""
    present = list(dict.fromkeys(found.row))
    order = [row for row in grid.ordered_rows if row in present]
    order += [row for row in present if row not in grid.rows]
    reference = found[found.row == grid.reference]
    gains = {
        row: paired_units(found[found.row == row], reference, by_seed=row in grid.rows)
        for row in order
        if row != grid.reference
    }
    tests = {
        row: paired_bootstrap(gain, np.zeros(len(gain)), draws=grid.draws, level=grid.level)
        for row, gain in gains.items()
        if len(gain)
    }
    corrected = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    sign = -1.0 if lower_is_better(metric, task) else 1.0
    for row in order:
        own = found[found.row == row]
        by_seed = own.groupby("seed").value.mean()
        line = {
            "group": grid.group_of(row) if row in grid.rows else BASELINES,
            "row": row,
            "task": task,
            "metric": metric,
            "mean": own.value.mean(),
            "std": own.value.std(ddof=1),
            "n": len(own),
            "std_seeds": by_seed.std(ddof=1),
            "values": " ".join(f"{value:.4f}" for value in own.value),
        }
        test = tests.get(row)
        better = np.nan if test is None else int((sign * gains[row] > 0).sum())
        yield {**line, **_difference(test), "p_holm": corrected.get(row), "better": better}


def _difference(test: PairedInterval | None) -> dict[str, Any]:
    names = ("low", "high", "p", "units")
    if test is None:
        return {"difference": np.nan, **dict.fromkeys(names, np.nan)}
    return {"difference": test.mean, **{name: getattr(test, name) for name in names}}


def paired_units(own: pd.DataFrame, reference: pd.DataFrame, *, by_seed: bool) -> np.ndarray:
    """Differences (U,) of one row to the reference, one a fold and slide (patient) that both have.

    Label columns, blocks and draws of one slide (``slide:column:draw``) are paired one by one and
    averaged: they are no slides of their own.

    Args:
        own: values of the row in one cell and metric.
        reference: those of the reference.
        by_seed: pair the same seed (trained rows), then average; else average the reference over
            its seeds first (baselines, which have none).
    """
    if by_seed:
        keys = [*PLACE, "seed"]
        both = own.merge(reference, on=keys, suffixes=("", "_reference"))
        gain = (both.value - both.value_reference).groupby([both.fold, both.unit]).mean()
    else:
        first, second = (frame.groupby(PLACE).value.mean() for frame in (own, reference))
        gain = (first - second).dropna()
    slides = np.array([str(unit).split(":")[0] for _, unit in gain.index], dtype=object)
    by_slide = gain.groupby([gain.index.get_level_values("fold"), slides]).mean()
    return by_slide.to_numpy(dtype=np.float64)
