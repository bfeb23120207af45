"""Cosines of TF-IDF rows with anchors, and their mean and spread over a stream of spots.

Shapes: S spots, G genes of the panel, M pathways.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse import csr_matrix

from .errors import PathwayError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

BLOCK_SPOTS = 1024
UNIT_TOLERANCE = 1e-3
CONSTANT_SD = 1e-6


def checked_idf(idf: npt.ArrayLike, n_genes: int) -> Doubles:
    """Inverse document frequencies (G,), finite and not negative, or an error."""
    values = np.asarray(idf, dtype=np.float64)
    if values.shape != (n_genes,) or not np.isfinite(values).all() or (values < 0).any():
        raise PathwayError(
            f"idf of shape {values.shape}; expected {n_genes} finite numbers >= 0, one a gene."
        )
    return values


def row_blocks(tfidf: csr_matrix) -> Iterable[csr_matrix]:
    """Rows in blocks, so that a dense (block, M) stays small."""
    for start in range(0, tfidf.shape[0], BLOCK_SPOTS):
        yield tfidf[start : start + BLOCK_SPOTS]


def cosine(tfidf: csr_matrix, matrix: csr_matrix) -> Floats:
    """Unit rows (S, G) times unit columns (G, M) -> dense (S, M)."""
    if not sparse.issparse(tfidf) or tfidf.shape[1] != matrix.shape[0]:
        raise PathwayError(
            f"TF-IDF of shape {np.shape(tfidf)}; expected a CSR matrix with {matrix.shape[0]} "
            "genes, in the order of the fitted panel."
        )
    tfidf = csr_matrix(tfidf)
    longest = tfidf.multiply(tfidf).sum(axis=1).max() if tfidf.shape[0] else 0.0
    if not longest <= (1 + UNIT_TOLERANCE) ** 2:
        raise PathwayError(
            f"a TF-IDF row has length {np.sqrt(longest):.3g}; expected L2-normalised rows (length "
            "1). Pass the output of TfidfReweighter.transform, not counts."
        )
    out = np.empty((tfidf.shape[0], matrix.shape[1]), dtype=np.float32)
    for start, part in enumerate(row_blocks(tfidf)):
        rows = slice(start * BLOCK_SPOTS, start * BLOCK_SPOTS + part.shape[0])
        out[rows] = (part @ matrix).toarray()
    return out


def moments(blocks: Iterable[Floats]) -> tuple[Doubles, Doubles]:
    """Mean and population sd over rows of a stream (pairwise update of Chan et al.)."""
    count, mean, square = 0, np.zeros(0), np.zeros(0)
    for block in blocks:
        values = block.astype(np.float64)
        n, block_mean = len(values), values.mean(axis=0)
        block_square = ((values - block_mean) ** 2).sum(axis=0)
        if count == 0:
            count, mean, square = n, block_mean, block_square
            continue
        shift = block_mean - mean
        square = square + block_square + shift**2 * (count * n / (count + n))
        mean = mean + shift * (n / (count + n))
        count += n
    if count == 0:
        raise PathwayError("no training spots; expected at least one block of TF-IDF rows.")
    sd = np.sqrt(square / count)
    sd[sd <= CONSTANT_SD * np.abs(mean)] = 0.0
    return mean, sd


def empty_rows(tfidf: csr_matrix) -> npt.NDArray[np.bool_]:
    """Spots (S,) without any value, which match nothing."""
    empty: npt.NDArray[np.bool_] = np.asarray(abs(tfidf).sum(axis=1)).ravel() == 0
    return empty
