"""Two results files, paired by fold x seed x slide: differences, intervals, corrected p values.

``{"slides": {id: sha256}, "folds": {name: {"train": [ids], "genes": sha256}}}`` stands in the data
of results.json.

A unit is a slide or, in annotation, a patient (seeds, label columns and draws averaged), or a fold
where a metric is pooled over the slides of a fold. Shapes: U units.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eval.errors import FoldError
from eval.folds.assemble import JobGroup
from eval.measures.intervals import holm, paired_bootstrap, unit_kind
from eval.report.glossary import lower_is_better
from eval.report.headline import MIN_FOLDS, values_by_key
from hibio.data.splits import SlideEntry
from hibio.keys import MAIN
from preprocessing.store import SlideStore


def fingerprint(groups: Sequence[JobGroup], entries: Iterable[SlideEntry]) -> dict[str, Any]:
    """The fingerprint of an evaluation.

    Args:
        groups: checkpoints by fold and seed.
        entries: every slide that was given.
    """
    slides = {entry.slide_id: _content(entry) for entry in entries}
    folds = {
        group.fold: fold_print(
            group.main.model.artifacts.train_slides, group.main.model.artifacts.genes
        )
        for group in groups
    }
    return {"slides": slides, "folds": folds}


def fold_print(train: Iterable[str], genes: Iterable[str]) -> dict[str, Any]:
    """Training slides of a fold, and a hash of its genes, whatever their order."""
    text = "\n".join(sorted(str(gene) for gene in genes))
    return {"train": sorted(train), "genes": hashlib.sha256(text.encode()).hexdigest()}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; empty when nothing does."""
    told = [*_sets("slides", first["slides"], second["slides"])]
    shared = set(first["slides"]) & set(second["slides"])
    other = sorted(s for s in shared if first["slides"][s] != second["slides"][s])
    if other:
        told.append(f"the content of {len(other)} slides ({_listed(other)})")
    told += _sets("folds", first["folds"], second["folds"])
    for what, name in (("train", "training slides"), ("genes", "genes")):
        odd = [
            fold
            for fold in sorted(set(first["folds"]) & set(second["folds"]))
            if first["folds"][fold][what] != second["folds"][fold][what]
        ]
        if odd:
            told.append(f"the {name} of {len(odd)} folds ({_listed(odd)})")
    return told


def _sets(what: str, first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Names that only one side has."""
    mine, other = sorted(set(first) - set(second)), sorted(set(second) - set(first))
    sides = [
        f"{len(names)} only in the {where} ({_listed(names)})"
        for names, where in ((mine, "first"), (other, "second"))
        if names
    ]
    return [f"{what}: {'; '.join(sides)}"] if sides else []


def _content(entry: SlideEntry) -> str:
    """The seal of a store's content; of an older store without one, the hash of the file."""
    with SlideStore(entry.path) as store:
        return str(store.attrs.get("content_sha256") or store.sha256)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + ", ..." * (len(names) > 4)


SIGNIFICANT = 0.05


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
        if self.folds < MIN_FOLDS:
            return f"{self.folds} fold{'s' * (self.folds > 1)}: too few to tell"
        if not self.corrected < SIGNIFICANT:
            return "no clear difference"
        return "better" if self.difference > 0 else "worse"


def check_same_data(first: Results, second: Results) -> None:
    """Refuse to compare what was measured on different slides, folds or genes, or otherwise.

    Raises:
        FoldError: they differ, or a file does not say.
    """
    prints = []
    for results in (first, second):
        found = (results.body.get("data") or {}).get("fingerprint")
        if not isinstance(found, Mapping) or not {"slides", "folds"} <= set(found):
            raise FoldError(
                f"{results.label}: the results do not say which slides, folds and genes they were "
                "measured on (an older version wrote them); run `hibio eval` again"
            )
        prints.append(found)
    told = differences(*prints)
    settings = [(results.body.get("data") or {}).get("settings", {}) for results in (first, second)]
    if settings[0] != settings[1]:
        told.append(f"settings of tasks (--set): {settings[0]} and {settings[1]}")
    if told:
        raise FoldError(
            f"{first.label} (first) and {second.label} (second) were measured on different data: "
            f"{'; '.join(told)}; compare only runs of the same slides, folds and genes"
        )


def find_entry(
    results: Results, task: str, metric: str, model: str | None
) -> Mapping[str, Any] | None:
    """The metric of the named model, else of the run's own, else of ``hibio``, else of the only."""
    having = _models_with(results, task, metric)
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
        having = _models_with(results, task, metric)
        raise FoldError(
            f"{results.label}: task {task!r}, metric {metric!r}: no model {model or MAIN!r} (it "
            f"has: {', '.join(having) or 'none'}); name one with --model"
        )
    return found


def _models_with(results: Results, task: str, metric: str) -> dict[str, Mapping[str, Any]]:
    models = results.body["tasks"].get(task, {}).get("models", {})
    return {name: metrics[metric] for name, metrics in models.items() if metric in metrics}


def compare_metric(
    first: Results,
    second: Results,
    metric: tuple[str, str],
    model: str | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> Compared:
    """One metric of two runs, paired; p is not corrected yet.

    Args:
        first: the run under test.
        second: the other.
        metric: task and name.
        model: row of both; see `entry_of`.
        seed: of the draws.
        draws: of bootstrap and signs.

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
    left_out = len(keys[0]) - len(both)
    if not both:
        raise FoldError(f"{task}: {name}: no value is defined in both runs")
    one, two = _by_unit(mine, both), _by_unit(other, both)
    sign = -1.0 if lower_is_better(name, task) else 1.0
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
        left_out=left_out,
    )


def corrected(found: Sequence[Compared]) -> list[Compared]:
    """The same comparisons with p values corrected for their number (Holm)."""
    values = holm([one.p for one in found])
    return [replace(one, corrected=value) for one, value in zip(found, values, strict=True)]


def _by_unit(values: Mapping[str, float], keys: Sequence[str]) -> dict[tuple[str, str], float]:
    """Mean over the seeds and label columns of each (fold, slide)."""
    groups: dict[tuple[str, str], list[float]] = {}
    for key in keys:
        fold, _, unit = key.split("/", 2)
        groups.setdefault((fold, unit.split(":")[0]), []).append(values[key])
    return {unit: float(np.mean(group)) for unit, group in groups.items()}


def _odd_keys(first: set[str], second: set[str]) -> str:
    """Which part of the keys ``fold/seed/unit`` two runs do not share."""
    told = []
    for part, name in enumerate(("folds", "seeds", "slides or blocks")):
        mine, other = ({key.split("/", 2)[part] for key in keys} for keys in (first, second))
        if mine != other:
            told.append(f"{name} ({_few(mine - other)} against {_few(other - mine)})")
    return ", ".join(told) or f"the combination of folds and seeds (first: {min(first ^ second)})"


def _few(names: set[str]) -> str:
    listed = sorted(names)
    return (", ".join(listed[:4]) + ", ..." * (len(listed) > 4)) or "none"
