"""Leiden: against every partition of small graphs, cliques, connectedness, and as regions."""

import itertools

import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from preprocessing.errors import DataError
from preprocessing.graphs import KNNGraph, components
from preprocessing.leiden import leiden, leiden_regions


def quality(weight: np.ndarray, label: np.ndarray, resolution: float = 1.0) -> float:
    """Modularity, pair by pair."""
    total, strength = weight.sum(), weight.sum(axis=1)
    value = 0.0
    for i, j in itertools.product(range(len(weight)), repeat=2):
        if label[i] == label[j]:
            value += weight[i, j] - resolution * strength[i] * strength[j] / total
    return value / total


def partitions(n: int):
    """Every partition of n nodes, as labels."""

    def grow(head: list[int], highest: int):
        if len(head) == n:
            yield np.array(head)
            return
        for label in range(highest + 2):
            yield from grow([*head, label], max(highest, label))

    return grow([0], 0)


def random_graph(seed: int, n: int = 6, density: float = 0.6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.random((n, n)) * (rng.random((n, n)) < density), 1)
    return upper + upper.T


def cliques(n_cliques: int, size: int, bridge: float = 0.1) -> np.ndarray:
    """A ring of cliques with weak bridges."""
    weight = np.kron(np.eye(n_cliques), np.ones((size, size)) - np.eye(size))
    for k in range(n_cliques):
        i, j = k * size, ((k + 1) % n_cliques) * size + 1
        weight[i, j] = weight[j, i] = bridge
    return weight


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one[:, None] == one, other[:, None] == other)


def test_mostly_the_best_of_all_partitions_and_never_far_from_it():
    best_found = 0
    for seed in range(20):
        weight = random_graph(seed)
        best = max(quality(weight, label) for label in partitions(6))
        found = quality(weight, leiden(sparse.csr_matrix(weight)))
        assert found <= best + 1e-12
        assert found > best - 0.06
        best_found += found > best - 1e-12
    assert best_found >= 14


def test_a_ring_of_cliques_falls_into_its_cliques():
    weight = cliques(5, 4)
    for seed in range(4):
        assert same(leiden(sparse.csr_matrix(weight), seed=seed), np.repeat(np.arange(5), 4))


def test_more_resolution_gives_more_communities_down_to_single_nodes():
    weight = sparse.csr_matrix(cliques(6, 5))
    counts = [len(set(leiden(weight, g))) for g in (1e-3, 1.0, 30.0)]
    assert counts == [1, 6, 30]


def test_the_names_of_the_nodes_do_not_matter_to_clear_communities():
    weight, order = cliques(4, 5), np.random.default_rng(0).permutation(20)
    plain = leiden(sparse.csr_matrix(weight))
    assert same(leiden(sparse.csr_matrix(weight[np.ix_(order, order)])), plain[order])


@pytest.mark.parametrize("resolution", [0.3, 1.0, 4.0])
def test_every_community_is_connected(resolution):
    for seed in range(6):
        weight = random_graph(seed, 60, 0.06)
        label = leiden(sparse.csr_matrix(weight), resolution, seed)
        for community in np.unique(label):
            own = label == community
            assert connected_components(weight[np.ix_(own, own)])[0] == 1


def test_the_result_is_better_than_single_nodes_and_than_one_community():
    for seed in range(5):
        weight = random_graph(seed, 40, 0.15)
        found = quality(weight, leiden(sparse.csr_matrix(weight)))
        assert found > max(quality(weight, np.arange(40)), quality(weight, np.zeros(40)), 0)


def test_nodes_without_edges_stand_alone():
    assert leiden(sparse.csr_matrix((4, 4))).tolist() == [0, 1, 2, 3]
    weight = np.zeros((4, 4))
    weight[0, 1] = weight[1, 0] = 1
    assert same(leiden(sparse.csr_matrix(weight)), np.array([0, 0, 1, 2]))


@pytest.mark.parametrize(
    ("weight", "resolution", "words"),
    [
        (np.array([[0.0, 1.0], [0.0, 0.0]]), 1.0, "not symmetric"),
        (np.zeros((2, 3)), 1.0, "not symmetric"),
        (np.array([[0.0, -1.0], [-1.0, 0.0]]), 1.0, "negative"),
        (np.eye(2)[::-1], 0.0, "resolution is 0"),
    ],
)
def test_what_is_no_graph_is_refused(weight, resolution, words):
    with pytest.raises(DataError, match=words):
        leiden(sparse.csr_matrix(weight), resolution)


# ------------------------------------------------------------------ regions
def grid(side: int = 12) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * 100.0


@pytest.mark.parametrize("wanted", [2, 6, 20])
def test_regions_are_connected_and_about_as_many_as_asked(wanted):
    xy = grid()
    graph = KNNGraph(k=6).build(xy)
    feature = np.random.default_rng(0).normal(size=(len(xy), 4))
    label = leiden_regions(feature, graph, wanted)
    assert abs(len(np.unique(label)) - wanted) <= max(1, 0.1 * wanted)
    assert set(label) == set(range(label.max() + 1))
    matrix = graph.matrix()
    for region in np.unique(label):
        own = np.flatnonzero(label == region)
        assert connected_components(matrix[own][:, own])[0] == 1


def test_two_tissues_are_told_apart():
    xy = grid()
    feature = np.where(xy[:, :1] < 600, 0.0, 8.0) + 0.1 * np.random.default_rng(1).normal(
        size=(len(xy), 3)
    )
    label = leiden_regions(feature, KNNGraph(k=6).build(xy), 2)
    assert same(label, (xy[:, 0] >= 600).astype(int))


def test_pieces_of_tissue_are_never_joined():
    xy = np.concatenate([grid(5), grid(5) + 5000.0])
    graph = KNNGraph(k=4).build(xy)
    label = leiden_regions(np.zeros((50, 2)), graph, 1)
    assert same(label, components(graph))


def test_regions_of_other_spots_are_refused():
    graph = KNNGraph(k=4).build(grid(5))
    with pytest.raises(DataError, match="one row a spot"):
        leiden_regions(np.zeros((24, 2)), graph, 3)
    with pytest.raises(DataError, match="at least 1 region"):
        leiden_regions(np.zeros((25, 2)), graph, 0)
