"""Spatial graphs over the spots of one slide, and what is computed on them (docs/method.md 3).

One class is one way to turn spot centres in micrometres into a `SpotGraph`. Graphs are symmetric
and never cross slides, because each is built from the spots of one slide. On them: the connected
pieces, Moran's I, and means over neighbours.
Shapes: S spots, G genes, E undirected edges, F or D values a spot, k neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
                "Build it with KNNGraph or DelaunayGraph."
            )

    @classmethod
    def from_edges(
        cls, n_spots: int, source: NDArray[Any], target: NDArray[Any], distance: NDArray[Any]
    ) -> SpotGraph:
        """Makes the graph from undirected edges (E,), each given once, with lengths in micrometres.

        Within a row neighbours come nearest first, ties by spot index.
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

    def edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The two ends (E,) of every edge, each edge once."""
        row = np.repeat(np.arange(self.n_spots), self.degree)
        once = row < self.indices
        return row[once], self.indices[once].astype(np.int64)

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
    """The connected piece of each spot, (S,) int32: 0 for that of the first spot, then as met."""
    labels = connected_components(graph.matrix(), directed=False)[1]
    return in_order_of_appearance(labels).astype(np.int32)


def in_order_of_appearance(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """The same labels, numbered from 0 by where each is met first."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(first.size, dtype=np.int64)
    rank[np.argsort(first)] = np.arange(first.size)
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


def _check_prune(prune: float) -> None:
    if not prune >= 1:
        raise DataError(f"prune is {prune}, expected at least 1 x the median edge (3 is usual).")


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
                "triangle exists. Use KNNGraph (genes.graph: knn)."
            ) from error
        if triangles.coplanar.size:
            spot, _, twin = triangles.coplanar[0]
            raise DataError(
                f"DelaunayGraph: {len(triangles.coplanar)} spots lie on top of another spot, first "
                f"spot {spot} on spot {twin} at {xy[spot].tolist()} um. Remove the copies or use "
                "KNNGraph (genes.graph: knn)."
            )
        corners = triangles.simplices
        source = np.concatenate([corners[:, 0], corners[:, 1], corners[:, 2]])
        target = np.concatenate([corners[:, 1], corners[:, 2], corners[:, 0]])
        return _graph_of_pairs(xy, source, target, self.prune)


def spatial_graph(kind: str, k: int, xy_um: NDArray[np.float64]) -> SpotGraph:
    """The graph of spot centres (S, 2) that the setting ``genes.graph`` names.

    ``delaunay``, or anything else for the ``k`` nearest. Raises what the builders raise.
    """
    return (DelaunayGraph() if kind == "delaunay" else KNNGraph(k=k)).build(xy_um)


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


def neighbour_mean(values: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Mean (S, F) over the neighbours (S, k; -1 pads) of each spot, itself not included.

    A spot without neighbours keeps its own values.
    """
    weights = neighbour_weights(neighbours)
    lonely = np.asarray(weights.sum(axis=1)).ravel() == 0
    mean = np.asarray(weights @ values)
    return np.where(lonely[:, None], values, mean)


def smooth(rows: np.ndarray, neighbours: np.ndarray, rounds: int) -> np.ndarray:
    """Mean (S, D) of each spot and its neighbours (S, k; -1 pads), taken ``rounds`` times."""
    weights = neighbour_weights(neighbours)
    degree = (neighbours >= 0).sum(axis=1, keepdims=True)
    for _ in range(rounds):
        rows = (rows + degree * (weights @ rows)) / (1 + degree)
    return rows


def neighbour_weights(neighbours: np.ndarray, n_spots: int | None = None) -> sparse.csr_matrix:
    """Averaging matrix: 1/degree on each spot's neighbours (n, k; -1 pads), rows of 0 where none.

    (n, S) with ``n_spots`` given as S; without it S is n.
    """
    present = neighbours >= 0
    degree = present.sum(axis=1)
    row = np.repeat(np.arange(len(neighbours)), degree)
    weight = np.repeat(1.0 / np.maximum(degree, 1), degree)
    shape = (len(neighbours), len(neighbours) if n_spots is None else n_spots)
    return sparse.csr_matrix((weight, (row, neighbours[present])), shape=shape)
