"""Quality of the counts of a slide: depth, genes and mitochondrial share of every spot.

Rows are read a block at a time, so memory does not grow with the section. Shapes: S spots, G genes.
"""

import re
from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.modality import RNA
from preprocessing.store import SlideStore

_MITOCHONDRIAL = re.compile(r"mt-", re.IGNORECASE)
_ROWS = 4096


def count_quality(counts: csr_matrix, gene_names: np.ndarray, modality: str = RNA) -> pd.DataFrame:
    """Quality of every spot.

    Args:
        counts: (S, G) raw counts, or intensities of proteins.
        gene_names: (G,) symbols.
        modality: "rna" or "protein".

    Returns:
        (S, 3): depth (counts; proteins: sum of intensities), n_genes (genes with a count),
        mito_fraction (share of counts in genes named MT-... or mt-..., 0..1; NaN for proteins and
        where the panel has none or the depth is 0).
    """
    if counts.shape[1] != len(gene_names):
        raise DataError(f"{len(gene_names)} gene names for {counts.shape[1]} columns of counts")
    depth = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    mito = np.array([_MITOCHONDRIAL.match(str(g)) is not None for g in gene_names], dtype=bool)
    share = np.full(len(depth), np.nan)
    if mito.any() and modality == RNA:
        inside = counts @ mito.astype(np.float64)
        np.divide(inside, depth, out=share, where=depth > 0)
    n_genes = np.asarray((counts != 0).sum(axis=1)).ravel()
    return pd.DataFrame({"depth": depth, "n_genes": n_genes, "mito_fraction": share})


def store_count_quality(store: SlideStore) -> pd.DataFrame:
    """`count_quality` of a store, read a block of spots at a time.

    Raises:
        DataError: the store has no counts, or damaged ones.
    """
    if not store.has_counts:
        raise DataError(f"{store.path} has no counts (image only); nothing to measure")
    names = store.gene_names
    frames = [count_quality(block, names, store.modality) for block in _blocks(store)]
    return pd.concat(frames, ignore_index=True)


def _blocks(store: SlideStore) -> Iterator[csr_matrix]:
    for start in range(0, store.n_spots, _ROWS):
        yield store.counts(slice(start, min(start + _ROWS, store.n_spots)))
