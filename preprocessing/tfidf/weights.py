"""The parts of TF-IDF: term frequencies, idf and their sums (docs/method.md 1).

Each part is a frozen dataclass whose fields are its own arguments; `tfidf.VARIANTS` pairs them by
name. `ArcsinhTf`, `RankTf`, `ScaleWeight` and `TypicalWeight` are of protein intensities, which no
depth divides: what a cell has of one protein says nothing of how deeply the others were measured.
And nearly every cell has a little of every protein, so detections tell no idf.
Shapes: S spots (cells), G genes (proteins), U some of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.errors import DataError
from preprocessing.graphs import SpotGraph, morans_i

FIXED_POINT = 2.0**32  # one unit of a real statistic
_SQUARE_UNIT = 2.0**26  # 10^9 cells of a saturated 16-bit channel fit in 63 bits
_MEAN_BINS = 20
_CONSTANT = 1e-12  # variance of a gene that does not vary
_BLOCK_ENTRIES = 1 << 16  # what is computed on them stays in the second-level cache
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]


class TermFrequency(Protocol):
    """How often a gene is in a spot."""

    def weigh(self, count: Doubles, depth: Doubles, mean_depth: float) -> Doubles:
        """Weighs each stored count, given its spot's depth and the mean depth of the training."""
        ...

    def finish(self, weights: sparse.csr_matrix, reference: sparse.csr_matrix) -> sparse.csr_matrix:
        """A last step within each spot, after the weights of genes; none in most variants.

        Args:
            weights: (S, U) weights of some genes.
            reference: (S, G) weights of all genes of the spots; often the same matrix.

        Returns:
            (S, U) finished weights.
        """
        return weights


@dataclass(frozen=True)
class LogTf(TermFrequency):
    """ln(1 + scale x / depth).

    Attributes:
        scale: counts per spot after depth correction.
    """

    scale: float = 1e4

    def weigh(self, count: Doubles, depth: Doubles, mean_depth: float) -> Doubles:
        """See TermFrequency."""
        return np.asarray(np.log1p(self.scale * count / depth))


@dataclass(frozen=True)
class RawTf(TermFrequency):
    """x / depth."""

    def weigh(self, count: Doubles, depth: Doubles, mean_depth: float) -> Doubles:
        """See TermFrequency."""
        return count / depth


@dataclass(frozen=True)
class Bm25Tf(TermFrequency):
    """x (k + 1) / (x + k (1 - b + b depth / mean depth)): saturating, depth corrected.

    Attributes:
        k: counts at which the weight of an average spot is half saturated.
        b: share of the depth correction, 0 to 1.
    """

    k: float = 1.2
    b: float = 0.75

    def __post_init__(self) -> None:
        """Refuses a share outside 0 to 1."""
        if not 0 <= self.b <= 1:
            raise DataError(f"TF-IDF argument b is {self.b}, expected 0 to 1 (0.75 is usual).")

    def weigh(self, count: Doubles, depth: Doubles, mean_depth: float) -> Doubles:
        """See TermFrequency."""
        norm = self.k * (1 - self.b + self.b * depth / mean_depth)
        return count * (self.k + 1) / (count + norm)


@dataclass(frozen=True)
class FitSums:
    """What TF-IDF learns from training spots; two of them add up.

    Attributes:
        n_spots: N.
        depth: sum of all counts.
        df: (G,) int64, spots with the gene.
        extra: (G,) int64, fixed-point sum of the variant's own statistic, 0 where it has none;
            (G, n) where it has several.
    """

    n_spots: int
    depth: float
    df: Integers
    extra: Integers

    def __add__(self, other: FitSums) -> FitSums:
        return FitSums(
            self.n_spots + other.n_spots,
            self.depth + other.depth,
            self.df + other.df,
            self.extra + other.extra,
        )


class InverseDocumentFrequency(Protocol):
    """How rare a gene is among spots.

    Attributes:
        n_sums: of its own for a gene; 0 where one array (G,) holds them, or zeros.
    """

    n_sums: ClassVar[int] = 0

    def observe(
        self, counts: sparse.csr_matrix, graph: SpotGraph | None, depth: Doubles | None = None
    ) -> Integers:
        """The variant's own fixed-point sums over these spots, as in `FitSums.extra`.

        Args:
            counts: (S, G), from `checked_table`.
            graph: of the spots; only `SpatialIdf` and `ReliableIdf` read it.
            depth: (S,) depth of the spots; None is the sum of these counts.
        """

    def weight(self, sums: FitSums) -> Doubles:
        """Weighs each gene (G,) from the sums."""


