"""Read-outs against scikit-learn and against brute force."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from eval.errors import FoldError
from eval.measures import ridge as readouts
from eval.measures.metrics import pearson_per_gene
from eval.measures.ridge import Moments, RidgeConfig, choose_alpha, ridge_weights


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def problem(rng):
    """Train x, y, test x with a weak linear signal, and four groups of spots."""
    x, test = rng.standard_normal((120, 15)), rng.standard_normal((30, 15))
    y = x @ rng.standard_normal((15, 3)) + 4.0 * rng.standard_normal((120, 3)) + 2.0
    return x, y, test, np.repeat(list("abcd"), 30)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 50.0, 1e4])
def test_ridge_equals_scikit_learn(problem, alpha):
    x, y, test, _ = problem
    expected = Ridge(alpha=alpha).fit(x, y).predict(test)
    found = readouts.ridge_fit_predict(x, y, test, alpha)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_all_penalties_come_from_one_decomposition(problem):
    x, y, _, _ = problem
    weights = ridge_weights(Moments.of(x, y), [0.1, 10.0])
    for alpha, found in zip([0.1, 10.0], weights, strict=True):
        np.testing.assert_allclose(found, Ridge(alpha=alpha).fit(x, y).coef_.T, rtol=1e-7)


def test_hest_penalty_and_pca_follow_the_protocol(problem):
    x, y, test, _ = problem
    pca = PCA(6).fit(x)
    model = Ridge(alpha=100 / (6 * 3)).fit(pca.transform(x), y)
    config = RidgeConfig(n_components=6)
    found = readouts.ridge_fit_predict(x, y, test, "hest", config=config)
    np.testing.assert_allclose(found, model.predict(pca.transform(test)), rtol=1e-6)


def brute_force_alpha(x, y, groups, config) -> float:
    """Leave a group out, fit scikit-learn ridge for every candidate, mean Pearson over genes."""
    scores = np.zeros(len(config.grid))
    for held in np.unique(groups):
        inner = groups != held
        scale = ((x[inner] - x[inner].mean(axis=0)) ** 2).sum() / x.shape[1]
        for i, candidate in enumerate(config.grid):
            model = Ridge(alpha=candidate * scale).fit(x[inner], y[inner])
            scores[i] += pearson_per_gene(model.predict(x[~inner]), y[~inner]).mean()
    total = ((x - x.mean(axis=0)) ** 2).sum() / x.shape[1]
    return config.grid[int(np.argmax(scores))] * total


def test_chosen_penalty_equals_brute_force_over_held_out_groups(problem):
    x, y, _, groups = problem
    config = RidgeConfig(n_folds=4)
    found = choose_alpha(x, y, groups, groups, config)
    assert found == pytest.approx(brute_force_alpha(x, y, groups, config))


def test_chosen_penalty_does_not_depend_on_scale_or_rotation(problem, rng):
    x, y, test, groups = problem
    turn = np.linalg.qr(rng.standard_normal((15, 15)))[0]
    base = readouts.ridge_fit_predict(x, y, test, "cv", groups)
    moved = readouts.ridge_fit_predict(1e3 * x @ turn + 7, y, 1e3 * test @ turn + 7, "cv", groups)
    np.testing.assert_allclose(moved, base, rtol=1e-6)


def test_pure_noise_gets_a_strong_penalty_and_clean_signal_a_weak_one(rng):
    x, groups = rng.standard_normal((300, 40)), np.repeat(list("abcdef"), 50)
    weights = rng.standard_normal((40, 2))
    clean = choose_alpha(x, x @ weights, groups, groups, RidgeConfig())
    noisy_y = x @ weights + 60 * rng.standard_normal((300, 2))
    noisy = choose_alpha(x, noisy_y, groups, groups, RidgeConfig())
    assert clean < noisy


def test_folds_never_split_a_group_and_one_patient_gives_spatial_blocks(rng):
    groups = rng.choice(list("abcdefg"), 200)
    fold = readouts.group_folds(groups, 3)
    assert set(fold) == {0, 1, 2}
    assert all(len(set(fold[groups == name])) == 1 for name in "abcdefg")
    patients, slides = np.full(90, "P", object), np.repeat(["s", "t"], 45).astype(object)
    blocks = readouts.inner_groups(patients, slides, rng.random((90, 2)))
    _, size = np.unique(blocks.astype(str), return_counts=True)
    np.testing.assert_array_equal(size, np.full(18, 5))
    two = np.repeat(["P", "Q"], 45).astype(object)
    assert readouts.inner_groups(two, slides, rng.random((90, 2))) is two


def test_spatial_blocks_are_compact(rng):
    xy = rng.random((900, 2))
    block = readouts.spatial_blocks(xy)
    inside = np.mean([xy[block == b].std(axis=0).mean() for b in range(9)])
    assert inside < 0.5 * xy.std(axis=0).mean()


@pytest.mark.parametrize("k", [1, 7, 500])
def test_knn_mean_equals_a_loop_over_spots(rng, k):
    bank, values, query = rng.standard_normal((60, 4)), rng.random((60, 3)), rng.random((9, 4))
    slow = []
    for row in query:
        cosine = bank @ row / np.linalg.norm(bank, axis=1)
        slow.append(values[np.argsort(-cosine)[:k]].mean(axis=0))
    np.testing.assert_allclose(readouts.knn_mean(bank, values, query, k, block=4), slow)


def test_zscore_mean_weighs_predictions_alike_and_leaves_one_alone(rng):
    a, b = rng.standard_normal((50, 2)), rng.standard_normal((50, 2))
    base = readouts.zscore_mean(a, b)
    np.testing.assert_allclose(readouts.zscore_mean(100 * a + 3, b), base, atol=1e-12)
    assert readouts.zscore_mean(a) is a
    constant = readouts.zscore(np.full((5, 1), 0.1))
    np.testing.assert_array_equal(constant, np.zeros((5, 1)))
    np.testing.assert_allclose(readouts.zscore(a).std(axis=0), 1.0)


@pytest.mark.parametrize(
    ("alpha", "groups", "message"),
    [
        ("best", None, "'cv', 'hest' or a number"),
        ("cv", None, "needs groups"),
        ("cv", np.full(120, "a"), "at least two groups"),
    ],
)
def test_wrong_settings_say_what_to_give(problem, alpha, groups, message):
    x, y, test, _ = problem
    with pytest.raises(FoldError, match=message):
        readouts.ridge_fit_predict(x, y, test, alpha, groups)


def test_wrong_shapes_are_refused(problem):
    x, y, test, _ = problem
    with pytest.raises(FoldError, match="rows must match"):
        readouts.ridge_fit_predict(x[:-1], y, test, 1.0)
    with pytest.raises(FoldError, match="test features"):
        readouts.ridge_fit_predict(x, y, test[:, :-1], 1.0)
    with pytest.raises(FoldError, match="knn"):
        readouts.knn_mean(x, y, test, 0)
