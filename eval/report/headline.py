"""The headline table: this checkpoint against its best baseline, split by split.

A difference is taken between values with the same key (`fold/seed/slide`), averaged within a
fold, and its standard error is over folds: slides and seeds of one fold are not independent
(docs/method.md 6: claims need the error over splits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.measures.intervals import headline_interval
from eval.report.glossary import kind_of, lower_is_better
from eval.report.page import (
    MISSING,
    Html,
    decimals_for,
    heading_row,
    is_number,
    join,
    number,
    paragraph,
    table,
    tag,
    text,
)
from hibio.keys import MAIN

MIN_FOLDS = 3

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


@dataclass(frozen=True)
class HeadlineRow:
    """One question that the headline table answers.

    Attributes:
        label: The question in words, for example "Find the profile of a patch, top 10 %".
        task: Task in results.json.
        metric: Metric in that task.
        note: Small print under the label.
        against: Baselines to compare with; empty means all that compete.
    """

    label: str
    task: str
    metric: str
    note: str = ""
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Paired difference of two models, positive when the first is better.

    Attributes:
        mean: Mean over folds.
        error: Standard error over the units; NaN below two units.
        folds: Number of folds with a value of both.
        unit: "folds", or "slides" when there is only one fold.
        units: Number of units.
        wins: Units in which the first model is better.
    """

    mean: float
    error: float
    folds: int
    unit: str
    units: int
    wins: int

    @property
    def verdict(self) -> str:
        """Plain words on what the difference allows to say."""
        if self.folds < MIN_FOLDS:
            return f"{self.folds} fold{'s' if self.folds > 1 else ''}: too few to tell"
        if self.mean > 2 * self.error:
            return "better"
        return "worse" if self.mean < -2 * self.error else "no clear difference"


def values_by_key(entry: Mapping[str, Any]) -> dict[str, float]:
    """Finite values of a metric by their key; empty when keys are missing or not unique."""
    keys, values = entry.get("keys") or [], entry.get("values") or []
    if len(keys) != len(values) or len(set(keys)) != len(keys):
        return {}
    pairs = zip(keys, values, strict=True)
    return {str(key): float(value) for key, value in pairs if is_number(value)}


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], lower: bool = False
) -> Comparison | None:
    """Paired difference of two metrics over the folds that they share.

    Args:
        first: Metric of the model under test, as in results.json.
        second: Metric of the other model.
        lower: Whether smaller values are better.

    Returns:
        None when no key is shared, so that nothing can be paired.
    """
    mine, other = values_by_key(first), values_by_key(second)
    mine, other = _without_seeds(mine, other), _without_seeds(other, mine)
    gains = {key: (other[key] - mine[key]) * (1 if lower else -1) for key in mine if key in other}
    if not gains:
        return None
    by_fold = _means_by(gains, 0)
    units, unit = (by_fold, "folds") if len(by_fold) > 1 else (_means_by(gains, -1), "slides")
    error = float(units.std(ddof=1) / np.sqrt(len(units))) if len(units) > 1 else float("nan")
    return Comparison(
        float(by_fold.mean()), error, len(by_fold), unit, len(units), int((units > 0).sum())
    )


