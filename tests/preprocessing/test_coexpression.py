"""Gene factors, spot vectors and the gene graph against SciPy, scikit-learn and slow oracles."""

import numpy as np
import pytest
from scipy import sparse, stats
from scipy.sparse.linalg import svds
from sklearn.decomposition import TruncatedSVD

from preprocessing.coexpression import (
    GeneFactors,
    GeneGraph,
    fit_gene_factors,
    group_gene_graphs,
    rank_normal_scores,
    spot_vectors,
    standardise,
    standardise_global,
)
from preprocessing.coexpression.gene_graph import EdgeRule, edge_limit, pair_edges
from preprocessing.errors import DataError
from preprocessing.tfidf import TfidfReweighter

N_GENES = 50


def slides(sizes=(120, 80, 60), seed: int = 0) -> list[sparse.csr_matrix]:
    """TF-IDF rows with 6 planted programmes and a depth that differs by slide."""
    rng = np.random.default_rng(seed)
    programme = rng.gamma(0.3, 4, (6, N_GENES))
    blocks = []
    for number, size in enumerate(sizes):
        usage = rng.gamma(0.4, 1, (size, 6)) * (1 + number)
        blocks.append(sparse.csr_matrix(rng.poisson(usage @ programme + 0.2)))
    tfidf = TfidfReweighter().fit(blocks)
    return [tfidf.transform(block) for block in blocks]


def fit(blocks, rank=5, **options) -> GeneFactors:
    return fit_gene_factors(lambda: iter(blocks), blocks[0].shape[1], rank, **options)


def gene_graph(blocks, n_genes, rule=None, **options) -> GeneGraph:
    """The graph of a corpus, whose spots are one group."""
    groups = lambda: (np.zeros(block.shape[0], np.int64) for block in blocks())  # noqa: E731
    return group_gene_graphs(blocks, groups, n_genes, 1, rule, **options)[0]


@pytest.mark.parametrize("drop", [False, True])
def test_factors_equal_svds_and_truncated_svd(drop):
    blocks = slides()
    whole = sparse.vstack(blocks).astype(np.float64)
    factors = fit(blocks, drop_first=drop, n_iter=25)
    _, values, vectors = svds(whole, k=5 + drop, random_state=0)
    vectors, values = vectors[::-1][drop:], values[::-1][drop:]
    np.testing.assert_allclose(factors.singular_values, values, rtol=1e-5)
    np.testing.assert_allclose(np.abs(vectors @ factors.components), np.eye(5), atol=1e-3)
    sklearn = TruncatedSVD(5 + drop, algorithm="arpack", random_state=0).fit(whole)
    overlap = np.linalg.svd(sklearn.components_[drop:] @ factors.components, compute_uv=False)
    np.testing.assert_allclose(overlap, 1, atol=1e-5)


def test_default_iterations_solve_a_flat_spectrum():
    """Closed form: the singular vectors of a diagonal are axes. Plain power iteration fails."""
    values = np.arange(1, 201) ** -0.1
    order = np.random.default_rng(0).permutation(200)
    diagonal = sparse.diags_array(values[order]).tocsr()
    factors = fit([diagonal[:90], diagonal[90:]], rank=5, drop_first=False)
    np.testing.assert_allclose(factors.singular_values, values[:5], rtol=1e-5)
    np.testing.assert_allclose(factors.components, np.eye(200)[:, np.argsort(order)[:5]], atol=0.02)


def test_columns_are_orthonormal_with_fixed_signs_and_repeat():
    blocks = slides()
    one, again, other = fit(blocks), fit(blocks), fit(blocks, seed=9, n_iter=30)
    np.testing.assert_array_equal(one.components, again.components)
    np.testing.assert_allclose(fit(blocks, n_iter=30).components, other.components, atol=1e-3)
    np.testing.assert_allclose(one.components.T @ one.components, np.eye(5), atol=1e-5)
    largest = np.abs(one.components).argmax(axis=0)
    assert (one.components[largest, np.arange(5)] > 0).all()


