"""Metrics against slow oracles, closed forms, invariances and errors."""

import math

import numpy as np
import pytest
from scipy import stats

from eval.errors import FoldError
from eval.measures import metrics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def test_pearson_and_spearman_equal_scipy_gene_by_gene(rng):
    truth, prediction = rng.poisson(2.0, (40, 5)) * 1.0, rng.standard_normal((40, 5))
    pearson = [stats.pearsonr(prediction[:, g], truth[:, g])[0] for g in range(5)]
    spearman = [stats.spearmanr(prediction[:, g], truth[:, g])[0] for g in range(5)]
    np.testing.assert_allclose(metrics.pearson_per_gene(prediction, truth), pearson)
    np.testing.assert_allclose(metrics.spearman_per_gene(prediction, truth), spearman)


def test_constant_truth_is_undefined_and_constant_prediction_is_worth_nothing(rng):
    truth, prediction = rng.standard_normal((30, 3)), rng.standard_normal((30, 3))
    truth[:, 0], prediction[:, 1] = 0.1, 1e6 + 0.3
    r = metrics.pearson_per_gene(prediction, truth)
    assert math.isnan(r[0])
    assert r[1] == 0.0
    summary = metrics.summarise(r)
    assert (summary.n, summary.n_constant) == (2, 1)
    assert summary.mean == pytest.approx(r[2] / 2)
    assert math.isnan(metrics.summarise(np.array([np.nan])).mean)


def test_pearson_ignores_scale_and_sign_flips_it(rng):
    truth, prediction = rng.standard_normal((30, 4)), rng.standard_normal((30, 4))
    r = metrics.pearson_per_gene(prediction, truth)
    np.testing.assert_allclose(metrics.pearson_per_gene(1e-6 * prediction + 3, truth), r)
    np.testing.assert_allclose(metrics.pearson_per_gene(-prediction, truth), -r)


def expected_over_orders(similarity: np.ndarray, value) -> float:
    """Mean of ``value(rank)`` over every place the true item can take among its ties."""
    per_query = []
    for query, row in enumerate(similarity):
        above = sum(s > row[query] for s in row)
        tied = sum(s == row[query] for s in row)
        per_query.append(np.mean([value(above + place) for place in range(1, tied + 1)]))
    return float(np.mean(per_query))


@pytest.mark.parametrize("levels", [3, 10_000])
def test_recall_and_mrr_equal_the_mean_over_orders_of_the_ties(rng, levels):
    similarity = rng.integers(levels, size=(25, 25)) / levels
    for k in (1, 3, 25):
        slow = expected_over_orders(similarity, lambda rank, k=k: float(rank <= k))
        assert metrics.recall_at_k(similarity, k) == pytest.approx(slow)
    slow = expected_over_orders(similarity, lambda rank: 1.0 / rank)
    assert metrics.mrr(similarity) == pytest.approx(slow)


def test_all_ties_are_exactly_at_chance():
    flat = np.zeros((40, 40))
    assert metrics.recall_at_k(flat, 4) == pytest.approx(metrics.chance_recall_at_k(4, 40))
    assert metrics.recall_at_k(flat, metrics.list_length(0.1, len(flat))) == pytest.approx(0.1)
    assert metrics.mrr(flat) == pytest.approx(metrics.chance_mrr(40))
    assert metrics.median_rank(flat) == pytest.approx(0.5, abs=0.0126)


def test_perfect_retrieval_and_known_ranks():
    assert metrics.recall_at_k(np.eye(10), 1) == 1.0
    assert metrics.mrr(np.eye(10)) == 1.0
    assert metrics.median_rank(np.eye(10)) == pytest.approx(0.05)
    similarity = np.array([[1.0, 2.0, 3.0], [0.0, 9.0, 1.0], [5.0, 1.0, 2.0]])
    np.testing.assert_array_equal(metrics.ranks(similarity).above, [2, 0, 1])
    assert metrics.mrr(similarity) == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)


def test_random_similarities_are_near_their_chance(rng):
    similarity = rng.standard_normal((600, 600))
    assert metrics.recall_at_k(
        similarity, metrics.list_length(0.1, len(similarity))
    ) == pytest.approx(0.1, abs=0.04)
    assert metrics.median_rank(similarity) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
def test_blocks_of_queries_give_the_same_ranks_as_the_whole_matrix(rng, block):
    query, item = rng.standard_normal((50, 6)), rng.standard_normal((50, 6))
    item[10:20] = item[10]
    cosine = metrics.unit_rows(query) @ metrics.unit_rows(item).T
    whole, blocked = metrics.ranks(cosine), metrics.ranks_of_embeddings(query, item, block)
    np.testing.assert_array_equal(blocked.above, whole.above)
    np.testing.assert_array_equal(blocked.tied, whole.tied)
    assert (blocked.tied[10:20] == 10).all()


