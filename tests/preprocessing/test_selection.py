"""Gene selectors: each finds the genes planted for it, equals a slow score, and streams."""

import numpy as np
import pytest
from scipy import sparse, stats

from preprocessing.errors import DataError
from preprocessing.graphs import KNNGraph, morans_i
from preprocessing.selection import SELECTORS, select_genes
from preprocessing.tfidf import TfidfReweighter

N_GENES = 60
SILENT = [58, 59]  # genes without any count


def planted_slides(seed: int = 0):
    """Two slides: gene 0 is spatial, gene 1 variable but scattered, gene 2 high everywhere."""
    rng = np.random.default_rng(seed)
    blocks, graphs = [], []
    for n_spots in (150, 90):
        xy = rng.uniform(0, 1000, (n_spots, 2))
        mean = np.full((n_spots, N_GENES), 4.0)
        mean[:, 0] = np.where(xy[:, 0] < 500, 1, 9)
        mean[:, 1] = rng.permutation(np.repeat([0.1, 40], [n_spots - n_spots // 4, n_spots // 4]))
        mean[:, 2] = 60
        mean[:, SILENT] = 0
        blocks.append(sparse.csr_matrix(rng.poisson(mean)))
        graphs.append(KNNGraph(k=6).build(xy))
    return blocks, graphs


def log_cp10k(counts: sparse.csr_matrix) -> np.ndarray:
    dense = counts.toarray().astype(float)
    return np.log1p(1e4 * dense / dense.sum(axis=1, keepdims=True))


def best(score: np.ndarray, k: int) -> list[int]:
    return sorted(np.argsort(-score, kind="stable")[:k].tolist())


@pytest.mark.parametrize("method", list(SELECTORS))
def test_every_selector_gives_k_rising_detected_genes_from_any_form(method):
    blocks, graphs = planted_slides()
    chosen = select_genes(method, blocks, 12, graphs=graphs, depth=10)
    assert chosen.shape == (12,)
    assert (np.diff(chosen) > 0).all()
    assert not set(SILENT) & set(chosen.tolist())
    streamed = select_genes(method, lambda: iter(blocks), 12, graphs=lambda: iter(graphs), depth=10)
    np.testing.assert_array_equal(streamed, chosen)
    everything = select_genes(method, blocks, N_GENES, graphs=graphs, depth=10)
    np.testing.assert_array_equal(everything, np.arange(N_GENES))


@pytest.mark.parametrize("method", list(SELECTORS))
def test_gene_order_does_not_matter(method):
    """Permuting the genes permutes the choice (random: only among equally likely genes)."""
    blocks, graphs = planted_slides()
    order = np.random.default_rng(1).permutation(N_GENES)
    turned = [block[:, order] for block in blocks]
    chosen = select_genes(method, turned, 3, graphs=graphs, depth=10)
    if method == "random":
        assert not set(SILENT) & set(order[chosen].tolist())
    else:
        wanted = select_genes(method, blocks, 3, graphs=graphs, depth=10)
        np.testing.assert_array_equal(np.sort(order[chosen]), wanted)


def test_planted_genes_are_found():
    blocks, graphs = planted_slides()
    assert select_genes("top", blocks, 1).tolist() == [2]
    assert select_genes("svg", blocks, 1, graphs=graphs).tolist() == [0]
    assert select_genes("hvg", blocks, 2).tolist() == [0, 1]
    assert select_genes("rank", blocks, 1, depth=5).tolist() == [0]
    assert 2 not in select_genes("rank", blocks, 12, depth=5)  # high, but nowhere above its mean


def test_svg_equals_the_weighted_mean_of_moran():
    blocks, graphs = planted_slides()
    score = sum(b.shape[0] * morans_i(log_cp10k(b), g) for b, g in zip(blocks, graphs, strict=True))
    score[SILENT] = -np.inf
    assert select_genes("svg", blocks, 20, graphs=graphs).tolist() == best(score, 20)


def test_tfidf_counts_keywords_and_takes_a_fitted_reweighter():
    blocks, _ = planted_slides()
    tfidf = TfidfReweighter("raw").fit(blocks[:1])
    often, mean = np.zeros(N_GENES), np.zeros(N_GENES)
    for row in np.concatenate([tfidf.transform(b).toarray() for b in blocks]):
        often[np.argsort(-row, kind="stable")[:7]] += 1
        mean += row / 240
    chosen = select_genes("tfidf", blocks, 9, tfidf=tfidf, depth=7)
    assert chosen.tolist() == best(often + 0.5 * mean, 9)


@pytest.mark.parametrize("n_spots", [150, 12])  # with 12 a gene is less than one spot in all
def test_rank_equals_a_slow_ranking(n_spots):
    blocks = [block[:n_spots] for block in planted_slides()[0]]
    dense = np.concatenate([b.toarray() / b.sum(axis=1) for b in blocks])
    dense = np.asarray(dense)
    with np.errstate(invalid="ignore"):
        ratio = np.nan_to_num(dense / (dense.sum(axis=0) / (dense > 0).sum(axis=0)))
    score = np.zeros(N_GENES)
    for row in ratio.astype(np.float32):
        first = np.argsort(-row, kind="stable")[:8]
        score[first] += 1 - np.arange(8) / 8
    assert select_genes("rank", blocks, 10, depth=8).tolist() == best(score, 10)


def test_hvg_equals_slow_bins_of_the_variance_within_slides():
    rng = np.random.default_rng(0)
    n_genes = 80
    rate = rng.gamma(2, 2, n_genes) + 0.5
    batch = [np.ones(n_genes), rng.gamma(4, 1 / 4, n_genes)]  # an offset between the slides
    blocks = [
        sparse.csr_matrix(rng.poisson(rate * b * rng.gamma(3, 1 / 3, (120, n_genes))))
        for b in batch
    ]
    logs = [log_cp10k(b) for b in blocks]
    mean = np.concatenate(logs).mean(axis=0)
    variance = sum(x.var(axis=0) for x in logs) / 2
    dispersion = np.log(variance / mean)
    bins = np.searchsorted(np.quantile(mean, np.linspace(0, 1, 9)[1:-1]), mean)
    score = np.zeros(n_genes)
    for own in set(bins.tolist()):
        inside = bins == own
        scale = stats.median_abs_deviation(dispersion[inside])
        score[inside] = (dispersion[inside] - np.median(dispersion[inside])) / scale
    assert select_genes("hvg", blocks, 15).tolist() == best(score, 15)


def test_random_follows_the_seed():
    blocks, _ = planted_slides()
    one, again, other = (select_genes("random", blocks, 20, seed=s).tolist() for s in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: select_genes("hgv", b, 5), "choose one of .*Did you mean 'hvg'"),
        (lambda b: select_genes("top", b, 61), "expected 1 to 60"),
        (lambda b: select_genes("top", b, 0), "expected 1 to 60"),
        (lambda b: select_genes("svg", b, 5), "needs the spot graph"),
        (lambda b: select_genes("top", [], 5), "found no slide"),
        (lambda b: select_genes("top", [b[0], b[1][:, :9]], 5), "9 genes, expected the 60"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(DataError, match=message):
        call(planted_slides()[0])
