"""Regions: a slow greedy Ward oracle, contiguity, nesting, matching across rebuilds, controls."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import ward_tree

from hibio.regions import (
    fit_region_tree,
    grid_regions,
    match_labels,
    n_regions_for,
    region_levels,
    shuffled_regions,
)
from preprocessing.errors import DataError
from preprocessing.graphs import KNNGraph, SpotGraph


def same_partition(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two labellings differ in names only."""
    pairs = len(np.unique(np.stack([left, right]), axis=1).T)
    return pairs == len(np.unique(left)) == len(np.unique(right))


def hexagonal(rows: int = 12, columns: int = 12, pitch_um: float = 100.0) -> np.ndarray:
    row, column = np.mgrid[:rows, :columns]
    x = (column + row % 2 / 2) * pitch_um
    return np.stack([x.ravel(), (row * math.sqrt(3) / 2 * pitch_um).ravel()], axis=1)


def two_pieces(seed: int = 0) -> tuple[np.ndarray, np.ndarray, SpotGraph]:
    """14 + 10 spots on two islands and one spot far from both."""
    rng = np.random.default_rng(seed)
    xy_um = np.concatenate(
        [rng.uniform(0, 300, (14, 2)), rng.uniform(5000, 5300, (10, 2)), [[20000.0, 0.0]]]
    )
    feature = rng.normal(size=(25, 3))
    return feature, xy_um, KNNGraph(k=4).build(xy_um)


def slow_ward(feature: np.ndarray, graph: SpotGraph, n_regions: int) -> np.ndarray:
    """Reference: join the two adjacent clusters whose join adds least variance, again and again."""
    label = np.arange(graph.n_spots)
    edges = np.argwhere(graph.matrix().toarray())
    while len(np.unique(label)) > n_regions:
        best = None
        for i, j in edges:
            if label[i] == label[j]:
                continue
            one, other = feature[label == label[i]], feature[label == label[j]]
            weight = len(one) * len(other) / (len(one) + len(other))
            cost = weight * np.sum((one.mean(0) - other.mean(0)) ** 2)
            if best is None or cost < best[0] - 1e-12:
                best = (cost, label[i], label[j])
        if best is None:
            break
        label[label == best[2]] = best[1]
    return label


def test_cuts_against_a_greedy_loop():
    feature, _, graph = two_pieces()
    tree = fit_region_tree(feature, graph)
    assert tree.n_components == 3
    for n_regions in (25, 20, 12, 7, 4, 3):
        found = tree.cut(n_regions)
        assert len(np.unique(found)) == n_regions
        assert same_partition(found, slow_ward(feature, graph, n_regions))


@pytest.mark.parametrize("seed", range(3))
def test_merges_are_those_of_scikit_learn(seed):
    """Without ties: the same pairs in the same order, the same heights, the same cuts."""
    rng = np.random.default_rng(seed)
    xy_um = rng.uniform(0, 3000, (800, 2))
    graph = KNNGraph(k=6, prune=np.inf).build(xy_um)
    feature = np.sin(xy_um[:, :1] / 400) + rng.normal(size=(800, 20))
    tree = fit_region_tree(feature, graph)
    children, _, _, _, height = ward_tree(
        feature, connectivity=graph.matrix(), return_distance=True
    )
    order = np.argsort(np.maximum.accumulate(height), kind="stable")
    assert np.array_equal(order, np.arange(799))
    np.testing.assert_array_equal(np.sort(tree.children, axis=1), np.sort(children, axis=1))
    np.testing.assert_allclose(tree.height, np.maximum.accumulate(height), rtol=1e-12)


def test_pieces_and_copies_of_a_spot_as_scikit_learn_cuts_them():
    """Each piece on its own, with weights that grow: twins join at height 0, before all else."""
    feature, _, graph = two_pieces(1)
    source, target = graph.edges()
    feature[target[0]] = feature[source[0]]
    tree = fit_region_tree(feature, graph)
    assert tree.height[0] == 0
    assert set(tree.children[0].tolist()) == {source[0], target[0]}
    matrix, heights = graph.matrix(), []
    for piece in range(2):
        inside = tree.component == piece
        local = matrix[inside][:, inside]
        found = ward_tree(feature[inside], connectivity=local, return_distance=True)[4]
        heights.append(np.maximum.accumulate(found))
    np.testing.assert_allclose(tree.height, np.sort(np.concatenate(heights)), rtol=1e-12)


