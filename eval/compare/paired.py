"""Two models on the same fold, seed and slide: differences, their error or interval, p values.

Values stand under keys ``fold/seed/unit``; a unit is a slide or, in annotation, a patient, with
what was drawn there behind a colon (``slide:column:draw``), or ``pooled`` where a metric is taken
over all slides of a fold. Label columns, blocks and draws of one slide are no units of their own,
and slides and seeds of one fold are not independent: claims need the error over folds
(docs/method.md 6). Shapes: U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from eval.errors import FoldError
from eval.measures.intervals import holm, paired_bootstrap, unit_kind
from eval.results import TaskRecord, task_record
from hibio.keys import MAIN

MIN_FOLDS = 3
SIGNIFICANT = 0.05

Group = TypeVar("Group", bound=Hashable)


def values_by_key(entry: Mapping[str, Any]) -> dict[str, float]:
    """Defined values of a metric of results.json by key; none where keys are not unique."""
    keys, values = entry.get("keys") or [], entry.get("values") or []
    if len(keys) != len(values) or len(set(keys)) != len(keys):
        return {}
    pairs = zip(keys, values, strict=True)
    return {str(k): float(v) for k, v in pairs if isinstance(v, int | float) and math.isfinite(v)}


def fold_of(key: str) -> str:
    """The fold of a key."""
    return key.split("/")[0]


def slide_of(key: str) -> str:
    """The slide (patient, ``pooled``) of a key."""
    return key.split("/")[-1].split(":")[0]


def fold_and_unit(key: str) -> tuple[str, str]:
    """Fold and unit of a key, without the seed."""
    fold, _, unit = key.split("/", 2)
    return fold, unit


def fold_and_slide(key: str) -> tuple[str, str]:
    """Fold and slide (patient, ``pooled``) of a key."""
    fold, unit = fold_and_unit(key)
    return fold, unit.split(":")[0]


def grouped(values: Mapping[str, float], by: Callable[[str], Group]) -> dict[Group, float]:
    """Mean of the values of every group of keys, in order of appearance."""
    groups: dict[Group, list[float]] = {}
    for key, value in values.items():
        groups.setdefault(by(key), []).append(value)
    return {group: float(np.mean(members)) for group, members in groups.items()}


def unit_gains(
    own: Mapping[str, float], reference: Mapping[str, float], *, by_seed: bool
) -> np.ndarray:
    """Differences (U,) to a reference, one a fold and slide that both have, sorted by them.

    Args:
        own: values by key.
        reference: those of the reference.
        by_seed: pair the same seed, then average; else average both over their seeds first
            (baselines, which have none).
    """
    if by_seed:
        paired = {key: own[key] - reference[key] for key in own if key in reference}
        gains = grouped(paired, fold_and_unit)
    else:
        first, second = grouped(own, fold_and_unit), grouped(reference, fold_and_unit)
        gains = {unit: first[unit] - second[unit] for unit in first if unit in second}
    slides: dict[tuple[str, str], list[float]] = {}
    for (fold, unit), gain in sorted(gains.items()):
        slides.setdefault((fold, unit.split(":")[0]), []).append(gain)
    return np.array([np.mean(slides[place]) for place in sorted(slides)], dtype=np.float64)


@dataclass(frozen=True)
class Comparison:
    """Paired difference of two models of one run, positive when the first is better.

    Attributes:
        mean: mean over folds.
        error: standard error over the units; NaN below two units.
        folds: folds with a value of both.
        unit: "folds", or "slides" when there is only one fold.
        units: number of units.
        wins: units in which the first model is better.
    """

    mean: float
    error: float
    folds: int
    unit: str
    units: int
    wins: int

    @property
    def verdict(self) -> str:
        """What the difference allows to say."""
        clear = abs(self.mean) > 2 * self.error
        return verdict(self.folds, clear, self.mean)


def verdict(folds: int, clear: bool, difference: float) -> str:
    """Plain words: better or worse only where it is clear and over enough folds."""
    if folds < MIN_FOLDS:
        return f"{folds} fold{'s' * (folds > 1)}: too few to tell"
    if not clear:
        return "no clear difference"
    return "better" if difference > 0 else "worse"


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], sign: float = 1.0
) -> Comparison | None:
    """Paired difference of two metrics over the folds that they share.

    Args:
        first: metric of the model under test, as in results.json.
        second: metric of the other model.
        sign: -1 where smaller values are better.

    Returns:
        None when no key is shared, so that nothing can be paired.
    """
    mine, other = values_by_key(first), values_by_key(second)
    mine, other = _without_seeds(mine, other), _without_seeds(other, mine)
    gains = {key: sign * (mine[key] - other[key]) for key in mine if key in other}
    if not gains:
        return None
    by_fold = np.array(list(grouped(gains, fold_of).values()))
    units, unit = by_fold, "folds"
    if len(by_fold) < 2:
        units, unit = np.array(list(grouped(gains, slide_of).values())), "slides"
    error = float(units.std(ddof=1) / np.sqrt(len(units))) if len(units) > 1 else math.nan
    return Comparison(
        float(by_fold.mean()), error, len(by_fold), unit, len(units), int((units > 0).sum())
    )


def _without_seeds(values: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Means over seeds in folds where one side has one seed and the other has more.

    A baseline without a seed is measured once, the model under each.
    """
    own, others = _seeds(values), _seeds(other)

    def shared(key: str) -> str:
        fold, unit = fold_of(key), key.split("/")[-1]
        few, many = sorted((len(own[fold]), len(others.get(fold, ()))))
        return f"{fold}/mean/{unit}" if few == 1 < many else key

    return grouped(values, shared)


