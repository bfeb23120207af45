"""The confidence interval that stands beside a headline number, and what it was drawn over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.metrics import bootstrap_ci

LEVEL = 0.95


@dataclass(frozen=True)
class HeadlineInterval:
    """Ends of an interval; ``over`` says of what, such as ``6 slides``."""

    low: float
    high: float
    over: str


def headline_interval(
    metrics: Mapping[str, Mapping[str, Any]], name: str
) -> HeadlineInterval | None:
    """The interval of the mean of a metric.

    A metric that brings its own ends (``<name>_low``, ``<name>_high``, as the outcome task does)
    has these, their mean over the seeds. Else it is the percentile bootstrap of the mean when whole
    slides (patients in annotation) are drawn again, seeds, label columns and draws of one together;
    of a metric that is pooled over slides, whole folds.

    Args:
        metrics: all metrics of one model, as in results.json.
        name: of the metric.

    Returns:
        None with fewer than two units.
    """
    own = [_mean(metrics.get(f"{name}_{end}")) for end in ("low", "high")]
    if own[0] is not None and own[1] is not None:
        return HeadlineInterval(own[0], own[1], "patients")
    entry = metrics[name]
    keys, values = entry.get("keys") or [], entry.get("values") or []
    pairs = [(k, v) for k, v in zip(keys, values, strict=False) if isinstance(v, int | float)]
    parts = [(str(key).split("/", 2), value) for key, value in pairs]
    if len(keys) != len(values) or any(len(part) < 3 for part, _ in parts):
        return None
    names = [part[2].split(":")[0] for part, _ in parts]
    pooled = set(names) == {"pooled"}
    units = [part[0] for part, _ in parts] if pooled else names
    low, high = bootstrap_ci([float(value) for _, value in parts], units, LEVEL)
    if not np.isfinite([low, high]).all():
        return None
    return HeadlineInterval(low, high, f"{len(set(units))} {unit_kind(entry, names)}")


def unit_kind(entry: Mapping[str, Any], names: Iterable[str]) -> str:
    """What the units of a metric are: folds, patients or slides.

    Args:
        entry: the metric, whose ``unit`` says "per test patient" where values are of patients.
        names: of the units; ``pooled`` where all slides of a fold give one value.
    """
    if set(names) == {"pooled"}:
        return "folds"
    return "patients" if "per test patient" in str(entry.get("unit", "")) else "slides"


def _mean(entry: Mapping[str, Any] | None) -> float | None:
    value = None if entry is None else entry.get("mean")
    return float(value) if isinstance(value, int | float) else None
