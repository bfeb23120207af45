"""Gene sets as queries: a set of the database must score as in training, a new one on its scale."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from pathways import PathwayError, raw_score, score_set, set_vector

from .toy import N_SETS, make_toy, unit_rows

TOY = make_toy(seed=5)


def test_a_known_set_gets_its_own_match() -> None:
    test = unit_rows(11, seed=77)
    match = TOY.anchors.match(test)
    background = TOY.anchors.background(test)
    for p in range(N_SETS):
        rows = TOY.database.table[TOY.database.table["source"] == f"P{p}"]
        vector = set_vector(rows["target"].tolist(), rows["weight"], TOY.genes, TOY.idf)
        np.testing.assert_allclose(
            vector.toarray()[0], TOY.anchors.matrix[:, [p]].toarray()[:, 0], atol=1e-6
        )
        mean, sd = TOY.anchors.mean[p], TOY.anchors.sd[p]
        score = score_set(test, vector, mean, sd, background)
        np.testing.assert_allclose(score, match[:, p], atol=1e-4)


def test_raw_score_is_the_cosine() -> None:
    vector = set_vector(["G3", "G9", "elsewhere"], None, TOY.genes, TOY.idf)
    dense = np.zeros(len(TOY.genes))
    dense[[3, 9]] = TOY.idf[[3, 9]]
    dense /= np.linalg.norm(dense)
    np.testing.assert_allclose(raw_score(TOY.tfidf, vector), TOY.tfidf.toarray() @ dense, atol=1e-6)
    assert vector.shape == (1, len(TOY.genes))
    assert vector.nnz == 2


def test_order_and_scale_of_weights_do_not_matter() -> None:
    one = set_vector(["G1", "G2"], [1.0, 3.0], TOY.genes, TOY.idf)
    two = set_vector(["G2", "G1"], [30.0, 10.0], TOY.genes, TOY.idf)
    np.testing.assert_allclose(one.toarray(), two.toarray(), atol=1e-6)


def test_empty_spot_scores_zero() -> None:
    vector = set_vector(["G1"], None, TOY.genes, TOY.idf)
    empty = csr_matrix((2, len(TOY.genes)), dtype=np.float32)
    assert score_set(empty, vector, 0.3, 0.1, np.ones(2)).tolist() == [0.0, 0.0]


def test_query_errors() -> None:
    genes, idf = TOY.genes, TOY.idf
    with pytest.raises(PathwayError, match=r"0 of 2 genes.*Trp53.*human"):
        set_vector(["Trp53", "Actb"], None, genes, idf)
    with pytest.raises(PathwayError, match="twice: G1"):
        set_vector(["G1", "G1"], None, genes, idf)
    with pytest.raises(PathwayError, match="weights of shape"):
        set_vector(["G1", "G2"], [1.0], genes, idf)
    with pytest.raises(PathwayError, match="no genes"):
        set_vector([], None, genes, idf)
    vector = set_vector(["G1"], None, genes, idf)
    with pytest.raises(PathwayError, match=r"sd=0\.0"):
        score_set(TOY.tfidf, vector, 0.0, 0.0, np.zeros(44))
    with pytest.raises(PathwayError, match="one background a spot"):
        score_set(TOY.tfidf, vector, 0.0, 1.0, np.zeros(43))
