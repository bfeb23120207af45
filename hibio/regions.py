"""Regions: contiguous parts of one slide, nested over sizes (docs/method.md 5).

Ward linkage constrained by the spatial graph gives one tree per connected piece of tissue; cutting
the trees at several sizes gives nested regions. The controls (grid, shuffled, Leiden) stand beside.

Legend: S spots of a slide, F features, V spot-vector length, N neighbours, D width, L levels, R
regions of a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from hibio.config.data import RegionsConfig
from preprocessing.errors import DataError
from preprocessing.graphs import SpotGraph, components, in_order_of_appearance
from preprocessing.leiden import leiden_regions

#: Default sizes of the nested levels, as diameters of circles of the same area, micrometres.
DIAMETERS_UM = (300.0, 600.0, 1200.0)


@dataclass(frozen=True)
class RegionTree:
    """Merges of all pieces of tissue of one slide, lowest first.

    Attributes:
        children: (n_merges, 2) int64; node S + i joins these two (below S: spots).
        height: (n_merges,) float64, Ward distance, never falling.
        n_spots: S.
        component: (S,) int32, the connected piece of tissue of each spot; pieces are never joined.
    """

    children: NDArray[np.int64]
    height: NDArray[np.float64]
    n_spots: int
    component: NDArray[np.int32]

    @property
    def n_components(self) -> int:
        """Pieces of tissue, the fewest regions that there can be."""
        return self.n_spots - len(self.children)

    def cut(self, n_regions: int) -> NDArray[np.int64]:
        """Labels of ``n_regions`` regions, shared among the pieces of tissue by merge height.

        Args:
            n_regions: wanted number; at most one a spot and at least one a piece are given.

        Returns:
            (S,) int64 labels 0..R-1 in order of appearance. A cut into fewer regions is a union of
            regions of every cut into more.

        Raises:
            DataError: ``n_regions`` is below 1.
        """
        if n_regions < 1:
            raise DataError(f"n_regions is {n_regions}, expected at least 1")
        n_merges = min(max(self.n_spots - n_regions, 0), len(self.children))
        node = np.repeat(self.n_spots + np.arange(n_merges), 2)
        size = self.n_spots + n_merges
        pair = (node, self.children[:n_merges].ravel())
        forest = sparse.coo_matrix((np.ones(2 * n_merges), pair), shape=(size, size))
        label = connected_components(forest, directed=False)[1]
        return in_order_of_appearance(label[: self.n_spots])


def fit_region_tree(feature_SF: NDArray[np.floating], graph: SpotGraph) -> RegionTree:
    """Ward linkage of the features where only neighbours in the graph may be joined.

    Tissue that is not connected is never joined; a spot without neighbours is a region by itself.

    Args:
        feature_SF: (S, F) fused features (PCA of TF-IDF, later the current embeddings).
        graph: spatial graph of the slide.

    Returns:
        The merges of all pieces, ordered by height (made non-falling within a piece).

    Raises:
        DataError: shapes that do not fit or features that are not finite.
    """
    feature = np.asarray(feature_SF, dtype=np.float64)
    n_spots = graph.n_spots
    if feature.ndim != 2 or len(feature) != n_spots:
        raise DataError(
            f"features are {feature.shape}, the graph has {n_spots} spots; expected ({n_spots}, F) "
            "of the same spots"
        )
    if not np.isfinite(feature).all():
        bad = int((~np.isfinite(feature)).any(axis=1).sum())
        raise DataError(f"features of {bad} of {n_spots} spots are not finite; drop those spots")
    piece = components(graph)
    by_piece = np.argsort(piece, kind="stable")
    size = np.bincount(piece)
    place = np.empty(n_spots, dtype=np.int64)  # of a spot within its piece
    place[by_piece] = np.arange(n_spots) - np.repeat(np.cumsum(size) - size, size)
    source, target = graph.edges()
    order = np.argsort(piece[source], kind="stable")
    edge_piece, source, target = piece[source[order]], place[source[order]], place[target[order]]
    pairs, heights = [np.empty((0, 2), dtype=np.int64)], [np.empty(0)]
    first = n_spots  # number of the next piece's lowest merge, before all are ordered by height
    for number, spots in enumerate(np.split(by_piece, np.cumsum(size)[:-1])):
        if len(spots) < 2:
            continue
        edges = slice(*np.searchsorted(edge_piece, [number, number + 1]))
        pair, height = ward_merges(feature[spots], source[edges], target[edges])
        numbers = np.concatenate([spots, first + np.arange(len(pair))])
        pairs.append(numbers[pair])
        heights.append(np.maximum.accumulate(height))
        first += len(pair)
    height = np.concatenate(heights)
    order = np.argsort(height, kind="stable")  # stable: a merge stays behind the ones it joins
    rank = np.arange(n_spots + len(order))
    rank[n_spots + order] = n_spots + np.arange(len(order))
    return RegionTree(rank[np.concatenate(pairs)[order]], height[order], n_spots, piece)


def ward_merges(
    feature_SF: NDArray[np.float64], source: NDArray[np.int64], target: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ward linkage of one connected graph.

    Args:
        feature_SF: (S, F), S at least 2.
        source: (E,) one end of each edge.
        target: (E,) the other end.

    Returns:
        The two nodes that each merge joins (S - 1, 2), merge i making node S + i, and its Ward
        distance (S - 1,): sqrt(2 |X||Y| / (|X| + |Y|)) times the distance of the two means.
    """
    import higra  # loads pyplot

    graph = higra.UndirectedGraph(len(feature_SF))
    graph.add_edges(source, target)
    linkage = higra.binary_partition_tree_ward_linkage
    tree, squared = linkage(graph, feature_SF, altitude_correction="none")
    children = np.argsort(tree.parents()[:-1], kind="stable").reshape(-1, 2)  # the root has none
    return children, np.sqrt(2 * squared[len(feature_SF) :])


