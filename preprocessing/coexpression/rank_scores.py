"""Ranks: normal scores of genes over the spots of a slide, and places of tied values.

Shapes: S spots, G genes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import ndtri

from preprocessing.errors import DataError


def rank_normal_scores(values: sparse.csr_matrix) -> NDArray[np.float32]:
    """Normal scores of average ranks, gene by gene: Phi^-1(rank / (S + 1)), centred.

    Zeros share one rank, so only stored values are sorted, all genes in one sort.

    Args:
        values: (S, G) non-negative sparse values of one slide.

    Returns:
        (S, G) float32 dense scores with mean 0 in every column.

    Raises:
        DataError: a negative or non-finite value.
    """
    table = sparse.csc_matrix(values, dtype=np.float32, copy=True)
    table.sum_duplicates()
    table.eliminate_zeros()
    if not (np.isfinite(table.data) & (table.data > 0)).all():
        raise DataError("rank scores: a value is negative or not finite; give TF-IDF rows.")
    n_spots, n_genes = table.shape
    stored = np.diff(table.indptr).astype(np.int64)
    gene = np.repeat(np.arange(n_genes, dtype=np.uint64), stored)
    key = (gene << np.uint64(32)) | table.data.view(np.uint32)
    order = np.argsort(key)  # equal keys get one rank, so their order is free
    rank = average_places(key[order]) - table.indptr[gene[order].astype(np.int64)]
    zeros = n_spots - stored
    gene_sorted = gene[order].astype(np.int64)
    score = ndtri((zeros[gene_sorted] + rank + 1) / (n_spots + 1))
    floor = ndtri(np.maximum(zeros + 1, 2) / 2 / (n_spots + 1))
    mean = (np.bincount(gene_sorted, score, minlength=n_genes) + floor * zeros) / n_spots
    dense = np.broadcast_to((floor - mean).astype(np.float32), (n_spots, n_genes)).copy()
    dense[table.indices[order], gene_sorted] = score - mean[gene_sorted]
    return dense


def average_places(ordered: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Mean position of every run of equal keys in a sorted array, for each of its entries.

    Args:
        ordered: (n,) sorted keys.

    Returns:
        (n,) places from 0; equal keys share the mean of theirs.
    """
    if ordered.size == 0:
        return np.zeros(0)
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    length = np.diff(np.append(first, ordered.size))
    return np.repeat(first + (length - 1) / 2, length)
