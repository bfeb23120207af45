"""Spatial graphs over the spots of one slide, their pieces, and Moran's I (docs/method.md 3).

Shapes: S spots, G genes, E undirected edges. The strategies that build one are in `graphs`.

One class is one strategy; all of them turn spot centres in micrometres into a `SpotGraph`. Graphs
are symmetric and never cross slides, because each is built from the spots of one slide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.spatial import Delaunay, QhullError, cKDTree

from preprocessing.errors import DataError

_DENSE_BLOCK = 1 << 22  # values held at once by the blockwise Moran's I


@dataclass(frozen=True)
class SpotGraph:
    """Symmetric graph over the spots of one slide; each row lists its neighbours nearest first.

    Attributes:
        indptr: (S + 1,) int64, row i holds entries indptr[i]:indptr[i + 1].
        indices: (2E,) int32, the neighbour of each entry; no self loops, no repeats.
        distance_um: (2E,) float32, length of each edge in micrometres, rising within a row.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    distance_um: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Refuses arrays that do not fit together."""
        found = (self.indices.shape, self.distance_um.shape)
        if self.indptr.size < 2 or found != ((int(self.indptr[-1]),),) * 2:
            raise DataError(
                f"a spot graph needs indptr (S + 1,) and one index and distance per entry; found "
                f"indptr {self.indptr.shape}, indices {found[0]}, distance_um {found[1]}. "
                "Build it with KNNGraph, RadiusGraph, DelaunayGraph or GridGraph."
            )

    @classmethod
    def from_edges(
        cls, n_spots: int, source: NDArray[Any], target: NDArray[Any], distance: NDArray[Any]
    ) -> SpotGraph:
        """Makes the graph from undirected edges, each given once.

        Args:
            n_spots: S.
            source: (E,) one end of each edge.
            target: (E,) the other end.
            distance: (E,) length in micrometres.

        Returns:
            The symmetric graph; within a row nearest first, ties by spot index.
        """
        ends = (np.concatenate([source, target]), np.concatenate([target, source]))
        both = np.concatenate([distance, distance]).astype(np.float32)
        table = sparse.coo_matrix((both, ends), shape=(n_spots, n_spots)).tocsr()
        table.sort_indices()
        rows = np.repeat(np.arange(n_spots, dtype=np.uint64), np.diff(table.indptr))
        key = (rows << np.uint64(32)) | table.data.view(np.uint32)  # lengths order like their bits
        order = np.argsort(key, kind="stable")
        indices = table.indices[order].astype(np.int32)
        return cls(table.indptr.astype(np.int64), indices, table.data[order])

    @property
    def n_spots(self) -> int:
        """S."""
        return self.indptr.size - 1

    @property
    def degree(self) -> NDArray[np.int64]:
        """(S,) number of neighbours of each spot."""
        return np.diff(self.indptr)

    def neighbours(self, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Padded neighbour lists, as the encoder reads them.

        Args:
            k: width of the lists; a spot with more neighbours keeps its k nearest.

        Returns:
            index (S, k) int32 padded with -1 and distance_um (S, k) float32 padded with inf, both
            nearest first.
        """
        row = np.repeat(np.arange(self.n_spots), self.degree)
        place = np.arange(row.size) - self.indptr[row]
        kept = place < k
        index = np.full((self.n_spots, k), -1, np.int32)
        distance = np.full((self.n_spots, k), np.inf, np.float32)
        index[row[kept], place[kept]] = self.indices[kept]
        distance[row[kept], place[kept]] = self.distance_um[kept]
        return index, distance

    def matrix(self) -> sparse.csr_matrix:
        """(S, S) CSR adjacency with 1.0 per edge (float64) and sorted columns."""
        shape = (self.n_spots, self.n_spots)
        parts = (np.ones(self.indices.size), self.indices.copy(), self.indptr.copy())
        adjacency = sparse.csr_matrix(parts, shape=shape)
        adjacency.sort_indices()
        return adjacency


