"""Read-outs: what is fitted on top of a frozen embedding (docs/method.md 6.1).

Ridge works on moments (X'X, X'Y) per slide, so that every alpha and every inner fold costs one
small eigendecomposition and no pass over spots. Beside ridge: the groups of its inner folds, the
mean of the nearest training spots, and the standardising that both use.
Shapes: S spots, F features, T targets, A alphas.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA

from eval.errors import FoldError
from eval.measures.metrics import unit_rows

TINY = 1e-12


@dataclass(frozen=True)
class RidgeConfig:
    """PCA and ridge.

    Args:
        n_components: PCA to this many dimensions when there are more features (256 as in HEST).
        alpha: ``cv`` = chosen by inner folds; ``hest`` = 100 / (dimensions x targets); or a number.
        grid: candidates of ``cv``, in units of the mean eigenvalue of X'X, so that the choice does
            not depend on the scale of the features or the number of spots.
        n_folds: most inner folds; whole groups stay together.
        seed: of the randomised PCA.
    """

    n_components: int = 256
    alpha: float | str = "cv"
    grid: tuple[float, ...] = tuple(float(10.0**p) for p in np.arange(-4.0, 4.01, 0.5))
    n_folds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Moments:
    """Sums over the spots of one unit: n, sum x, sum y, X'X, X'Y and sum y^2."""

    n: int
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray

    @staticmethod
    def of(x: np.ndarray, y: np.ndarray) -> "Moments":
        """Moments of (S, F) and (S, T)."""
        return Moments(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, (y * y).sum(0))

    def plus(self, other: "Moments", sign: int = 1) -> "Moments":
        """Sum of the two (sign 1), or the difference (sign -1)."""
        return Moments(
            self.n + sign * other.n,
            self.x + sign * other.x,
            self.y + sign * other.y,
            self.xx + sign * other.xx,
            self.xy + sign * other.xy,
            self.yy + sign * other.yy,
        )

    def centred(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """X'X (F, F), X'Y (F, T) and the column sums of y^2 (T,), all about the mean."""
        xx = self.xx - np.outer(self.x, self.x) / self.n
        xy = self.xy - np.outer(self.x, self.y) / self.n
        return xx, xy, np.maximum(self.yy - self.y**2 / self.n, 0.0)


def ridge_fit_predict(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    alpha: float | str = "cv",
    groups: Sequence[object] | np.ndarray | None = None,
    units: Sequence[object] | np.ndarray | None = None,
    config: RidgeConfig | None = None,
) -> np.ndarray:
    """Fit PCA and ridge on training spots and predict others.

    An intercept is fitted (HEST fits none; a constant does not change a correlation).

    Args:
        train_x: (S, F).
        train_y: (S, T).
        test_x: (S', F).
        alpha: ``cv``, ``hest`` or a number; see `RidgeConfig`.
        groups: (S,) inner folds never split a group (patients, or spatial blocks when there is
            one patient); needed for ``cv``.
        units: (S,) the validation correlation is taken within these (slides); default: groups.
        config: the rest of the settings.

    Returns:
        (S', T).

    Raises:
        FoldError: shapes do not fit, or ``cv`` has fewer than two groups.
    """
    config = config or RidgeConfig()
    if train_x.ndim != 2 or train_y.ndim != 2 or len(train_x) != len(train_y):
        raise FoldError(f"ridge: train_x {train_x.shape}, train_y {train_y.shape}; rows must match")
    if test_x.shape[1] != train_x.shape[1]:
        raise FoldError(f"ridge: {test_x.shape[1]} test features, {train_x.shape[1]} in training")
    train_x, test_x = _reduced(train_x, test_x, config)
    mean_x, mean_y = train_x.mean(axis=0), train_y.mean(axis=0)
    x, y = train_x - mean_x, train_y - mean_y
    value = _alpha(x, y, alpha, groups, units, config)
    weights = ridge_weights(Moments.of(x, y), [value])[0]
    return np.asarray((test_x - mean_x) @ weights + mean_y)


def ridge_weights(moments: Moments, alphas: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ridge weights for several alphas from one eigendecomposition.

    Args:
        moments: of the training spots.
        alphas: A penalties on the centred sums (scikit-learn's meaning of alpha).

    Returns:
        (A, F, T); directions without variance get weight 0 when alpha is 0.
    """
    xx, xy, _ = moments.centred()
    value, vector = np.linalg.eigh(xx)
    rotated = vector.T @ xy
    floor = TINY * max(float(value[-1]), TINY)
    penalised = np.maximum(value, 0.0) + np.asarray(alphas, dtype=np.float64)[:, None]
    inverse = np.where(penalised > floor, 1.0 / np.maximum(penalised, floor), 0.0)
    return np.asarray(vector @ (inverse[:, :, None] * rotated))


def choose_alpha(
    x: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    units: np.ndarray,
    config: RidgeConfig,
) -> float:
    """The penalty with the best inner validation correlation.

    For every inner fold (whole groups held out) the mean Pearson over targets within each held-out
    unit is averaged; within a unit, so that a patient's depth does not decide.

    Args:
        x: (S, F).
        y: (S, T).
        groups: (S,) never split over folds.
        units: (S,) within which the correlation is taken.
        config: grid and number of folds.

    Returns:
        The penalty on the scale of all training spots.
    """
    fold_of = group_folds(groups, config.n_folds)
    pieces = _piece_moments(x, y, fold_of, units)
    total = reduce(Moments.plus, pieces.values())
    scores = []
    for fold in range(int(fold_of.max()) + 1):
        held = [moments for (piece_fold, _), moments in pieces.items() if piece_fold == fold]
        train = total.plus(reduce(Moments.plus, held), -1)
        weights = ridge_weights(train, _penalties(train, config))
        scores += [_pearson_of_moments(moments, weights) for moments in held if moments.n > 2]
    best = int(np.argmax(_defined(scores).mean(axis=0)))
    return float(_penalties(total, config)[best])


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


def _reduced(
    train_x: np.ndarray, test_x: np.ndarray, config: RidgeConfig
) -> tuple[np.ndarray, np.ndarray]:
    """PCA fitted on training rows; a mere rotation is skipped, since ridge does not see it."""
    size = min(config.n_components, len(train_x) - 1)
    if train_x.shape[1] <= max(size, 1):
        return train_x, test_x
    pca = PCA(size, random_state=config.seed).fit(train_x)
    return pca.transform(train_x), pca.transform(test_x)


def _alpha(
    x: np.ndarray,
    y: np.ndarray,
    alpha: float | str,
    groups: Sequence[object] | np.ndarray | None,
    units: Sequence[object] | np.ndarray | None,
    config: RidgeConfig,
) -> float:
    if not isinstance(alpha, str):
        return float(alpha)
    if alpha == "hest":
        return 100.0 / float(x.shape[1] * y.shape[1])
    if alpha != "cv":
        raise FoldError(f"ridge: alpha {alpha!r}; it must be 'cv', 'hest' or a number")
    if groups is None:
        raise FoldError("ridge: alpha 'cv' needs groups (patients, or spatial blocks)")
    inner = np.asarray(groups, dtype=object)
    return choose_alpha(x, y, inner, inner if units is None else np.asarray(units, object), config)


def _penalties(moments: Moments, config: RidgeConfig) -> np.ndarray:
    xx, _, _ = moments.centred()
    return np.asarray(config.grid) * max(float(np.trace(xx)) / len(xx), TINY)


def _piece_moments(
    x: np.ndarray, y: np.ndarray, fold_of: np.ndarray, units: np.ndarray
) -> dict[tuple[int, str], Moments]:
    """Moments of every (inner fold, unit) that has spots."""
    names = units.astype(str)
    pieces = {}
    for fold in range(int(fold_of.max()) + 1):
        for unit in np.unique(names[fold_of == fold]):
            own = (fold_of == fold) & (names == unit)
            pieces[fold, str(unit)] = Moments.of(x[own], y[own])
    return pieces


def _pearson_of_moments(moments: Moments, weights: np.ndarray) -> np.ndarray:
    """Mean Pearson over targets (A,) of the predictions X W within one unit."""
    xx, xy, yy = moments.centred()
    covariance = np.einsum("aft,ft->at", weights, xy)
    variance = np.einsum("aft,aft->at", weights, xx @ weights)
    flat = yy <= TINY * np.maximum(moments.yy, TINY)
    product = np.sqrt(np.maximum(variance, 0.0) * yy)
    r = np.divide(covariance, product, out=np.zeros_like(covariance), where=product > TINY**2)
    return np.asarray(r[:, ~flat].mean(axis=1)) if (~flat).any() else np.full(len(r), math.nan)


def _defined(scores: list[np.ndarray]) -> np.ndarray:
    """The defined rows (units, A); one row of zeros when no unit has a varying target."""
    defined = [score for score in scores if np.isfinite(score).all()]
    return np.array(defined) if defined else np.zeros((1, 1))


def inner_groups(patients: np.ndarray, slides: np.ndarray, xy_um: np.ndarray) -> np.ndarray:
    """Groups (S,) of the inner folds: patients, or spatial blocks of each slide with one patient.

    Args:
        patients: (S,) names.
        slides: (S,) names.
        xy_um: (S, 2) micrometres.
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


def _quantile_bin(values: np.ndarray, n: int) -> np.ndarray:
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return (order * n) // max(len(values), 1)


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


def _mean_of_nearest(similarity: np.ndarray, target: np.ndarray, k: int) -> np.ndarray:
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    pointer = np.arange(0, nearest.size + 1, k)
    shape = (len(similarity), len(target))
    pick = sparse.csr_matrix((np.full(nearest.size, 1.0 / k), nearest.ravel(), pointer), shape)
    return np.asarray(pick @ target)


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
