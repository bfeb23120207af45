"""What each term gains over the reference, beside its matched control: the numbers of the map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from eval.glossary import lower_is_better
from eval.intervals import paired_bootstrap
from hibio.ablation.config import GridConfig
from hibio.ablation.table import PLACE, paired_units

Points = Mapping[str, Mapping[str, Any]]


def sign_of(task: str, metric: str) -> float:
    """1 where higher values are better, -1 where lower ones are."""
    return -1.0 if lower_is_better(metric, task) else 1.0


def gains_by_seed(grid: GridConfig, values: pd.DataFrame, row: str, sign: float) -> pd.DataFrame:
    """Gain of a row over the reference, one number a cell and seed.

    Args:
        grid: the reference.
        values: of one metric, all cells and rows.
        row: the row.
        sign: see `sign_of`.

    Returns:
        Columns ``cell``, ``seed``, ``gain``: the mean over the slides that both have.
    """
    keys = ["cell", *PLACE, "seed"]
    known = values[values.value.notna()]
    own, reference = known[known.row == row], known[known.row == grid.reference]
    both = own.merge(reference, on=keys, suffixes=("", "_reference"))
    both["gain"] = sign * (both.value - both.value_reference)
    means = both.groupby(["cell", "seed"], sort=False).gain.mean()
    return means.reset_index()


def term_table(grid: GridConfig, values: pd.DataFrame, points: Points) -> pd.DataFrame:
    """One line a term, cell and metric: gain, gain of the control, and term against control.

    Args:
        grid: terms, metrics, bootstrap.
        values: all values.
        points: cell -> axis -> value.

    Returns:
        ``term``, ``task``, ``metric``, ``cell`` and the axes; ``gain``, ``gain_low``,
        ``gain_high`` and ``gain_p`` against the reference; the same as ``control_*`` of the
        control, and as ``over_*`` of the term against its control. Positive is better.
    """
    lines = [
        {"term": title, "task": task, "metric": metric, "cell": cell, **points[cell], **numbers}
        for title in grid.terms
        for task, metrics in grid.tasks.items()
        for metric in metrics
        for cell, numbers in _lines(grid, values, title, task, metric)
    ]
    return pd.DataFrame(lines)


def _lines(
    grid: GridConfig, values: pd.DataFrame, title: str, task: str, metric: str
) -> Iterator[tuple[str, dict[str, float]]]:
    term, sign = grid.terms[title], sign_of(task, metric)
    known = values[values.task.eq(task) & values.metric.eq(metric) & values.value.notna()]
    for cell, part in known.groupby("cell", sort=False):
        frames = {row: part[part.row == row] for row in (term.row, term.control, grid.reference)}
        pairs = {
            "gain": (term.row, grid.reference),
            "control": (term.control, grid.reference),
            "over": (term.row, term.control),
        }
        line: dict[str, float] = {}
        for name, (first, second) in pairs.items():
            gain = sign * paired_units(frames[first], frames[second], by_seed=True)
            line |= _test(name, gain, grid)
        yield str(cell), line


def _test(name: str, gain: np.ndarray, grid: GridConfig) -> dict[str, float]:
    ends = [f"{name}_{part}" for part in ("low", "high", "p", "units")]
    if not len(gain):
        return {name: np.nan, **dict.fromkeys(ends, np.nan)}
    found = paired_bootstrap(gain, np.zeros(len(gain)), draws=grid.draws, level=grid.level)
    numbers = (found.low, found.high, found.p, found.units)
    return {name: found.mean, **dict(zip(ends, numbers, strict=True))}
