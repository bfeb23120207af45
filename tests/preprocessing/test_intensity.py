"""Protein intensities: TF-IDF variants, expression values, selectors and small panels."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import sparse, stats

from preprocessing.coexpression import fit_gene_factors, spot_vectors
from preprocessing.errors import DataError
from preprocessing.graphs import KNNGraph
from preprocessing.selection import SELECTORS, intensity, log_normalise, normalised, select_genes
from preprocessing.tfidf import TfidfReweighter, keyword_genes
from preprocessing.tfidf.weights import ranks_within
from tests.preprocessing.test_coexpression import gene_graph

INTENSITY = ["arcsinh", "rank"]


def cells(n_cells: int = 90, n_proteins: int = 12, seed: int = 0) -> sparse.csr_matrix:
    """Float intensities on scales from 1 to 10,000; protein 3 never found, cell 7 empty."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(0.7, np.geomspace(1, 1e4, n_proteins), (n_cells, n_proteins))
    values[rng.random(values.shape) < 0.1] = 0
    values[:, 3] = 0
    values[7] = 0
    return sparse.csr_matrix(values.astype(np.float32))


def unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def slow_scaled(train: sparse.csr_matrix, test: sparse.csr_matrix, cofactor: float) -> np.ndarray:
    """Arcsinh over its root mean square in training, 0 for a protein that has none."""
    fit, new = (np.arcsinh(part.toarray().astype(float) / cofactor) for part in (train, test))
    rms = np.sqrt((fit**2).mean(axis=0))
    return np.divide(new, rms, out=np.zeros_like(new), where=rms > 0)


@pytest.mark.parametrize("cofactor", [5, 150])
def test_arcsinh_equals_the_formula(cofactor):
    train, test = cells(), cells(seed=1)
    ours = TfidfReweighter("arcsinh", cofactor=cofactor).fit(train)
    found = ours.transform(test)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.toarray(), unit(slow_scaled(train, test, cofactor)), rtol=1e-5)
    assert ours.idf[3] == 0


def test_arcsinh_puts_all_proteins_on_one_scale():
    """Closed form: the mean square of every weighted training column is 1."""
    train = cells()
    ours = TfidfReweighter("arcsinh").fit(train)
    square = np.square(intensity(train).toarray() * ours.idf).mean(axis=0)
    np.testing.assert_allclose(np.delete(square, 3), 1, rtol=1e-5)


def test_rank_equals_rankdata_of_the_proteins_found():
    train, test = cells(), cells(seed=1)
    test = sparse.vstack([test, test[:1] * 0 + sparse.csr_matrix(np.full((1, 12), 3.0))]).tocsr()
    rms = np.sqrt((np.arcsinh(train.toarray().astype(float) / 5) ** 2).mean(axis=0))
    rms[3] = np.inf  # never found, so on no scale
    scaled = test.toarray() / (5 * np.sinh(rms))
    wanted = np.zeros_like(scaled)
    for row, values in zip(wanted, scaled, strict=True):
        found = values > 0
        row[found] = stats.rankdata(values[found]) / max(found.sum(), 1)
    ours = TfidfReweighter("rank").fit(train).transform(test)
    np.testing.assert_allclose(ours.toarray(), unit(wanted), rtol=1e-6)


def test_ranks_share_ties_and_leave_zeros():
    rows = sparse.csr_matrix([[2.0, 0, 5, 2], [0, 0, 0, 0], [0, 1, 0, 0]])
    wanted = [[0.5, 0, 1, 0.5], [0, 0, 0, 0], [0, 1, 0, 0]]
    np.testing.assert_allclose(ranks_within(rows, rows).toarray(), wanted)
    beside = sparse.csr_matrix([[3.0, 2, 9, 0], [1, 0, 0, 0], [1, 2, 0, 0.5]])
    wanted = [[2.5 / 3, 1.5 / 3, 3.5 / 3, 0], [0, 0, 0, 0], [1, 1.5, 0, 0.5]]
    np.testing.assert_allclose(ranks_within(beside, rows).toarray(), wanted)


def test_rank_ignores_the_brightness_of_a_cell_and_absent_proteins():
    """A factor per cell changes no order; a protein that is not on the panel moves nobody."""
    ours = TfidfReweighter("rank").fit(cells())
    test = cells(seed=1)
    factor = 2.0 ** np.random.default_rng(0).integers(-3, 8, 90)  # exact in binary
    brighter = sparse.diags_array(factor) @ test
    np.testing.assert_array_equal(
        ours.transform(brighter).toarray(), ours.transform(test).toarray()
    )
    panel = test.toarray()
    panel[:, :4] = 0
    found = ours.transform(panel).toarray()[:, 4:]
    kept = TfidfReweighter("rank").fit(cells()[:, 4:]).transform(panel[:, 4:]).toarray()
    np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize("variant", INTENSITY)
def test_tiles_equal_the_whole_and_depth_does_not_matter(variant):
    """Row by row given the fit: no cell sees another, and no value is divided by a depth."""
    train, test = cells(), cells(300, seed=2)
    ours = TfidfReweighter(variant).fit(train)
    whole = ours.transform(test).toarray()
    tiles = [ours.transform(test[a:b]).toarray() for a, b in pairwise([0, 1, 70, 71, 299, 300])]
    np.testing.assert_array_equal(np.concatenate(tiles), whole)
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_array_equal(ours.transform(test[order]).toarray(), whole[order])
    if variant == "arcsinh":
        before = ours.weighted(test.astype(np.float64))
        more = test.toarray().astype(np.float64)
        more[:, 0] += 1000
        after = ours.weighted(sparse.csr_matrix(more))
        np.testing.assert_array_equal(after[:, 1:].toarray(), before[:, 1:].toarray())


