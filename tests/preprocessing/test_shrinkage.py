"""Shrunken term frequency and what it is for: keyword genes that are found again."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from preprocessing.errors import DataError
from preprocessing.graphs import KNNGraph
from preprocessing.selection import KeywordOverlap, keyword_overlap
from preprocessing.tfidf import TfidfReweighter, keyword_genes
from preprocessing.tfidf.shrinkage import RatePrior

SIDE = 14
XY = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1).reshape(-1, 2) * 100.0
GRAPH = KNNGraph(k=4).build(XY)
NEAR = GRAPH.neighbours(4)[0]
NEAR_OF = [set(GRAPH.indices[a:b]) for a, b in zip(GRAPH.indptr, GRAPH.indptr[1:], strict=False)]


def tissue(depth: float = 300.0, n_genes: int = 120, seed: int = 0) -> sparse.csr_matrix:
    """Counts of two smooth gradients and private noise, of genes from common to rare."""
    rng = np.random.default_rng(seed)
    level = np.exp(rng.normal(size=n_genes))
    smooth = np.sin(XY / 400.0) @ rng.normal(size=(2, n_genes))
    rate = level * np.exp(smooth + 0.2 * rng.normal(size=(len(XY), n_genes)))
    rate *= depth * rng.uniform(0.5, 1.5, (len(XY), 1)) / rate.sum(axis=1, keepdims=True)
    return sparse.csr_matrix(rng.poisson(rate))


@pytest.fixture(scope="module")
def fitted() -> TfidfReweighter:
    return TfidfReweighter("shrunken").fit([tissue(), tissue(seed=1)], [GRAPH, GRAPH])


def test_sums_equal_the_moments_gene_by_gene():
    counts = tissue()
    x, n = counts.toarray().astype(float), np.asarray(counts.sum(axis=1)).ravel()
    prior = RatePrior.of(TfidfReweighter("shrunken").fit([counts], [GRAPH]).sums)
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if j in NEAR_OF[i]]
    for gene in range(0, x.shape[1], 7):
        mean = x[:, gene].sum() / n.sum()
        off = x[:, gene] - n * mean
        own = (off @ off - x[:, gene].sum()) / (mean**2 * (n @ n))
        shared = sum(off[i] * off[j] for i, j in pairs) / (
            mean**2 * sum(n[i] * n[j] for i, j in pairs)
        )
        assert prior.mean[gene] == pytest.approx(mean)
        assert prior.dispersion[gene] == pytest.approx(max(own, 0.01), abs=2e-5)
        assert prior.shared[gene] == pytest.approx(
            np.clip(shared, 0, prior.dispersion[gene]), abs=2e-5
        )


def test_rows_equal_the_formula_entry_by_entry(fitted):
    counts = tissue(seed=2)
    x, n = counts.toarray().astype(float), np.asarray(counts.sum(axis=1)).ravel()
    prior, n_train = RatePrior.of(fitted.sums), fitted.n_spots
    signal = prior.mean * prior.dispersion * fitted.sums.depth / n_train
    weight = (np.log((1 + n_train) / (1 + fitted.sums.df)) + 1) * signal / (1 + signal)
    wanted = np.zeros(x.shape)
    for i in range(len(x)):
        near = NEAR[i][NEAR[i] >= 0]
        for g in range(x.shape[1]):
            q, m, v, s = x[near, g].sum(), prior.mean[g], prior.dispersion[g], prior.shared[g]
            if x[i, g] + q == 0:
                continue
            depth, spread = n[near].sum(), (n[near] ** 2).sum() / n[near].sum() ** 2
            slope = s / (s + (v - s) * spread + 1 / (depth * m))
            niche = m + slope * (q / depth - m)
            left = max(v - slope * s, 0.01)
            rate = niche * (1 + left * x[i, g]) / (1 + left * niche * n[i])
            wanted[i, g] = max(np.log1p(1e4 * rate) - 0.5 * np.log1p(1e4 * m), 0) * weight[g]
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(fitted.transform(counts, NEAR).toarray(), wanted, atol=2e-6)


def test_a_deep_spot_keeps_its_own_rate_and_an_unread_one_that_of_training(fitted):
    prior = RatePrior.of(fitted.sums)
    rate = np.roll(prior.mean, 1)[None]
    nothing = (np.zeros(rate.shape), np.zeros(1), np.zeros(1))
    for depth, wanted, tolerance in ((1e12, rate, 1e-3), (0.0, prior.mean[None], 1e-12)):
        found = prior.rates((rate * depth, np.array([depth])), nothing)
        np.testing.assert_allclose(found, wanted, rtol=tolerance)


def test_tiles_and_blocks_equal_the_whole(fitted, monkeypatch):
    counts = tissue(seed=3)
    whole = fitted.transform(counts, NEAR).toarray()
    monkeypatch.setattr("preprocessing.tfidf.shrinkage._BLOCK_ENTRIES", 100)
    np.testing.assert_array_equal(fitted.transform(counts, NEAR).toarray(), whole)
    core = np.arange(30, 60)
    halo = np.setdiff1d(NEAR[core], [*core, -1])
    local = np.full(len(XY) + 1, -1)
    local[np.concatenate([core, halo])] = np.arange(len(core) + len(halo))
    tile = fitted.transform(counts[np.concatenate([core, halo])], local[NEAR[core]])
    np.testing.assert_allclose(tile.toarray(), whole[core], atol=1e-7)
    alone = fitted.transform(counts).toarray()
    np.testing.assert_allclose(fitted.transform(counts[5]).toarray()[0], alone[5], atol=1e-7)
    assert np.abs(alone - whole).max() > 0.01


def test_merged_slides_equal_slides_fitted_in_turn_in_any_order(fitted):
    one, two = (TfidfReweighter("shrunken").fit([tissue(seed=s)], [GRAPH]) for s in (0, 1))
    for merged in (one.merge(two), two.merge(one)):
        np.testing.assert_array_equal(merged.idf, fitted.idf)
    again = TfidfReweighter.from_state(fitted.state())
    counts = tissue(seed=2)
    assert (again.transform(counts, NEAR) != fitted.transform(counts, NEAR)).nnz == 0
    state = {**fitted.state(), "extra": fitted.sums.extra[:, 0]}
    with pytest.raises(DataError, match="TF-IDF state"):
        TfidfReweighter.from_state(state)


def test_counts_that_are_all_noise_are_not_told_apart():
    """Poisson counts of one rate: the fit finds no dispersion, and every spot is the mean."""
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(np.full((len(XY), 40), 5.0)))
    prior = RatePrior.of(TfidfReweighter("shrunken").fit([counts], [GRAPH]).sums)
    assert np.median(prior.dispersion) < 0.03
    assert prior.shared.mean() < 0.02


def test_keywords_reproduce_and_still_differ_between_spots(fitted):
    counts = tissue(depth=150, seed=0)
    log = TfidfReweighter().fit([counts])
    shrunken, noisy = (
        keyword_overlap(counts, one, 16, near) for one, near in ((fitted, NEAR), (log, None))
    )
    assert shrunken.half > max(0.5, noisy.half + 0.2)
    assert shrunken.between < shrunken.half - 0.05
    assert "WARNING" not in str(shrunken)
    assert "WARNING: below 50%" in str(noisy)


def test_the_overlap_is_that_of_the_sets_of_genes(fitted):
    counts = tissue(seed=4)
    found = keyword_overlap(counts, fitted, 10, NEAR, seed=3)
    half = counts.astype(float)
    half.data = np.random.default_rng(3).binomial(counts.data, 0.5).astype(float)
    lists = [keyword_genes(fitted.transform(part, NEAR), 10)[0] for part in (half, counts - half)]
    shared = [len({*a} & {*b}) for a, b in zip(*lists, strict=True)]
    assert found.half == pytest.approx(np.mean(shared) / 10)
    other = KeywordOverlap(10, 120, 0.1, 0.2)
    mean = KeywordOverlap.mean([found, other])
    assert (mean.k, mean.half) == (10, pytest.approx((found.half + 0.1) / 2))


def test_an_empty_spot_stays_empty_and_negative_neighbours_are_none(fitted):
    counts = tissue(seed=5).tolil()
    counts[7] = 0
    table = counts.tocsr()
    rows = fitted.transform(table, NEAR)
    assert rows[7].nnz == 0
    lonely = np.full_like(NEAR, -1)
    np.testing.assert_array_equal(
        fitted.transform(table, lonely).toarray(), fitted.transform(table).toarray()
    )
    with pytest.raises(DataError, match="expected a positive number"):
        TfidfReweighter("shrunken", scale=-1.0)