def test_cut_of_planted_stripes():
    xy_um = hexagonal()
    stripe = (xy_um[:, 1] // 320).astype(int)
    feature = stripe[:, None] * 10 + np.random.default_rng(0).normal(size=(144, 2)) * 0.1
    tree = fit_region_tree(feature, KNNGraph().build(xy_um))
    assert same_partition(tree.cut(stripe.max() + 1), stripe)


def test_pieces_are_never_joined_and_a_lone_spot_is_its_own_region():
    feature, xy_um, graph = two_pieces()
    feature = np.zeros_like(feature)  # nothing in the features keeps them apart
    tree = fit_region_tree(feature, graph)
    label = tree.cut(1)
    assert same_partition(label, np.repeat([0, 1, 2], [14, 10, 1]))
    assert same_partition(label, tree.component)
    assert np.array_equal(tree.cut(1000), np.arange(25))
    assert n_regions_for(1e6, xy_um, graph) == 3


def test_one_spot_and_no_edges():
    lone = SpotGraph.from_edges(1, *np.empty((2, 0), int), np.empty(0))
    assert fit_region_tree(np.ones((1, 2)), lone).cut(3).tolist() == [0]
    loose = SpotGraph.from_edges(4, *np.empty((2, 0), int), np.empty(0))
    assert fit_region_tree(np.ones((4, 2)), loose).cut(1).tolist() == [0, 1, 2, 3]


def test_does_not_depend_on_the_order_of_spots():
    feature, xy_um, graph = two_pieces()
    order = np.random.default_rng(1).permutation(25)
    turned = fit_region_tree(feature[order], KNNGraph(k=4).build(xy_um[order]))
    for n_regions in (12, 6, 4):
        found = fit_region_tree(feature, graph).cut(n_regions)
        assert same_partition(turned.cut(n_regions), found[order])


def test_heights_rise_and_children_come_first():
    feature, _, graph = two_pieces(3)
    tree = fit_region_tree(feature, graph)
    assert (np.diff(tree.height) >= 0).all()
    own = tree.n_spots + np.arange(len(tree.children))
    assert (tree.children < own[:, None]).all()
    assert len(np.unique(tree.children)) == tree.children.size


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 4))
def test_levels_are_nested_contiguous_and_labelled_without_gaps(seed, n_spots, n_features):
    rng = np.random.default_rng(seed)
    xy_um = rng.uniform(0, 1500, (n_spots, 2))
    graph = KNNGraph(k=3, prune=1.5).build(xy_um)
    feature = rng.integers(0, 3, (n_spots, n_features)).astype(float)  # many ties
    levels = region_levels(fit_region_tree(feature, graph), xy_um, graph, (150, 400, 900))
    assert levels.shape == (3, n_spots)
    matrix = graph.matrix()
    for label in levels:
        assert np.array_equal(np.unique(label), np.arange(label.max() + 1))
        for region in range(label.max() + 1):
            inside = label == region
            assert connected_components(matrix[inside][:, inside])[0] == 1
    for fine, coarse in itertools.pairwise(levels):
        for region in range(fine.max() + 1):
            assert len(np.unique(coarse[fine == region])) == 1


def test_number_of_regions_from_the_area():
    xy_um = hexagonal(40, 40)
    graph = KNNGraph().build(xy_um)
    area = 1600 * math.sqrt(3) / 2 * 100**2
    assert n_regions_for(600, xy_um, graph) == round(area / (math.pi * 300**2))
    assert n_regions_for(600, xy_um * 2, graph) == round(4 * area / (math.pi * 300**2))
    square = np.stack(np.mgrid[:30, :30], axis=-1).reshape(-1, 2) * 200.0
    expected = round(900 * 200**2 / (math.pi * 300**2))
    assert n_regions_for(600, square, KNNGraph(k=4).build(square)) == expected
    assert n_regions_for(1, xy_um, graph) == 1600


def test_number_of_regions_of_scattered_cells():
    xy_um = np.random.default_rng(0).uniform(0, 3000, (4000, 2))
    expected = 3000**2 / (math.pi * 150**2)
    assert n_regions_for(300, xy_um, KNNGraph().build(xy_um)) == pytest.approx(expected, rel=0.1)


