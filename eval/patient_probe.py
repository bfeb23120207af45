"""Logistic read-out of patient vectors, its penalty chosen over inner folds of patients.

Shapes: P training and Q test patients, D features, C classes.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

FLAT = 1e-6
LEAST = 1e-12


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of the logistic read-out.

    Args:
        grid: inverse penalties C; features have mean square 1 over training patients and are
            divided by the root of their number, so that one grid serves every size.
        n_folds: most inner folds; a class with fewer patients lowers it.
        subsets: balanced subsets of the training patients, whose probabilities are averaged.
        max_iter: of the solver.
    """

    grid: tuple[float, ...] = (0.1, 1.0, 10.0)
    n_folds: int = 4
    subsets: int = 8
    max_iter: int = 500


def probe_probabilities(
    train: np.ndarray,
    label: np.ndarray,
    test: np.ndarray,
    config: ProbeConfig,
    spread: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Class probabilities (Q, C) of test patients, mean over balanced L2-penalised regressions.

    Each is fitted on equally many patients of every class (`balanced_subsets`).

    Args:
        train: (P, D).
        label: (P,) class numbers 0..C-1, every class at least twice.
        test: (Q, D).
        config: settings.
        spread: (D,) standard deviation within a patient; a feature that varies less than a
            millionth of it between patients is constant.
        seed: of the subsets.
    """
    c = choose_c(train, label, config, spread)
    subsets = balanced_subsets(label, config.subsets, seed)
    found = [_fit_predict(train[s], label[s], test, c, config, spread) for s in subsets]
    return np.asarray(np.mean(found, axis=0))


def balanced_subsets(label: np.ndarray, number: int, seed: int) -> list[np.ndarray]:
    """Random subsets (indices of patients) with equally many patients of each class.

    With class weights instead, leaving a patient out makes the mean of the patient's class noisier
    than the others, which moves the boundary against the patient: pooled AUROCs of pure noise then
    lie below 0.5 (0.36 to 0.43 with 24 patients left out one by one).

    Args:
        label: (P,) class numbers.
        number: subsets; one, of all patients, when the classes are equal already.
        seed: of the draw.
    """
    size = np.bincount(label)
    if (size == size[0]).all():
        return [np.arange(len(label))]
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(label == name) for name in range(len(size))]
    least = int(size.min())
    return [
        np.sort(np.concatenate([rng.choice(own, least, replace=False) for own in members]))
        for _ in range(number)
    ]


def choose_c(
    train: np.ndarray, label: np.ndarray, config: ProbeConfig, spread: np.ndarray | None = None
) -> float:
    """The C with the lowest balanced log loss on held-out training patients; ties: smaller C."""
    if len(config.grid) == 1:
        return config.grid[0]
    fold = stratified_folds(label, config.n_folds)
    loss = np.zeros(len(config.grid))
    for held in range(int(fold.max()) + 1):
        inner, outer = fold != held, fold == held
        weight = 1.0 / np.bincount(label[outer])[label[outer]]
        for i, c in enumerate(config.grid):
            found = _fit_predict(train[inner], label[inner], train[outer], c, config, spread)
            true = found[np.arange(len(found)), label[outer]]
            loss[i] -= float((weight * np.log(np.maximum(true, LEAST))).sum())
    return float(config.grid[int(np.argmin(np.round(loss, 9)))])


def stratified_folds(label: np.ndarray, most: int) -> np.ndarray:
    """Inner fold (P,) of each patient: each class is dealt out in order, every fold gets some."""
    number = min(most, int(np.bincount(label).min()))
    fold = np.zeros(len(label), dtype=np.int64)
    for name in np.unique(label):
        own = np.flatnonzero(label == name)
        fold[own] = np.arange(len(own)) % number
    return fold


def constant_features(train: np.ndarray, spread: np.ndarray | None) -> np.ndarray:
    """Which features (D,) do not differ between training patients, up to rounding."""
    scale = np.abs(train).max(axis=0, initial=0.0) * 1e-9
    if spread is not None:
        scale = np.maximum(scale, FLAT * spread)
    return np.asarray(train.std(axis=0) <= scale)


def _fit_predict(
    train: np.ndarray,
    label: np.ndarray,
    test: np.ndarray,
    c: float,
    config: ProbeConfig,
    spread: np.ndarray | None,
) -> np.ndarray:
    keep = ~constant_features(train, spread)
    n_classes = int(label.max()) + 1
    if not keep.any():
        return np.full((len(test), n_classes), 1.0 / n_classes)
    mean, scale = train[:, keep].mean(axis=0), train[:, keep].std(axis=0) * np.sqrt(keep.sum())
    model = LogisticRegression(C=c, class_weight="balanced", max_iter=config.max_iter)
    model.fit((train[:, keep] - mean) / scale, label)
    return np.asarray(model.predict_proba((test[:, keep] - mean) / scale))
