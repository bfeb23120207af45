"""Attention pool: a slow oracle, a closed form, order of spots, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eval.errors import FoldError
from eval.tasks.patients import (
    AttentionPool,
    AttentionPoolConfig,
    GatedPool,
    fit_attention_pool,
    thinned,
)

SMALL = AttentionPoolConfig(steps=15, starts=2, components=4, hidden=3)


def bags_of(n: int = 8, size: int = 12, width: int = 5, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((size + i % 3, width)) for i in range(n)]


def labels_of(n: int = 8) -> np.ndarray:
    return np.arange(n) % 2


def test_forward_equals_loops_over_starts_bags_and_spots() -> None:
    generator = torch.Generator().manual_seed(3)
    pool = GatedPool(4, 3, AttentionPoolConfig(starts=2, hidden=3), generator)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
    points = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = pool(points, mask).detach().numpy()
    weight = {name: value.detach().numpy() for name, value in pool.named_parameters()}
    for m in range(2):
        for p in range(2):
            rows = points[p][mask[p]].numpy()
            score = []
            for row in rows:
                value = np.tanh(row @ weight["value"][m] + weight["value_bias"][m])
                gate = 1 / (1 + np.exp(-(row @ weight["gate"][m] + weight["gate_bias"][m])))
                score.append(float((value * gate) @ weight["score"][m][:, 0]))
            share = np.exp(score) / np.exp(score).sum()
            pooled = sum(a * row for a, row in zip(share, rows, strict=True))
            expected = pooled @ weight["head"][m] + weight["head_bias"][m]
            np.testing.assert_allclose(found[m, p], expected, rtol=1e-9)


def test_identical_spots_share_the_weight_equally() -> None:
    pool = fit_attention_pool(bags_of(), labels_of(), 2, 0, SMALL)
    np.testing.assert_allclose(pool.attention(np.ones((7, 5))), 1 / 7, rtol=1e-9)


def test_order_of_spots_in_training_and_test_does_not_matter() -> None:
    bags = bags_of()
    turned = [bag[::-1] for bag in bags]
    first = fit_attention_pool(bags, labels_of(), 2, 0, SMALL).predict(bags_of(seed=1))
    again = fit_attention_pool(turned, labels_of(), 2, 0, SMALL)
    shuffled = [bag[np.random.default_rng(0).permutation(len(bag))] for bag in bags_of(seed=1)]
    np.testing.assert_allclose(again.predict(shuffled), first, atol=1e-7)


def test_scale_and_shift_of_the_embedding_do_not_matter() -> None:
    scaled = [7.0 * bag + 3.0 for bag in bags_of()]
    first = fit_attention_pool(bags_of(), labels_of(), 2, 0, SMALL).predict(bags_of(seed=1))
    other = fit_attention_pool(scaled, labels_of(), 2, 0, SMALL)
    found = other.predict([7.0 * bag + 3.0 for bag in bags_of(seed=1)])
    np.testing.assert_allclose(found, first, atol=1e-7)


def test_more_bags_than_one_batch_give_the_same_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit_attention_pool(bags_of(), labels_of(), 2, 0, SMALL).predict(bags_of(seed=1))
    monkeypatch.setattr("eval.tasks.patients.BAGS_AT_ONCE", 3)
    again = fit_attention_pool(bags_of(), labels_of(), 2, 0, SMALL).predict(bags_of(seed=1))
    np.testing.assert_allclose(again, first, atol=1e-9)


def test_same_seed_same_probabilities_that_sum_to_one() -> None:
    first, again, other = (
        fit_attention_pool(bags_of(), labels_of(), 2, seed, SMALL).predict(bags_of(seed=1))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_allclose(first.sum(axis=1), 1.0)


def test_attention_lies_on_the_spots_that_carry_the_label() -> None:
    rng = np.random.default_rng(0)
    bags = [rng.standard_normal((100, 6)) for _ in range(20)]
    label = np.arange(20) % 2
    for bag, k in zip(bags, label, strict=True):
        bag[:4, 0] += 6.0 * k
    pool: AttentionPool = fit_attention_pool(bags, label, 2, 0)
    on_signal = np.mean([pool.attention(bag)[:4].sum() for bag in bags[1::2]])
    assert on_signal > 0.16  # the spots are 4 % of the bag


def test_thinning_keeps_order_and_small_slides() -> None:
    rows = np.arange(20.0)[:, None]
    few = thinned(rows, 5, np.random.default_rng(0))
    assert few.shape == (5, 1)
    assert (np.diff(few[:, 0]) > 0).all()
    assert thinned(rows, 20, np.random.default_rng(0)) is rows


@pytest.mark.parametrize(
    ("bags", "label", "message"),
    [
        (bags_of(3), labels_of(2), "3 bags"),
        ([*bags_of(3), np.zeros((4, 2))], labels_of(4), "same number of dimensions"),
        ([*bags_of(3), np.zeros((0, 5))], labels_of(4), "at least one spot"),
        (bags_of(4), np.zeros(4, dtype=int), r"\[4, 0\] of each"),
    ],
)
def test_bags_that_do_not_fit_are_refused(bags, label, message: str) -> None:
    with pytest.raises(FoldError, match=message):
        fit_attention_pool(bags, label, 2, 0, SMALL)
