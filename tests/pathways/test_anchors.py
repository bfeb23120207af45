"""Anchors: match scores and soft targets against slow definitions, invariances and errors."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.sparse import csr_matrix
from sklearn.metrics.pairwise import cosine_similarity

from pathways import (
    GeneSet,
    PathwayAnchors,
    PathwayDatabase,
    PathwayError,
    fit_anchors,
    soft_targets,
)
from pathways import anchors as similarity

from .toy import N_GENES, N_SETS, make_toy, unit_rows

TOY = make_toy()


def test_raw_match_is_scikit_learns_cosine() -> None:
    weights = TOY.database.matrix(TOY.genes).toarray() * TOY.idf[:, None]
    expected = cosine_similarity(TOY.tfidf.toarray(), weights.T)
    np.testing.assert_allclose(TOY.anchors.raw_match(TOY.tfidf), expected, atol=1e-6)
    norms = np.linalg.norm(TOY.anchors.matrix.toarray(), axis=0)
    np.testing.assert_allclose(norms, 1.0, atol=1e-6)


def test_streamed_statistics_are_those_of_the_stack() -> None:
    raw = TOY.anchors.raw_match(TOY.tfidf).astype(np.float64)
    np.testing.assert_allclose(TOY.anchors.mean, raw.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(TOY.anchors.sd, raw.std(axis=0), rtol=1e-6)
    for blocks in ([TOY.tfidf], TOY.blocks[::-1], (TOY.tfidf[i] for i in range(44))):
        other = fit_anchors(TOY.database, TOY.genes, TOY.idf, blocks)
        np.testing.assert_allclose(other.mean, TOY.anchors.mean, rtol=1e-10)
        np.testing.assert_allclose(other.sd, TOY.anchors.sd, rtol=1e-10)


def test_match_is_standardised_then_centred() -> None:
    test = unit_rows(9, seed=99)
    raw = TOY.anchors.raw_match(test).astype(np.float64)
    slow = np.zeros_like(raw)
    for i in range(9):
        z = [(raw[i, p] - TOY.anchors.mean[p]) / TOY.anchors.sd[p] for p in range(N_SETS)]
        slow[i] = np.array(z) - sum(z) / N_SETS
    np.testing.assert_allclose(TOY.anchors.match(test), slow, atol=1e-5)
    exact = (test.astype(np.float64) @ TOY.anchors.matrix.astype(np.float64)).toarray()
    slow_standard = (exact - TOY.anchors.mean) / TOY.anchors.sd
    np.testing.assert_allclose(
        TOY.anchors.background(test),
        slow_standard.mean(axis=1),
        rtol=1e-6,
        atol=1e-7,
    )


def test_match_of_a_spot_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TOY.anchors.match(TOY.tfidf)
    order = np.random.default_rng(3).permutation(44)
    np.testing.assert_array_equal(TOY.anchors.match(TOY.tfidf[order]), whole[order])
    monkeypatch.setattr(similarity, "BLOCK_SPOTS", 5)
    np.testing.assert_array_equal(TOY.anchors.match(TOY.tfidf), whole)
    assert TOY.anchors.match(TOY.tfidf[:0]).shape == (0, N_SETS)


def test_gene_order_does_not_matter() -> None:
    order = np.random.default_rng(4).permutation(N_GENES)
    genes = [TOY.genes[g] for g in order]
    blocks = [block[:, order] for block in TOY.blocks]
    other = fit_anchors(TOY.database, genes, TOY.idf[order], blocks)
    np.testing.assert_allclose(
        other.match(TOY.tfidf[:, order]), TOY.anchors.match(TOY.tfidf), atol=2e-5
    )


def test_a_common_factor_of_all_pathways_is_taken_off() -> None:
    """Depth raises every match of a spot; the centred match must not see it."""
    genes = [f"G{i}" for i in range(8)]
    sets = [GeneSet(f"P{p}", "", (f"G{2 * p}", f"G{2 * p + 1}")) for p in range(3)]
    database = PathwayDatabase.from_sets(sets, "three")
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.2, 0.9, size=200)
    dense = np.zeros((200, 8))
    dense[:, :6] = (depth / np.sqrt(6))[:, None]
    dense[:, 6] = np.sqrt(1 - depth**2)  # the rest of the row is a gene of no pathway
    tfidf = csr_matrix(dense)
    anchors = fit_anchors(database, genes, np.ones(8), [tfidf])
    assert np.corrcoef(anchors.standardised(tfidf)[:, 0], depth)[0, 1] > 0.999
    np.testing.assert_allclose(anchors.match(tfidf), 0.0, atol=1e-5)


def test_empty_spots_and_constant_pathways_score_zero() -> None:
    genes = ["A", "B", "C", "D"]
    sets = [GeneSet("x", "", ("A",)), GeneSet("y", "", ("B",)), GeneSet("silent", "", ("D",))]
    rows = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.6, 0, 0.8, 0]])
    with pytest.warns(UserWarning, match="1 of 3 pathways never vary.*silent"):
        anchors = fit_anchors(
            PathwayDatabase.from_sets(sets, "t"), genes, np.ones(4), [csr_matrix(rows)]
        )
    assert anchors.varying.tolist() == [True, True, False]
    test = csr_matrix(np.array([[0.0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]))
    match = anchors.match(test)
    assert (match[0] == 0).all()
    assert (match[:, 2] == 0).all()
    assert match[2].argmax() == 0
    np.testing.assert_allclose(match[1:, :2].sum(axis=1), 0, atol=1e-6)


def test_rounding_does_not_make_a_constant_pathway_vary() -> None:
    genes = ["A", "B", "C"]
    sets = [GeneSet("x", "", ("A",)), GeneSet("level", "", ("C",))]
    rows = np.zeros((21, 3))
    rows[:, 2] = 0.1  # the same match everywhere, but for the last bit of some float32
    rows[::2, 2] = np.nextafter(np.float32(0.1), np.float32(1))
    rows[:10, 0] = rows[10:, 1] = np.sqrt(0.99)
    blocks = [csr_matrix(rows[i : i + 3]) for i in range(0, 21, 3)]
    with pytest.warns(UserWarning, match="level"):
        anchors = fit_anchors(PathwayDatabase.from_sets(sets, "t"), genes, np.ones(3), blocks)
    assert anchors.sd[1] == 0.0


def _slow_targets(match: np.ndarray, t: float, top: int, threshold: float) -> np.ndarray:
    """Softmax over all pathways, cut to the best above the threshold, sum restored."""
    out = np.zeros(match.shape)
    for i, row in enumerate(match.astype(np.float64)):
        soft = np.exp(row / t) / np.exp(row / t).sum()
        best = [p for p in np.argsort(-row, kind="stable")[:top] if row[p] > threshold]
        if best:
            out[i, best] = soft[best] / soft[best].sum()
    return out


@given(
    match=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 9)),
        elements=st.floats(-4, 4, width=32),
    ),
    temperature=st.sampled_from([0.2, 0.5, 2.0]),
    top=st.integers(1, 12),
    threshold=st.sampled_from([-10.0, 0.0, 1.0]),
)
def test_soft_targets_against_a_loop(
    match: np.ndarray, temperature: float, top: int, threshold: float
) -> None:
    ties = np.arange(match.size, dtype=np.float32).reshape(match.shape) * 1e-3
    match = match + ties  # a tie at the cut has no right answer
    assume(all(len(set(row)) == len(row) for row in match.tolist()))
    target = soft_targets(match, temperature, top, threshold)
    assert target.dtype == np.float32
    assert target.shape == match.shape
    np.testing.assert_allclose(target, _slow_targets(match, temperature, top, threshold), atol=2e-6)
    sums = target.sum(axis=1)
    assert (np.isclose(sums, 1, atol=1e-5) | (sums == 0)).all()
    assert ((target > 0).sum(axis=1) <= top).all()


def test_soft_targets_closed_form() -> None:
    match = np.array([[np.log(2.0), 0.0, -3.0], [-1.0, -2.0, -3.0]])
    target = soft_targets(match, temperature=1.0, top=2, threshold=-0.5)
    np.testing.assert_allclose(target, [[2 / 3, 1 / 3, 0], [0, 0, 0]], atol=1e-6)
    sharp = soft_targets(match, temperature=1e-3, top=3, threshold=-9)
    np.testing.assert_allclose(sharp, [[1, 0, 0], [1, 0, 0]], atol=1e-6)
    assert soft_targets(np.array([[1.0, 1.0, 1.0]]), top=2).tolist()[0].count(0.5) == 2


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ([1.0, 2.0], {}),
        ([[np.nan, 1.0]], {}),
        (np.zeros((3, 0)), {}),
        ([[1.0]], {"temperature": 0.0}),
        ([[1.0]], {"temperature": float("nan")}),
        ([[1.0]], {"top": 0}),
    ],
)
def test_soft_targets_refuse(match: object, options: dict[str, float]) -> None:
    with pytest.raises(PathwayError, match="expected"):
        soft_targets(match, **options)


def test_storage_round_trip(tmp_path: Path) -> None:
    np.savez(tmp_path / "anchors.npz", **TOY.anchors.to_arrays())
    with np.load(tmp_path / "anchors.npz", allow_pickle=False) as stored:
        back = PathwayAnchors.from_arrays(stored)
    assert back.names == TOY.anchors.names
    np.testing.assert_array_equal(back.match(TOY.tfidf), TOY.anchors.match(TOY.tfidf))
    as_bytes = TOY.anchors.to_arrays()
    as_bytes["names"] = np.array([n.encode() for n in TOY.anchors.names], dtype=object)
    assert PathwayAnchors.from_arrays(as_bytes).names == TOY.anchors.names


def test_damaged_storage_is_refused() -> None:
    good = TOY.anchors.to_arrays()
    with pytest.raises(PathwayError, match="lack sd"):
        PathwayAnchors.from_arrays({k: v for k, v in good.items() if k != "sd"})
    with pytest.raises(PathwayError, match="damaged"):
        PathwayAnchors.from_arrays(good | {"indices": good["indices"] + 1000})
    with pytest.raises(PathwayError, match="same number of pathways"):
        PathwayAnchors.from_arrays(good | {"mean": good["mean"][:-1]})


def test_a_gene_without_idf_belongs_to_no_anchor() -> None:
    """Proteins that no training cell has are weighed 0."""
    idf = TOY.idf.copy()
    idf[:5] = 0
    anchors = fit_anchors(TOY.database, TOY.genes, idf, TOY.blocks)
    assert not anchors.matrix[:5].toarray().any()
    weights = TOY.database.matrix(TOY.genes).toarray() * idf[:, None]
    expected = cosine_similarity(TOY.tfidf.toarray(), weights.T)
    np.testing.assert_allclose(anchors.raw_match(TOY.tfidf), expected, atol=1e-6)


def test_fit_refuses_what_cannot_be_right() -> None:
    database, genes, idf, blocks = TOY.database, TOY.genes, TOY.idf, TOY.blocks
    single = PathwayDatabase.from_sets([GeneSet("A", "", ("G1",))], "single")
    lost = PathwayDatabase.from_sets([GeneSet("A", "", ("G1",)), GeneSet("B", "", ("X",))], "lost")
    for arguments, words in (
        ((single, genes, idf, blocks), "at least 2"),
        ((lost, genes, idf, blocks), r"1 of 2 pathways.*B\. Call database.restrict"),
        ((database, genes, idf[:-1], blocks), "idf of shape"),
        ((database, genes, -idf, blocks), "numbers >= 0"),
        ((database, genes, idf, []), "no training spots"),
        ((database, genes, idf, [blocks[0][:1]]), "no pathway varies"),
        ((database, genes, idf, [blocks[0] * 40]), "L2-normalised"),
        ((database, genes, idf, [blocks[0][:, :-1]]), "60 genes"),
        ((database, genes, idf, [blocks[0].toarray()]), "CSR matrix"),
    ):
        with pytest.raises(PathwayError, match=words):
            fit_anchors(*arguments)
