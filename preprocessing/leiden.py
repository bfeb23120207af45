"""The Leiden algorithm (Traag, Waltman and van Eck 2019) and regions made by it: a control.

Modularity with a resolution g: communities c maximise sum_c [W_c - g K_c^2 / (2 M)], W_c the
weight inside (both directions), K_c the summed strength of its nodes and M the total strength.
Shapes: S nodes or spots, F features, R regions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from preprocessing.errors import DataError
from preprocessing.graphs import SpotGraph

SEARCH = (1e-2, 1e3)  # resolutions
STEPS = 12  # of the bisection


@dataclass(frozen=True)
class _Network:
    """A symmetric weighted graph; the diagonal holds twice the weight inside a merged node."""

    weight: sparse.csr_matrix
    strength: NDArray[np.float64]
    factor: float  # resolution / total strength

    def neighbours(self, node: int) -> tuple[list[int], list[float]]:
        """Other nodes with an edge to this one, and the weights."""
        row = slice(self.weight.indptr[node], self.weight.indptr[node + 1])
        near, weight = self.weight.indices[row], self.weight.data[row]
        other = near != node
        return near[other].tolist(), weight[other].tolist()

    def links(
        self, node: int, label: NDArray[np.int64], within: NDArray[np.int64] | None = None
    ) -> dict[int, float]:
        """Weight from a node to each label among its neighbours (of its own part of ``within``)."""
        found: dict[int, float] = {}
        for near, weight in zip(*self.neighbours(node), strict=True):
            if within is None or within[near] == within[node]:
                found[int(label[near])] = found.get(int(label[near]), 0.0) + weight
        return found


def leiden(weight: sparse.spmatrix, resolution: float = 1.0, seed: int = 0) -> NDArray[np.int64]:
    """Communities of a graph; each is connected.

    Merging in the refinement is greedy (the limit of no randomness of the paper's rule).

    Args:
        weight: (S, S) symmetric, no negative entries, nothing on the diagonal.
        resolution: g; more gives smaller communities.
        seed: of the order in which nodes are visited.

    Returns:
        (S,) labels from 0; a node without edges is a community by itself.

    Raises:
        DataError: a matrix that is not symmetric or has negative entries, or g not above 0.
    """
    matrix = sparse.csr_matrix(weight, dtype=np.float64)
    if matrix.nnz and matrix.data.min() < 0:
        raise DataError("a weight is negative; give similarities of at least 0")
    if matrix.shape[0] != matrix.shape[1] or abs(matrix - matrix.T).sum() > 1e-9 * matrix.sum():
        raise DataError(f"weights of shape {matrix.shape} are not symmetric; give W + W.T")
    if not resolution > 0:
        raise DataError(f"resolution is {resolution}, more than 0 is needed")
    rng = np.random.default_rng(seed)
    total = float(matrix.sum())
    node_of = np.arange(matrix.shape[0])
    label = np.arange(matrix.shape[0])
    while total > 0:
        strength = np.asarray(matrix.sum(axis=1)).ravel()
        network = _Network(matrix, strength, resolution / total)
        label = _move_nodes(network, label, rng)
        if len(np.unique(label)) == matrix.shape[0]:
            break
        refined = _in_order(_refine(network, label, rng))
        n_merged = int(refined.max()) + 1
        if n_merged == matrix.shape[0]:
            break
        member = sparse.csr_matrix(
            (np.ones(len(refined)), (np.arange(len(refined)), refined)),
            shape=(len(refined), n_merged),
        )
        above = np.empty(n_merged, dtype=np.int64)
        above[refined] = label
        matrix, label, node_of = (member.T @ matrix @ member).tocsr(), above, refined[node_of]
    return _in_order(label[node_of])


def _move_nodes(
    network: _Network, start: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Nodes go where they gain most, until none does; neighbours of a moved node are seen again."""
    label = _in_order(start)
    size = np.zeros(len(label) + 1)
    np.add.at(size, label, network.strength)
    count = np.bincount(label, minlength=len(label) + 1)
    queue = rng.permutation(len(label)).tolist()
    waiting = np.ones(len(label), dtype=bool)
    place = 0
    while place < len(queue):
        node = queue[place]
        place, waiting[node] = place + 1, False
        own, strength = int(label[node]), float(network.strength[node])
        links = network.links(node, label)
        size[own] -= strength
        count[own] -= 1
        best, gain = own, links.get(own, 0.0) - network.factor * strength * size[own]
        if gain < -1e-12:
            best, gain = int(np.flatnonzero(count == 0)[0]), 0.0  # alone is better
        for other, linked in links.items():
            found = linked - network.factor * strength * size[other]
            if found > gain + 1e-12:
                best, gain = other, found
        label[node] = best
        size[best] += strength
        count[best] += 1
        if best != own:
            for near in network.neighbours(node)[0]:
                if label[near] != best and not waiting[near]:
                    queue.append(near)
                    waiting[near] = True
    return label


def _refine(
    network: _Network, label: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Split every community into parts that are well connected, each grown from single nodes."""
    n_nodes = len(label)
    part = np.arange(n_nodes)
    whole = np.zeros(n_nodes + 1)
    np.add.at(whole, label, network.strength)
    size = network.strength.copy()
    inside = np.array([network.links(v, label).get(int(label[v]), 0.0) for v in range(n_nodes)])
    outward = inside.copy()  # weight from each part to the rest of its community

    def well_connected(index: int, community: int) -> bool:
        rest = whole[community] - size[index]
        return bool(outward[index] >= network.factor * size[index] * rest - 1e-12)

    alone = np.ones(n_nodes, dtype=bool)
    for node in rng.permutation(n_nodes).tolist():
        community = int(label[node])
        if not alone[node] or not well_connected(node, community):
            continue
        best, gain, linked_best = node, 0.0, 0.0
        for other, linked in network.links(node, part, within=label).items():
            if other == node or not well_connected(other, community):
                continue
            found = linked - network.factor * network.strength[node] * size[other]
            if found > gain:
                best, gain, linked_best = other, found, linked
        if best != node:
            part[node], alone[node], alone[best] = best, False, False
            size[best] += size[node]
            outward[best] += outward[node] - 2 * linked_best
    return part


def leiden_regions(
    feature_SF: NDArray[np.floating], graph: SpotGraph, n_regions: int, seed: int = 0
) -> NDArray[np.int64]:
    """Control: Leiden communities of the spatial graph, about as many as the tree's regions.

    An edge weighs exp(-d / median d), d the distance of the features of its ends; the resolution
    is found by bisection. Levels of different size are not nested.

    Args:
        feature_SF: (S, F) the features that the tree would cluster.
        graph: spatial graph of the slide.
        n_regions: wanted number.
        seed: of the visits.

    Returns:
        (S,) labels 0..R-1, every region connected in the graph; R is the number nearest to the
        wanted one that the search met, at least the number of pieces of tissue.

    Raises:
        DataError: features of other spots, or n_regions below 1.
    """
    feature = np.asarray(feature_SF, dtype=np.float64)
    if feature.ndim != 2 or len(feature) != graph.n_spots or n_regions < 1:
        raise DataError(
            f"features are {feature.shape} for {graph.n_spots} spots and n_regions is {n_regions}; "
            "expected one row a spot and at least 1 region"
        )
    edges = graph.matrix().tocoo()
    distance = np.linalg.norm(feature[edges.row] - feature[edges.col], axis=1)
    scale = max(float(np.median(distance)), 1e-12) if len(distance) else 1.0
    ends = (edges.row, edges.col)
    weight = sparse.csr_matrix((np.exp(-distance / scale), ends), shape=edges.shape)
    low, high = np.log(SEARCH)
    best: NDArray[np.int64] | None = None
    for _ in range(STEPS):
        found = _connected(leiden(weight, float(np.exp((low + high) / 2)), seed), weight)
        n_found = int(found.max()) + 1
        if best is None or abs(n_found - n_regions) < abs(int(best.max()) + 1 - n_regions):
            best = found
        if n_found == n_regions:
            break
        low, high = ((low + high) / 2, high) if n_found < n_regions else (low, (low + high) / 2)
    assert best is not None
    return best


def _connected(label: NDArray[np.int64], weight: sparse.csr_matrix) -> NDArray[np.int64]:
    """Labels of the connected pieces of every label."""
    edges = weight.tocoo()
    kept = label[edges.row] == label[edges.col]
    ends = (edges.row[kept], edges.col[kept])
    within = sparse.csr_matrix((np.ones(int(kept.sum())), ends), shape=weight.shape)
    return _in_order(connected_components(within, directed=False)[1])


def _in_order(label: NDArray[np.integer]) -> NDArray[np.int64]:
    return np.asarray(np.unique(label, return_inverse=True)[1].reshape(-1), dtype=np.int64)