def test_region_size_is_about_what_was_asked():
    xy_um = hexagonal(40, 40)
    graph = KNNGraph().build(xy_um)
    feature = xy_um / 1000 + np.random.default_rng(0).normal(size=xy_um.shape) * 0.01
    levels = region_levels(fit_region_tree(feature, graph), xy_um, graph)
    area = [math.sqrt(3) / 2 * 100**2 * 1600 / (label.max() + 1) for label in levels]
    assert np.sqrt(4 * np.array(area) / math.pi) == pytest.approx([300, 600, 1200], rel=0.05)


def test_match_labels_keeps_names_of_what_stays():
    previous = np.array([5, 5, 5, 2, 2, 7, 7, 7])
    new = np.array([0, 0, 0, 1, 1, 3, 3, 2])
    assert match_labels(previous, new).tolist() == [5, 5, 5, 2, 2, 7, 7, 8]
    assert match_labels(previous, previous).tolist() == previous.tolist()
    none = np.array([-1, -1, 4, 4, 4, 4, 4, 4])
    assert match_labels(none, new).tolist()[:3] == [5, 5, 5]
    assert match_labels(previous, none).tolist()[:2] == [-1, -1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
def test_match_labels_reaches_the_best_overlap(seed, n_previous, n_new):
    rng = np.random.default_rng(seed)
    previous, new = rng.integers(0, n_previous, 20), rng.integers(0, n_new, 20)
    found = match_labels(previous, new)
    assert same_partition(found, new)
    best = 0
    names = np.unique(new)
    targets = np.concatenate([np.unique(previous), 100 + np.arange(len(names))])
    for choice in itertools.permutations(range(len(targets)), len(names)):
        renamed = targets[list(choice)][np.searchsorted(names, new)]
        best = max(best, int((renamed == previous).sum()))
    assert (found == previous).sum() == best


def test_grid_against_a_loop():
    xy_um = np.random.default_rng(0).uniform(-500, 2000, (200, 2))
    label = grid_regions(xy_um, 400.0)
    side = math.sqrt(math.pi * 200**2)
    cells = [tuple((xy - xy_um.min(0)) // side) for xy in xy_um]
    expected = np.array([cells.index(cell) for cell in cells])
    assert same_partition(label, expected)
    assert label.max() + 1 == len(set(cells))
    assert np.array_equal(grid_regions(xy_um + 12345.0, 400.0), label)


def test_shuffled_keeps_sizes_and_nesting():
    levels = np.array([[0, 0, 1, 1, 2, 3, 3, 3], [0, 0, 0, 0, 1, 1, 1, 1]])
    found = shuffled_regions(levels, seed=1)
    assert np.array_equal(np.sort(found, axis=1), np.sort(levels, axis=1))
    assert {tuple(pair) for pair in found.T} == {tuple(pair) for pair in levels.T}
    assert not np.array_equal(found, levels)
    assert np.array_equal(found, shuffled_regions(levels, seed=1))
    assert levels[0, 0] == 0
    assert np.array_equal(shuffled_regions(levels[0], 1), found[0])


def test_errors():
    feature, xy_um, graph = two_pieces()
    tree = fit_region_tree(feature, graph)
    with pytest.raises(DataError, match="same spots"):
        fit_region_tree(feature[:5], graph)
    with pytest.raises(DataError, match="of 1 of 25 spots are not finite"):
        fit_region_tree(np.where(np.arange(25)[:, None] == 3, np.nan, feature), graph)
    with pytest.raises(DataError, match="n_regions"):
        tree.cut(0)
    with pytest.raises(DataError, match="diameter_um"):
        n_regions_for(0, xy_um, graph)
    with pytest.raises(DataError, match="share their place"):
        n_regions_for(300, xy_um * 0, graph)
    for diameters in ((), (300, 300), (600, 300)):
        with pytest.raises(DataError, match="rising"):
            region_levels(tree, xy_um, graph, diameters)
    with pytest.raises(DataError, match="one label for every spot"):
        match_labels(np.zeros(3, int), np.zeros(4, int))
    with pytest.raises(DataError, match="diameter_um"):
        grid_regions(xy_um, -1.0)
