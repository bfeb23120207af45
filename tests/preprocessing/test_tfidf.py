"""TF-IDF: scikit-learn and slow oracles, exact streaming and merging, keyword genes, errors."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer

from preprocessing.errors import DataError
from preprocessing.graphs import KNNGraph, morans_i
from preprocessing.tfidf import VARIANTS, TfidfReweighter, keyword_genes
from preprocessing.tfidf.weights import row_blocks

GRAPHLESS = [name for name in VARIANTS if name != "spatial"]
#: What they learn is learnt within slides: spots of one slide given in parts are other slides.
OF_SLIDES = ("shrunken", "lognormal")


def draw_counts(n_spots: int = 40, n_genes: int = 25, seed: int = 0) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.4, 2, n_genes) * rng.gamma(2, 1, (n_spots, 1)))
    counts[:, 3] = 0  # never seen
    counts[7] = 0  # an empty spot
    return sparse.csr_matrix(counts.astype(np.int32))


def unit_rows(weights: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(weights, axis=1, keepdims=True)
    return np.divide(weights, length, out=np.zeros_like(weights), where=length > 0)


@pytest.mark.parametrize("variant", ["log", "raw", "unweighted"])
def test_equals_scikit_learn_on_the_tf_matrix(variant):
    train, test = draw_counts(), draw_counts(seed=1)

    def tf(counts):
        dense = counts.toarray().astype(float)
        share = dense / np.maximum(dense.sum(axis=1, keepdims=True), 1)
        return share if variant == "raw" else np.log1p(1e4 * share)

    weighted = variant != "unweighted"
    oracle = TfidfTransformer(norm="l2", smooth_idf=True, use_idf=weighted).fit(tf(train))
    ours = TfidfReweighter(variant).fit(train)
    np.testing.assert_allclose(ours.idf, oracle.idf_ if weighted else 1, rtol=1e-12)
    found = ours.transform(test)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.toarray(), oracle.transform(tf(test)).toarray(), rtol=1e-5)


def test_bm25_equals_the_formula():
    train, test = draw_counts(), draw_counts(seed=1)
    mean_length = train.toarray().sum(axis=1).mean()
    ours = TfidfReweighter("bm25", k=1.7, b=0.4).fit(train)
    wanted = np.zeros(test.shape)
    for (i, g), x in np.ndenumerate(test.toarray()):
        norm = 1 - 0.4 + 0.4 * test[i].sum() / mean_length
        wanted[i, g] = x * 2.7 / (x + 1.7 * norm) * ours.idf[g]
    np.testing.assert_allclose(ours.transform(test).toarray(), unit_rows(wanted), rtol=1e-5)


def test_depth_matched_equals_the_formula():
    counts = draw_counts()
    dense = counts.toarray()
    df = np.zeros(dense.shape[1])
    for row in dense[dense.sum(axis=1) > 0]:
        df += 1 - (1 - row / row.sum()) ** 300.0
    idf = np.log((1 + 40) / (1 + df)) + 1
    np.testing.assert_allclose(TfidfReweighter("depth_matched", depth=300).fit(counts).idf, idf)


def test_depth_matched_ignores_sequencing_depth():
    """Ten times the reads leave the shares, and so the matched idf, as they are."""
    counts = draw_counts()
    for variant, same in [("depth_matched", True), ("log", True)]:
        shallow, deep = (TfidfReweighter(variant).fit(c).idf for c in (counts, counts * 10))
        assert np.array_equal(shallow, deep) == same
    rng = np.random.default_rng(0)
    thin = sparse.csr_matrix(rng.binomial(counts.toarray(), 0.2))
    drift = {
        v: np.abs(TfidfReweighter(v).fit(thin).idf - TfidfReweighter(v).fit(counts).idf)
        for v in ("depth_matched", "log")
    }
    assert drift["depth_matched"].mean() < drift["log"].mean()


def test_spatial_weighs_idf_by_moran_over_slides():
    slides = [draw_counts(40, seed=0), draw_counts(20, seed=1)]
    rng = np.random.default_rng(2)
    graphs = [KNNGraph(k=4).build(rng.uniform(0, 1000, (s.shape[0], 2))) for s in slides]
    moran = np.zeros(25)
    for counts, graph in zip(slides, graphs, strict=True):
        depth = np.maximum(counts.sum(axis=1), 1)
        log = np.log1p(1e4 * counts.toarray() / np.asarray(depth))
        moran += counts.shape[0] * morans_i(log, graph) / 60
    plain = TfidfReweighter().fit(slides)
    ours = TfidfReweighter("spatial").fit(slides, graphs)
    np.testing.assert_allclose(ours.idf, plain.idf * (1 + np.maximum(moran, 0)), rtol=1e-9)
    swapped = TfidfReweighter("spatial").fit(slides[::-1], graphs[::-1])
    np.testing.assert_array_equal(swapped.idf, ours.idf)


@settings(max_examples=40, deadline=None)
@given(
    variant=st.sampled_from([name for name in GRAPHLESS if name not in OF_SLIDES]),
    cuts=st.lists(st.integers(1, 39), max_size=6, unique=True),
    order_seed=st.integers(0, 100),
)
def test_streaming_and_merging_equal_fitting_at_once(variant, cuts, order_seed):
    counts = draw_counts()
    whole = TfidfReweighter(variant).fit(counts)
    edges = [0, *sorted(cuts), 40]
    parts = [counts[a:b] for a, b in pairwise(edges)]
    np.random.default_rng(order_seed).shuffle(parts)
    streamed = TfidfReweighter(variant).fit(iter(parts))
    merged = TfidfReweighter(variant).fit(parts[0])
    for part in parts[1:]:
        merged = merged.merge(TfidfReweighter(variant).partial_fit(part))
    for other in (streamed, merged):
        np.testing.assert_array_equal(other.idf, whole.idf)
        found, wanted = other.transform(counts), whole.transform(counts)
        np.testing.assert_array_equal(found.toarray(), wanted.toarray())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.float32])
def test_the_type_of_the_counts_changes_no_bit(variant, kind):
    """Thirds of counts in float32: their sums in float32 would differ."""
    counts = draw_counts().astype(kind)
    if kind == np.float32:
        counts.data /= np.float32(3)
    assert counts.dtype == kind
    graphs = [KNNGraph(k=4).build(np.random.default_rng(2).uniform(0, 1000, (40, 2)))]
    given = {"graphs": graphs} if variant == "spatial" else {}
    one, other = (
        TfidfReweighter(variant).fit([table], **given) for table in (counts, counts.astype(float))
    )
    assert one.state()["depth"] == other.state()["depth"]
    for name in ("df", "extra"):
        np.testing.assert_array_equal(one.state()[name], other.state()[name])
    found, wanted = one.transform(counts), other.transform(counts.astype(float))
    np.testing.assert_array_equal(found.toarray(), wanted.toarray())


@pytest.mark.parametrize("variant", GRAPHLESS)
def test_rows_at_a_time_change_no_bit(variant, monkeypatch):
    counts = draw_counts()
    fitted = TfidfReweighter(variant).fit(counts)
    whole = fitted.transform(counts)
    for entries in (1, 7, 100):
        monkeypatch.setattr("preprocessing.tfidf.weights._BLOCK_ENTRIES", entries)
        assert len(list(row_blocks(counts.astype(float)))) > 400 // (entries + 25)
        found = fitted.transform(counts)
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(found, part), getattr(whole, part))


@pytest.mark.parametrize("variant", GRAPHLESS)
def test_rows_have_unit_length_and_empty_spots_stay_zero(variant):
    rows = TfidfReweighter(variant).fit(draw_counts()).transform(draw_counts()).toarray()
    assert np.isfinite(rows).all()
    length = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(np.delete(length, 7), 1, rtol=1e-6)
    assert length[7] == 0


def test_inputs_and_fits_are_left_alone():
    entries = ([1, 2, 0, 5], ([0, 0, 1, 1], [2, 2, 0, 1]))  # repeated and stored-zero entries
    messy = sparse.csr_matrix((entries[0], [2, 2, 0, 1], [0, 2, 4]), shape=(2, 3))
    before = messy.data.copy(), messy.indices.copy()
    one, two = TfidfReweighter().fit(messy), TfidfReweighter().fit(messy.toarray())
    np.testing.assert_array_equal(one.idf, two.idf)
    np.testing.assert_array_equal(
        one.transform(messy).toarray(), two.transform(messy.toarray()).toarray()
    )
    np.testing.assert_array_equal(messy.data, before[0])
    np.testing.assert_array_equal(messy.indices, before[1])
    assert one.merge(two).n_spots == 4
    assert one.n_spots == 2
    assert one.fit(messy).n_spots == 2  # fit forgets


@pytest.mark.parametrize("variant", GRAPHLESS)
def test_state_round_trip(variant):
    fitted = TfidfReweighter(variant).fit(draw_counts())
    state = fitted.state()
    json.dumps({k: v for k, v in state.items() if not isinstance(v, np.ndarray)})
    back = TfidfReweighter.from_state(state)
    np.testing.assert_array_equal(back.idf, fitted.idf)
    assert back.merge(fitted).n_spots == 80
    assert (back.tf, back.idf_rule, back.n_spots) == (fitted.tf, fitted.idf_rule, 40)


@pytest.mark.parametrize("k", [1, 3, 30])
def test_keyword_genes_equal_a_sort_per_row(k):
    rng = np.random.default_rng(0)
    dense = np.round(rng.random((30, 20)) * (rng.random((30, 20)) < 0.4), 1).astype(np.float32)
    index, value = keyword_genes(sparse.csr_matrix(dense), k)
    assert (index.dtype, value.dtype, index.shape) == (np.int32, np.float32, (30, k))
    for i, row in enumerate(dense):
        wanted = sorted((-v, g) for g, v in enumerate(row) if v > 0)[:k]
        pad = k - len(wanted)
        assert index[i].tolist() == [g for _, g in wanted] + [20] * pad
        assert value[i].tolist() == [-v for v, _ in wanted] + [0] * pad


def test_keyword_genes_do_not_depend_on_storage_order():
    shuffled = sparse.csr_matrix(([0.5, 0.25, 0.5], [4, 0, 1], [0, 3]), shape=(1, 5))
    index, value = keyword_genes(shuffled, 4)
    assert index.tolist() == [[1, 4, 0, 5]]
    assert value.tolist() == [[0.5, 0.5, 0.25, 0]]
    assert shuffled.indices.tolist() == [4, 0, 1]


def test_keyword_genes_across_row_blocks(monkeypatch):
    """With 31 bits taken by genes a block holds 4 rows; the answer is the same."""
    table = TfidfReweighter().fit(draw_counts()).transform(draw_counts())
    wanted = keyword_genes(table, 6)
    wide = sparse.csr_matrix((table.data, table.indices, table.indptr), shape=(40, 2**31 - 1))
    index, value = keyword_genes(wide, 6)
    np.testing.assert_array_equal(value, wanted[1])
    np.testing.assert_array_equal(np.where(index == 2**31 - 1, 25, index), wanted[0])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda f: TfidfReweighter("lgo"), "choose one of .*Did you mean 'log'"),
        (lambda f: TfidfReweighter("bm25", kk=1), "unknown argument .*'k'"),
        (lambda f: TfidfReweighter("bm25", b=1.5), "expected 0 to 1"),
        (lambda f: TfidfReweighter("depth_matched", depth=-1), "positive"),
        (lambda f: TfidfReweighter().idf, "not fitted"),
        (lambda f: TfidfReweighter().fit([]), "at least one"),
        (lambda f: TfidfReweighter().fit(np.zeros((3, 4))).transform(np.ones((1, 4))), "any count"),
        (lambda f: TfidfReweighter("spatial").fit(draw_counts()), "needs the spot graph"),
        (lambda f: f.transform(np.ones((2, 24))), "24 genes, expected the 25"),
        (lambda f: f.partial_fit(np.ones((2, 26))), "26 genes, expected the 25"),
        (lambda f: f.partial_fit(np.zeros((0, 25))), "no spots"),
        (lambda f: f.transform(np.full((2, 25), -1.0)), "row 0, column 0.*raw counts"),
        (lambda f: f.transform(np.full((2, 25), np.nan)), "non-finite"),
        (lambda f: f.merge(TfidfReweighter("raw").fit(draw_counts())), "Fit both alike"),
        (lambda f: TfidfReweighter.from_state({"variant": "log"}), "lacks .*'df'"),
        (lambda f: TfidfReweighter.from_state(f.state() | {"df": np.zeros(2)}), "must be"),
        (lambda f: keyword_genes(sparse.csr_matrix([[1.0]]), 0), "at least 1"),
        (lambda f: keyword_genes(sparse.csr_matrix([[-1.0]]), 1), "negative"),
    ],
)
def test_errors_say_what_to_do(action, message):
    fitted = TfidfReweighter().fit(draw_counts())
    with pytest.raises(DataError, match=message):
        action(fitted)
