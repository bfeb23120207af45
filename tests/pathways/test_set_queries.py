"""Gene sets as queries: a set of the database must score as in training, a new one on its scale."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from pathways import GeneSet, PathwayDatabase, PathwayError, score_sets, set_matrix
from pathways.anchors import BLOCK_SPOTS, cosine

from .toy import N_SETS, make_toy, unit_rows

TOY = make_toy(seed=5)


def new_sets(*sets: list[str]) -> PathwayDatabase:
    """A database of lists of genes."""
    named = [GeneSet(f"N{i}", "", tuple(genes)) for i, genes in enumerate(sets)]
    return PathwayDatabase.from_sets(named, "new")


def test_known_sets_get_their_own_match() -> None:
    test = unit_rows(11, seed=77)
    matrix = set_matrix(TOY.database, TOY.genes, TOY.idf)
    np.testing.assert_array_equal(matrix.toarray(), TOY.anchors.matrix.toarray())
    background = TOY.anchors.background(test)
    score = score_sets(test, matrix, TOY.anchors.mean, TOY.anchors.sd, background)
    np.testing.assert_allclose(score, TOY.anchors.match(test), atol=1e-4)
    assert score.shape == (11, N_SETS)


def test_the_cosine_is_that_of_dense_rows_over_more_than_a_block() -> None:
    matrix = set_matrix(new_sets(["G3", "G9", "elsewhere"], ["G1"]), TOY.genes, TOY.idf)
    dense = np.zeros((len(TOY.genes), 2))
    dense[[3, 9], 0], dense[1, 1] = TOY.idf[[3, 9]] / np.linalg.norm(TOY.idf[[3, 9]]), 1.0
    rows = unit_rows(BLOCK_SPOTS + 30, seed=1)
    np.testing.assert_allclose(cosine(rows, matrix), rows.toarray() @ dense, atol=1e-6)
    assert matrix.nnz == 3


def test_an_empty_spot_scores_zero() -> None:
    matrix = set_matrix(new_sets(["G1"], ["G2", "G5"]), TOY.genes, TOY.idf)
    empty = csr_matrix((2, len(TOY.genes)), dtype=np.float32)
    given = ([0.3, 0.1], [0.1, 0.2], np.ones(2))
    assert not score_sets(empty, matrix, *given).any()
    half = csr_matrix(([1.0, 0.0, 0.0], ([1, 0, 0], [0, 1, 2])), empty.shape)  # zeros are stored
    scores = score_sets(half, matrix, *given)
    assert scores.any(axis=1).tolist() == [False, True]
    np.testing.assert_array_equal(score_sets(half.tocsc(), matrix, *given), scores)
    raw = cosine(half, matrix).astype(np.float64)
    np.testing.assert_allclose(score_sets(half, matrix, *given, raw), scores, atol=1e-6)
    np.testing.assert_array_equal(raw, cosine(half, matrix))  # is not written over
    told = score_sets(half, matrix, *given, raw, np.array([False, True]))
    assert told.any(axis=1).tolist() == [True, False]  # as who knows them says
    with pytest.raises(PathwayError, match=r"raw of shape \(1, 2\); expected \(2, 2\)"):
        score_sets(half, matrix, *given, raw[:1])


def test_query_errors() -> None:
    matrix = set_matrix(new_sets(["G1"]), TOY.genes, TOY.idf)
    with pytest.raises(PathwayError, match=r"1 of 1 pathways of new have no gene in the panel: N0"):
        set_matrix(new_sets(["Trp53", "Actb"]), TOY.genes, TOY.idf)
    with pytest.raises(PathwayError, match="twice: G1"):
        set_matrix(new_sets(["G1"]), ["G1", "G1"], TOY.idf[:2])
    with pytest.raises(PathwayError, match=r"smallest sd=0\.0"):
        score_sets(TOY.tfidf, matrix, [0.0], [0.0], np.zeros(44))
    with pytest.raises(PathwayError, match="one background a spot"):
        score_sets(TOY.tfidf, matrix, [0.0], [1.0], np.zeros(43))
