"""Bootstrap interval of an AUROC over patients, without sorting again for every draw.

Shapes: N rows, C classes, U units, B draws, P positive and Q negative rows of one class.
"""

import math
from collections.abc import Sequence

import numpy as np

from eval.fold import FoldError

DRAWS_AT_ONCE = 256


def auroc_interval(
    truth: Sequence[str] | np.ndarray,
    score: np.ndarray,
    classes: Sequence[str],
    units: Sequence[str] | np.ndarray,
    level: float = 0.95,
    n: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `eval.metrics.macro_auroc` when whole units are drawn again.

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
    if not drawn.any():
        return math.nan, math.nan
    total = np.where(defined, table, 0.0).sum(axis=0)
    means = total[drawn] / defined.sum(axis=0)[drawn]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
