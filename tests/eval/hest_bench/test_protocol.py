"""The published head, step by step: scaling, PCA, penalty, ridge, Pearson; and the gene rule."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from threadpoolctl import threadpool_limits

from eval.errors import FoldError
from eval.hest_bench.layout import BenchSplit, Sample
from eval.hest_bench.protocol import (
    FoldData,
    HestProtocol,
    constant_genes,
    nested_predictions,
    published_pearson,
    published_predictions,
    reduce_features,
    score_fold,
    stored_features,
)
from eval.hest_bench.samples import GeneSums, choose_genes, normalised_dispersion
from preprocessing.errors import DataError


def data(n: int = 90, width: int = 12, genes: int = 5, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((2 * n, width)) * rng.uniform(0.5, 3, width) + 7).astype(np.float32)
    weight = rng.standard_normal((width, genes))
    y = np.log1p(np.maximum(x @ weight + 4 * rng.standard_normal((2 * n, genes)), 0))
    return x[:n], x[n:], y[:n], y[n:]


def test_features_are_scaled_and_rotated_by_training_spots_alone() -> None:
    train, test, _, _ = data()
    found = reduce_features(stored_features(train, test), HestProtocol(n_components=4))
    mean, sd = train.astype(float).mean(axis=0), train.astype(float).std(axis=0)
    scaled = (train - mean) / sd
    _, _, axes = np.linalg.svd(scaled - scaled.mean(axis=0), full_matrices=False)
    for side, raw in ((found.train, train), (found.test, test)):
        slow = ((raw - mean) / sd) @ axes[:4].T
        np.testing.assert_allclose(np.abs(side), np.abs(slow), atol=2e-4)
    other = reduce_features(stored_features(train, test[:1]), HestProtocol(n_components=4))
    np.testing.assert_allclose(other.test[0], found.test[0], atol=1e-5)
    assert found.train.dtype == np.float64
    np.testing.assert_array_equal(found.train, found.train.astype(np.float32))


def test_fewer_features_than_components_keep_all_of_them() -> None:
    train, test, _, _ = data()
    assert reduce_features(stored_features(train, test), HestProtocol()).train.shape == (90, 12)
    assert reduce_features(stored_features(train[:6], test), HestProtocol()).train.shape == (6, 6)


def test_the_penalty_is_a_hundred_over_dimensions_times_genes() -> None:
    assert HestProtocol().alpha(256, 50) == pytest.approx(0.0078125)


def test_ridge_equals_its_closed_form_without_intercept() -> None:
    train, test, train_y, _ = data()
    features = reduce_features(stored_features(train, test), HestProtocol(n_components=8))
    alpha = 100 / (8 * 5)
    x = features.train.astype(float)
    weight = np.linalg.solve(x.T @ x + alpha * np.eye(8), x.T @ train_y)
    found = published_predictions(features, train_y, HestProtocol(n_components=8))
    np.testing.assert_allclose(found, features.test @ weight, atol=5e-3)
    assert abs(found.mean() - train_y.mean()) > 0.5  # no intercept is fitted


def test_one_iteration_is_not_enough_so_the_limit_is_used() -> None:
    train, test, train_y, _ = data()
    features = reduce_features(stored_features(train, test), HestProtocol())
    whole = published_predictions(features, train_y, HestProtocol())
    cut = published_predictions(features, train_y, HestProtocol(max_iter=1))
    assert np.abs(whole - cut).max() > 1e-2


def test_pearson_equals_a_loop_and_is_undefined_where_a_side_is_constant() -> None:
    rng = np.random.default_rng(3)
    prediction, truth = rng.standard_normal((2, 30, 4))
    truth[:, 1], prediction[:, 2] = 3.0, 1.0
    found = published_pearson(prediction, truth)
    for gene in (0, 3):
        a, b = prediction[:, gene], truth[:, gene]
        product = sum((x - a.mean()) * (y - b.mean()) for x, y in zip(a, b, strict=True))
        assert found[gene] == pytest.approx(product / (30 * a.std() * b.std()))
    assert math.isnan(found[1])
    assert math.isnan(found[2])
    assert constant_genes(truth) == 1


def test_inner_folds_find_a_larger_penalty_where_features_are_noise() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 60)).astype(np.float32)
    y = x[:, :1] + 3 * rng.standard_normal((80, 1))
    test = rng.standard_normal((400, 60)).astype(np.float32)
    truth = test[:, :1] + 3 * rng.standard_normal((400, 1))
    features = reduce_features(stored_features(x, test), HestProtocol())
    groups = np.repeat(np.array(["a", "b", "c", "d"], dtype=object), 20)
    nested = nested_predictions(features, y, groups, groups)
    fixed = published_predictions(features, y, HestProtocol())
    assert published_pearson(nested, truth)[0] > published_pearson(fixed, truth)[0]
    assert nested.std() < fixed.std()


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (np.ones((4, 3)), np.ones((4, 2)), "widths must be equal"),
        (np.ones((1, 3)), np.ones((4, 3)), "too few"),
        (np.full((4, 3), np.nan), np.ones((4, 3)), "not finite"),
    ],
)
def test_features_that_do_not_fit_are_refused(train, test, words: str) -> None:
    with pytest.raises(FoldError, match=words):
        stored_features(train, test)


@pytest.mark.parametrize("stored", ["enc_f32", "enc_f16"])
def test_both_published_protocols_give_the_published_numbers(oracle, stored: str) -> None:
    """Outputs of the published code, run apart with SciPy 1.17 and one thread (README beside them).

    Its solver stops early, so that the last bit of a sum moves a gene's r in the third decimal.
    """
    same = version("scipy").startswith("1.17.") and version("numpy").startswith("2.4.")
    close = 1e-6 if same else 5e-3
    golden = oracle("hest_bench.npz")
    column = [golden["all_genes"].tolist().index(gene) for gene in golden["genes"].tolist()]
    names = sorted(key.split("/")[0] for key in golden if key.endswith("/counts"))
    targets = {n: np.log1p(golden[f"{n}/counts"][:, column].astype(np.float64)) for n in names}
    vectors = {name: golden[f"{name}/{stored}"] for name in names}
    samples = {name: Sample(name, Path(name), Path(name)) for name in names}
    own, places = {name: name for name in names}, dict.fromkeys(names)
    for k, test in enumerate(names):
        train = tuple(samples[name] for name in names if name != test)
        split = BenchSplit(str(k), train, (samples[test],))
        fold = FoldData(split, targets, targets, own, places)
        with threadpool_limits(1):
            found = score_fold(vectors, fold, HestProtocol())
        expected = {
            protocol: golden[f"pearson_gene_fold/{protocol}/{stored}"][:, k]
            for protocol in ("pca256", "none")
        }
        np.testing.assert_allclose(found.genes, expected["pca256"], atol=close)
        np.testing.assert_allclose(found.genes_no_pca, expected["none"], atol=close)
        mean = golden[f"pearson_mean_per_fold/pca256/{stored}"][k]
        assert found.published == pytest.approx(mean, abs=min(close, 1e-3))


def sums(values: np.ndarray, names: list[str]) -> GeneSums:
    return GeneSums(
        np.array(names), len(values), values.sum(0), (values**2).sum(0), (values > 0).sum(0)
    )


def slow_dispersion(values: np.ndarray) -> list[float]:
    """Gene by gene, bin by bin."""
    mean, variance = values.mean(axis=0), values.var(axis=0, ddof=1)
    bins = pd.cut(np.log1p(mean), 20, labels=False)
    found = []
    for gene in range(values.shape[1]):
        alike = [g for g in range(values.shape[1]) if bins[g] == bins[gene] and variance[g] > 0]
        logs = [math.log(variance[g] / mean[g]) for g in alike]
        if variance[gene] == 0:
            found.append(-math.inf)
        elif len(logs) == 1:
            found.append(1.0 if logs[0] else -math.inf)
        else:
            own = math.log(variance[gene] / mean[gene])
            found.append((own - np.mean(logs)) / np.std(logs, ddof=1))
    return found


def test_dispersion_equals_a_loop_over_genes_and_bins() -> None:
    rng = np.random.default_rng(1)
    values = rng.negative_binomial(2, 0.4, (60, 40)) * rng.integers(1, 6, 40)
    values = values.astype(float)
    values[:, 7] = 4.0
    found = normalised_dispersion(60, values.sum(0), (values**2).sum(0))
    np.testing.assert_allclose(found, slow_dispersion(values), rtol=1e-9)


def test_genes_are_chosen_on_the_given_samples_and_measured_in_all() -> None:
    rng = np.random.default_rng(2)
    names = [f"G{i:02d}" for i in range(30)] + ["BLANK_1"]
    first, second = (rng.poisson(3.0, (50, 31)).astype(float) for _ in range(2))
    for values in (first, second):
        values[:, 29] += 500  # the other genes share a bin
    first[:, 4], first[:, 30] = rng.permutation(50) // 25 * 6, rng.permutation(50) // 25 * 6
    second[:, 9] = rng.permutation(50) // 25 * 6
    rare = first.copy()
    rare[:, 4] = 0  # four spots are below a tenth
    rare[:4, 4] = 30
    one, two = sums(first, names), sums(second, names)
    assert "G04" in choose_genes([one], [one, two], 3)
    assert "G04" in choose_genes([sums(rare[:40], names)], [one], 3)
    assert "G09" not in choose_genes([one], [one, two], 3)
    assert "G04" not in choose_genes([sums(rare, names)], [one], 30)
    assert "BLANK_1" not in choose_genes([one], [one], 31)
    without = sums(np.delete(second, 4, axis=1), names[:4] + names[5:])
    assert "G04" not in choose_genes([one], [one, without], 30)
    changed = sums(second[:, ::-1] * 7, names)
    assert choose_genes([one], [one, two], 5) == choose_genes([one], [one, changed], 5)
    with pytest.raises(DataError, match="share no panel"):
        choose_genes([one], [sums(first, [f"X{i}" for i in range(31)])], 5)
