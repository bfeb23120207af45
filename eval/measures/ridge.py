"""Read-outs: what is fitted on top of a frozen embedding (docs/method.md 6.1).

Ridge works on moments (X'X, X'Y) per slide, so that every alpha and every inner fold costs one
small eigendecomposition and no pass over spots. Targets are z-scored within each training slide, so
that depth and level of a slide do not weigh; what is predicted is put back on the scale of the
training spots. The penalty is the strongest that inner folds cannot tell from the best one: the
one-standard-error rule (Breiman et al. 1984, section 3.4.3).
Beside ridge: the mean of the nearest training spots, and the weights of several predictions in
their mean.
Shapes: S spots, F features, T targets, A alphas, P predictions, U units (slides).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import numpy as np
import torch
from scipy import sparse
from sklearn.decomposition import PCA

from eval.errors import FoldError
from eval.measures.inner_folds import SHARES, group_folds, within_one_error
from eval.measures.metrics import unit_rows
from hibio.config.schema import Count, Folds, Positive, Seed

TINY = 1e-12
COLUMNS = 128  # targets at once, so that what is computed of them stays in the processor's cache
MOST_TARGETS = 1024  # that choose the penalty, which is one for all


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

    n_components: Count = 256
    alpha: Positive | str = "cv"
    grid: tuple[Positive, ...] = tuple(float(10.0**p) for p in np.arange(-4.0, 5.01, 0.5))
    n_folds: Folds = 5
    seed: Seed = 0


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


@dataclass(frozen=True)
class Targets:
    """What is fitted for training spots, and the way back to their scale.

    Args:
        z: (S, T) z-scored within each unit.
        mean: (T,) over all spots.
        spread: (T,) standard deviation within a unit, over all spots.
    """

    z: np.ndarray
    mean: np.ndarray
    spread: np.ndarray

    @staticmethod
    def of(y: np.ndarray, units: np.ndarray | None) -> "Targets":
        """Of (S, T) and the unit (S,) of each spot; without units, of all spots as they are."""
        if units is None:
            return Targets(y - y.mean(axis=0), y.mean(axis=0), np.ones(y.shape[1]))
        z, power = np.zeros(y.shape), np.zeros(y.shape[1])
        names = units.astype(str)
        for unit in np.unique(names):
            own = names == unit
            z[own], sd = _standardised(y[own])
            power += own.sum() * sd**2
        return Targets(z, y.mean(axis=0), np.sqrt(power / len(y)))

    def back(self, predicted: np.ndarray, columns: slice = slice(None)) -> np.ndarray:
        """Predictions (S', T) of all targets or of some, on the scale of the training spots.

        Order and r are unchanged.
        """
        return np.asarray(predicted * self.spread[columns] + self.mean[columns])


@dataclass(frozen=True)
class ReadOut:
    """Predictions (S', T) of test spots, and (S, T) of training spots by inner folds."""

    test: np.ndarray
    inner: np.ndarray


@dataclass(frozen=True)
class Ridge:
    """A ridge that was fitted.

    Args:
        x: (S, F) training rows, reduced and centred.
        y: targets of the training spots.
        alpha: penalty.
        mean: (F,) that was taken off.
        weights: (F, T).
        pca: what reduced them, or None.
    """

    x: np.ndarray
    y: Targets
    alpha: float
    mean: np.ndarray
    weights: np.ndarray
    pca: PCA | None

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Predictions (S', T) of rows (S', F).

        On the scale of the training spots: their mean, and their spread within a unit.

        Raises:
            FoldError: rows of another width.
        """
        return self.y.back(self.reduced(x) @ self.weights)

    def reduced(self, x: np.ndarray) -> np.ndarray:
        """Rows (S', F) as the weights read them: after the PCA, if there is one, and centred.

        Raises:
            FoldError: rows of another width.
        """
        known = len(self.mean) if self.pca is None else self.pca.n_features_in_
        if x.shape[1] != known:
            raise FoldError(f"ridge: {x.shape[1]} test features, {known} in training")
        return np.asarray((x if self.pca is None else self.pca.transform(x)) - self.mean)


def ridge_fit(
    train_x: np.ndarray,
    train_y: np.ndarray,
    alpha: float | str = "cv",
    groups: Sequence[object] | np.ndarray | None = None,
    units: Sequence[object] | np.ndarray | None = None,
    config: RidgeConfig | None = None,
) -> Ridge:
    """Fit PCA and ridge on training spots.

    An intercept is fitted (HEST fits none; a constant does not change a correlation).

    Args:
        train_x: (S, F).
        train_y: (S, T).
        alpha: ``cv``, ``hest`` or a number; see `RidgeConfig`.
        groups: (S,) inner folds never split a group (`inner_groups`); needed for ``cv``.
        units: (S,) slides: the targets are z-scored and the validation correlation is taken within
            these; with ``hest``, which takes targets as they are, they are not read. Default: the
            groups of ``cv``; targets as they are with a number.
        config: the rest of the settings.

    Raises:
        FoldError: shapes do not fit, or ``cv`` has fewer than two groups.
    """
    config = config or RidgeConfig()
    if train_x.ndim != 2 or train_y.ndim != 2 or len(train_x) != len(train_y):
        raise FoldError(f"ridge: train_x {train_x.shape}, train_y {train_y.shape}; rows must match")
    pca = _pca(train_x, config)
    x = train_x if pca is None else pca.transform(train_x)
    mean = x.mean(axis=0)
    x = x - mean
    group = None if groups is None else np.asarray(groups, dtype=object)
    unit = group if units is None and alpha == "cv" else units
    within = None if unit is None or alpha == "hest" else np.asarray(unit, dtype=object)
    y = Targets.of(train_y, within)
    value = _alpha(x, y.z, alpha, group, within, config)
    return Ridge(x, y, value, mean, ridge_weights(Moments.of(x, y.z), [value])[0], pca)


def ridge_fit_predict(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    alpha: float | str = "cv",
    groups: Sequence[object] | np.ndarray | None = None,
    units: Sequence[object] | np.ndarray | None = None,
    config: RidgeConfig | None = None,
) -> np.ndarray:
    """Predictions (S', T) of ``test_x`` (S', F) by `ridge_fit` of the rest, at once."""
    return ridge_fit(train_x, train_y, alpha, groups, units, config).predict(test_x)


def ridge_readout(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    groups: np.ndarray,
    units: np.ndarray,
    config: RidgeConfig,
) -> ReadOut:
    """`ridge_fit_predict`, and each training spot predicted without its inner fold."""
    ridge = ridge_fit(train_x, train_y, config.alpha, groups, units, config)
    fold_of = group_folds(np.asarray(groups, dtype=object), config.n_folds)
    inner = inner_predictions(ridge.x, ridge.y.z, fold_of, ridge.alpha)
    return ReadOut(ridge.predict(test_x), ridge.y.back(inner))


def inner_predictions(
    x: np.ndarray, y: np.ndarray, fold_of: np.ndarray, alpha: float
) -> np.ndarray:
    """Each spot (S, T) by a ridge without its fold; the penalty a spot stays the same."""
    found = np.zeros(y.shape)
    for fold in range(int(fold_of.max()) + 1):
        own = fold_of == fold
        rest = Moments.of(x[~own], y[~own])
        weights = ridge_weights(rest, [alpha * rest.n / len(x)])[0]
        found[own] = (x[own] - rest.x / rest.n) @ weights + rest.y / rest.n
    return found


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
    """The strongest penalty whose inner validation correlation is within one error of the best.

    For every inner fold (whole groups held out) the mean Pearson over targets within each held-out
    unit is taken; within a unit, so that a patient's depth does not decide. The standard error is
    that over units; with fewer than three of them the best penalty is taken.

    Args:
        x: (S, F).
        y: (S, T); of more than `MOST_TARGETS` that many, evenly spaced, are asked.
        groups: (S,) never split over folds.
        units: (S,) within which the correlation is taken.
        config: grid and number of folds.

    Returns:
        The penalty on the scale of all training spots.
    """
    fold_of = group_folds(groups, config.n_folds)
    n_targets = y.shape[1]
    asked = np.linspace(0, n_targets - 1, min(n_targets, MOST_TARGETS)).astype(np.intp)
    pieces = _piece_moments(x, y[:, asked], fold_of, units)
    total = reduce(Moments.plus, pieces.values())
    scores: dict[str, list[np.ndarray]] = {}
    for fold in range(int(fold_of.max()) + 1):
        held = {unit: one for (piece_fold, unit), one in pieces.items() if piece_fold == fold}
        train = total.plus(reduce(Moments.plus, held.values()), -1)
        weights = ridge_weights(train, _penalties(train, config))
        for unit, moments in held.items():
            if moments.n > 2:
                r = _mean(_pearson_of_moments(moments, weights))
                scores.setdefault(unit, []).append(r)
    rows = _defined([np.mean(of_unit, axis=0) for of_unit in scores.values()])
    return float(_penalties(total, config)[within_one_error(rows, config.grid)])


def choose_weights(
    inner: Sequence[np.ndarray], target: np.ndarray, units: np.ndarray
) -> tuple[float, ...]:
    """Weights of several predictions in their mean, chosen on training spots.

    The correlation of the z-scored mean with the target is taken within each unit, for equal
    weights and all that are quarters. Of those within one standard error of the best
    (`within_one_error`) the most equal is taken: an embedding that was trained on these spots looks
    better on them than it is.

    Args:
        inner: P predictions (S, T) of the training spots by inner folds.
        target: (S, T).
        units: (S,) slides.

    Returns:
        P weights that sum to 1.
    """
    n = len(inner)
    quarters = [w for w in product(SHARES, repeat=n) if math.isclose(sum(w), 1.0)]
    mixes = [(1.0 / n,) * n, *quarters]
    weights = np.array(mixes)
    rows = []
    for unit in np.unique(units.astype(str)):
        own = units.astype(str) == unit
        parts, truth = np.stack([zscore(one[own]) for one in inner]), zscore(target[own])
        shared = np.einsum("pst,qst->pqt", parts, parts)
        covariance = weights @ np.einsum("pst,st->pt", parts, truth)
        size = np.sqrt(np.einsum("cp,pqt,cq->ct", weights, shared, weights) * own.sum())
        r = np.divide(covariance, size, out=np.zeros_like(covariance), where=size > TINY)
        rows.append(r.mean(axis=1))
    return mixes[within_one_error(np.array(rows), -(weights**2).sum(axis=1))]


def _pca(x: np.ndarray, config: RidgeConfig) -> PCA | None:
    """PCA fitted on training rows; a mere rotation is skipped, since ridge does not see it."""
    size = min(config.n_components, len(x) - 1)
    if x.shape[1] <= max(size, 1):
        return None
    return PCA(size, random_state=config.seed).fit(x)


def _alpha(
    x: np.ndarray,
    y: np.ndarray,
    alpha: float | str,
    groups: np.ndarray | None,
    units: np.ndarray | None,
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
    return choose_alpha(x, y, groups, groups if units is None else units, config)


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
    """Pearson (A, T) of the predictions X W within one unit; of the targets that vary there."""
    xx, xy, yy = moments.centred()
    covariance = np.einsum("aft,ft->at", weights, xy)
    variance = np.einsum("aft,aft->at", weights, xx @ weights)
    flat = yy <= TINY * np.maximum(moments.yy, TINY)
    product = np.sqrt(np.maximum(variance, 0.0) * yy)
    r = np.divide(covariance, product, out=np.zeros_like(covariance), where=product > TINY**2)
    return np.asarray(r[:, ~flat])


def _mean(r: np.ndarray) -> np.ndarray:
    """Mean (A,) over targets (A, T); NaN without any."""
    return r.mean(axis=1) if r.shape[1] else np.full(len(r), math.nan)


def column_blocks(n: int, size: int = COLUMNS) -> list[slice]:
    """Slices of at most ``size`` of n columns; one that is empty of none."""
    return [slice(start, min(start + size, n)) for start in range(0, max(n, 1), size)]


def _defined(scores: list[np.ndarray]) -> np.ndarray:
    """The defined rows (units, A); one row of zeros when no unit has a varying target."""
    defined = [score for score in scores if np.isfinite(score).all()]
    return np.array(defined) if defined else np.zeros((1, 1))


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
    if len(train_x) != len(train_y):
        raise FoldError(f"knn: train_x {train_x.shape}, train_y {train_y.shape}; rows must match")
    return np.asarray(nearest_weights(train_x, test_x, k, block) @ train_y)


def nearest_weights(
    train_x: np.ndarray, test_x: np.ndarray, k: int = 50, block: int = 2048
) -> sparse.csr_matrix:
    """What makes a mean of the k training spots with the highest cosine: (S', S), rows sum to 1.

    Args: as of `knn_mean`.
    """
    if train_x.shape[1] != test_x.shape[1] or k < 1:
        raise FoldError(
            f"knn: train_x {train_x.shape}, test_x {test_x.shape}, k = {k}; columns of x must "
            "match, k >= 1"
        )
    k = min(k, len(train_x))
    bank, query = (unit_rows(x).astype(np.float32) for x in (train_x, test_x))
    nearest = np.zeros((len(query), k), dtype=np.int64)
    for start in range(0, len(query), block):
        similarity = query[start : start + block] @ bank.T
        found = torch.topk(torch.from_numpy(similarity), k, sorted=False)  # ten times numpy's
        nearest[start : start + block] = found.indices.numpy()
    pointer = np.arange(0, nearest.size + 1, k)
    weight = np.full(nearest.size, 1.0 / k)
    return sparse.csr_matrix((weight, nearest.ravel(), pointer), (len(query), len(bank)))


def zscore(values: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and standard deviation 1 over the rows; constant columns become 0."""
    return _standardised(values)[0]


def _standardised(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`zscore` of (S, T), and the standard deviations (T,)."""
    values = np.asarray(values, dtype=np.float64)
    mean = values.mean(axis=0)
    centred = values - mean
    sd = np.sqrt(np.einsum("st,st->t", centred, centred) / len(values))
    flat = sd <= TINY * np.maximum(np.abs(mean), TINY)  # of a constant it is the largest value
    centred /= np.where(flat, 1.0, sd)
    centred[:, flat] = 0.0
    return centred, sd


def zscore_mean(*predictions: np.ndarray, weights: Sequence[float] | None = None) -> np.ndarray:
    """Weighted mean of z-scored predictions (S, T) of the same spots; one alone is left as it is.

    Args:
        predictions: P of them.
        weights: P weights; equal ones by default.
    """
    if len(predictions) == 1:
        return predictions[0]
    share = np.ones(len(predictions)) if weights is None else np.asarray(weights)
    mixed = np.zeros(predictions[0].shape)
    for part, one in zip(predictions, share / share.sum(), strict=True):
        mixed += one * zscore(part)
    return mixed


def centre(values: np.ndarray) -> np.ndarray:
    """Rows minus their mean over the spots (of one slide)."""
    return np.asarray(values - values.mean(axis=0))