def test_statistics_equal_those_of_the_projected_spots():
    blocks = slides()
    factors = fit(blocks)
    raw = [spot_vectors(block, factors) for block in blocks]
    together = np.concatenate(raw)
    within = np.concatenate([r - r.mean(axis=0) for r in raw])
    np.testing.assert_allclose(factors.mean, together.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(factors.sd, together.std(axis=0), rtol=1e-4)
    np.testing.assert_allclose(factors.spread, np.sqrt((within**2).mean(axis=0)), rtol=1e-4)


def test_slides_in_another_order_give_the_same_factors():
    blocks = slides()
    one, two = fit(blocks), fit(blocks[::-1])
    np.testing.assert_allclose(one.components, two.components, atol=1e-5)
    np.testing.assert_allclose(one.spread, two.spread, rtol=1e-5)


def test_standardise_gives_each_slide_mean_zero_and_the_weight_as_sd():
    blocks = slides()
    factors = fit(blocks)
    raw = spot_vectors(blocks[1], factors)
    vectors, mean, scale = standardise(raw, factors)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(vectors.std(axis=0), factors.weight, rtol=1e-4)
    np.testing.assert_allclose((raw - mean) * scale, vectors, atol=1e-5)
    assert factors.weight.max() == 1
    shifted = standardise(3 * raw + 7, factors)[0]  # a slide's own offset and scale drop out
    np.testing.assert_allclose(shifted, vectors, atol=1e-4)


def test_standardise_of_tiny_slides_is_finite():
    blocks = slides()
    factors = fit(blocks)
    raw = spot_vectors(blocks[0], factors)
    copies = standardise(np.repeat(raw[:1], 4, axis=0), factors)
    np.testing.assert_allclose(copies[0], 0, atol=1e-4)
    assert all(np.isfinite(part).all() for part in copies)
    np.testing.assert_array_equal(
        standardise(raw[:1], factors)[0], standardise_global(raw[:1], factors)
    )
    wanted = (raw - factors.mean) / factors.sd * np.sqrt(factors.spread / factors.spread.max())
    np.testing.assert_allclose(standardise_global(raw, factors), wanted, rtol=1e-4, atol=1e-5)


def slow_information(blocks: list[sparse.csr_matrix]) -> np.ndarray:
    """Pair by pair: within-slide normal scores of average ranks, pooled correlation, MI."""
    scores = []
    for block in blocks:
        dense = block.toarray()
        each = [stats.norm.ppf(stats.rankdata(c) / (len(c) + 1)) for c in dense.T]
        scores.append(np.stack([e - e.mean() for e in each], axis=1))
    pooled = np.concatenate(scores)
    result = np.zeros((pooled.shape[1],) * 2)
    for a in range(pooled.shape[1]):
        for b in range(pooled.shape[1]):
            if a != b and pooled[:, a].any() and pooled[:, b].any():
                r = (
                    pooled[:, a]
                    @ pooled[:, b]
                    / np.sqrt((pooled[:, a] ** 2).sum() * (pooled[:, b] ** 2).sum())
                )
                result[a, b] = -0.5 * np.log(1 - r**2)
    return result


@pytest.mark.parametrize("block", [7, 1024])
def test_graph_equals_the_slow_pairs(block):
    blocks = slides()
    information = slow_information(blocks)
    graph = gene_graph(
        lambda: iter(blocks), N_GENES, EdgeRule(n_neighbours=4, min_information=0.02, block=block)
    )
    assert (graph.neighbour.dtype, graph.weight.dtype) == (np.int32, np.float32)
    for gene in range(N_GENES):
        ranked = np.argsort(-information[gene], kind="stable")[:4]
        wanted = [int(g) for g in ranked if information[gene, g] >= 0.02]
        pad = 4 - len(wanted)
        assert graph.neighbour[gene].tolist() == wanted + [N_GENES] * pad
        np.testing.assert_allclose(
            graph.weight[gene], [*information[gene, wanted], *[0] * pad], rtol=1e-3
        )


def test_copula_information_of_a_bivariate_normal():
    """MI of a Gaussian pair is -0.5 ln(1 - rho^2), also after any monotone transform."""
    rng = np.random.default_rng(0)
    x, noise, alone = rng.standard_normal((3, 20_000))
    y = -0.8 * x + 0.6 * noise
    values = sparse.csr_matrix(np.stack([np.exp(x), np.exp(3 * y), np.exp(alone)], axis=1))
    graph = gene_graph(lambda: iter([values]), 3, EdgeRule(n_neighbours=2), max_spots=20_000)
    assert graph.neighbour.tolist() == [[1, 3], [0, 3], [3, 3]]
    np.testing.assert_allclose(graph.weight[0, 0], -0.5 * np.log(1 - 0.64), rtol=0.03)


def test_slide_offsets_make_no_edge():
    rng = np.random.default_rng(0)
    blocks = [sparse.csr_matrix(rng.random((400, 5)) + 10 * shift) for shift in range(3)]
    assert (
        gene_graph(lambda: iter(blocks), 5, EdgeRule(min_information=0.02)).neighbour == 5
    ).all()


def test_rank_scores_equal_rankdata():
    values = np.round(np.random.default_rng(0).random((41, 9)) * 4) * (np.arange(9) > 0)
    values[:, 8] += 1  # no zeros at all
    wanted = stats.norm.ppf(stats.rankdata(values, axis=0) / 42)
    found = rank_normal_scores(sparse.csr_matrix(values))
    np.testing.assert_allclose(found, wanted - wanted.mean(axis=0), atol=1e-6)


def test_rare_constant_and_copied_genes():
    rng = np.random.default_rng(0)
    values = rng.random((300, 6))
    values[:, 1] = values[:, 0]
    values[:, 2] = 1
    values[:, 3:5] = 0
    values[5, 3:5] = 1  # two genes that share their only spot
    graph = gene_graph(lambda: iter([sparse.csr_matrix(values)]), 6, EdgeRule(min_information=0.05))
    assert graph.neighbour[0, 0] == 1
    assert np.isfinite(graph.weight).all()
    assert (graph.neighbour[2:] == 6).all()
    with_rare = gene_graph(lambda: iter([sparse.csr_matrix(values)]), 6, EdgeRule(min_detected=1))
    assert with_rare.neighbour[3, 0] == 4
    matrix = graph.matrix().toarray()
    np.testing.assert_array_equal(matrix, matrix.T)
    assert np.count_nonzero(matrix) == 2


def test_spots_are_drawn_evenly_and_by_seed():
    """200 of 60 + 400 + 400: the small slide gives all it has, the others share the rest."""
    seen: list[int] = []

    class Spy(sparse.csr_matrix):
        def __getitem__(self, key):
            seen.append(len(key))
            return super().__getitem__(key)

    blocks = [Spy(block) for block in slides((400, 60, 400))]
    one = gene_graph(lambda: iter(blocks), N_GENES, max_spots=200)
    assert seen == [70, 60, 70]
    again = gene_graph(lambda: iter(blocks), N_GENES, max_spots=200)
    other = gene_graph(lambda: iter(blocks), N_GENES, max_spots=200, seed=1)
    np.testing.assert_array_equal(one.weight, again.weight)
    assert (one.weight != other.weight).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: fit(b, rank=50), "expected 1 to 49"),
        (lambda b: fit(b, rank=0), "expected 1"),
        (lambda b: fit([b[0][:3]], rank=5), "span only 3 .*at most 2"),
        (lambda b: fit_gene_factors(b, N_GENES, 5), "found list.*lambda"),
        (lambda b: fit_gene_factors(lambda: iter([]), N_GENES, 5), "no slide"),
        (lambda b: fit_gene_factors(lambda: iter(b), 49, 5), "expected \\(S, 49\\)"),
        (lambda b: spot_vectors(b[0][:, :9], fit(b)), "expected \\(S, 50\\)"),
        (lambda b: standardise(np.zeros((3, 4), np.float32), fit(b)), "expected \\(S, 5\\)"),
        (lambda b: gene_graph(lambda: iter(b), 49), "expected \\(S, 49\\)"),
        (lambda b: gene_graph(lambda: iter([b[0][:2]]), N_GENES), "at least 3"),
        (lambda b: gene_graph(lambda: iter([-b[0]]), N_GENES), "negative"),
        (lambda b: gene_graph(lambda: iter([b[0][:0]]), N_GENES), "no spots"),
        (lambda b: gene_graph(lambda: iter(b), N_GENES, EdgeRule(n_neighbours=0)), "at least 1"),
        (
            lambda b: GeneGraph(np.zeros((3, 2), np.int32), np.zeros((3, 1), np.float32)),
            "one shape",
        ),
        (lambda b: GeneFactors(*[np.ones((4, 2))] * 5), "mean|spread"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(DataError, match=message):
        call(slides())


def test_a_stream_that_runs_dry_is_noticed():
    blocks = slides()
    passes = iter([blocks, blocks, blocks[:1], *[blocks] * 20])
    with pytest.raises(DataError, match="fresh iterator"):
        fit_gene_factors(lambda: iter(next(passes)), N_GENES, 5)


def test_edges_are_among_the_genes_that_may_have_them():
    blocks = slides()
    among = np.zeros(N_GENES, dtype=bool)
    among[::2] = True
    whole, some = (
        gene_graph(lambda: iter(blocks), N_GENES, EdgeRule(N_GENES - 1, 0.02, among=one))
        for one in (None, among)
    )
    expected = whole.matrix().toarray() * among[:, None] * among[None, :]
    assert (expected > 0).sum() < (whole.matrix() > 0).sum()
    np.testing.assert_allclose(some.matrix().toarray(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("genes", "listed", "graphs", "edges"),
    [(100, 400, 1, 80), (400, 400, 1, 160), (11_000, 12_000, 1, 333), (11_000, 12_000, 30, 16)],
)
def test_how_many_edges_a_gene_may_have(genes, listed, graphs, edges):
    """More in a larger panel until the memory of all is full; never fewer than 16."""
    assert edge_limit(genes, listed, graphs) == edges


def test_pair_edges_against_loops():
    rng = np.random.default_rng(0)
    neighbour = np.stack([rng.permutation(12)[:4] for _ in range(12)]).astype(np.int32)
    neighbour[neighbour == np.arange(12)[:, None]] = 12
    weight = np.where(neighbour < 12, rng.gamma(1.0, 0.1, neighbour.shape), 0.0)
    graphs = [GeneGraph(neighbour, weight.astype(np.float32))]
    graphs.append(GeneGraph(np.roll(neighbour, 3, axis=0), graphs[0].weight))
    gene = np.stack([rng.permutation(13)[:7] for _ in range(6)])  # 12 is padding
    gene[5, 1:] = 12
    group = np.array([0, 1, 0, 1, 1, 0])
    edges, squares, pairs = 0, 0.0, 0
    for spot, number in zip(gene, group, strict=True):
        own = [one for one in spot if one < 12]
        for one in own if len(own) > 1 else []:
            row = []
            for other in own:
                listed = graphs[number].neighbour[one].tolist()
                nats = 0.0
                if other in listed:
                    nats = float(graphs[number].weight[one, listed.index(other)])
                if other != one:
                    row.append((1 - np.exp(-2 * nats)) ** 0.5)
            edges += sum(value > 0 for value in row)
            squares += sum((value - np.mean(row)) ** 2 for value in row)
            pairs += len(row)
    share, spread = pair_edges(graphs, gene, group)
    assert share == pytest.approx(edges / pairs)
    assert spread == pytest.approx((squares / pairs) ** 0.5)
    assert pair_edges(graphs, gene[:, :1], group) == (0.0, 0.0)
