"""Metrics: pure functions of arrays, each with a slow oracle in the tests (docs/method.md 6).

A constant truth has no correlation (NaN, counted and left out); a constant prediction of a varying
truth is worth 0. Ties give the expected value over a random order of them, which is chance if all
are tied.

Shapes: S spots, G genes (or pathways), Q queries, N items, C classes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    f1_score,
    normalized_mutual_info_score,
    recall_score,
    roc_auc_score,
)

from eval.errors import FoldError

TIE = 1e-9
FLAT = 1e-10

#: What a value is, for the reports.
WORDS = {
    "pearson": "pearson: correlation of predicted and measured values, 1 is perfect; constant "
    "genes have none and are left out",
    "spearman": "spearman: correlation of ranks, 1 is perfect",
    "recall": "recall@k: share of queries whose partner is among the first k (k % of the pool)",
    "median_rank": "median_rank: where the right partner stands in the ranked pool, in the unit "
    "stated with the values; lower is better",
    "mrr": "mrr: mean of 1/rank of the right partner, 1 is perfect",
    "ari": "ari: adjusted Rand index of two partitions, 0 is chance, 1 is identical",
    "nmi": "nmi: normalised mutual information of two partitions, 1 is identical",
    "ami": "ami: mutual information of two partitions adjusted for chance, 0 is chance, "
    "1 is identical",
    "balanced_accuracy": "balanced_accuracy: mean recall over classes",
    "macro_f1": "macro_f1: F1 averaged over classes, so rare classes count as much",
    "auroc": "auroc: probability that a case is ranked above a non-case, 0.5 is chance",
    "pooled": "pooled: over all test spots of a fold together, so differences between slides count "
    "as well",
}


def pearson_per_gene(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pearson correlation (G,) of each column over the rows of (S, G) and (S, G).

    It is NaN where the truth is constant, and 0 where only the prediction is.
    """
    prediction, truth = _same_shape(prediction, truth)
    if len(truth) < 2:
        return np.full(truth.shape[1], np.nan)
    a, a_flat = _unit_columns(prediction)
    b, b_flat = _unit_columns(truth)
    r = np.clip(np.einsum("sg,sg->g", a, b), -1.0, 1.0)
    r[a_flat] = 0.0
    r[b_flat] = np.nan
    return np.asarray(r)


def spearman_per_gene(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Spearman correlation of each column, ties at their mean rank; NaN and 0 as for Pearson."""
    prediction, truth = _same_shape(prediction, truth)
    return pearson_per_gene(rankdata(prediction, axis=0), rankdata(truth, axis=0))


@dataclass(frozen=True)
class ColumnSummary:
    """Mean and median of the defined columns, their number, and that of the constant ones."""

    mean: float
    median: float
    n: int
    n_constant: int


def summarise(values: np.ndarray) -> ColumnSummary:
    """Mean and median over the columns whose truth varies; NaN when none does."""
    defined = values[np.isfinite(values)]
    if not len(defined):
        return ColumnSummary(math.nan, math.nan, 0, len(values))
    mean, median = float(defined.mean()), float(np.median(defined))
    return ColumnSummary(mean, median, len(defined), len(values) - len(defined))


@dataclass(frozen=True)
class Ranks:
    """Where the true item of each query stands.

    Args:
        above: (Q,) number of items strictly more similar than the true one.
        tied: (Q,) number of items as similar as the true one, itself included (>= 1).
        n_items: size N of the pool.
    """

    above: np.ndarray
    tied: np.ndarray
    n_items: int


def ranks(similarity: np.ndarray, tolerance: float = TIE) -> Ranks:
    """Ranks of the diagonal of a square similarity (query i belongs to item i).

    Args:
        similarity: (N, N), queries in rows.
        tolerance: similarities closer than this are ties.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or not similarity.size:
        raise FoldError(
            f"similarity has shape {similarity.shape}, expected (N, N) with query i and item i a "
            "pair; align the two sides first"
        )
    return _ranks_of_blocks(iter([(0, similarity)]), len(similarity), tolerance)


def ranks_of_embeddings(
    query: np.ndarray, item: np.ndarray, block: int = 1024, tolerance: float = TIE
) -> Ranks:
    """Cosine ranks of pairs (row i, row i) without holding the N x N similarity.

    Args:
        query: (N, D).
        item: (N, D).
        block: queries at a time; memory is block x N float64.
        tolerance: cosines closer than this are ties.
    """
    query, item = _same_shape(query, item)
    query, item = unit_rows(query), unit_rows(item)
    blocks = (
        (start, query[start : start + block] @ item.T) for start in range(0, len(query), block)
    )
    return _ranks_of_blocks(blocks, len(item), tolerance)


def recall_at_k(similarity: np.ndarray | Ranks, k: int) -> float:
    """Probability that the true item is among the k most similar, ties in random order.

    ``similarity`` is (N, N) with pairs on the diagonal, or its `Ranks`.
    """
    if k < 1:
        raise FoldError(f"recall at k = {k}; k must be at least 1")
    r = _as_ranks(similarity)
    return float(np.clip((k - r.above) / r.tied, 0.0, 1.0).mean())


def list_length(fraction: float, n_items: int) -> int:
    """List length of recall at a fraction of the pool: rounded half up, at least 1."""
    if not 0.0 < fraction <= 1.0:
        raise FoldError(f"recall at fraction {fraction}; it must be above 0 and at most 1")
    return max(1, math.floor(fraction * n_items + 0.5))


def median_rank(similarity: np.ndarray | Ranks) -> float:
    """Median of the mid-ranks as a fraction of the pool; chance is 0.5, lower is better."""
    r = _as_ranks(similarity)
    return float(np.median((r.above + 0.5 * r.tied) / r.n_items))


def mrr(similarity: np.ndarray | Ranks) -> float:
    """Mean reciprocal rank, expected over a random order of the ties."""
    r = _as_ranks(similarity)
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, r.n_items + 1))])
    return float(((harmonic[r.above + r.tied] - harmonic[r.above]) / r.tied).mean())