@pytest.mark.parametrize("variant", INTENSITY)
def test_fits_merge_exactly_in_any_order(variant):
    """Float intensities, but the fitted sums are integers."""
    table = cells(500, seed=3)
    whole = TfidfReweighter(variant).fit(table)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        cuts = [0, *np.sort(rng.choice(np.arange(1, 500), 6, replace=False)).tolist(), 500]
        parts = [table[a:b] for a, b in pairwise(cuts)]
        rng.shuffle(parts)
        streamed = TfidfReweighter(variant).fit(iter(parts))
        merged = TfidfReweighter(variant).fit(parts[0])
        for part in parts[1:]:
            merged = merged.merge(TfidfReweighter(variant).partial_fit(part))
        for other in (streamed, merged, TfidfReweighter.from_state(whole.state())):
            np.testing.assert_array_equal(other.idf, whole.idf)
            np.testing.assert_array_equal(
                other.transform(table).toarray(), whole.transform(table).toarray()
            )


def test_sums_hold_a_large_bright_corpus():
    """Twenty million saturated cells: the sum of squares neither overflows nor loses the scale."""
    one = TfidfReweighter("arcsinh").fit(np.full((10, 2), 65535.0))
    state = one.state()
    large = TfidfReweighter.from_state(
        state | {"n_spots": 20_000_000, "extra": state["extra"] * 2_000_000}
    )
    np.testing.assert_allclose(large.merge(large).idf, one.idf, rtol=1e-6)


def test_expression_values():
    counts = sparse.csr_matrix([[1, 3, 0], [0, 0, 0]])
    logs = log_normalise(counts)
    assert (logs.dtype, intensity(counts).dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(logs.toarray(), np.log1p([[2500, 7500, 0], [0, 0, 0]]), rtol=1e-6)
    wanted = np.arcsinh([[0.1, 0.3, 0], [0, 0, 0]])
    np.testing.assert_allclose(intensity(counts, 10).toarray(), wanted, rtol=1e-6)
    assert counts.data.tolist() == [1, 3]
    for modality, values in (("rna", logs), ("protein", intensity(counts))):
        np.testing.assert_array_equal(normalised(counts, modality).toarray(), values.toarray())
    table = np.random.default_rng(0).poisson(2.0, (50, 9))
    rows = np.concatenate([log_normalise(row[None]).toarray() for row in table])
    np.testing.assert_array_equal(rows, log_normalise(table).toarray())  # row by row
    np.testing.assert_allclose(log_normalise(table * 7).toarray(), rows, rtol=1e-6)  # depth drops
    assert abs(intensity(table * 7) - intensity(table)).max() > 1


@pytest.mark.parametrize("method", list(SELECTORS))
def test_selectors_of_a_small_panel_of_intensities(method):
    """Fewer proteins than keyword genes; a bright protein is not variable for being bright."""
    rng = np.random.default_rng(0)
    values = rng.gamma(50, np.geomspace(1, 1e4, 12) / 50, (200, 12))
    xy = rng.uniform(0, 500, (200, 2))
    values[:, 5] *= np.where(xy[:, 0] < 250, 0.05, 2)  # the one that varies, and in space
    values[:, 11] = 0
    graph = KNNGraph(k=6).build(xy)
    blocks = [sparse.csr_matrix(values.astype(np.float32))]
    options = {"graphs": [graph], "modality": "protein"}
    chosen = select_genes(method, blocks, 11, **options)
    assert chosen.tolist() == list(range(11))
    best = select_genes(method, blocks, 1, **options).tolist()
    if method in ("hvg", "svg"):
        assert best == [5]
    if method == "top":
        assert best == [10]


@pytest.mark.parametrize("n_genes", [1, 3, 12, 33])
def test_small_panels_go_all_the_way(n_genes):
    rng = np.random.default_rng(0)
    programme = rng.gamma(0.5, 4, (3, n_genes))
    blocks = [
        sparse.csr_matrix(rng.poisson(rng.gamma(0.5, 1, (s, 3)) @ programme)) for s in (80, 60)
    ]
    tfidf = TfidfReweighter().fit(blocks)
    rows = [tfidf.transform(block) for block in blocks]
    index, value = keyword_genes(rows[0], 128)
    assert (index[value == 0] == n_genes).all()
    graph = gene_graph(lambda: iter(rows), n_genes)
    assert graph.neighbour.shape == (n_genes, 16)
    if n_genes > 1:
        rank = min(20, n_genes - 1)
        factors = fit_gene_factors(lambda: iter(rows), n_genes, rank)
        assert np.isfinite(spot_vectors(rows[0], factors)).all()
    with pytest.raises(DataError, match="Lower the rank"):
        fit_gene_factors(lambda: iter(rows), n_genes, n_genes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TfidfReweighter("arcsinh", cofactor=0), "positive"),
        (lambda: TfidfReweighter("arcsinh", cofacter=5), "Did you mean 'cofactor'"),
        (lambda: TfidfReweighter("rank").fit(-cells()), "negative"),
        (lambda: TfidfReweighter("rank").fit(cells()).transform(cells() * np.nan), "non-finite"),
        (lambda: intensity(cells(), 0), "positive"),
        (lambda: log_normalise(-cells()), "negative"),
        (lambda: normalised(cells(), "proteins"), "choose one of .*Did you mean 'protein'"),
        (lambda: select_genes("hvg", [cells()], 2, modality="dna"), "unknown modality"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(DataError, match=message):
        call()
