"""Confidence intervals and paired tests, and what they were drawn over.

Shapes: N rows, C classes, U units, B draws, P positive and Q negative rows of one class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.errors import FoldError
from eval.measures.metrics import bootstrap_ci, percentile_ends

DRAWS_AT_ONCE = 256
LEVEL = 0.95  # of the interval beside a headline number
EXACT_UNITS = 12  # 4,096 signs


def auroc_interval(
    truth: Sequence[str] | np.ndarray,
    score: np.ndarray,
    classes: Sequence[str],
    units: Sequence[str] | np.ndarray,
    level: float = 0.95,
    n: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `macro_auroc` when whole units are drawn again.

    A draw counts a row as often as its unit was drawn; ties count half. A class without members
    or without others in a draw is left out of the macro mean of that draw, as `macro_auroc` does;
    a draw in which no class is left is left out. The interval speaks of the patients, not of the
    training: the models are not fitted again.

    Args:
        truth: (N,) class names.
        score: (N, C), higher = more of that class.
        classes: the C names of the columns.
        units: (N,) unit (patient) of each row; rows of one unit are drawn together.
        level: coverage.
        n: draws B.
        seed: of the draws.

    Returns:
        (low, high); NaN with fewer than two units, or where no draw has an AUROC.

    Raises:
        FoldError: sizes do not fit together, or a score is not finite.
    """
    truth, names = np.asarray(truth), np.asarray(units)
    if score.shape != (len(truth), len(classes)) or names.shape != truth.shape:
        raise FoldError(
            f"scores {score.shape}, truth {truth.shape}, units {names.shape}; expected one row a "
            f"prediction and {len(classes)} columns"
        )
    if not np.isfinite(score).all():
        raise FoldError("scores are not finite; look for NaN in the embeddings they come from")
    unit = np.unique(names, return_inverse=True)[1]
    n_units = int(unit.max(initial=-1)) + 1
    if n_units < 2:
        return math.nan, math.nan
    draw = np.random.default_rng(seed).integers(n_units, size=(n, n_units))
    offset = n_units * np.arange(n)[:, None]
    times = np.bincount((draw + offset).ravel(), minlength=n * n_units).reshape(n, n_units)
    values = [_drawn(truth == name, score[:, c], times[:, unit]) for c, name in enumerate(classes)]
    table = np.stack(values)
    defined = np.isfinite(table)
    drawn = defined.any(axis=0)
    total = np.where(defined, table, 0.0).sum(axis=0)
    return percentile_ends(total[drawn] / defined.sum(axis=0)[drawn], level)


def _drawn(positive: np.ndarray, score: np.ndarray, times: np.ndarray) -> np.ndarray:
    """AUROC (B,) of one class when row i occurs times[b, i] times; NaN without both sides."""
    above = score[positive][:, None] - score[~positive]
    wins = (above > 0) + 0.5 * (above == 0)
    found = np.full(len(times), np.nan)
    for start in range(0, len(times), DRAWS_AT_ONCE):
        part = slice(start, start + DRAWS_AT_ONCE)
        members, others = times[part][:, positive], times[part][:, ~positive]
        pairs = members.sum(axis=1) * others.sum(axis=1)
        won = ((members @ wins) * others).sum(axis=1)
        np.divide(won, pairs, out=found[part], where=pairs > 0)
    return found


@dataclass(frozen=True)
class PairedInterval:
    """A paired difference and how far it can be trusted.

    Attributes:
        mean: mean of first - second over the units.
        low: lower end of the percentile interval of the mean.
        high: upper end.
        p: two-sided p of no difference (`sign_flip_p`); NaN with fewer than two units.
        units: units that were paired.
    """

    mean: float
    low: float
    high: float
    p: float
    units: int


def paired_bootstrap(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> PairedInterval:
    """Percentile interval of the mean of first - second when whole units are drawn again.

    Both values of a unit (a slide, its seeds averaged) are drawn together (Efron and Tibshirani
    1993, chapter 13). Only the units are resampled: models are not trained again, and units that
    share training data are more alike than the interval knows.

    Args:
        first: (U,) one value a unit.
        second: (U,) the other model on the same units, in the same order.
        seed: of the draws.
        draws: B.
        level: coverage.

    Returns:
        The ends and p are NaN with fewer than two units.

    Raises:
        FoldError: the two do not pair, nothing to pair, or values that are not finite.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise FoldError(f"values {a.shape} and {b.shape}; expected (U,) each, one value a unit")
    if not np.isfinite(a - b).all():
        raise FoldError("values are not finite; leave out the units where one model has none")
    gain = a - b
    mean, n = float(gain.mean()), len(gain)
    if n < 2:
        return PairedInterval(mean, math.nan, math.nan, math.nan, n)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            gain[rng.integers(n, size=(min(DRAWS_AT_ONCE, draws - start), n))].mean(axis=1)
            for start in range(0, draws, DRAWS_AT_ONCE)
        ]
    )
    low, high = percentile_ends(means, level)
    return PairedInterval(mean, low, high, sign_flip_p(gain, seed, draws), n)


def sign_flip_p(gain: np.ndarray, seed: int = 0, draws: int = 2000) -> float:
    """Two-sided p of a mean of paired differences: how often random signs reach it (Fisher 1935).

    All 2^U signs are tried up to `EXACT_UNITS` units, else ``draws`` random ones and the found
    ones. With few units it cannot be small (2 / 2^U at least), unlike a p read off a bootstrap.

    Args:
        gain: (U,) differences.
        seed: of the random signs.
        draws: random signs.
    """
    n = len(gain)
    if n <= EXACT_UNITS:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(seed).integers(2, size=(draws, n))
    size = np.abs(gain).sum() + np.finfo(float).tiny
    reached = np.abs(signs @ gain) >= np.abs(gain.sum()) - 1e-12 * size
    if n <= EXACT_UNITS:
        return float(reached.mean())
    return float((reached.sum() + 1) / (len(signs) + 1))


def holm(p: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979), in the order given.

    A NaN (nothing could be tested) stays NaN and is not counted.
    """
    values = np.asarray(p, dtype=np.float64)
    tested = np.flatnonzero(np.isfinite(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    scaled = values[order] * np.arange(len(order), 0, -1)
    corrected = np.full(len(values), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(value) for value in corrected]


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