def chance_recall_at_k(k: int, n_items: int) -> float:
    """Recall at k of a random order."""
    return min(k, n_items) / n_items


def chance_mrr(n_items: int) -> float:
    """Mean reciprocal rank of a random order."""
    return float(np.mean(1.0 / np.arange(1, n_items + 1)))


def ari(truth: np.ndarray, cluster: np.ndarray) -> float:
    """Adjusted Rand index; 0 in expectation for random clusters, 1 for the same partition."""
    return float(adjusted_rand_score(*_same_length(truth, cluster)))


def nmi(truth: np.ndarray, cluster: np.ndarray) -> float:
    """Normalised mutual information (arithmetic mean of the entropies)."""
    return float(normalized_mutual_info_score(*_same_length(truth, cluster)))


def ami(truth: np.ndarray, cluster: np.ndarray) -> float:
    """Mutual information adjusted for chance."""
    return float(adjusted_mutual_info_score(*_same_length(truth, cluster)))


def balanced_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall over the classes that occur in the truth."""
    truth, predicted = _same_length(truth, predicted)
    present = np.unique(truth)
    return float(recall_score(truth, predicted, labels=present, average="macro", zero_division=0))


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean F1 over the classes that occur in the truth."""
    truth, predicted = _same_length(truth, predicted)
    present = np.unique(truth)
    return float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0))


def macro_auroc(truth: np.ndarray, score: np.ndarray, classes: Sequence[str]) -> float:
    """Mean one-versus-rest AUROC over the classes that occur in the truth.

    Args:
        truth: (S,) class names.
        score: (S, C), higher = more of that class.
        classes: the C names of the columns.

    Returns:
        NaN when no class of the truth has both members and others.
    """
    truth = np.asarray(truth)
    if score.shape != (len(truth), len(classes)):
        raise FoldError(f"scores {score.shape}, expected ({len(truth)}, {len(classes)})")
    members = [(truth == name, column) for column, name in enumerate(classes)]
    values = [
        roc_auc_score(positive, score[:, column])
        for positive, column in members
        if positive.any() and not positive.all()
    ]
    return float(np.mean(values)) if values else math.nan


def bootstrap_ci(
    values: Sequence[float],
    units: Sequence[str] | None = None,
    level: float = 0.95,
    n: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean when whole units (patients, slides) are drawn again.

    Args:
        values: one number each; NaN are left out.
        units: unit of each value; values of one unit are drawn together. None: each its own.
        level: coverage.
        n: draws.
        seed: of the draws.

    Returns:
        (low, high); NaN with fewer than two units.
    """
    numbers = np.asarray(values, dtype=np.float64)
    names = np.arange(len(numbers)) if units is None else np.asarray(units)
    numbers, names = _same_length(numbers, names)
    keep = np.isfinite(numbers)
    _, unit = np.unique(names[keep], return_inverse=True)
    total, size = np.bincount(unit, numbers[keep]), np.bincount(unit)
    if len(size) < 2:
        return math.nan, math.nan
    draw = np.random.default_rng(seed).integers(len(size), size=(n, len(size)))
    return percentile_ends(total[draw].sum(axis=1) / size[draw].sum(axis=1), level)


def percentile_ends(draws: np.ndarray, level: float) -> tuple[float, float]:
    """Ends of the middle ``level`` of the finite draws; NaN without any."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their length; a row of zeros stays zero."""
    rows = np.asarray(rows, dtype=np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, length, out=np.zeros_like(rows), where=length > 0))


def _as_ranks(similarity: np.ndarray | Ranks) -> Ranks:
    return similarity if isinstance(similarity, Ranks) else ranks(similarity)


def _ranks_of_blocks(
    blocks: Iterator[tuple[int, np.ndarray]], n_items: int, tolerance: float
) -> Ranks:
    above, tied = [], []
    for start, block in blocks:
        row = np.arange(len(block))
        true = block[row, start + row][:, None]
        above.append((block > true + tolerance).sum(axis=1))
        tied.append((np.abs(block - true) <= tolerance).sum(axis=1))
    return Ranks(np.concatenate(above), np.maximum(np.concatenate(tied), 1), n_items)


def _unit_columns(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centred columns of length 1, and which columns are constant up to rounding."""
    centred = values - values.mean(axis=0)
    length = np.linalg.norm(centred, axis=0)
    scale = np.sqrt(len(values)) * np.abs(values).max(axis=0, initial=0.0)
    flat = length <= FLAT * scale
    return centred / np.where(flat, 1.0, length), flat


def _same_shape(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2:
        raise FoldError(f"arrays of shape {a.shape} and {b.shape}; both must be (rows, columns)")
    return a, b


def _same_length(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise FoldError(f"arrays of shape {a.shape} and {b.shape}; both must be (n,) with n >= 1")
    return a, b