@dataclass(frozen=True)
class SmoothIdf(InverseDocumentFrequency):
    """ln((1 + N) / (1 + df)) + 1, as in scikit-learn."""

    def observe(
        self, counts: sparse.csr_matrix, graph: SpotGraph | None, depth: Doubles | None = None
    ) -> Integers:
        """Nothing beyond df."""
        return np.zeros(counts.shape[1], np.int64)

    def weight(self, sums: FitSums) -> Doubles:
        """See InverseDocumentFrequency."""
        return _smooth(sums.n_spots, sums.df.astype(np.float64))


@dataclass(frozen=True)
class EqualIdf(SmoothIdf):
    """1 for every gene: the control of the reweighting."""

    def weight(self, sums: FitSums) -> Doubles:
        """See InverseDocumentFrequency."""
        return np.ones(len(sums.df))


@dataclass(frozen=True)
class DepthMatchedIdf(InverseDocumentFrequency):
    """Smooth idf with df = sum_i [1 - (1 - x_i / n_i)^depth], detections expected at one depth.

    Attributes:
        depth: the common depth d0, in counts per spot.
    """

    depth: float = 1000.0

    def observe(
        self, counts: sparse.csr_matrix, graph: SpotGraph | None, depth: Doubles | None = None
    ) -> Integers:
        """Expected detections; spots without the gene add exactly 0, so it stays sparse."""
        counts = counts.astype(np.float64, copy=False)
        depth = spot_depth(counts) if depth is None else depth
        share = np.minimum(counts.data / entries(counts, depth), 1)
        with np.errstate(divide="ignore"):  # a spot with one gene only: log(0), probability 1
            detected = -np.expm1(self.depth * np.log1p(-share))
        return _fixed_point_sums(counts, detected, FIXED_POINT)

    def weight(self, sums: FitSums) -> Doubles:
        """See InverseDocumentFrequency."""
        return _smooth(sums.n_spots, sums.extra / FIXED_POINT)


@dataclass(frozen=True)
class SpatialIdf(InverseDocumentFrequency):
    """Smooth idf x (1 + max(0, I)), I = Moran's I of log tf, mean over slides by spots."""

    def observe(
        self, counts: sparse.csr_matrix, graph: SpotGraph | None, depth: Doubles | None = None
    ) -> Integers:
        """Spots x Moran's I of this slide."""
        if graph is None:
            raise DataError(
                "the 'spatial' variant needs the spot graph of every slide, found none. Pass "
                "graph= to partial_fit (graphs= to fit), e.g. KNNGraph(k=6).build(xy_um)."
            )
        counts = counts.astype(np.float64, copy=False)
        moran = morans_i(frequencies(counts, LogTf(), 1.0, depth), graph)
        return fixed_point(counts.shape[0] * moran, FIXED_POINT)

    def weight(self, sums: FitSums) -> Doubles:
        """See InverseDocumentFrequency."""
        moran = sums.extra / (FIXED_POINT * sums.n_spots)
        smooth = _smooth(sums.n_spots, sums.df.astype(np.float64))
        return np.asarray(smooth * (1 + np.maximum(moran, 0)))


@dataclass(frozen=True)
class VariableIdf(InverseDocumentFrequency):
    """1 for the genes of largest dispersion, 0 for the others: what PCA on variable genes reads.

    Attributes:
        n_variable: how many genes.
    """

    n_variable: float = 2000
    n_sums: ClassVar[int] = 2

    def observe(
        self, counts: sparse.csr_matrix, graph: SpotGraph | None, depth: Doubles | None = None
    ) -> Integers:
        """(G, 2): sum of log tf, and its squares about the mean of this slide."""
        depth = spot_depth(counts) if depth is None else depth
        log = frequencies(counts.astype(np.float64), LogTf(), 1.0, depth)
        total = np.asarray(log.sum(axis=0)).ravel()
        squares = np.asarray(log.multiply(log).sum(axis=0)).ravel()
        within = np.maximum(squares - total**2 / log.shape[0], 0)
        return np.stack([fixed_point(part, _SQUARE_UNIT) for part in (total, within)], axis=1)

    def weight(self, sums: FitSums) -> Doubles:
        """See InverseDocumentFrequency."""
        mean, variance = sums.extra.T / (_SQUARE_UNIT * sums.n_spots)
        score = dispersion_scores(mean, variance)
        best = np.argsort(-score, kind="stable")[: int(self.n_variable)]
        chosen = np.zeros(len(score))
        chosen[best] = np.isfinite(score[best])
        return chosen


