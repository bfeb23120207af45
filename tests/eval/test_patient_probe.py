"""Patient read-out: balanced subsets, inner folds, constant features, closed forms."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from eval.tasks.patients import (
    ProbeConfig,
    balanced_subsets,
    choose_c,
    constant_features,
    probe_probabilities,
    stratified_folds,
)


def case(n: int = 12, width: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    return rng.standard_normal((n, width)) + label[:, None], label


def test_equals_scikit_learn_on_scaled_features() -> None:
    train, label = case()
    test = case(6, seed=1)[0]
    config = ProbeConfig(grid=(1.0,))
    scale = train.std(axis=0) * 2.0  # root of 4 features
    model = LogisticRegression(C=1.0).fit((train - train.mean(axis=0)) / scale, label)
    expected = model.predict_proba((test - train.mean(axis=0)) / scale)
    np.testing.assert_allclose(probe_probabilities(train, label, test, config), expected, atol=1e-4)


def test_scale_shift_and_rotation_of_equal_scales_do_not_matter() -> None:
    train, label = case()
    test = case(6, seed=1)[0]
    first = probe_probabilities(train, label, test, ProbeConfig())
    again = probe_probabilities(5 * train - 2, label, 5 * test - 2, ProbeConfig())
    np.testing.assert_allclose(again, first, atol=1e-6)


def test_constant_features_say_nothing() -> None:
    train, label = case()
    flat = np.column_stack([train, np.full(12, 3.0), 1e-9 * train[:, 0]])
    assert constant_features(flat, np.ones(6)).tolist() == [False] * 4 + [True] * 2
    found = probe_probabilities(np.ones((12, 2)), label, np.ones((3, 2)), ProbeConfig())
    np.testing.assert_array_equal(found, np.full((3, 2), 0.5))


def test_inner_folds_hold_every_class() -> None:
    label = np.array([0] * 9 + [1] * 3)
    fold = stratified_folds(label, 4)
    assert fold.max() == 2
    assert all(set(label[fold == k]) == {0, 1} for k in range(3))


def test_subsets_are_balanced_and_whole_when_they_can_be() -> None:
    label = np.array([0] * 7 + [1] * 4)
    subsets = balanced_subsets(label, 5, seed=0)
    assert len(subsets) == 5
    assert all(np.bincount(label[s]).tolist() == [4, 4] for s in subsets)
    assert len({tuple(s) for s in subsets}) > 1
    (only,) = balanced_subsets(np.array([0, 1, 1, 0]), 5, seed=0)
    assert only.tolist() == [0, 1, 2, 3]


def test_the_penalty_follows_the_held_out_loss() -> None:
    rng = np.random.default_rng(0)
    label = np.arange(40) % 2
    clear = rng.standard_normal((40, 1)) + 8.0 * label[:, None]
    noise = rng.standard_normal((40, 30))
    config = ProbeConfig(grid=(0.01, 100.0))
    assert choose_c(clear, label, config) == 100.0
    assert choose_c(noise, label, config) == 0.01


def test_leaving_noisy_patients_out_one_by_one_is_not_pushed_below_chance() -> None:
    """Class weights on all patients push the pooled AUROC of noise down by about 0.1."""
    config = ProbeConfig(grid=(1.0,), subsets=4)
    gain, probability_of_truth = [], []
    keep, label = ~np.eye(10, dtype=bool), np.arange(10) % 2
    for seed in range(12):
        x = np.random.default_rng(seed).standard_normal((10, 40))
        p = np.array([probe_probabilities(x[k], label[k], x[~k], config)[0, 1] for k in keep])
        q = [_weighted(x[k], label[k], x[~k])[0, 1] for k in keep]
        gain.append(roc_auc_score(label, p) - roc_auc_score(label, q))
        probability_of_truth.append(np.where(label == 1, p, 1 - p).mean())
    assert np.mean(gain) > 0.04
    assert abs(np.mean(probability_of_truth) - 0.5) < 0.02


def _weighted(train: np.ndarray, label: np.ndarray, test: np.ndarray) -> np.ndarray:
    mean, scale = train.mean(axis=0), train.std(axis=0) * np.sqrt(train.shape[1])
    model = LogisticRegression(C=1.0, class_weight="balanced")
    return model.fit((train - mean) / scale, label).predict_proba((test - mean) / scale)