def test_retrieval_ignores_rotation_scale_and_the_order_of_pairs(rng):
    query, item = rng.standard_normal((40, 5)), rng.standard_normal((40, 5))
    turn, order = np.linalg.qr(rng.standard_normal((5, 5)))[0], rng.permutation(40)
    base = metrics.ranks_of_embeddings(query, item)
    moved = metrics.ranks_of_embeddings(3.0 * query[order] @ turn, 0.1 * item[order] @ turn)
    np.testing.assert_array_equal(moved.above, base.above[order])


def test_list_length_rounds_half_up_and_is_at_least_one():
    assert [metrics.list_length(0.1, n) for n in (3, 14, 15, 180)] == [1, 1, 2, 18]
    with pytest.raises(FoldError, match="fraction"):
        metrics.list_length(0.0, 10)


def slow_class_scores(truth, predicted) -> tuple[float, float]:
    recall, f1 = [], []
    for name in sorted(set(truth)):
        hit = sum(t == p == name for t, p in zip(truth, predicted, strict=True))
        n_true, n_called = list(truth).count(name), list(predicted).count(name)
        recall.append(hit / n_true)
        f1.append(2 * hit / (n_true + n_called))
    return float(np.mean(recall)), float(np.mean(f1))


def test_balanced_accuracy_and_f1_count_the_classes_of_the_truth(rng):
    truth, predicted = rng.choice(list("abc"), 60), rng.choice(list("abcd"), 60)
    accuracy, f1 = slow_class_scores(truth, predicted)
    assert metrics.balanced_accuracy(truth, predicted) == pytest.approx(accuracy)
    assert metrics.macro_f1(truth, predicted) == pytest.approx(f1)


def test_auroc_is_the_share_of_pairs_in_order_and_skips_absent_classes(rng):
    truth, score = rng.choice(list("ab"), 30), np.round(rng.random((30, 3)), 1)
    values = []
    for column, name in enumerate("ab"):
        inside, outside = score[truth == name, column], score[truth != name, column]
        pairs = inside[:, None] - outside[None, :]
        values.append((np.sum(pairs > 0) + 0.5 * np.sum(pairs == 0)) / pairs.size)
    assert metrics.macro_auroc(truth, score, list("abz")) == pytest.approx(np.mean(values))
    assert math.isnan(metrics.macro_auroc(np.array(["a"] * 30), score, list("abz")))


def test_partitions_are_compared_whatever_the_names():
    truth = np.array(list("aabbcc"))
    renamed = np.array([9, 9, 4, 4, 1, 1])
    for score in (metrics.ari, metrics.nmi, metrics.ami):
        assert score(truth, renamed) == pytest.approx(1.0)
    same, apart = np.zeros(6), np.arange(6)
    assert metrics.ari(truth, same) == metrics.ari(truth, apart) == 0.0
    with pytest.raises(FoldError, match="n >= 1"):
        metrics.ari(truth, renamed[:3])


def test_bootstrap_interval_has_the_width_of_the_standard_error(rng):
    values = rng.standard_normal(400)
    low, high = metrics.bootstrap_ci(values, seed=1)
    expected = 2 * 1.96 * values.std() / np.sqrt(400)
    assert high - low == pytest.approx(expected, rel=0.1)
    assert low < values.mean() < high


def test_bootstrap_draws_whole_units(rng):
    values = rng.standard_normal(10)
    units = [f"p{i}" for i in range(10)]
    once = metrics.bootstrap_ci(values, units)
    copies = metrics.bootstrap_ci(np.tile(values, 50), units * 50)
    np.testing.assert_allclose(once, copies)
    with_gaps = metrics.bootstrap_ci([*values, np.nan], [*units, "p0"])
    np.testing.assert_allclose(once, with_gaps)
    assert all(math.isnan(x) for x in metrics.bootstrap_ci([1.0, 2.0], ["p", "p"]))


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.pearson_per_gene(np.zeros((3, 2)), np.zeros((3, 1))),
        lambda: metrics.ranks(np.zeros((3, 2))),
        lambda: metrics.recall_at_k(np.eye(3), 0),
        lambda: metrics.macro_auroc(np.array(["a", "b"]), np.zeros((2, 3)), ["a", "b"]),
    ],
)
def test_wrong_shapes_are_refused(call):
    with pytest.raises(FoldError):
        call()
