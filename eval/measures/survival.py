"""Survival times as outcomes: how they are written, the concordance index, a ridge Cox model.

An outcome ``34.5;1`` is a time (any unit, above 0) and whether the event was seen then (1) or the
patient was lost to follow-up (0, censored). Shapes: P training and Q test patients, D features.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from eval.errors import FoldError
from eval.measures.metrics import percentile_ends

_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*;\s*([01])\s*")
FLAT = 1e-9


@dataclass(frozen=True)
class Survival:
    """Time (P,) and event (P,) bool of patients, in the order of some names."""

    time: np.ndarray
    event: np.ndarray

    def only(self, keep: np.ndarray) -> "Survival":
        """The patients at these indices."""
        return Survival(self.time[keep], self.event[keep])


def is_survival(outcomes: Mapping[str, str]) -> bool:
    """Whether outcomes are survival times; all or none of them must be.

    Raises:
        FoldError: some are and some are not, or a time is not above 0.
    """
    fitting = {name for name, text in outcomes.items() if _FORM.fullmatch(text)}
    if not fitting:
        return False
    odd = sorted(set(outcomes) - fitting)
    odd += [name for name in sorted(fitting) if float(outcomes[name].split(";")[0]) <= 0]
    if odd:
        raise FoldError(
            f"{len(odd)} of {len(outcomes)} outcomes are no survival times (patient {odd[0]}: "
            f"{outcomes[odd[0]]!r}); expected TIME;EVENT with TIME above 0 and EVENT 1 (seen) or "
            "0 (censored) for all patients, or a class for all"
        )
    return True


def survival_of(outcomes: Mapping[str, str], names: tuple[str, ...]) -> Survival:
    """Times and events of some patients; `is_survival` must hold."""
    parts = [outcomes[name].split(";") for name in names]
    time = np.array([float(part[0]) for part in parts])
    return Survival(time, np.array([part[1].strip() == "1" for part in parts], dtype=bool))


def concordance_index(survival: Survival, risk: np.ndarray) -> float:
    """Share of comparable pairs whose order the risk gets right (Harrell et al. 1982).

    A pair is comparable when the earlier time is an event; of equal times, when exactly one is an
    event, which then counts as the earlier. Equal risks count half. O(P^2) time, O(P) memory.

    Args:
        survival: of P patients.
        risk: (P,) higher = earlier event.

    Returns:
        NaN without a comparable pair.

    Raises:
        FoldError: lengths differ, or a risk is not finite.
    """
    return _concordance(survival, risk, np.ones(len(survival.time)))


def concordance_interval(
    survival: Survival, risk: np.ndarray, level: float = 0.95, n: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the concordance index when patients are drawn again.

    Returns:
        (low, high); NaN where no draw has a comparable pair.
    """
    size = len(survival.time)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        times = np.bincount(rng.integers(size, size=size), minlength=size).astype(np.float64)
        found.append(_concordance(survival, risk, times))
    return percentile_ends(np.array(found), level)


def _concordance(survival: Survival, risk: np.ndarray, times: np.ndarray) -> float:
    """The index when patient i occurs times[i] times."""
    risk = np.asarray(risk, dtype=np.float64)
    if risk.shape != survival.time.shape or not np.isfinite(risk).all():
        raise FoldError(f"risks {risk.shape} of {len(survival.time)} patients; one finite each")
    won = pairs = 0.0
    for i in np.flatnonzero(survival.event & (times > 0)):
        same = survival.time == survival.time[i]
        later = (survival.time > survival.time[i]) | (same & ~survival.event)
        weight = times[i] * times[later]
        pairs += float(weight.sum())
        won += float(weight @ ((risk[later] < risk[i]) + 0.5 * (risk[later] == risk[i])))
    return won / pairs if pairs else math.nan


