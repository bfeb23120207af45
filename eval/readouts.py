"""Read-outs: what is fitted on top of a frozen embedding (METHOD section 6.1).

Ridge itself is in `eval.ridge`; here are the groups of its inner folds, the mean of the nearest
training spots, and the standardising that both use.

Shapes: S spots, F features, T targets.
"""

import numpy as np
from scipy import sparse

from eval.fold import FoldError
from eval.metrics import unit_rows
from eval.ridge import RidgeConfig, group_folds, ridge_fit_predict

__all__ = [
    "RidgeConfig",
    "centre",
    "group_folds",
    "inner_groups",
    "knn_mean",
    "ridge_fit_predict",
    "spatial_blocks",
    "zscore",
    "zscore_mean",
]

TINY = 1e-12


def inner_groups(patients: np.ndarray, slides: np.ndarray, xy_um: np.ndarray) -> np.ndarray:
    """Groups of the inner folds: patients, or spatial blocks of each slide with one patient.

    Args:
        patients: (S,) names.
        slides: (S,) names.
        xy_um: (S, 2) micrometres.

    Returns:
        (S,) group names.
    """
    if len(set(patients.tolist())) > 1:
        return patients
    groups = np.empty(len(slides), dtype=object)
    for slide in sorted(set(slides.tolist())):
        own = slides == slide
        blocks = spatial_blocks(xy_um[own])
        groups[own] = [f"{slide}/{block}" for block in blocks.tolist()]
    return groups


def spatial_blocks(xy_um: np.ndarray, side: int = 3) -> np.ndarray:
    """Block number (S,) on a grid of side x side with equally many spots per row and column."""
    column = _quantile_bin(xy_um[:, 0], side)
    row = np.zeros(len(xy_um), dtype=np.int64)
    for index in range(side):
        own = column == index
        row[own] = _quantile_bin(xy_um[own, 1], side)
    return column * side + row


def knn_mean(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, k: int = 50, block: int = 2048
) -> np.ndarray:
    """Mean target of the k training spots with the highest cosine (BLEEP-like).

    Args:
        train_x: (S, F).
        train_y: (S, T).
        test_x: (S', F).
        k: neighbours; all training spots when there are fewer.
        block: test spots at a time.

    Returns:
        (S', T).
    """
    if len(train_x) != len(train_y) or train_x.shape[1] != test_x.shape[1] or k < 1:
        raise FoldError(
            f"knn: train_x {train_x.shape}, train_y {train_y.shape}, test_x {test_x.shape}, "
            f"k = {k}; rows of the first two and columns of x must match, k >= 1"
        )
    k = min(k, len(train_x))
    bank, query = unit_rows(train_x), unit_rows(test_x)
    means = [
        _mean_of_nearest(query[start : start + block] @ bank.T, train_y, k)
        for start in range(0, len(query), block)
    ]
    return np.concatenate(means) if means else np.zeros((0, train_y.shape[1]))


def zscore(values: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and standard deviation 1 over the rows; constant columns become 0."""
    values = np.asarray(values, dtype=np.float64)
    centred = values - values.mean(axis=0)
    spread = values.std(axis=0)
    flat = spread <= TINY * np.maximum(np.abs(values).max(axis=0, initial=0.0), TINY)
    return np.asarray(np.where(flat, 0.0, centred / np.where(flat, 1.0, spread)))


def zscore_mean(*predictions: np.ndarray) -> np.ndarray:
    """Mean of z-scored predictions (S, T) of the same spots; one alone is returned as it is."""
    if len(predictions) == 1:
        return predictions[0]
    return np.asarray(np.mean([zscore(prediction) for prediction in predictions], axis=0))


def centre(values: np.ndarray) -> np.ndarray:
    """Rows minus their mean over the spots (of one slide)."""
    return np.asarray(values - values.mean(axis=0))


def _mean_of_nearest(similarity: np.ndarray, target: np.ndarray, k: int) -> np.ndarray:
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    pointer = np.arange(0, nearest.size + 1, k)
    shape = (len(similarity), len(target))
    pick = sparse.csr_matrix((np.full(nearest.size, 1.0 / k), nearest.ravel(), pointer), shape)
    return np.asarray(pick @ target)


def _quantile_bin(values: np.ndarray, n: int) -> np.ndarray:
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return (order * n) // max(len(values), 1)