def n_regions_for(diameter_um: float, xy_um: NDArray[np.floating], graph: SpotGraph) -> int:
    """How many regions of a given size the tissue holds.

    Args:
        diameter_um: diameter of a circle with the area of one region, micrometres.
        xy_um: (S, 2) spot centres.
        graph: spatial graph of the slide.

    Returns:
        Tissue area over region area, at least the number of pieces of tissue and at most S.

    Raises:
        DataError: a diameter that is not positive, or spots that lie on top of each other.
    """
    if not diameter_um > 0:
        raise DataError(f"diameter_um is {diameter_um}, expected more than 0 micrometres")
    n_pieces = int(components(graph).max()) + 1
    area = graph.n_spots * _area_per_spot(np.asarray(xy_um, dtype=np.float64))
    wanted = round(area / (math.pi / 4 * diameter_um**2))
    return int(min(max(wanted, n_pieces), graph.n_spots))


def _area_per_spot(xy_um: NDArray[np.float64]) -> float:
    """Area that one spot stands for, um^2, from the median distance d to the nearest spot.

    A hexagonal array (about 6 spots within 1.2 d) has sqrt(3)/2 d^2 and a square one (about 4) d^2;
    scattered cells (about 1) are taken for a Poisson process, which has pi / ln 2 d^2.
    """
    if len(xy_um) < 2:
        return 0.0
    distance, _ = cKDTree(xy_um).query(xy_um, k=min(len(xy_um), 9))
    nearest = float(np.median(distance[:, 1]))
    if nearest == 0:
        raise DataError("more than half of the spots share their place; check xy_um")
    around = np.median((distance[:, 1:] < 1.2 * nearest).sum(axis=1))
    if around >= 5:
        return math.sqrt(3) / 2 * nearest**2
    return nearest**2 if around >= 3 else math.pi / math.log(2) * nearest**2


def region_levels(
    tree: RegionTree,
    xy_um: NDArray[np.floating],
    graph: SpotGraph,
    diameters_um: Sequence[float] = DIAMETERS_UM,
) -> NDArray[np.int64]:
    """Nested regions: every region of a level is a union of regions of the level before.

    Args:
        tree: from `fit_region_tree`.
        xy_um: (S, 2) spot centres, micrometres.
        graph: the graph of the tree.
        diameters_um: rising region sizes, see `n_regions_for`.

    Returns:
        (L, S) int64 labels, 0..R-1 at each level.

    Raises:
        DataError: no diameters, or they do not rise.
    """
    if not diameters_um or any(np.diff(diameters_um) <= 0):
        raise DataError(f"diameters_um is {tuple(diameters_um)}, expected rising sizes")
    return np.stack([tree.cut(n_regions_for(d, xy_um, graph)) for d in diameters_um])


