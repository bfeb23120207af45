"""Similarities that use the whole test slide; they stand beside plain cosine, marked as such.

Shapes: N spots; queries in rows, items in columns.
"""

import numpy as np
from scipy.special import logsumexp


def csls(similarity: np.ndarray, k: int = 10) -> np.ndarray:
    """Cross-domain similarity local scaling: 2 s - mean of the k best per row and per column.

    Args:
        similarity: (N, M) cosines.
        k: size of the neighbourhood.

    Returns:
        (N, M); the same matrix serves both directions.
    """
    rows = _mean_of_best(similarity, k)
    columns = _mean_of_best(similarity.T, k)
    return np.asarray(2.0 * similarity - rows[:, None] - columns[None, :])


def sinkhorn(similarity: np.ndarray, temperature: float = 0.1, steps: int = 30) -> np.ndarray:
    """Log of the doubly stochastic scaling of exp(similarity / temperature).

    It says that every item belongs to one query, which holds for a pool of pairs.

    Args:
        similarity: (N, N) cosines.
        temperature: of the kernel; 0.1 was measured in the prototype.
        steps: rounds of row and column scaling.

    Returns:
        (N, N) log assignment; rows and columns of its exponential sum to about 1.
    """
    kernel = similarity / temperature
    row = np.zeros(len(kernel))
    column = np.zeros(kernel.shape[1])
    for _ in range(steps):
        row = -logsumexp(kernel + column, axis=1)
        column = -logsumexp(kernel + row[:, None], axis=0)
    return np.asarray(kernel + row[:, None] + column)


def _mean_of_best(similarity: np.ndarray, k: int) -> np.ndarray:
    k = min(k, similarity.shape[1])
    best = np.partition(similarity, similarity.shape[1] - k, axis=1)[:, -k:]
    return np.asarray(best.mean(axis=1))
