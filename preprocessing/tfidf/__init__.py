"""TF-IDF reweighting: a spot is a document, a gene is a term (docs/method.md 1).

A variant is a pair of one term frequency and one inverse document frequency of `weights`.
Everything that is fitted is a sum over spots, so fitting slide by slide, merging partial fits and
fitting at once give the same weights to the last bit; so do `arcsinh` and `rank` of intensities,
which do not read the mean depth. Shapes: S spots, G genes, U new genes, K keyword genes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.errors import DataError, unknown_name
from preprocessing.graphs import SpotGraph
from preprocessing.tfidf.shrinkage import RatePrior, ReliableIdf, ShrunkenTf, shrunken_blocks
from preprocessing.tfidf.weights import (
    ArcsinhTf,
    Bm25Tf,
    DepthMatchedIdf,
    EqualIdf,
    FitSums,
    LogTf,
    RankTf,
    RawTf,
    ScaleWeight,
    SmoothIdf,
    SpatialIdf,
    TypicalWeight,
    VariableIdf,
    checked_table,
    detections,
    entries,
    row_blocks,
    row_sums,
    spot_depth,
)

__all__ = ["VARIANTS", "TfidfReweighter", "keyword_genes"]

#: Term frequency and inverse document frequency of each variant.
VARIANTS: Mapping[str, tuple[type[Any], type[Any]]] = MappingProxyType(
    {
        "log": (LogTf, SmoothIdf),
        "raw": (RawTf, SmoothIdf),
        "bm25": (Bm25Tf, SmoothIdf),
        "depth_matched": (LogTf, DepthMatchedIdf),
        "spatial": (LogTf, SpatialIdf),
        "unweighted": (LogTf, EqualIdf),
        "lognormal": (LogTf, VariableIdf),
        "shrunken": (ShrunkenTf, ReliableIdf),
        "arcsinh": (ArcsinhTf, ScaleWeight),
        "rank": (RankTf, TypicalWeight),
    }
)
#: Arguments that may be 0.
SHARES = ("b", "centre")
_VALUE_BITS = 31  # a non-negative float32 orders like its bits, of which the sign is always 0
_VALUE_MASK = (1 << _VALUE_BITS) - 1
_SORTED_WHOLE = 4  # rows of fewer than this times K entries are sorted as they are


class TfidfReweighter:
    """Fits idf on training spots and turns counts into L2-normalised TF-IDF rows."""

    def __init__(self, variant: str = "log", **arguments: float) -> None:
        """Chooses the variant.

        Args:
            variant: a key of VARIANTS.
            **arguments: fields of the variant's two classes, e.g. scale=1e4, k=1.2, depth=1000,
                cofactor=5.

        Raises:
            DataError: unknown variant or argument, or an argument that is not positive.
        """
        if variant not in VARIANTS:
            raise unknown_name("TF-IDF variant", variant, VARIANTS)
        names = [[f.name for f in fields(part)] for part in VARIANTS[variant]]
        for name, value in arguments.items():
            if name not in names[0] + names[1]:
                kind = f"argument of TF-IDF variant '{variant}'"
                raise unknown_name(kind, name, names[0] + names[1])
            if name not in SHARES and not 0 < value < np.inf:
                raise DataError(f"TF-IDF argument {name} is {value}, expected a positive number.")
        self.variant = variant
        self.tf, self.idf_rule = (
            part(**{n: float(arguments[n]) for n in own if n in arguments})
            for part, own in zip(VARIANTS[variant], names, strict=True)
        )
        self._sums: FitSums | None = None

    @property
    def sums(self) -> FitSums:
        """What has been fitted.

        Raises:
            DataError: nothing has been fitted yet.
        """
        if self._sums is None:
            raise DataError("TF-IDF is not fitted; call fit or partial_fit on training counts.")
        return self._sums

    @property
    def n_genes(self) -> int:
        """G."""
        return self.sums.df.size

    @property
    def n_spots(self) -> int:
        """N, training spots seen."""
        return self.sums.n_spots

    @property
    def idf(self) -> NDArray[np.float64]:
        """(G,) inverse document frequency; of intensities, what puts proteins on one scale."""
        return np.asarray(self.idf_rule.weight(self.sums))

    def partial_fit(self, counts: Any, graph: SpotGraph | None = None) -> TfidfReweighter:
        """Adds the spots of one slide.

        Args:
            counts: (S, G) raw counts or intensities, CSR or dense.
            graph: the slide's spot graph; `spatial` needs it, and `shrunken` learns from it what
                neighbours share (without it nothing). The others do not read it.

        Returns:
            self.

        Raises:
            DataError: negative or non-finite counts, another G than before, or no graph.
        """
        table = checked_table(counts, None if self._sums is None else self.n_genes)
        extra = self.idf_rule.observe(table, graph)
        new = FitSums(
            table.shape[0], float(table.data.sum(dtype=np.float64)), detections(table), extra
        )
        self._sums = new if self._sums is None else self._sums + new
        return self

    def fit(self, blocks: Any, graphs: Iterable[SpotGraph] | None = None) -> TfidfReweighter:
        """Forgets earlier spots and fits one matrix, or an iterable of slides.

        Args:
            blocks: (S, G) counts, or an iterable of them, one per slide.
            graphs: one spot graph per slide, for `spatial` and `shrunken`.

        Returns:
            self.
        """
        single = sparse.issparse(blocks) or isinstance(blocks, np.ndarray)
        slides = [blocks] if single else blocks
        self._sums = None
        if graphs is None:
            for counts in slides:
                self.partial_fit(counts)
        else:
            for counts, graph in zip(slides, graphs, strict=True):
                self.partial_fit(counts, graph)
        if self._sums is None:
            raise DataError("TF-IDF: there is no training slide to fit; give at least one.")
        return self

    def merge(self, other: TfidfReweighter) -> TfidfReweighter:
        """Joins two fits of the same variant and genes into a new one; neither is changed."""
        if (self.tf, self.idf_rule) != (other.tf, other.idf_rule) or self.n_genes != other.n_genes:
            raise DataError(
                f"cannot merge TF-IDF fits: {self.tf}, {self.idf_rule}, {self.n_genes} genes and "
                f"{other.tf}, {other.idf_rule}, {other.n_genes} genes. Fit both alike."
            )
        merged = TfidfReweighter(self.variant, **self._arguments())
        merged._sums = self.sums + other.sums
        return merged

    @property
    def reads_neighbours(self) -> bool:
        """Whether the weight of a gene in a spot depends on the counts of its neighbours."""
        return isinstance(self.tf, ShrunkenTf)

    def transform(
        self, counts: Any, neighbours: NDArray[np.integer] | None = None
    ) -> sparse.csr_matrix:
        """Reweights counts.

        Args:
            counts: (S, G) raw counts, genes in the fitted order.
            neighbours: (n, N) rows of `counts` around each of the first n spots, -1 pads; read by
                `shrunken` alone, which shrinks to the training mean where there are none.

        Returns:
            (n, G) float32 CSR (n is S without `neighbours`), rows of unit L2 length; a spot without
            counts stays all zero.
        """
        table, idf = checked_table(counts, self.n_genes), self.idf
        n_rows = table.shape[0] if neighbours is None else len(neighbours)
        if not self.reads_neighbours:
            return self._transform_alone(table[:n_rows], idf)
        self._check_depth()
        parts = []
        for part in shrunken_blocks(table, neighbours, self.tf, RatePrior.of(self.sums)):
            part.data *= idf[part.indices]
            length = np.sqrt(row_sums(np.square(part.data), part.indptr))
            part.data /= entries(part, np.where(length > 0, length, 1))
            parts.append(part.astype(np.float32))
        found = sparse.csr_matrix(sparse.vstack(parts, format="csr"))
        found.eliminate_zeros()
        return found

    def _transform_alone(
        self, table: sparse.csr_matrix, idf: NDArray[np.float64]
    ) -> sparse.csr_matrix:
        """`transform` of a variant that reads every spot alone."""
        value, gene = np.empty(table.nnz, np.float32), np.empty_like(table.indices)
        stored, n_stored = [np.zeros(1, table.indptr.dtype)], 0
        for part in row_blocks(table):
            self._weigh(part, idf, spot_depth(part))
            weights = self.tf.finish(part, part)
            length = np.sqrt(row_sums(np.square(weights.data), weights.indptr))
            own = slice(n_stored, n_stored + weights.nnz)
            value[own] = weights.data / entries(weights, np.where(length > 0, length, 1))
            gene[own] = weights.indices
            stored.append(np.diff(weights.indptr))
            n_stored += weights.nnz
        pointer = np.cumsum(np.concatenate(stored), dtype=table.indptr.dtype)
        parts = (value[:n_stored], gene[:n_stored], pointer)
        return sparse.csr_matrix(parts, shape=table.shape)

    def weighted(
        self,
        table: sparse.csr_matrix,
        sums: FitSums | None = None,
        depth: NDArray[np.float64] | None = None,
    ) -> sparse.csr_matrix:
        """Term frequency x idf, before the last step within the spot and the unit length.

        Args:
            table: (S, U) checked counts of any genes, each spot read alone.
            sums: of these genes; None: they are the fitted ones.
            depth: (S,) depth of the spots; None is the sum of these counts.

        Returns:
            (S, U) float64 CSR.

        Raises:
            DataError: fitted on spots without any count.
        """
        sums = sums or self.sums
        depth = spot_depth(table) if depth is None else depth
        idf = np.asarray(self.idf_rule.weight(sums))
        if self.reads_neighbours:
            self._check_depth()
            blocks = shrunken_blocks(table, None, self.tf, RatePrior.of(sums), depth)
            found = sparse.csr_matrix(sparse.vstack(list(blocks), format="csr"))
            found.data *= idf[found.indices]
            return found
        weights = table.astype(np.float64)
        self._weigh(weights, idf, depth)
        return weights

    def _check_depth(self) -> None:
        if self.sums.depth == 0:
            raise DataError("TF-IDF was fitted on spots without any count; fit it on real slides.")

    def _weigh(
        self, table: sparse.csr_matrix, idf: NDArray[np.float64], depth: NDArray[np.float64]
    ) -> None:
        """`weighted`, in place."""
        self._check_depth()
        mean_depth = self.sums.depth / self.n_spots
        table.data = self.tf.weigh(table.data, entries(table, depth), mean_depth)
        table.data *= idf.take(table.indices, mode="clip")  # unchecked is faster

    def with_genes(self, df: NDArray[np.int64], extra: NDArray[np.int64]) -> TfidfReweighter:
        """A reweighter that also knows further genes; this one is left as it is.

        Args:
            df: (U,) spots with each new gene, among the N training spots.
            extra: (U,) or (U, n), the variant's own sums of each, over N spots.

        Returns:
            One of G + U genes, the new ones last.

        Raises:
            DataError: the two differ in length.
        """
        if df.ndim != 1 or extra.shape != df.shape + self.sums.extra.shape[1:]:
            raise DataError(f"new genes: df {df.shape} and extra {extra.shape} must both be (U,).")
        longer = TfidfReweighter(self.variant, **self._arguments())
        own = self.sums
        longer._sums = FitSums(
            own.n_spots,
            own.depth,
            np.concatenate([own.df, df]).astype(np.int64),
            np.concatenate([own.extra, extra]).astype(np.int64),
        )
        return longer

    def state(self) -> dict[str, Any]:
        """Everything fitted, as numbers, one JSON text (`arguments`) and int64 arrays."""
        return {"variant": self.variant, "arguments": json.dumps(self._arguments())} | {
            field.name: getattr(self.sums, field.name) for field in fields(FitSums)
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TfidfReweighter:
        """The inverse of `state`.

        Raises:
            DataError: a part is missing or the two gene arrays differ in length.
        """
        missing = [
            name
            for name in ["variant", "arguments", *(f.name for f in fields(FitSums))]
            if name not in state
        ]
        if missing:
            raise DataError(f"TF-IDF state lacks {missing}; write it again with state().")
        fitted = cls(str(state["variant"]), **json.loads(str(state["arguments"])))
        df, extra = (np.asarray(state[name], dtype=np.int64) for name in ("df", "extra"))
        n_sums = fitted.idf_rule.n_sums
        if df.ndim != 1 or extra.shape != (df.size, n_sums)[: 2 if n_sums else 1]:
            raise DataError(f"TF-IDF state: df {df.shape} and extra {extra.shape} must be (G,).")
        fitted._sums = FitSums(int(state["n_spots"]), float(state["depth"]), df, extra)
        return fitted

    def _arguments(self) -> dict[str, float]:
        return asdict(self.tf) | asdict(self.idf_rule)


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


def _largest(block: sparse.csr_matrix, k: int) -> sparse.csr_matrix:
    """The rows without what is below their k largest entries; ties with the last one stay."""
    if block.nnz <= _SORTED_WHOLE * k * block.shape[0]:
        return block
    kept = np.ones(block.nnz, dtype=bool)
    for start, stop in itertools.pairwise(block.indptr):
        if stop - start > k:
            row = block.data[start:stop]
            kept[start:stop] = row >= np.partition(row, -k)[-k]
    bounds = np.append(0, np.cumsum(kept))[block.indptr]
    return sparse.csr_matrix((block.data[kept], block.indices[kept], bounds), shape=block.shape)


def _fill(
    block: sparse.csr_matrix, gene_bits: int, index: NDArray[np.int32], value: NDArray[np.float32]
) -> None:
    """Writes the keyword genes of the rows of `block` into `index` and `value`, both (rows, K)."""
    block = _largest(block, index.shape[1])
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
