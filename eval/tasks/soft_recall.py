"""Soft recall: how many retrieved items are nearly what was asked for (METHOD section 6.2).

Spots beside each other have nearly the same profile, and plain recall counts all but one of them as
wrong. Here an item is relevant to a query when its measured expression is among the most similar to
the query's own: Pearson over variable genes, the first ``share`` of the slide's spots, the query's
own included. Soft recall at k is the share of the first k items that are relevant: precision at k
(Manning, Raghavan and Schütze 2008, section 8.4) under that relevance, so a random order reaches
about ``share``. Ties count at their expectation.
Shapes: N spots of one slide, D dimensions, V variable genes.
"""

from collections.abc import Sequence

import numpy as np

from eval.fold import FoldError
from eval.metrics import TIE, list_length, unit_rows

BLOCK = 512


def soft_recall(
    query: np.ndarray,
    item: np.ndarray,
    expression: np.ndarray,
    k: Sequence[int],
    share: float,
    block: int = BLOCK,
) -> tuple[list[float], float]:
    """Mean over the queries for several list lengths, and what a random order reaches.

    Args:
        query: (N, D) embeddings of one side.
        item: (N, D) embeddings of the other side, pairs in the same row.
        expression: (N, V) measured expression of the spots.
        k: list lengths.
        share: of the items that are relevant to a query; more where similarities tie.
        block: queries at a time; memory is block x N float64.

    Raises:
        FoldError: rows do not match, or a length beyond the pool.
    """
    n = len(query)
    if not (len(item) == len(expression) == n) or not n:
        raise FoldError(
            f"{n} queries, {len(item)} items, {len(expression)} profiles; must be equal"
        )
    if min(k) < 1 or max(k) > n:
        raise FoldError(f"list lengths {list(k)} of a pool of {n}; they must be 1 to {n}")
    a, b = unit_rows(query), unit_rows(item)
    profile = unit_rows(expression - expression.mean(axis=1, keepdims=True))
    first = list_length(share, n)
    total, relevant_share = np.zeros(len(k)), 0.0
    for start in range(0, n, block):
        rows = slice(start, start + block)
        alike = profile[rows] @ profile.T
        own = np.arange(len(alike))
        alike[own, start + own] = np.inf  # the query's own spot is always relevant
        bound = -np.partition(-alike, first - 1, axis=1)[:, first - 1 : first]
        relevant = alike >= bound - TIE
        relevant_share += float(relevant.mean(axis=1).sum())
        similarity = a[rows] @ b.T
        total += [_precision(similarity, relevant, length).sum() for length in k]
    return (total / n).tolist(), relevant_share / n


def _precision(similarity: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """Share (Q,) of the k most similar items that are relevant; ties in random order."""
    cut = -np.partition(-similarity, k - 1, axis=1)[:, k - 1 : k]
    above, tied = similarity > cut + TIE, np.abs(similarity - cut) <= TIE
    free = k - above.sum(axis=1)
    part = (relevant & tied).sum(axis=1) / tied.sum(axis=1)
    return np.asarray(((relevant & above).sum(axis=1) + free * part) / k)
