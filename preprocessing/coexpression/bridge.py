"""Bridge slides, on which known and new genes are measured, and the sums over them for fold-in.

Values of new genes are relative to the known ones of their spot: their depth, and the length of
their TF-IDF row, as they would be of a known gene. Shapes: S spots, G known genes, U new genes,
r factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.coexpression.gene_factors import GeneFactors
from preprocessing.coexpression.slide_blocks import read_stream
from preprocessing.errors import DataError
from preprocessing.graphs import SpotGraph
from preprocessing.tfidf import TfidfReweighter
from preprocessing.tfidf.weights import FitSums, checked_counts, detections, spot_depth

_NO_SLIDE = (
    "fold-in found no bridge slide. Give at least one that measures known genes and the "
    "new ones, by a function that returns a fresh iterator on every call."
)


@dataclass(frozen=True)
class BridgeSlide:
    """One slide on which known and new genes are measured.

    Attributes:
        known: (S, G) raw counts or intensities in the fitted order; genes not measured as zeros.
        new: (S, U) those of the new genes.
        graph: the slide's spot graph; only the `spatial` TF-IDF variant reads it.
    """

    known: Any
    new: Any
    graph: SpotGraph | None = None


BridgeBlocks = Callable[[], Iterable[BridgeSlide]]


@dataclass(frozen=True)
class Detections:
    """What the first pass over a bridge finds.

    Attributes:
        n_spots: S of all bridge slides.
        n_used: those with a known gene.
        known: (G,) bool, known genes found.
        sums: of the new genes in the used spots.
    """

    n_spots: int
    n_used: int
    known: NDArray[np.bool_]
    sums: FitSums


@dataclass
class Moments:
    """What the second pass sums, about each slide's own mean over the used spots.

    Attributes:
        n_spots: used spots.
        n_slides: slides that have any.
        zz: (r, r) of spot vectors.
        zk: (r, G) of spot vectors and known genes' values.
        zx: (r, U) of spot vectors and new genes' values.
        kk: (G,) of squares of known genes' values.
        xx: (U,) of squares of new genes' values.
    """

    n_spots: int
    n_slides: int
    zz: NDArray[np.float64]
    zk: NDArray[np.float64]
    zx: NDArray[np.float64]
    kk: NDArray[np.float64]
    xx: NDArray[np.float64]

    @property
    def free(self) -> int:
        """Spots beyond the means of slides."""
        return self.n_spots - self.n_slides


def _read(
    blocks: BridgeBlocks, n_known: int, n_new: int
) -> Iterator[tuple[sparse.csr_matrix, sparse.csr_matrix, SpotGraph | None]]:
    """Checked counts of known and new genes; spots without known genes have no new ones either."""
    for slide in read_stream("bridge slides", blocks, _NO_SLIDE, "of BridgeSlide"):
        known, new = checked_counts(slide.known, n_known), checked_counts(slide.new, n_new)
        if known.shape[0] != new.shape[0]:
            raise DataError(
                f"a bridge slide has {known.shape[0]} spots of known and {new.shape[0]} of new "
                "genes; both must be rows of the same spots."
            )
        new = sparse.csr_matrix(sparse.diags_array((spot_depth(known) > 0).astype(float)) @ new)
        new.eliminate_zeros()
        yield known, new, slide.graph


def read_detections(blocks: BridgeBlocks, n_new: int, tfidf: TfidfReweighter) -> Detections:
    """Which known genes are found, and the TF-IDF sums of the U new ones, over all slides.

    Raises:
        DataError: no slide, or counts that do not fit.
    """
    n_spots, n_used, found = 0, 0, np.zeros(tfidf.n_genes, bool)
    own = np.zeros((n_new, *tfidf.sums.extra.shape[1:]), np.int64)
    sums = FitSums(0, 0.0, np.zeros(n_new, np.int64), own)
    for known, new, graph in _read(blocks, tfidf.n_genes, n_new):
        depth = spot_depth(known)
        df = detections(new)
        extra = tfidf.idf_rule.observe(new, graph, depth)
        sums += FitSums(known.shape[0], float(new.data.sum()), df, extra)
        found[known.indices] = True
        n_spots += len(depth)
        n_used += int((depth > 0).sum())
    return Detections(n_spots, n_used, found, sums)


def read_moments(
    blocks: BridgeBlocks, new_sums: FitSums, tfidf: TfidfReweighter, factors: GeneFactors
) -> Moments:
    """Products of spot vectors with the values of known and new genes (TF-IDF sums `new_sums`)."""
    r, n_known, n_new = factors.rank, tfidf.n_genes, new_sums.df.size
    shapes = ((r, r), (r, n_known), (r, n_new), n_known, n_new)
    sums = Moments(0, 0, *(np.zeros(shape) for shape in shapes))
    for known, new, _ in _read(blocks, tfidf.n_genes, n_new):
        depth = spot_depth(known)
        used = np.flatnonzero(depth > 0)
        if not used.size:
            continue
        reference = tfidf.weighted(known[used])
        weights = tfidf.tf.finish(reference, reference)
        value = tfidf.tf.finish(tfidf.weighted(new[used], new_sums, depth[used]), reference)
        length = np.sqrt(np.asarray(weights.multiply(weights).sum(axis=1)).ravel())
        unit = sparse.diags_array(np.divide(1, length, out=np.zeros_like(length), where=length > 0))
        weights, value = (sparse.csr_matrix(unit @ part) for part in (weights, value))
        z = weights @ factors.components.astype(np.float64)
        z -= z.mean(axis=0)  # the other side of a product need not be centred
        sums.n_spots += len(z)
        sums.n_slides += 1
        sums.zz += z.T @ z
        sums.zk += (weights.T @ z).T
        sums.zx += (value.T @ z).T
        sums.kk += _squares(weights)
        sums.xx += _squares(value)
    return sums


def _squares(table: sparse.csr_matrix) -> NDArray[np.float64]:
    """Sum of squares of each column about its mean."""
    mean = np.asarray(table.mean(axis=0)).ravel()
    total = np.asarray(table.multiply(table).sum(axis=0)).ravel()
    return np.asarray(np.maximum(total - table.shape[0] * mean**2, 0))