def components(graph: SpotGraph) -> NDArray[np.int32]:
    """Labels the connected pieces of a graph.

    Args:
        graph: of S spots.

    Returns:
        (S,) int32, 0 for the piece of the first spot, then in order of appearance.
    """
    labels = connected_components(graph.matrix(), directed=False)[1]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(first.size, np.int32)
    rank[np.argsort(first)] = np.arange(first.size, dtype=np.int32)
    return rank[inverse]


def morans_i(values: Any, graph: SpotGraph) -> NDArray[np.float64]:
    """Moran's I of every gene with weight 1 per edge (docs/method.md 1, `spatial`).

    I = S / sum(w) * sum_ij w_ij z_i z_j / sum_i z_i^2 with z the centred values.

    Args:
        values: (S, G) CSR or dense, any unit.
        graph: the spots of the same slide.

    Returns:
        (G,) float64; 0 for constant genes and for a graph without edges.

    Raises:
        DataError: values and graph differ in S, or a value is not finite.
    """
    n_spots, n_genes = values.shape
    if n_spots != graph.n_spots:
        raise DataError(
            f"Moran's I: the values have {n_spots} rows and the graph {graph.n_spots} spots; give "
            "the graph that was built from these very spots."
        )
    is_sparse = sparse.issparse(values)
    columns = sparse.csc_matrix(values) if is_sparse else np.asarray(values)
    if not np.isfinite(columns.data if is_sparse else columns).all():
        raise DataError("Moran's I: a value is not finite; clean NaN and inf out of it first.")
    adjacency = graph.matrix()
    result = np.zeros(n_genes)
    if adjacency.nnz == 0:
        return result
    of_block = _sparse_moran if is_sparse else _dense_moran
    step = max(1, _DENSE_BLOCK // n_spots)
    for start in range(0, n_genes, step):
        result[start : start + step] = of_block(columns[:, start : start + step], adjacency)
    return result


def _dense_moran(block: NDArray[Any], adjacency: sparse.csr_matrix) -> NDArray[np.float64]:
    centred = block - block.mean(axis=0, dtype=np.float64)
    product = np.einsum("sg,sg->g", centred, adjacency @ centred)
    total = np.square(block, dtype=np.float64).sum(axis=0)
    return _moran_ratio(product, np.square(centred).sum(axis=0), total, adjacency)


def _sparse_moran(block: sparse.csc_matrix, adjacency: sparse.csr_matrix) -> NDArray[np.float64]:
    """As `_dense_moran`; the centring is expanded so that zeros stay zeros."""
    block = block.astype(np.float64).tocsr()
    mean = np.asarray(block.mean(axis=0)).ravel()
    total = np.asarray(block.multiply(block).sum(axis=0)).ravel()
    raw = np.asarray((adjacency @ block).multiply(block).sum(axis=0)).ravel()
    degree = np.diff(adjacency.indptr).astype(np.float64)
    product = raw - 2 * mean * (block.T @ degree) + mean**2 * adjacency.nnz
    return _moran_ratio(product, total - block.shape[0] * mean**2, total, adjacency)


def _moran_ratio(
    product: NDArray[np.float64],
    squares: NDArray[np.float64],
    total: NDArray[np.float64],
    adjacency: sparse.csr_matrix,
) -> NDArray[np.float64]:
    varies = squares > 1e-12 * total
    ratio = np.divide(product, squares, out=np.zeros_like(product), where=varies)
    return np.asarray(ratio * (adjacency.shape[0] / adjacency.nnz))


__all__ = [
    "DelaunayGraph",
    "GraphBuilder",
    "GridGraph",
    "KNNGraph",
    "RadiusGraph",
    "SpotGraph",
    "components",
    "morans_i",
]

_CROWDED = 512  # mean number of neighbours above which a radius is surely a mistake

_GRID_DEGREE = 8  # no planar array has more touching neighbours


class GraphBuilder(Protocol):
    """A strategy that joins the spots of one slide."""

    def build(self, xy_um: NDArray[np.float64]) -> SpotGraph:
        """Joins spot centres (S, 2), micrometres."""


@dataclass(frozen=True)
class KNNGraph:
    """Joins two spots when either is among the k nearest of the other (the union).

    Among neighbours at exactly the same distance the choice is arbitrary but repeatable.

    Attributes:
        k: neighbours asked for each spot; 6 on a hexagonal array.
        prune: edges longer than `prune` x the median edge are dropped; inf keeps all.
    """

    k: int = 6
    prune: float = 3.0

    def __post_init__(self) -> None:
        """Refuses settings that no graph can meet."""
        if self.k < 1:
            raise DataError(f"KNNGraph: k is {self.k}, expected at least 1 (6 is usual).")
        _check_prune(self.prune)

    def build(self, xy_um: NDArray[np.float64]) -> SpotGraph:
        """Joins spot centres (S, 2), micrometres."""
        xy = _checked_xy(xy_um)
        n_spots = len(xy)
        width = min(self.k + 1, n_spots)
        nearest = cKDTree(xy).query(xy, k=[*range(1, width + 1)])[1]
        is_self = nearest == np.arange(n_spots)[:, None]
        is_self[~is_self.any(axis=1), -1] = True  # crowded out by copies of itself
        source, place = np.nonzero(~is_self)
        return _graph_of_pairs(xy, source, nearest[source, place], self.prune)


@dataclass(frozen=True)
class RadiusGraph:
    """Joins all spots at most `radius_um` apart.

    Attributes:
        radius_um: reach in micrometres; 150 takes the first ring of a 100 um array.
    """

    radius_um: float

    def __post_init__(self) -> None:
        """Refuses settings that no graph can meet."""
        _check_length("RadiusGraph: radius_um", self.radius_um)

    def build(self, xy_um: NDArray[np.float64]) -> SpotGraph:
        """Joins spot centres (S, 2), micrometres."""
        xy = _checked_xy(xy_um)
        tree = cKDTree(xy)
        mean = tree.count_neighbors(tree, self.radius_um) / len(xy) - 1
        if mean > _CROWDED:
            raise DataError(
                f"RadiusGraph: within {self.radius_um:g} um a spot has {mean:.0f} neighbours on "
                f"average, expected at most {_CROWDED}. Give a smaller radius_um, or check that "
                "the coordinates are micrometres."
            )
        pairs = tree.query_pairs(self.radius_um, output_type="ndarray")
        return _graph_of_pairs(xy, pairs[:, 0], pairs[:, 1], math.inf)


@dataclass(frozen=True)
class DelaunayGraph:
    """Joins the corners of every triangle of the Delaunay triangulation.

    Attributes:
        prune: edges longer than `prune` x the median edge are dropped; inf keeps all.
    """

    prune: float = 3.0

    def __post_init__(self) -> None:
        """Refuses settings that no graph can meet."""
        _check_prune(self.prune)

    def build(self, xy_um: NDArray[np.float64]) -> SpotGraph:
        """Joins spot centres (S, 2), micrometres; at most two spots are simply joined.

        Raises:
            DataError: all spots lie on one line, or two at the same place.
        """
        xy = _checked_xy(xy_um)
        if len(xy) < 3:
            first = np.arange(len(xy) - 1)
            return _graph_of_pairs(xy, first, first + 1, self.prune)
        try:
            triangles = Delaunay(xy - xy.mean(axis=0))
        except QhullError as error:
            raise DataError(
                f"DelaunayGraph: the {len(xy)} spots lie on one line (or at one place), so no "
                "triangle exists. Use KNNGraph for this slide."
            ) from error
        if triangles.coplanar.size:
            spot, _, twin = triangles.coplanar[0]
            raise DataError(
                f"DelaunayGraph: {len(triangles.coplanar)} spots lie on top of another spot, first "
                f"spot {spot} on spot {twin} at {xy[spot].tolist()} um. Remove the copies or use "
                "KNNGraph."
            )
        corners = triangles.simplices
        source = np.concatenate([corners[:, 0], corners[:, 1], corners[:, 2]])
        target = np.concatenate([corners[:, 1], corners[:, 2], corners[:, 0]])
        return _graph_of_pairs(xy, source, target, self.prune)


@dataclass(frozen=True)
class GridGraph:
    """Joins the touching spots of a regular array: 6 on a hexagonal, 4 on a square one.

    Two spots touch when they are at most (1 + tolerance) x pitch apart, so the array geometry
    itself says which kind it is.

    Attributes:
        pitch_um: centre-to-centre distance; None measures it (median nearest distance).
        tolerance: slack for stage jitter; must stay below 0.41, where square diagonals begin.
    """

    pitch_um: float | None = None
    tolerance: float = 0.2

    def __post_init__(self) -> None:
        """Refuses settings that no graph can meet."""
        if self.pitch_um is not None:
            _check_length("GridGraph: pitch_um", self.pitch_um)
        if not 0 <= self.tolerance < 0.41:
            raise DataError(
                f"GridGraph: tolerance is {self.tolerance:g}, expected 0 to 0.41: above it the "
                "diagonals of a square array count as touching. Use RadiusGraph for those."
            )

    def build(self, xy_um: NDArray[np.float64]) -> SpotGraph:
        """Joins spot centres (S, 2), micrometres.

        Raises:
            DataError: the coordinates are no array of this pitch.
        """
        xy = _checked_xy(xy_um)
        if len(xy) == 1:
            return _graph_of_pairs(xy, np.zeros(0, np.int64), np.zeros(0, np.int64), math.inf)
        step = float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))
        pitch = step if self.pitch_um is None else self.pitch_um
        _check_length("GridGraph: the median distance to the nearest spot", pitch)
        if step < pitch * (1 - self.tolerance) / 2 or (len(xy) > 2 and step > 4 * pitch):
            raise self._no_array(pitch, f"the median nearest spot is {step:.4g} um away")
        graph = RadiusGraph(pitch * (1 + self.tolerance)).build(xy)
        if graph.degree.max() > _GRID_DEGREE:
            raise self._no_array(pitch, f"a spot has {graph.degree.max()} touching neighbours")
        return graph

    def _no_array(self, pitch: float, found: str) -> DataError:
        return DataError(
            f"GridGraph: the spots are no regular array of pitch {pitch:g} um: {found}. Leave "
            "pitch_um out to have it measured, check that coordinates are micrometres, or use "
            "KNNGraph."
        )


