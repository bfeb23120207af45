"""Read-outs against scikit-learn and against brute force."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from eval.errors import FoldError
from eval.measures import inner_folds
from eval.measures import ridge as readouts
from eval.measures.inner_folds import within_one_error
from eval.measures.metrics import pearson_per_gene
from eval.measures.ridge import Moments, RidgeConfig, choose_alpha, choose_weights, ridge_weights


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
    """Leave a group out, fit scikit-learn ridge for every candidate, mean Pearson over genes.

    Of the candidates within one standard error over the groups of the best, the strongest.
    """
    rows = []
    for held in np.unique(groups):
        inner = groups != held
        scale = ((x[inner] - x[inner].mean(axis=0)) ** 2).sum() / x.shape[1]
        rows.append([])
        for candidate in config.grid:
            model = Ridge(alpha=candidate * scale).fit(x[inner], y[inner])
            rows[-1].append(pearson_per_gene(model.predict(x[~inner]), y[~inner]).mean())
    mean, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(len(rows))
    best = int(np.argmax(mean))
    strongest = max(i for i, m in enumerate(mean) if m >= mean[best] - error[best])
    total = ((x - x.mean(axis=0)) ** 2).sum() / x.shape[1]
    return config.grid[strongest] * total


@pytest.mark.parametrize(("most", "asked"), [(1024, [0, 1, 2, 3]), (3, [0, 1, 3])])
def test_chosen_penalty_equals_brute_force_over_held_out_groups(problem, monkeypatch, most, asked):
    monkeypatch.setattr(readouts, "MOST_TARGETS", most)
    x, y, _, groups = problem
    y = np.hstack([y, x[:, :1]])  # of no noise, which wants another penalty
    config = RidgeConfig(n_folds=4)
    found = choose_alpha(x, y, groups, groups, config)
    assert found == pytest.approx(brute_force_alpha(x, y[:, asked], groups, config))


def test_two_slides_give_no_standard_error_and_the_best_penalty_is_taken():
    scores = np.array([[0.1, 0.5, 0.45], [0.2, 0.6, 0.55]])
    assert within_one_error(scores, [1, 2, 3]) == 1
    assert within_one_error(np.vstack([scores, [0.0, 0.2, 0.19]]), [1, 2, 3]) == 2
    assert within_one_error(np.vstack([scores, [0.0, 0.2, 0.19]]), [3, 2, 1]) == 1


def test_the_fit_is_scikit_learns_on_targets_z_scored_within_slides(problem):
    x, y, test, groups = problem
    alpha = choose_alpha(x, _z_within(y, groups), groups, groups, RidgeConfig())
    model = Ridge(alpha=alpha).fit(x, _z_within(y, groups))
    spread = np.sqrt(np.mean([y[groups == g].var(axis=0) for g in "abcd"], axis=0))
    found = readouts.ridge_fit_predict(x, y, test, "cv", groups, groups)
    np.testing.assert_allclose(found, model.predict(test) * spread + y.mean(axis=0), rtol=1e-7)


def _z_within(y, groups):
    return np.concatenate([readouts.zscore(y[groups == g]) for g in np.unique(groups)])


def test_level_and_scale_of_a_slide_do_not_weigh(problem):
    x, y, test, groups = problem
    moved = y.copy()
    moved[groups == "b"] = 100.0 * moved[groups == "b"] + 50.0
    base, after = (readouts.ridge_fit_predict(x, v, test, "cv", groups, groups) for v in (y, moved))
    np.testing.assert_allclose(readouts.zscore(after), readouts.zscore(base), atol=1e-8)
    hest = [readouts.ridge_fit_predict(x, v, test, "hest", groups, groups) for v in (y, moved)]
    assert np.abs(readouts.zscore(hest[0]) - readouts.zscore(hest[1])).max() > 0.1


def test_inner_predictions_come_from_the_other_groups(problem):
    x, y, test, groups = problem
    config = RidgeConfig(alpha=30.0, n_folds=4)
    found = readouts.ridge_readout(x, y, test, groups, groups, config)
    z = _z_within(y, groups)
    spread = np.sqrt(np.mean([y[groups == g].var(axis=0) for g in "abcd"], axis=0))
    for held in "abcd":
        own = groups == held
        model = Ridge(alpha=30.0 * 0.75).fit(x[~own], z[~own])  # the penalty a spot stays
        expected = model.predict(x[own]) * spread + y.mean(axis=0)
        np.testing.assert_allclose(found.inner[own], expected, rtol=1e-7)
    expected = Ridge(alpha=30.0).fit(x, z).predict(test) * spread + y.mean(axis=0)
    np.testing.assert_allclose(found.test, expected, rtol=1e-7)


def test_weights_are_the_most_equal_that_slides_cannot_tell_from_the_best(rng):
    truth, units = rng.standard_normal((400, 3)), np.repeat(list("abcd"), 100)
    good, noise = truth + rng.standard_normal((400, 3)), rng.standard_normal((400, 3))
    assert choose_weights([good, noise], truth, units) == (1.0, 0.0)
    other = truth + rng.standard_normal((400, 3))
    assert choose_weights([good, other], truth, units) == (0.5, 0.5)
    third = truth + rng.standard_normal((400, 3))
    assert choose_weights([good, other, third], truth, units) == pytest.approx((1 / 3,) * 3)
    assert choose_weights([noise, 50 * good + 7], truth, units) == (0.0, 1.0)


def test_weights_equal_a_loop_over_all_mixtures(rng):
    truth, units = rng.standard_normal((60, 2)), np.repeat(["a", "b"], 30)
    parts = [truth + s * rng.standard_normal((60, 2)) for s in (1.0, 2.0)]
    scores = {}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        r = []
        for unit in "ab":
            own = units == unit
            mixed = readouts.zscore_mean(*(p[own] for p in parts), weights=(share, 1 - share))
            r.append(pearson_per_gene(mixed, truth[own]).mean())
        scores[share] = np.mean(r)
    best = max(scores, key=lambda share: scores[share])
    assert choose_weights(parts, truth, units) == (best, 1 - best)


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


def test_folds_never_split_a_group_and_are_of_patients_slides_or_blocks(rng):
    groups = rng.choice(list("abcdefg"), 200)
    fold = inner_folds.group_folds(groups, 3)
    assert set(fold) == {0, 1, 2}
    assert all(len(set(fold[groups == name])) == 1 for name in "abcdefg")
    slides, xy = np.repeat(["s", "t"], 45).astype(object), rng.random((90, 2))
    three = np.repeat(["P", "Q", "R"], 30).astype(object)
    assert inner_folds.inner_groups(three, slides, xy) is three
    for patients in (np.full(90, "P", object), slides):
        assert inner_folds.inner_groups(patients, slides, xy) is slides
    one = np.full(90, "s", object)
    blocks = inner_folds.inner_groups(one, one, xy)
    np.testing.assert_array_equal(np.unique(blocks.astype(str), return_counts=True)[1], [10] * 9)


def test_spatial_blocks_are_compact(rng):
    xy = rng.random((900, 2))
    block = inner_folds.spatial_blocks(xy)
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