def _without_seeds(values: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Means over seeds in folds where one side has one seed and the other has more.

    A baseline without a seed is measured once, the model under each.
    """
    own, others = _seeds(values), _seeds(other)
    groups: dict[str, list[float]] = {}
    for key, value in values.items():
        fold, unit = key.split("/")[0], key.split("/")[-1]
        few, many = sorted((len(own[fold]), len(others.get(fold, ()))))
        groups.setdefault(f"{fold}/mean/{unit}" if few == 1 < many else key, []).append(value)
    return {key: float(np.mean(group)) for key, group in groups.items()}


def _seeds(values: Mapping[str, float]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for key in values:
        found.setdefault(key.split("/")[0], set()).update(key.split("/")[1:2])
    return found


def _means_by(gains: Mapping[str, float], part: int) -> np.ndarray:
    """Mean gain for each name at one place of the keys `fold/seed/slide`.

    Label columns and blocks of a slide (`slide:column:block`) are no units of their own.
    """
    groups: dict[str, list[float]] = {}
    for key, gain in gains.items():
        groups.setdefault(key.split("/")[part].split(":")[0], []).append(gain)
    return np.asarray([np.mean(values) for values in groups.values()])


def best_model(
    entries: Mapping[str, Mapping[str, Any]], lower: bool, names: Sequence[str]
) -> str | None:
    """Name with the best finite mean among `names`; None when there is none."""
    usable = [name for name in names if name in entries and is_number(entries[name].get("mean"))]
    if not usable:
        return None
    choose = min if lower else max
    return choose(usable, key=lambda name: float(entries[name]["mean"]))


def headline_section(results: Mapping[str, Any], rows: Sequence[HeadlineRow]) -> Html:
    """The table and how to read it; a row without results is shown with dashes."""
    names = (
        "question",
        f"{MAIN}, 95 % interval",
        "best baseline",
        "its value",
        "difference",
        "better in",
    )
    head = [heading_row((*names, "chance", "verdict"))]
    body = [_headline_cells(results, row) for row in rows]
    warnings = [tag("li", text(line)) for row in rows for line in control_warnings(results, row)]
    parts = [table(head, body), paragraph(NOTE, "soft")]
    return join([*parts, tag("ul", *warnings)] if warnings else parts)


def control_warnings(results: Mapping[str, Any], row: HeadlineRow) -> list[str]:
    """One sentence for each control that this checkpoint does not beat on a headline metric."""
    entries = _entries(results, row)
    mine: Any = entries.get(MAIN, {}).get("mean")
    lower = lower_is_better(row.metric, row.task)
    lines = []
    for name, entry in entries.items():
        mean = entry.get("mean")
        if kind_of(name).name != "control" or not is_number(mean) or not is_number(mine):
            continue
        if mean == mine or (mean < mine) == lower:
            lines.append(
                f"Not beaten: the control {name} reaches {number(mean)} on {row.task}: "
                f"{row.metric}, this checkpoint {number(mine)}."
            )
    return lines


def _entries(results: Mapping[str, Any], row: HeadlineRow) -> dict[str, Mapping[str, Any]]:
    models = results.get("tasks", {}).get(row.task, {}).get("models", {})
    return {name: metrics[row.metric] for name, metrics in models.items() if row.metric in metrics}


def _headline_cells(results: Mapping[str, Any], row: HeadlineRow) -> Html:
    entries = _entries(results, row)
    lower = lower_is_better(row.metric, row.task)
    rivals = row.against or tuple(
        name for name in entries if kind_of(name).competes and not _is_own(name)
    )
    best = best_model(entries, lower, rivals)
    mine = entries.get(MAIN, {})
    outcome = compare(mine, entries[best], lower) if best and mine else None
    return tag(
        "tr",
        _question(row, lower),
        _value(mine, _interval(results, row)),
        tag("td", text(best or MISSING), class_="words"),
        tag("td", text(mean_and_spread(entries[best]) if best else MISSING)),
        tag("td", text(_difference(outcome))),
        tag("td", text(_wins(outcome) if outcome else MISSING)),
        tag("td", text(chance_of(entries.values()))),
        tag("td", text(_verdict(mine, best, outcome)), class_="words"),
    )


def _value(entry: Mapping[str, Any], interval: str) -> Html:
    lines = [text(mean_and_spread(entry))]
    if interval != MISSING:
        lines.append(tag("small", text(interval)))
    return tag("td", Html("<br>".join(lines)))


def _interval(results: Mapping[str, Any], row: HeadlineRow) -> str:
    """Interval of this checkpoint's mean, with what it was drawn over."""
    models = results.get("tasks", {}).get(row.task, {}).get("models", {})
    own = models.get(MAIN) or {}
    found = headline_interval(own, row.metric) if row.metric in own else None
    if found is None:
        return MISSING
    return f"{number(found.low)} to {number(found.high)} ({found.over})"


def _is_own(name: str) -> bool:
    return kind_of(name).is_checkpoint or kind_of(name).name == "variant"


def _question(row: HeadlineRow, lower: bool) -> Html:
    small = f"{row.task}: {row.metric}" + (" (lower is better)" if lower else "")
    lines = [text(row.label), tag("small", text(small))]
    if row.note:
        lines.append(tag("small", text(row.note)))
    return tag("th", Html("<br>".join(lines)), scope="row", class_="words")


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