def _seeds(values: Mapping[str, float]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for key in values:
        found.setdefault(fold_of(key), set()).update(key.split("/")[1:2])
    return found


@dataclass(frozen=True)
class Results:
    """A results file under a short name; ``body`` is its content."""

    label: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """One metric of two runs.

    Args:
        task: of the metric.
        metric: its name.
        first: label of the run under test.
        second: label of the other.
        value_first: its mean over the shared units.
        value_second: the other's.
        difference: first - second, or the reverse where lower is better: positive is better.
        low: lower end of its interval; NaN with one unit.
        high: upper end.
        p: of no difference, by random signs over the units.
        corrected: the same after Holm over all comparisons of the report.
        unit: slides, patients or folds.
        units: U.
        folds: folds that the units come from.
        wins: folds in which the first is better.
        left_out: pairs in which one side is undefined.
    """

    task: str
    metric: str
    first: str
    second: str
    value_first: float
    value_second: float
    difference: float
    low: float
    high: float
    p: float
    corrected: float
    unit: str
    units: int
    folds: int
    wins: int
    left_out: int

    @property
    def verdict(self) -> str:
        """What the numbers allow to say."""
        return verdict(self.folds, self.corrected < SIGNIFICANT, self.difference)


def find_entry(
    results: Results, task: str, metric: str, model: str | None
) -> Mapping[str, Any] | None:
    """The metric of the named model, else of the run's own, else of ``hibio``, else of the only."""
    having = task_record(results.body, task).entries(metric)
    if model is not None:
        return having.get(model)
    own = str((results.body.get("data") or {}).get("main_model", ""))
    name = next((name for name in (own, MAIN) if name in having), None)
    if name is None and len(having) == 1:
        name = next(iter(having))
    return None if name is None else having[name]


def entry_of(results: Results, task: str, metric: str, model: str | None) -> Mapping[str, Any]:
    """What `find_entry` finds, which must be there.

    Raises:
        FoldError: no such task, model or metric.
    """
    found = find_entry(results, task, metric, model)
    if found is None:
        having = task_record(results.body, task).entries(metric)
        raise FoldError(
            f"{results.label}: task {task!r}, metric {metric!r}: no model {model or MAIN!r} (it "
            f"has: {', '.join(having) or 'none'}); name one with --model"
        )
    return found


def declared(runs: Sequence[Results], task: str, metric: str) -> TaskRecord:
    """The task of the first run that says which way a metric is better, else of the first."""
    found = [task_record(run.body, task) for run in runs]
    return next((one for one in found if metric in (one.body.get("metrics") or {})), found[0])


def compare_metric(
    first: Results,
    second: Results,
    metric: tuple[str, str],
    model: str | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> Compared:
    """One metric (task and name) of the run under test and another, paired; p not yet corrected.

    Raises:
        FoldError: a metric is missing, or its values have different keys.
    """
    task, name = metric
    sides = [entry_of(results, task, name, model) for results in (first, second)]
    keys = [set(entry.get("keys") or ()) for entry in sides]
    if keys[0] != keys[1] or not keys[0]:
        raise FoldError(
            f"{task}: {name}: {first.label} and {second.label} differ in {_odd_keys(*keys)}; "
            "evaluate both on the same folds, seeds and slides"
        )
    mine, other = (values_by_key(entry) for entry in sides)
    both = [key for key in sides[0]["keys"] if key in mine and key in other]
    if not both:
        raise FoldError(f"{task}: {name}: no value is defined in both runs")
    one = grouped({key: mine[key] for key in both}, fold_and_slide)
    two = grouped({key: other[key] for key in both}, fold_and_slide)
    sign = declared((first, second), task, name).sign(name)
    a, b = np.array(list(one.values())), np.array(list(two.values()))
    found = paired_bootstrap(sign * a, sign * b, seed, draws)
    gain: dict[str, list[float]] = {}
    for (fold, _), value in zip(one, sign * (a - b), strict=True):
        gain.setdefault(fold, []).append(float(value))
    return Compared(
        task=task,
        metric=name,
        first=first.label,
        second=second.label,
        value_first=float(a.mean()),
        value_second=float(b.mean()),
        difference=found.mean,
        low=found.low,
        high=found.high,
        p=found.p,
        corrected=math.nan,
        unit=unit_kind(sides[0], [unit for _, unit in one]),
        units=found.units,
        folds=len(gain),
        wins=sum(float(np.mean(values)) > 0 for values in gain.values()),
        left_out=len(keys[0]) - len(both),
    )


def corrected(found: Sequence[Compared]) -> list[Compared]:
    """The same comparisons with p values corrected for their number (Holm)."""
    values = holm([one.p for one in found])
    return [replace(one, corrected=value) for one, value in zip(found, values, strict=True)]


def _odd_keys(first: set[str], second: set[str]) -> str:
    """Which part of the keys ``fold/seed/unit`` two runs do not share."""
    told = []
    for part, name in enumerate(("folds", "seeds", "slides or blocks")):
        mine, other = ({key.split("/", 2)[part] for key in keys} for keys in (first, second))
        if mine != other:
            sides = [listed(sorted(names)) or "none" for names in (mine - other, other - mine)]
            told.append(f"{name} ({' against '.join(sides)})")
    return ", ".join(told) or f"the combination of folds and seeds (first: {min(first ^ second)})"


def listed(names: Sequence[str]) -> str:
    """The first four names, and whether there are more."""
    return ", ".join(names[:4]) + ", ..." * (len(names) > 4)