def dispersion_scores(mean: Doubles, variance: Doubles) -> Doubles:
    """Highly variable genes: log dispersion against genes of similar mean, (G,).

    log(variance / mean) is centred by the median and scaled by the median absolute deviation of its
    mean-quantile bin; a gene that does not vary has -inf.
    """
    score = np.full(mean.size, -np.inf)
    varies = np.flatnonzero(variance > _CONSTANT)
    if varies.size == 0:
        return score
    mean, dispersion = mean[varies], np.log(variance[varies] / mean[varies])
    n_bins = max(1, min(_MEAN_BINS, varies.size // 10))
    own_bin = np.searchsorted(np.quantile(mean, np.linspace(0, 1, n_bins + 1)[1:-1]), mean)
    for bin_index in range(n_bins):
        inside = own_bin == bin_index
        if inside.any():
            centred = dispersion[inside] - np.median(dispersion[inside])
            score[varies[inside]] = centred / max(float(np.median(np.abs(centred))), 1e-6)
    return score


@dataclass(frozen=True)
class ArcsinhTf(TermFrequency):
    """arcsinh(x / cofactor).

    Attributes:
        cofactor: intensity at which the scale turns from linear to logarithmic; 5 is usual for
            mass cytometry and imaging, 150 for flow cytometry.
    """

    cofactor: float = 5.0

    def weigh(self, count: Doubles, depth: Doubles, mean_depth: float) -> Doubles:
        """See TermFrequency; the depth is not used."""
        return np.asarray(np.arcsinh(count / self.cofactor))


@dataclass(frozen=True)
class RankTf(TermFrequency):
    """Rank of a protein among those found in the cell, over their number; see TypicalWeight.

    1 is the highest, ties share their mean rank. What multiplies a whole cell (exposure, section
    thickness) drops out. A protein of intensity 0 stays 0 and takes no rank: 0 also stands for a
    protein that is not on this panel, and that must not move the others.
    """

    def weigh(self, count: Doubles, depth: Doubles, mean_depth: float) -> Doubles:
        """See TermFrequency; the depth is not used."""
        return count.copy()

    def finish(self, weights: sparse.csr_matrix, reference: sparse.csr_matrix) -> sparse.csr_matrix:
        """See TermFrequency."""
        return ranks_within(weights, reference)


@dataclass(frozen=True)
class ScaleWeight(InverseDocumentFrequency):
    """1 / root mean square of arcsinh(x / cofactor) over the training cells.

    A protein that no training cell has is on no known scale and gets weight 0.

    Attributes:
        cofactor: as in the term frequency.
    """

    cofactor: float = 5.0

    def observe(
        self, counts: sparse.csr_matrix, graph: SpotGraph | None, depth: Doubles | None = None
    ) -> Integers:
        """Sum of squares."""
        square = np.square(np.arcsinh(counts.data.astype(np.float64) / self.cofactor))
        return _fixed_point_sums(counts, square, _SQUARE_UNIT)

    def weight(self, sums: FitSums) -> Doubles:
        """See InverseDocumentFrequency."""
        rms = self.typical(sums)
        return np.divide(1, rms, out=np.zeros_like(rms), where=rms > 0)

    def typical(self, sums: FitSums) -> Doubles:
        """(G,) root mean square of arcsinh."""
        return np.asarray(np.sqrt(sums.extra / (_SQUARE_UNIT * sums.n_spots)))


@dataclass(frozen=True)
class TypicalWeight(ScaleWeight):
    """1 / the intensity whose arcsinh is that root mean square; 0 where it is 0.

    Proteins are ranked by intensity over typical intensity, so that a factor of the whole cell
    changes no order, as it would between arcsinh values.
    """

    def weight(self, sums: FitSums) -> Doubles:
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


def checked_counts(counts: Any, n_genes: int | None = None) -> sparse.csr_matrix:
    """Makes counts a canonical float64 CSR without stored zeros; the input is left as it is.

    Args:
        counts: (S, G) sparse or dense counts.
        n_genes: expected G, or None for any.

    Returns:
        (S, G) float64 CSR.

    Raises:
        DataError: negative or non-finite values, no spots, or another number of genes.
    """
    return checked_table(counts, n_genes).astype(np.float64, copy=False)


def checked_table(counts: Any, n_genes: int | None = None) -> sparse.csr_matrix:
    """`checked_counts` in the type of the input, whose arrays it may share."""
    table = sparse.csr_matrix(counts, dtype=None if sparse.issparse(counts) else np.float64)
    if n_genes is not None and table.shape[1] != n_genes:
        raise DataError(
            f"counts have {table.shape[1]} genes, expected the {n_genes} fitted ones in the "
            "fitted order. Align the columns by gene id first (missing genes as zeros)."
        )
    if table.shape[0] == 0:
        raise DataError("counts have no spots; drop empty slides before fitting.")
    lowest, highest = table.data.min(initial=1), table.data.max(initial=0)
    if not (lowest >= 0 and highest < np.inf):  # NaN is neither
        bad = np.flatnonzero(~np.isfinite(table.data) | (table.data < 0))
        row = int(np.searchsorted(table.indptr, bad[0], side="right")) - 1
        raise DataError(
            f"counts hold {bad.size} negative or non-finite values, first "
            f"{float(table.data[bad[0]])} in row {row}, column {table.indices[bad[0]]}; expected "
            "raw counts or intensities, not normalised or scaled values."
        )
    if not table.has_canonical_format or lowest == 0:
        table = table.astype(np.float64)
        table.sum_duplicates()
        table.eliminate_zeros()
    return table


def row_blocks(table: sparse.csr_matrix) -> Iterator[sparse.csr_matrix]:
    """The rows of a checked table, a few at a time, as float64."""
    start = table.indptr[:-1]
    edges = np.searchsorted(
        start, np.arange(_BLOCK_ENTRIES, table.nnz, _BLOCK_ENTRIES), side="right"
    )
    for first, last in pairwise(np.unique([0, *edges, table.shape[0]])):
        pointer = table.indptr[first : last + 1]
        stored = slice(pointer[0], pointer[-1])
        parts = (table.data[stored].astype(np.float64), table.indices[stored], pointer - pointer[0])
        yield sparse.csr_matrix(parts, shape=(last - first, table.shape[1]))


def detections(table: sparse.csr_matrix) -> Integers:
    """(G,) spots that have each gene."""
    found = np.zeros(table.shape[1], np.int64)
    for start in range(0, table.nnz, _BLOCK_ENTRIES):  # else it copies all indices
        part = table.indices[start : start + _BLOCK_ENTRIES]
        found += np.bincount(part, minlength=table.shape[1])
    return found


def spot_depth(table: sparse.csr_matrix) -> Doubles:
    """(S,) sum of each spot's counts."""
    return row_sums(table.data, table.indptr)


def row_sums(values: NDArray[Any], indptr: NDArray[np.integer]) -> Doubles:
    """(S,) sums of values at the stored entries of each row, in float64."""
    sums = np.zeros(len(indptr) - 1)
    filled = np.flatnonzero(np.diff(indptr))
    sums[filled] = np.add.reduceat(values.astype(np.float64, copy=False), indptr[filled])
    return sums


def entries(table: sparse.csr_matrix, per_spot: Doubles) -> Doubles:
    """(nnz,) the value of `per_spot` (S,) at every stored entry."""
    return np.repeat(per_spot, np.diff(table.indptr))


def frequencies(
    table: sparse.csr_matrix,
    tf: TermFrequency,
    mean_depth: float,
    depth: Doubles | None = None,
) -> sparse.csr_matrix:
    """The (S, G) float64 term frequencies of checked counts.

    Args:
        table: (S, G) checked counts.
        tf: term frequency.
        mean_depth: of the training spots.
        depth: (S,) depth of each spot; None is the sum of its counts here.
    """
    depth = spot_depth(table) if depth is None else depth
    data = tf.weigh(table.data, entries(table, depth), mean_depth)
    return sparse.csr_matrix((data, table.indices.copy(), table.indptr.copy()), shape=table.shape)


def fixed_point(values: Doubles, unit: float) -> Integers:
    """Real statistics as integers, so that no order of sums matters."""
    return np.rint(values * unit).astype(np.int64)


def _fixed_point_sums(counts: sparse.csr_matrix, values: Doubles, unit: float) -> Integers:
    """(G,) sums of a value at every stored entry."""
    parts = (fixed_point(values, unit), counts.indices, counts.indptr)
    return np.asarray(sparse.csr_matrix(parts, shape=counts.shape).sum(axis=0)).ravel()


def _smooth(n_spots: int, df: Doubles) -> Doubles:
    return np.asarray(np.log((1 + n_spots) / (1 + df)) + 1)
