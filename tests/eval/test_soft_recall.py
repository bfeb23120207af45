"""Soft recall: a slow double loop, closed forms, invariances, ties, errors, the task itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eval.errors import FoldError
from eval.tasks.retrieval import RetrievalConfig, run, soft_recall


def data(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 4)), rng.standard_normal((n, 4)), rng.random((n, 9))


def slow(query: np.ndarray, item: np.ndarray, expression: np.ndarray, k: int, share: float):
    n = len(query)
    precision = []
    for i in range(n):
        alike = [
            2.0 if j == i else np.corrcoef(expression[i], expression[j])[0, 1] for j in range(n)
        ]
        wanted = sorted(range(n), key=lambda j: -alike[j])[: max(1, int(share * n + 0.5))]
        cosine = [q @ query[i] / np.linalg.norm(q) / np.linalg.norm(query[i]) for q in item]
        shown = sorted(range(n), key=lambda j: -cosine[j])[:k]
        precision.append(len(set(wanted) & set(shown)) / k)
    return float(np.mean(precision))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_equals_a_loop_over_queries_and_items(share: float) -> None:
    sides = data()
    found, chance = soft_recall(*sides, k=(1, 5, 60), share=share, block=7)
    for value, k in zip(found, (1, 5, 60), strict=True):
        assert value == pytest.approx(slow(*sides, k, share))
    assert chance == pytest.approx(max(1, int(share * 60 + 0.5)) / 60)
    assert found[2] == pytest.approx(chance)  # the whole pool


def test_perfect_embeddings_reach_one_and_random_ones_chance() -> None:
    rng = np.random.default_rng(1)
    expression = rng.standard_normal((400, 30))
    own = expression - expression.mean(axis=1, keepdims=True)
    found, chance = soft_recall(own, own, expression, (1, 10, 20), 0.05)
    assert found == pytest.approx([1.0, 1.0, 1.0])
    noise = rng.standard_normal((400, 30))
    found, _ = soft_recall(noise, rng.standard_normal((400, 30)), expression, (10,), 0.05)
    assert found[0] == pytest.approx(chance, abs=0.02)


def test_scale_of_profiles_and_common_order_of_spots_do_not_matter() -> None:
    query, item, expression = data()
    base = soft_recall(query, item, expression, (3,), 0.1)
    assert soft_recall(2 * query, item, 5 * expression + 3, (3,), 0.1)[0] == pytest.approx(base[0])
    order = np.random.default_rng(4).permutation(60)
    turned = soft_recall(query[order], item[order], expression[order], (3,), 0.1)
    assert turned[0] == pytest.approx(base[0])


def test_all_tied_is_chance() -> None:
    _, _, expression = data()
    same = np.ones((60, 4))
    found, chance = soft_recall(same, same, expression, (1, 7), 0.1)
    assert found == pytest.approx([chance, chance])


def test_a_neighbour_of_nearly_the_same_profile_counts() -> None:
    """Pairs of twins: the item of the twin is retrieved; recall is 0, soft recall 1."""
    rng = np.random.default_rng(2)
    one = rng.standard_normal((30, 12))
    expression = np.repeat(one, 2, axis=0) + 1e-3 * rng.standard_normal((60, 12))
    query = np.eye(60)
    item = query[np.arange(60) ^ 1]
    assert soft_recall(query, item, expression, (1,), 2 / 60)[0] == [1.0]


def test_what_does_not_fit_is_refused() -> None:
    query, item, expression = data()
    with pytest.raises(FoldError, match="must be equal"):
        soft_recall(query, item[:5], expression, (1,), 0.1)
    with pytest.raises(FoldError, match="1 to 60"):
        soft_recall(query, item, expression, (61,), 0.1)


def test_the_task_reports_it_beside_plain_recall(toy_fold) -> None:
    fold = replace(toy_fold, models=(toy_fold.model("hibio"), toy_fold.model("coordinates")))
    models = run(fold, RetrievalConfig()).models
    row = models["hibio"]
    for direction in ("image_to_omics", "omics_to_image"):
        metric = row[f"{direction}/soft_recall@10"]
        assert metric.chance == pytest.approx(6 / 120)
        assert metric.mean > 3 * 6 / 120
        assert metric.keys == row[f"{direction}/recall@10"].keys
    niche = run(fold, RetrievalConfig(item="niche")).models["hibio"]
    assert not any("soft" in name for name in niche)
