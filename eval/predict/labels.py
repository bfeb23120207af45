"""Probes of labels beside the read-out: fitted, calibrated and measured on training patients.

A multinomial logistic regression on the inputs of the read-out, without class weights, so that its
probabilities can be calibrated (a temperature, Guo et al. 2017), and for the reason given in
`eval.predict.fit` measured and calibrated by the stored features alone, in units held out in turn.

Shapes: S spots, F inputs, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from eval.measures.inner_folds import group_folds
from eval.measures.metrics import balanced_accuracy
from hibio.readout import LabelProbe

GRID = (1e-3, 1e-2, 1e-1)  # inverse penalties
FOLDS, MOST = 3, 3000  # inner folds; spots of a fit
ABSENT = -30.0  # logit of a class that the other units do not have
COOLEST, HOTTEST = 0.2, 20.0  # temperatures that are tried


def fit_labels(
    name: str,
    label: np.ndarray,
    inputs: tuple[np.ndarray, np.ndarray],
    groups: np.ndarray,
    slides: np.ndarray,
    *,
    unit: str,
    interval: Callable[[np.ndarray], tuple[np.ndarray, ...]],
) -> LabelProbe | None:
    """The probe of one column; None where no slide has two of its classes.

    Args:
        name: of the column.
        label: (S,) text, "" unknown.
        inputs: (S, F) of the read-out, and (S, P) that no training touched; both standardised.
        groups: (S,) units that are held out whole.
        slides: (S,) names; a label that is one of a whole slide is no annotation of spots.
        unit: what a group is.
        interval: values (U, 1) of units -> mean, low, high and how many there are, (1,) each.
    """
    known = np.flatnonzero(label != "")
    if not any(len(set(label[known][slides[known] == one])) > 1 for one in np.unique(slides)):
        return None
    known = known[np.linspace(0, len(known) - 1, min(MOST, len(known))).astype(int)]
    y, own = label[known].astype(str), groups[known]
    classes = np.unique(y)
    if len(classes) < 2:  # a rare one was thinned out
        return None
    x, untrained = (one[known] for one in inputs)
    logits, temperature = np.zeros((len(y), len(classes))), 1.0
    units = np.unique(own)
    if len(units) > 1:
        fold_of = group_folds(own, FOLDS)
        weight = sum(1.0 / (own == one).sum() * (own == one) for one in units) / len(units)
        trials = [_held_out(untrained, y, classes, fold_of, c) for c in GRID]
        logits = trials[int(np.argmin([_loss(one, y, classes, weight) for one in trials]))]
        temperature = _temperature(logits, y, classes, weight)
        losses = [_loss(_held_out(x, y, classes, fold_of, c), y, classes, weight) for c in GRID]
        best = GRID[int(np.argmin(losses))]
    else:
        best = GRID[1]
    probe = _fitted(x, y, best)
    weights, bias = _all_classes(probe, classes)
    share = softmax(logits / temperature, axis=1)
    right = classes[share.argmax(axis=1)]
    held = np.array([balanced_accuracy(y[own == one], right[own == one]) for one in units])
    held = held if len(units) > 1 else np.array([np.nan])
    mean, low, high, n = (float(one[0]) for one in interval(held[:, None]))
    error = calibration_error(share, y, classes) if len(units) > 1 else float("nan")
    return LabelProbe(
        name,
        classes,
        weights / temperature,
        bias / temperature,
        temperature,
        *(mean, low, high, int(n), error),
        unit,
    )


def _fitted(x: np.ndarray, y: np.ndarray, c: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough: it is calibrated
        return LogisticRegression(C=c, max_iter=200, tol=1e-3).fit(x, y)


def _all_classes(probe: LogisticRegression, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (F, C) and bias (C,) of all classes; of two, scikit-learn keeps one column."""
    coef, bias = probe.coef_.T, probe.intercept_
    if len(probe.classes_) == 2:
        coef, bias = np.hstack([0 * coef, coef]), np.append(0.0, bias)
    weights = np.zeros((len(coef), len(classes)))
    biases = np.full(len(classes), ABSENT)
    place = np.searchsorted(classes, probe.classes_)
    weights[:, place], biases[place] = coef, bias
    return weights, biases


def _held_out(
    x: np.ndarray, y: np.ndarray, classes: np.ndarray, fold_of: np.ndarray, c: float
) -> np.ndarray:
    """Logits (S, C) of every unit by the probe of the others."""
    found = np.zeros((len(y), len(classes)))
    for fold in range(int(fold_of.max()) + 1):
        own = fold_of == fold
        if len(set(y[~own])) > 1:
            weights, bias = _all_classes(_fitted(x[~own], y[~own], c), classes)
            found[own] = x[own] @ weights + bias
    return found


def _loss(logits: np.ndarray, y: np.ndarray, classes: np.ndarray, weight: np.ndarray) -> float:
    """Mean of -log p of the true class, every unit the same."""
    chosen = log_softmax(logits, axis=1)[np.arange(len(y)), np.searchsorted(classes, y)]
    return float(-(weight * chosen).sum())


def _temperature(
    logits: np.ndarray, y: np.ndarray, classes: np.ndarray, weight: np.ndarray
) -> float:
    bounds = (np.log(COOLEST), np.log(HOTTEST))
    found = minimize_scalar(
        lambda t: _loss(logits / np.exp(t), y, classes, weight), bounds=bounds, method="bounded"
    )
    return float(np.exp(found.x))


def calibration_error(share_SC: np.ndarray, y: np.ndarray, classes: np.ndarray) -> float:
    """Mean over spots of |how often right - how sure|, in ten bins of the largest probability."""
    sure, right = share_SC.max(axis=1), classes[share_SC.argmax(axis=1)] == y
    bins = np.minimum((10 * sure).astype(int), 9)
    gaps = [abs(right[bins == b].mean() - sure[bins == b].mean()) for b in np.unique(bins)]
    return float(np.average(gaps, weights=np.bincount(bins)[np.unique(bins)]))
