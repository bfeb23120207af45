"""Spatial graphs and Moran's I: hand-drawn adjacency, brute force, invariance and errors."""

import numpy as np
import pytest
from scipy import sparse

from preprocessing.errors import DataError
from preprocessing.graphs import DelaunayGraph, KNNGraph, SpotGraph, components, morans_i

BUILDERS = [KNNGraph(k=4), DelaunayGraph(), DelaunayGraph(prune=np.inf)]


def edges(graph: SpotGraph) -> set[tuple[int, int]]:
    row = np.repeat(np.arange(graph.n_spots), graph.degree)
    return set(zip(row.tolist(), graph.indices.tolist(), strict=True))


def both_ways(pairs: list[tuple[int, int]]) -> set[tuple[int, int]]:
    return {*pairs, *((b, a) for a, b in pairs)}


def scattered(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1000, (n, 2))


def test_delaunay_on_a_hand_drawn_kite():
    """The short diagonal 0-2 is inside, the long one 1-3 is not."""
    xy = np.array([[0, 0], [100, 40], [200, 0], [100, -40]], float)
    graph = DelaunayGraph().build(xy)
    assert edges(graph) == both_ways([(0, 1), (1, 2), (2, 3), (3, 0), (1, 3)])


def test_knn_is_the_union_and_prunes_long_edges():
    """Spot 3 asks for spot 2, which prefers 1; spot 4 is too far from everything."""
    xy = np.array([[0, 0], [10, 0], [20, 0], [35, 0], [900, 0]], float)
    kept = both_ways([(0, 1), (1, 2), (2, 3)])
    assert edges(KNNGraph(k=1).build(xy)) == kept
    assert edges(KNNGraph(k=1, prune=np.inf).build(xy)) == kept | both_ways([(3, 4)])


def test_knn_equals_brute_force():
    xy = scattered(60)
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    wanted = {(i, int(j)) for i in range(60) for j in np.argsort(distance[i])[:5]}
    graph = KNNGraph(k=5, prune=np.inf).build(xy)
    assert edges(graph) == both_ways(sorted(wanted))
    row = np.repeat(np.arange(60), graph.degree)
    np.testing.assert_allclose(graph.distance_um, distance[row, graph.indices], rtol=1e-6)


def test_delaunay_circumcircles_are_empty():
    xy = scattered(30, seed=3)
    graph = DelaunayGraph(prune=np.inf).build(xy)
    found = edges(graph)
    for i, j in found:
        shared = [k for k in range(30) if (i, k) in found and (j, k) in found]
        circles = []
        for k in shared:
            a, b = xy[j] - xy[i], xy[k] - xy[i]
            centre = np.linalg.solve(2 * np.array([a, b]), [a @ a, b @ b]) + xy[i]
            reach = np.linalg.norm(xy[i] - centre)
            circles.append((np.linalg.norm(xy - centre, axis=1) >= reach * (1 - 1e-9)).all())
        assert any(circles)


@pytest.mark.parametrize("builder", BUILDERS)
def test_symmetric_without_loops_and_nearest_first(builder):
    graph = builder.build(scattered(80))
    found = edges(graph)
    assert len(found) == graph.indices.size > 0
    assert all((j, i) in found and i != j for i, j in found)
    for i in range(graph.n_spots):
        assert (np.diff(graph.distance_um[graph.indptr[i] : graph.indptr[i + 1]]) >= 0).all()


@pytest.mark.parametrize("builder", BUILDERS)
def test_rotation_translation_and_permutation(builder):
    xy = scattered(80, seed=1)
    turn = np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    order = np.random.default_rng(2).permutation(80)
    original = edges(builder.build(xy))
    assert edges(builder.build(xy @ turn.T + [5e4, -3e4])) == original
    moved = edges(builder.build(xy[order]))
    assert {(int(order[i]), int(order[j])) for i, j in moved} == original


@pytest.mark.parametrize("builder", BUILDERS)
def test_one_and_two_spots(builder):
    one = builder.build(np.array([[5.0, 5.0]]))
    assert (one.n_spots, one.indices.size) == (1, 0)
    two = builder.build(np.array([[0.0, 0.0], [0.0, 90.0]]))
    assert edges(two) == {(0, 1), (1, 0)}
    np.testing.assert_array_equal(two.distance_um, [90, 90])


