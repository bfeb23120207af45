"""Keyword genes: the K largest TF-IDF values of every spot (METHOD section 1).

Shapes: S spots, G genes, K keyword genes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.errors import DataError

_VALUE_BITS = 31  # a non-negative float32 orders like its bits, of which the sign is always 0
_VALUE_MASK = (1 << _VALUE_BITS) - 1


def keyword_genes(
    tfidf: sparse.csr_matrix, k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Picks the k genes of largest weight in every spot.

    Row, falling value and gene are packed into one 64-bit key, so that one plain sort orders a
    whole slide.

    Args:
        tfidf: (S, G) CSR of non-negative weights.
        k: K, genes per spot; 128 is usual.

    Returns:
        index (S, K) int32 padded with G and value (S, K) float32 padded with 0, by falling value,
        ties by rising gene index. Genes of weight 0 are never keywords.

    Raises:
        DataError: k below 1, or a negative or non-finite weight.
    """
    if k < 1:
        raise DataError(f"keyword_genes: k is {k}, expected at least 1 (128 is usual).")
    table = sparse.csr_matrix(tfidf, dtype=np.float32)
    if not (np.isfinite(table.data) & (table.data >= 0)).all():
        raise DataError("keyword_genes: a weight is negative or not finite; give TF-IDF rows.")
    if not table.has_canonical_format:
        table = table.copy()
        table.sum_duplicates()
    n_spots, n_genes = table.shape
    index = np.full((n_spots, k), n_genes, np.int32)
    value = np.zeros((n_spots, k), np.float32)
    gene_bits = max(1, (n_genes - 1).bit_length())
    step = 1 << min(30, 64 - _VALUE_BITS - gene_bits)
    for start in range(0, n_spots, step):
        rows = slice(start, start + step)
        _fill(table[rows], gene_bits, index[rows], value[rows])
    return index, value


def _fill(
    block: sparse.csr_matrix, gene_bits: int, index: NDArray[np.int32], value: NDArray[np.float32]
) -> None:
    """Writes the keyword genes of the rows of `block` into `index` and `value`, both (rows, K)."""
    row = np.repeat(np.arange(block.shape[0], dtype=np.uint64), np.diff(block.indptr))
    falling = np.uint64(_VALUE_MASK) - (block.data + np.float32(0)).view(np.uint32)
    shift = np.uint64(gene_bits)
    key = (((row << np.uint64(_VALUE_BITS)) | falling) << shift) | block.indices.astype(np.uint64)
    key = np.sort(key[block.data > 0])
    row = key >> np.uint64(_VALUE_BITS + gene_bits)
    start = np.searchsorted(row, np.arange(block.shape[0], dtype=np.uint64))
    row = row.astype(np.int64)
    place = np.arange(key.size) - start[row]
    kept = place < index.shape[1]
    key, row, place = key[kept], row[kept], place[kept]
    index[row, place] = (key & np.uint64((1 << gene_bits) - 1)).astype(np.int32)
    bits = np.uint64(_VALUE_MASK) - ((key >> shift) & np.uint64(_VALUE_MASK))
    value[row, place] = bits.astype(np.uint32).view(np.float32)