def cox_weights(x: np.ndarray, survival: Survival, penalty: float) -> np.ndarray:
    """Weights (D,) of the Cox model with Breslow's ties and an L2 penalty.

    Minimises -log partial likelihood / events + penalty / 2 |w|^2 (Cox 1972).

    Args:
        x: (P, D), standardised.
        survival: of the patients.
        penalty: above 0.

    Raises:
        FoldError: no event, or no penalty.
    """
    if not survival.event.any() or penalty <= 0:
        raise FoldError(
            f"Cox model: {int(survival.event.sum())} events, penalty {penalty}; at least one event "
            "and a penalty above 0 are needed"
        )
    start = np.zeros(x.shape[1])
    found = minimize(cox_loss, start, args=(x, survival, penalty), jac=True, method="L-BFGS-B")
    return np.asarray(found.x)


def cox_loss(
    w: np.ndarray, x: np.ndarray, survival: Survival, penalty: float
) -> tuple[float, np.ndarray]:
    """The objective of `cox_weights` at w (D,), and its gradient (D,)."""
    order = np.argsort(-survival.time, kind="stable")  # at risk: everybody before, ties included
    time, event, rows = survival.time[order], survival.event[order], x[order]
    score = rows @ w
    top = float(score.max(initial=0.0))
    hazard = np.exp(score - top)
    last = np.searchsorted(-time, -time, side="right") - 1
    at_risk = np.cumsum(hazard)[last]
    weighted = np.cumsum(hazard[:, None] * rows, axis=0)[last]
    n_events = int(event.sum())
    loss = -float((score[event] - top - np.log(at_risk[event])).sum()) / n_events
    mean = weighted[event] / at_risk[event, None]
    gradient = -(rows[event] - mean).sum(axis=0) / n_events
    return loss + 0.5 * penalty * float(w @ w), gradient + penalty * w


def cox_risk(
    train: np.ndarray,
    survival: Survival,
    test: np.ndarray,
    grid: tuple[float, ...],
    n_folds: int,
) -> np.ndarray:
    """Risk (Q,) of test patients: log hazard against the mean training patient.

    The penalty is the one of the grid with the best concordance over inner folds of the training
    patients; ties: the larger penalty.

    Args:
        train: (P, D) of the training patients.
        survival: theirs.
        test: (Q, D).
        grid: penalties.
        n_folds: most inner folds.
    """
    scores = np.zeros(len(grid))
    for held in _inner_folds(survival, n_folds):
        rest = np.setdiff1d(np.arange(len(train)), held)
        for i, penalty in enumerate(grid):
            found = _fitted_risk(train[rest], survival.only(rest), train[held], penalty)
            value = concordance_index(survival.only(held), found)
            scores[i] += 0.0 if math.isnan(value) else value
    best = max(range(len(grid)), key=lambda i: (round(float(scores[i]), 9), grid[i]))
    return _fitted_risk(train, survival, test, grid[best])


def _inner_folds(survival: Survival, most: int) -> list[np.ndarray]:
    """Patients dealt out by time, events and censored ones apart, so that folds are alike."""
    number = max(2, min(most, int(survival.event.sum())))
    fold = np.zeros(len(survival.time), dtype=np.int64)
    for kind in (True, False):
        own = np.flatnonzero(survival.event == kind)
        fold[own[np.argsort(survival.time[own], kind="stable")]] = np.arange(len(own)) % number
    held = [k for k in range(number) if (fold == k).any() and survival.event[fold != k].any()]
    return [np.flatnonzero(fold == k) for k in held]


def _fitted_risk(
    train: np.ndarray, survival: Survival, test: np.ndarray, penalty: float
) -> np.ndarray:
    spread = train.std(axis=0)
    keep = spread > FLAT * np.maximum(np.abs(train).max(axis=0, initial=0.0), FLAT)
    if not keep.any():
        return np.zeros(len(test))
    mean, scale = train[:, keep].mean(axis=0), spread[keep] * math.sqrt(int(keep.sum()))
    w = cox_weights((train[:, keep] - mean) / scale, survival, penalty)
    return np.asarray(((test[:, keep] - mean) / scale) @ w)
