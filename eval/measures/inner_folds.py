"""Inner folds of training spots, and the choice that is made on them (docs/method.md 6).

Shapes: S spots, U units (slides or patients), C candidates.
"""

import math
from collections.abc import Sequence

import numpy as np

from eval.errors import FoldError

MIN_UNITS = 3  # patients, slides: fewer give no standard error
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # weights of one part in a mean


def inner_groups(patients: np.ndarray, slides: np.ndarray, xy_um: np.ndarray) -> np.ndarray:
    """Groups (S,) of the inner folds, never fewer than they need to be told apart.

    Patients from three on; else slides, since two patients say nothing of a third; else spatial
    blocks of the only slide.

    Args:
        patients: (S,) names.
        slides: (S,) names.
        xy_um: (S, 2) micrometres.
    """
    if len(set(patients.tolist())) >= MIN_UNITS:
        return patients
    if len(set(slides.tolist())) > 1:
        return slides
    return spatial_blocks(xy_um).astype(str).astype(object)


def group_folds(groups: np.ndarray, n_folds: int) -> np.ndarray:
    """Fold number (S,) of each spot: whole groups, largest first into the smallest fold.

    Raises:
        FoldError: fewer than two groups.
    """
    _, group, size = np.unique(groups.astype(str), return_inverse=True, return_counts=True)
    if len(size) < 2:
        raise FoldError(
            "inner folds need at least two groups of spots; with one patient give spatial blocks "
            "(eval.measures.ridge.inner_groups)"
        )
    filled = np.zeros(min(n_folds, len(size)), dtype=np.int64)
    fold_of_group = np.zeros(len(size), dtype=np.int64)
    for index in np.argsort(-size, kind="stable"):
        fold_of_group[index] = int(np.argmin(filled))
        filled[fold_of_group[index]] += size[index]
    return fold_of_group[group]


def spatial_blocks(xy_um: np.ndarray, side: int = 3) -> np.ndarray:
    """Block number (S,) on a grid of side x side with equally many spots per row and column."""
    column = _quantile_bin(xy_um[:, 0], side)
    row = np.zeros(len(xy_um), dtype=np.int64)
    for index in range(side):
        own = column == index
        row[own] = _quantile_bin(xy_um[own, 1], side)
    return column * side + row


def _quantile_bin(values: np.ndarray, n: int) -> np.ndarray:
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return (order * n) // max(len(values), 1)


def within_one_error(scores: np.ndarray, preference: Sequence[float] | np.ndarray) -> int:
    """Of the candidates within one standard error of the best one, the most preferred.

    Args:
        scores: (U, C) of every unit and candidate, higher is better.
        preference: (C,) higher is preferred.

    Returns:
        Index of the candidate; the best one where fewer than three units give no error.
    """
    mean = scores.mean(axis=0)
    best = int(np.argmax(mean))
    if len(scores) < MIN_UNITS:
        return best
    error = float(scores[:, best].std(ddof=1)) / math.sqrt(len(scores))
    near = np.flatnonzero(mean >= mean[best] - error)
    return int(near[np.argmax(np.asarray(preference)[near])])