def _graph_of_pairs(
    xy: NDArray[np.float64], source: NDArray[Any], target: NDArray[Any], prune: float
) -> SpotGraph:
    """Makes undirected pairs (in any order, repeated or not) a pruned symmetric graph."""
    low = np.minimum(source, target).astype(np.int64)
    high = np.maximum(source, target).astype(np.int64)
    pair = np.sort(low * len(xy) + high)  # sort and compare: ten times faster than np.unique
    low, high = np.divmod(pair[np.diff(pair, prepend=-1) > 0], len(xy))
    distance = np.linalg.norm(xy[low] - xy[high], axis=1)
    apart = distance[distance > 0]
    if apart.size and math.isfinite(prune):
        kept = distance <= prune * np.median(apart)
        low, high, distance = low[kept], high[kept], distance[kept]
    return SpotGraph.from_edges(len(xy), low, high, distance)


def _checked_xy(xy_um: NDArray[Any]) -> NDArray[np.float64]:
    xy = np.asarray(xy_um, dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2 or len(xy) == 0:
        raise DataError(f"spot centres have shape {xy.shape}, expected (S, 2) with S at least 1.")
    bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if bad.size:
        raise DataError(
            f"{bad.size} of {len(xy)} spot centres are not finite, first row {bad[0]}: "
            f"{xy[bad[0]].tolist()}. Drop these spots or repair their coordinates."
        )
    return xy


def _check_prune(prune: float) -> None:
    if not prune >= 1:
        raise DataError(f"prune is {prune}, expected at least 1 x the median edge (3 is usual).")


def _check_length(name: str, length_um: float) -> None:
    if not (length_um > 0 and math.isfinite(length_um)):
        raise DataError(f"{name} is {length_um}, expected a positive length in micrometres.")