def match_labels(previous: NDArray[np.integer], new: NDArray[np.integer]) -> NDArray[np.int64]:
    """Give the regions of a rebuild the names of the regions they overlap most (Hungarian).

    Args:
        previous: (S,) labels before; negative is none.
        new: (S,) labels after the rebuild, of the same spots; negative is none and stays.

    Returns:
        (S,) int64, ``new`` renamed one to one; a region that matches none gets a new name after
        all previous ones.

    Raises:
        DataError: the two do not label the same spots.
    """
    previous, new = np.asarray(previous), np.asarray(new)
    if previous.shape != new.shape or new.ndim != 1:
        raise DataError(
            f"labels have shapes {previous.shape} and {new.shape}, expected one label for every "
            "spot in both"
        )
    old_name, old = np.unique(previous, return_inverse=True)
    new_name, now = np.unique(new, return_inverse=True)
    overlap = np.zeros((len(new_name), len(old_name)))
    np.add.at(overlap, (now, old), 1)
    overlap[new_name < 0] = 0
    overlap[:, old_name < 0] = 0
    row, column = linear_sum_assignment(overlap, maximize=True)
    kept = overlap[row, column] > 0
    name = np.where(new_name < 0, new_name, -1).astype(np.int64)
    name[row[kept]] = old_name[column[kept]]
    fresh = (new_name >= 0) & (name < 0)
    start = max(int(previous.max(initial=-1)), -1) + 1
    name[fresh] = start + np.arange(fresh.sum())
    return name[now]


def grid_regions(xy_um: NDArray[np.floating], diameter_um: float) -> NDArray[np.int64]:
    """Control: squares of the same area as a circle of that diameter, blind to the tissue.

    Args:
        xy_um: (S, 2) spot centres, micrometres.
        diameter_um: as for `n_regions_for`.

    Returns:
        (S,) int64 labels 0..R-1 of the squares that hold a spot.

    Raises:
        DataError: a diameter that is not positive.
    """
    if not diameter_um > 0:
        raise DataError(f"diameter_um is {diameter_um}, expected more than 0 micrometres")
    xy = np.asarray(xy_um, dtype=np.float64)
    side_um = diameter_um * math.sqrt(math.pi) / 2
    cell = np.floor((xy - xy.min(axis=0)) / side_um).astype(np.int64)
    return in_order_of_appearance(cell[:, 0] * (cell[:, 1].max() + 1) + cell[:, 1])


def shuffled_regions(labels: NDArray[np.integer], seed: int) -> NDArray[np.int64]:
    """Control: the same region sizes, spread over the slide at random.

    The spots of ``labels``, (S,) or (L, S), in another order; levels stay nested.
    """
    order = np.random.default_rng(seed).permutation(np.shape(labels)[-1])
    return np.asarray(labels, dtype=np.int64)[..., order]


def fused_features(
    vector_SV: NDArray[np.floating] | None,
    neighbour_SN: NDArray[np.integer],
    embeddings_SD: Sequence[NDArray[np.floating] | None] = (),
) -> NDArray[np.floating]:
    """What the tree clusters: the spot vector smoothed over the neighbours, then the embeddings.

    Each part is scaled to total variance 1, so that none of them rules by its number of columns.

    Args:
        vector_SV: of each spot, or None where nothing was measured.
        neighbour_SN: indices of spots, -1 is none.
        embeddings_SD: current embeddings; None is left out.
    """
    parts = [part for part in embeddings_SD if part is not None]
    if vector_SV is not None:
        present = (neighbour_SN >= 0)[..., None]
        around = (vector_SV[neighbour_SN] * present).sum(axis=1)
        parts.insert(0, (vector_SV + around) / (1.0 + present.sum(axis=1)))
    scaled = []
    for part in parts:
        centred = part - part.mean(axis=0)
        scaled.append(centred / max(float(np.sqrt((centred**2).sum(axis=1).mean())), 1e-8))
    return np.concatenate(scaled, axis=1)


def slide_regions(
    feature_SF: NDArray[np.floating],
    xy_um: NDArray[np.floating],
    graph: SpotGraph,
    config: RegionsConfig,
) -> NDArray[np.int64]:
    """Region of each spot at each level, (L, S), of the kind that the configuration asks for.

    Args:
        feature_SF: from `fused_features`; a grid does not read them.
        xy_um: (S, 2) spot centres, micrometres.
        graph: spatial graph of the slide.
        config: kind and sizes.
    """
    if config.kind == "grid":
        return np.stack([grid_regions(xy_um, d) for d in config.diameters_um])
    if config.kind == "leiden":
        sizes = [n_regions_for(d, xy_um, graph) for d in config.diameters_um]
        return np.stack([leiden_regions(feature_SF, graph, size) for size in sizes])
    tree = fit_region_tree(feature_SF, graph)
    levels = region_levels(tree, xy_um, graph, config.diameters_um)
    return shuffled_regions(levels, seed=0) if config.kind == "shuffled" else levels
