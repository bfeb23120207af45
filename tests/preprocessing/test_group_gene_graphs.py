"""Gene graphs of groups: a slow formula, planted edges, small groups and errors."""

import numpy as np
import pytest
from scipy import sparse, stats

from preprocessing.coexpression import group_gene_graphs
from preprocessing.coexpression.gene_graph import EdgeRule
from preprocessing.errors import DataError
from tests.preprocessing.test_coexpression import gene_graph

N_GENES = 12
PAIR = ((0, 1), (2, 3))  # the genes that go together in group 0, and in group 1
SHARED = (4, 5)


def planted(sizes=(700, 500), seed: int = 0):
    """Positive values: a pair of genes in either group, one pair in both; and the groups."""
    rng = np.random.default_rng(seed)
    blocks, groups = [], []
    for offset, size in enumerate(sizes):
        group = rng.integers(0, 2, size)
        values = rng.standard_normal((size, N_GENES))
        for number, (a, b) in enumerate(PAIR):
            mine = group == number
            values[mine, b] = 0.9 * values[mine, a] + 0.4 * values[mine, b]
        values[:, SHARED[1]] = 0.9 * values[:, SHARED[0]] + 0.4 * values[:, SHARED[1]]
        values[:, 6:8] += 6 * group[:, None]  # levels that tell the groups apart
        blocks.append(sparse.csr_matrix(np.exp(values / 3) + offset))
        groups.append(group)
    return blocks, groups


def fit(blocks, groups, n_groups=2, rule=None, **options):
    return group_gene_graphs(
        lambda: iter(blocks), lambda: iter(groups), N_GENES, n_groups, rule, **options
    )


def edges(graph) -> set[tuple[int, int]]:
    row, column = graph.matrix().nonzero()
    return {(int(a), int(b)) for a, b in zip(row, column, strict=True) if a < b}


def slow_information(blocks, groups, group) -> np.ndarray:
    """Pair by pair over the spots of one group, normal scores within slide."""
    scores = []
    for block, own in zip(blocks, groups, strict=True):
        dense = block.toarray()[own == group]
        each = [stats.norm.ppf(stats.rankdata(c) / (len(c) + 1)) for c in dense.T]
        scores.append(np.stack([e - e.mean() for e in each], axis=1))
    pooled = np.concatenate(scores)
    result = np.zeros((N_GENES, N_GENES))
    for a in range(N_GENES):
        for b in range(N_GENES):
            product, square = pooled[:, a] @ pooled[:, b], (pooled[:, [a, b]] ** 2).sum(axis=0)
            result[a, b] = a != b and -0.5 * np.log(1 - product**2 / square.prod())
    return result


def test_graphs_equal_the_slow_pairs_of_their_group():
    blocks, groups = planted()
    graphs = fit(blocks, groups, rule=EdgeRule(n_neighbours=3, min_information=0.02))
    for group, graph in enumerate(graphs):
        wanted = slow_information(blocks, groups, group)
        for gene in range(N_GENES):
            ranked = np.argsort(-wanted[gene], kind="stable")[:3]
            kept = [int(g) for g in ranked if wanted[gene, g] >= 0.02]
            assert graph.neighbour[gene].tolist() == kept + [N_GENES] * (3 - len(kept))
            np.testing.assert_allclose(
                graph.weight[gene, : len(kept)], wanted[gene, kept], rtol=1e-3
            )


def test_planted_edges_are_found_only_in_their_group():
    blocks, groups = planted()
    first, second = fit(blocks, groups, rule=EdgeRule(min_information=0.05))
    assert edges(first) == {PAIR[0], SHARED}
    assert edges(second) == {PAIR[1], SHARED}
    # over all spots the levels of the groups make an edge that neither group has
    corpus = gene_graph(lambda: iter(blocks), N_GENES, EdgeRule(min_information=0.05))
    assert (6, 7) in edges(corpus)


@pytest.mark.parametrize("max_spots", [5000, 300])
def test_a_group_gets_the_graph_of_its_spots_alone(max_spots):
    blocks, groups = planted((400, 700, 300))
    graphs = fit(blocks, groups, rule=EdgeRule(min_information=0.02), max_spots=max_spots, seed=3)
    for group, graph in enumerate(graphs):
        alone = [b[own == group] for b, own in zip(blocks, groups, strict=True)]
        wanted = gene_graph(
            lambda alone=alone: iter(alone),
            N_GENES,
            EdgeRule(min_information=0.02),
            max_spots=max_spots,
            seed=3,
        )
        np.testing.assert_array_equal(graph.neighbour, wanted.neighbour)
        np.testing.assert_array_equal(graph.weight, wanted.weight)


def test_renumbering_the_groups_renumbers_the_graphs():
    blocks, groups = planted()
    first, second = fit(blocks, groups)
    turned = fit(blocks, [1 - own for own in groups])
    np.testing.assert_array_equal(turned[0].weight, second.weight)
    np.testing.assert_array_equal(turned[1].weight, first.weight)


def test_a_small_group_takes_the_corpus_graph_and_this_is_told():
    blocks, groups = planted()
    few = [np.where(np.arange(own.size) < 40, 2, own) for own in groups]
    with pytest.warns(UserWarning, match="2 of 4 .*group 2: 80 spots, group 3: 0 spots"):
        graphs = fit(blocks, few, 4)
    corpus = gene_graph(lambda: iter(blocks), N_GENES)
    for graph in graphs[2:]:
        np.testing.assert_array_equal(graph.weight, corpus.weight)
    with pytest.warns(UserWarning, match="1 of 4"):
        own = fit(blocks, few, 4, min_group_spots=80)[2]
    assert (own.weight[own.weight > 0] >= 5 / 80).all()  # noise of 80 spots makes no edge
    assert SHARED in edges(own)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, g: fit(b, g, 0), "n_groups is 0"),
        (lambda b, g: fit(b, g, 1), "integers from 0 to 0"),
        (lambda b, g: fit(b, [own.astype(float) for own in g]), "float64.*SpotGroups.assign"),
        (lambda b, g: fit(b, [own - 1 for own in g]), "integers from 0"),
        (lambda b, g: fit(b, g[:1]), "same slides"),
        (lambda b, g: fit(b, [g[0], g[1][:-1]]), "same slides"),
        (lambda b, g: fit(b, g[::-1]), "same slides"),
        (lambda b, g: fit([], g), "no slide"),
        (lambda b, g: group_gene_graphs(lambda: iter(b), g, N_GENES, 2), "found list.*lambda"),
        (lambda b, g: fit(b, g, rule=EdgeRule(n_neighbours=0)), "at least 1"),
        (lambda b, g: fit(b, g, max_spots=0), "at least 1"),
        (lambda b, g: fit([-one for one in b], g), "negative"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(DataError, match=message):
        call(*planted())


def test_groups_that_run_dry_are_noticed():
    blocks, groups = planted()
    passes = iter([groups, groups[:1]])
    with pytest.raises(DataError, match="same slides"):
        group_gene_graphs(lambda: iter(blocks), lambda: iter(next(passes)), N_GENES, 2)