def test_copies_of_a_spot_keep_knn_free_of_loops():
    xy = np.repeat([[0.0, 0.0], [50.0, 0.0]], 5, axis=0)
    graph = KNNGraph(k=2).build(xy)
    assert all(i != j for i, j in edges(graph))
    assert graph.degree.min() >= 2


def test_neighbour_lists_are_padded_and_nearest_first():
    xy = np.array([[0, 0], [10, 0], [25, 0]], float)
    graph = KNNGraph(k=1, prune=np.inf).build(xy)
    index, distance = graph.neighbours(2)
    np.testing.assert_array_equal(index, [[1, -1], [0, 2], [1, -1]])
    np.testing.assert_array_equal(distance, [[10, np.inf], [10, 15], [15, np.inf]])
    np.testing.assert_array_equal(graph.neighbours(1)[0], [[1], [0], [1]])
    np.testing.assert_array_equal(graph.matrix().toarray(), [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


def test_components_are_numbered_by_first_spot():
    graph = SpotGraph.from_edges(5, np.array([3, 1]), np.array([0, 2]), np.ones(2))
    np.testing.assert_array_equal(components(graph), [0, 1, 1, 0, 2])
    assert [ends.tolist() for ends in graph.edges()] == [[0, 1], [3, 2]]


def slow_moran(values: np.ndarray, adjacency: np.ndarray) -> list[float]:
    result = []
    for column in values.T:
        z = column - column.mean()
        cross = sum(adjacency[i, j] * z[i] * z[j] for i in range(len(z)) for j in range(len(z)))
        result.append(0.0 if not z.any() else len(z) / adjacency.sum() * cross / (z @ z))
    return result


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_moran_equals_the_double_loop(form, block, monkeypatch):
    monkeypatch.setattr("preprocessing.graphs._DENSE_BLOCK", block)
    graph = KNNGraph(k=4).build(scattered(25))
    values = np.random.default_rng(0).poisson(0.8, (25, 6)).astype(np.float32)
    values[:, 2] = 3  # constant: 0 by definition
    values[:, 4] = 0
    wanted = slow_moran(values.astype(float), graph.matrix().toarray())
    np.testing.assert_allclose(morans_i(form(values), graph), wanted, atol=1e-12)


def test_moran_of_a_checkerboard_is_minus_one_and_of_halves_is_high():
    row, column = np.divmod(np.arange(64), 8)
    graph = KNNGraph(k=4, prune=1.0).build(np.stack([column, row], axis=1) * 100.0)
    assert set(graph.distance_um.tolist()) == {100.0}
    moran = morans_i(np.stack([(row + column) % 2, column < 4], axis=1).astype(float), graph)
    np.testing.assert_allclose(moran[0], -1)
    np.testing.assert_allclose(moran[1], 1 - 2 * 8 / 112)


def test_moran_without_edges_is_zero():
    graph = SpotGraph.from_edges(2, *np.empty((2, 0), int), np.empty(0))
    np.testing.assert_array_equal(morans_i(np.array([[1.0], [2.0]]), graph), [0])


@pytest.mark.parametrize(
    ("make", "xy", "message"),
    [
        (DelaunayGraph, [[0, 0], [1, 1], [2, 2], [3, 3]], "one line.*KNNGraph"),
        (DelaunayGraph, [[0, 0], [9, 0], [0, 9], [9, 0]], "on top of another.*KNNGraph"),
        (KNNGraph, [[0, 0], [np.nan, 1]], "not finite, first row 1"),
        (KNNGraph, np.zeros((0, 2)), "expected \\(S, 2\\)"),
        (KNNGraph, [[0, 0, 0]], "expected \\(S, 2\\)"),
    ],
)
def test_unusable_spots_say_what_to_do(make, xy, message):
    with pytest.raises(DataError, match=message):
        make().build(np.asarray(xy, float))


@pytest.mark.parametrize(
    "make",
    [
        lambda: KNNGraph(k=0),
        lambda: KNNGraph(prune=0.5),
        lambda: DelaunayGraph(prune=np.nan),
        lambda: SpotGraph(np.array([0, 2]), np.zeros(1, np.int32), np.zeros(1, np.float32)),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(DataError, match=r"expected|needs"):
        make()


def test_moran_refuses_other_spots_and_nan():
    graph = KNNGraph(k=1).build(scattered(4))
    with pytest.raises(DataError, match="3 rows and the graph 4 spots"):
        morans_i(np.zeros((3, 2)), graph)
    with pytest.raises(DataError, match="not finite"):
        morans_i(np.full((4, 1), np.nan), graph)
