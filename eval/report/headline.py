"""The headline table: this checkpoint against its best baseline, split by split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.compare.paired import MIN_FOLDS, Comparison, compare
from eval.measures.intervals import headline_interval
from eval.report.numbers import MISSING, decimals_for, is_number, number
from eval.results import Better, TaskRecord, task_record
from preprocessing.pages import Bullets, Cell, Line, Part, Table, Text

NOTE = (
    "Interval: 95 % percentile bootstrap of this checkpoint's mean over what is named in brackets "
    "(slides, patients in annotation and outcome, folds for pooled metrics), seeds together. Best "
    "baseline: the one with the best mean on these same test values, controls included, oracles "
    "and transductive read-outs not. Difference: this checkpoint minus that baseline on the same "
    "fold, seed and slide (seeds averaged where one of both has a single one), averaged within a "
    "fold, ± the standard error over folds (over slides when there is one fold); positive means "
    f"better also where lower values are better. A verdict needs at least {MIN_FOLDS} folds and "
    "two standard errors; folds share training data, so the error is rather too small."
)


def best_model(
    entries: Mapping[str, Mapping[str, Any]], better: Better, names: Sequence[str]
) -> str | None:
    """Name with the best finite mean among `names`; None without one, or where none is better."""
    usable = [name for name in names if name in entries and is_number(entries[name].get("mean"))]
    if not usable or better == "none":
        return None
    choose = min if better == "low" else max
    return choose(usable, key=lambda name: float(entries[name]["mean"]))


def headline_section(results: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> list[Part]:
    """The table and how to read it.

    Args:
        results: content of results.json.
        rows: task and metric; one without results is shown with dashes.
    """
    tasks = [(task_record(results, task), metric) for task, metric in rows]
    mains = list(dict.fromkeys(task.main for task, _ in tasks))
    names = (
        *("question", f"{', '.join(mains)}, 95 % interval", "best baseline", "its value"),
        *("difference", "better in", "chance", "verdict"),
    )
    body = [_headline_row(task, metric) for task, metric in tasks]
    warnings = [line for one in tasks for line in control_warnings(*one)]
    parts: list[Part] = [Table(names, body), Text(NOTE, "soft")]
    return [*parts, Bullets(warnings)] if warnings else parts


def control_warnings(task: TaskRecord, metric: str) -> list[str]:
    """One sentence for each control that this checkpoint does not beat on a headline metric."""
    entries, better = task.entries(metric), task.better(metric)
    mine: Any = entries.get(task.main, {}).get("mean")
    lines = []
    for name, entry in entries.items():
        mean = entry.get("mean")
        if task.role(name) != "control" or not is_number(mean) or not is_number(mine):
            continue
        if better != "none" and (mean == mine or (mean < mine) == (better == "low")):
            lines.append(
                f"Not beaten: the control {name} reaches {number(mean)} on {task.task}: "
                f"{metric}, this checkpoint {number(mine)}."
            )
    return lines


def _headline_row(task: TaskRecord, metric: str) -> Line:
    entries = task.entries(metric)
    rivals = [n for n in entries if task.role(n) not in ("model", "variant", "oracle")]
    best = best_model(entries, task.better(metric), rivals)
    mine = entries.get(task.main, {})
    outcome = compare(mine, entries[best], task.sign(metric)) if best and mine else None
    small = f"{task.task}: {metric}"
    if task.better(metric) != "high":
        small += f" ({task.direction(metric)})"
    verdict = _verdict(mine, best, outcome)
    if entries and task.better(metric) == "none":
        verdict = f"{task.direction(metric)}; evaluate again to compare"
    cells = (
        Cell(task.task, "words", below=(small,)),
        Cell(mean_and_spread(mine), below=_interval(task, metric)),
        Cell(best or MISSING, "words"),
        mean_and_spread(entries[best]) if best else MISSING,
        _difference(outcome),
        _wins(outcome) if outcome else MISSING,
        chance_of(entries.values()),
        Cell(verdict, "words"),
    )
    return Line(cells)


def _interval(task: TaskRecord, metric: str) -> tuple[str, ...]:
    """Interval of this checkpoint's mean, with what it was drawn over."""
    own = task.models.get(task.main) or {}
    found = headline_interval(own, metric) if metric in own else None
    if found is None:
        return ()
    return (f"{number(found.low)} to {number(found.high)} ({found.over})",)


def mean_and_spread(entry: Mapping[str, Any]) -> str:
    """Mean ± standard deviation in the mean's own number of digits; a dash when missing."""
    mean, std = entry.get("mean"), entry.get("std")
    shown = number(mean)
    if shown == MISSING or not is_number(std) or entry.get("n") == 1:
        return shown
    return f"{shown} ± {number(std, decimals_for(float(mean)))}"  # type: ignore[arg-type]


def chance_of(entries: Any) -> str:
    """Chance level of a metric, a range when models differ, a dash when none is stated."""
    levels = [float(e["chance"]) for e in entries if is_number(e.get("chance"))]
    if not levels:
        return MISSING
    low, high = number(min(levels)), number(max(levels))
    return low if low == high else f"{low} to {high}"


def _wins(outcome: Comparison) -> str:
    unit = outcome.unit if outcome.units > 1 else outcome.unit.rstrip("s")
    return f"{outcome.wins} of {outcome.units} {unit}"


def _difference(outcome: Comparison | None) -> str:
    if outcome is None:
        return MISSING
    digits = decimals_for(outcome.mean)
    sign = "+" if outcome.mean >= 0 else ""
    shown = f"{sign}{number(outcome.mean, digits)}"
    return shown if np.isnan(outcome.error) else f"{shown} ± {number(outcome.error, digits)}"


def _verdict(mine: Mapping[str, Any], best: str | None, outcome: Comparison | None) -> str:
    if not is_number(mine.get("mean")):
        return "not measured"
    if best is None:
        return "no baseline to compare with"
    return "values cannot be paired" if outcome is None else outcome.verdict
