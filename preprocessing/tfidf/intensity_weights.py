"""The parts of TF-IDF for protein intensities: no depth, one scale for all proteins.

An intensity is no count: what a cell has of one protein says nothing of how deeply the others were
measured, and nearly every cell has a little of every protein, so detections tell no idf. METHOD
section 1; the parts for counts are in `term_weights`. Shapes: S cells, G proteins, U some of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.graphs import SpotGraph
from preprocessing.tfidf.term_weights import FitSums, TermFrequency, entries, fixed_point

_SQUARE_UNIT = 2.0**26  # 10^9 cells of a saturated 16-bit channel fit in 63 bits


@dataclass(frozen=True)
class ArcsinhTf(TermFrequency):
    """arcsinh(x / cofactor).

    Attributes:
        cofactor: intensity at which the scale turns from linear to logarithmic; 5 is usual for
            mass cytometry and imaging, 150 for flow cytometry.
    """

    cofactor: float = 5.0

    def weigh(
        self, count: NDArray[np.float64], depth: NDArray[np.float64], mean_depth: float
    ) -> NDArray[np.float64]:
        """See TermFrequency; the depth is not used."""
        return np.asarray(np.arcsinh(count / self.cofactor))


@dataclass(frozen=True)
class RankTf(TermFrequency):
    """Rank of a protein among those found in the cell, over their number; see TypicalWeight.

    1 is the highest, ties share their mean rank. What multiplies a whole cell (exposure, section
    thickness) drops out. A protein of intensity 0 stays 0 and takes no rank: 0 also stands for a
    protein that is not on this panel, and that must not move the others.
    """

    def weigh(
        self, count: NDArray[np.float64], depth: NDArray[np.float64], mean_depth: float
    ) -> NDArray[np.float64]:
        """See TermFrequency; the depth is not used."""
        return count.copy()

    def finish(self, weights: sparse.csr_matrix, reference: sparse.csr_matrix) -> sparse.csr_matrix:
        """See TermFrequency."""
        return ranks_within(weights, reference)


@dataclass(frozen=True)
class ScaleWeight:
    """1 / root mean square of arcsinh(x / cofactor) over the training cells.

    A protein that no training cell has is on no known scale and gets weight 0.

    Attributes:
        cofactor: as in the term frequency.
    """

    cofactor: float = 5.0

    def observe(
        self, counts: sparse.csr_matrix, depth: NDArray[np.float64], graph: SpotGraph | None
    ) -> NDArray[np.int64]:
        """Sum of squares."""
        square = fixed_point(np.square(np.arcsinh(counts.data / self.cofactor)), _SQUARE_UNIT)
        parts = (square, counts.indices, counts.indptr)
        return np.asarray(sparse.csr_matrix(parts, shape=counts.shape).sum(axis=0)).ravel()

    def weight(self, sums: FitSums) -> NDArray[np.float64]:
        """See InverseDocumentFrequency."""
        rms = self.typical(sums)
        return np.divide(1, rms, out=np.zeros_like(rms), where=rms > 0)

    def typical(self, sums: FitSums) -> NDArray[np.float64]:
        """(G,) root mean square of arcsinh."""
        return np.asarray(np.sqrt(sums.extra / (_SQUARE_UNIT * sums.n_spots)))


@dataclass(frozen=True)
class TypicalWeight(ScaleWeight):
    """1 / the intensity whose arcsinh is that root mean square; 0 where it is 0.

    Proteins are ranked by intensity over typical intensity, so that a factor of the whole cell
    changes no order, as it would between arcsinh values.
    """

    def weight(self, sums: FitSums) -> NDArray[np.float64]:
        """See InverseDocumentFrequency."""
        typical = self.cofactor * np.sinh(self.typical(sums))
        return np.divide(1, typical, out=np.zeros_like(typical), where=typical > 0)


def ranks_within(weights: sparse.csr_matrix, reference: sparse.csr_matrix) -> sparse.csr_matrix:
    """Where each weight would stand among the positive reference weights of its row.

    Args:
        weights: (S, U) CSR of weights >= 0.
        reference: (S, G) CSR of weights >= 0.

    Returns:
        (S, U) float64 CSR: [number smaller + (number equal + 1) / 2] / number of positive ones in
        the row. With `reference` the same as `weights` these are average ranks over their number.
        0 stays 0, and a row without reference gives 0.
    """
    table, own = (part.copy() for part in (reference, weights))
    table.eliminate_zeros()
    own.eliminate_zeros()
    levels, level = np.unique(np.concatenate([table.data, own.data]), return_inverse=True)
    stored = np.diff(table.indptr).astype(np.int64)
    row = np.arange(own.shape[0])
    reference_key = np.sort(np.repeat(row, stored) * levels.size + level[: table.nnz])
    own_row = np.repeat(row, np.diff(own.indptr))
    key = own_row * levels.size + level[table.nnz :]
    first = np.searchsorted(reference_key, key, side="left")
    last = np.searchsorted(reference_key, key, side="right")
    rank = first - table.indptr[own_row] + (last - first + 1) / 2
    n_found = entries(own, stored.astype(np.float64))
    own.data = np.divide(rank, n_found, out=np.zeros(rank.size), where=n_found > 0)
    return own
