"""Groups of spots: planted blobs, a slow nearest centroid, streaming, seeds and errors."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from preprocessing.coexpression.spot_groups import SpotGroups, fit_spot_groups
from preprocessing.errors import DataError

SHARE = (0.6, 0.3, 0.1)


def blobs(sizes=(400, 150, 250), seed: int = 0):
    """Three blobs in six dimensions, a different mixture on every slide; vectors and truth."""
    rng = np.random.default_rng(seed)
    centre = 4 * np.eye(3, 6)
    truth = [rng.choice(3, size, p=np.roll(SHARE, 0 if size > 200 else 1)) for size in sizes]
    vectors = [(centre[t] + rng.normal(0, 0.7, (t.size, 6))).astype(np.float32) for t in truth]
    return vectors, truth


def fit(vectors, n_groups=3, **options) -> SpotGroups:
    return fit_spot_groups(lambda: iter(vectors), n_groups, **options)


def test_planted_groups_are_found_largest_first():
    vectors, truth = blobs()
    groups = fit(vectors)
    assert (groups.n_groups, groups.centroids.dtype) == (3, np.float32)
    found = np.concatenate([groups.assign(v) for v in vectors])
    assert found.dtype == np.int64
    assert adjusted_rand_score(np.concatenate(truth), found) > 0.98
    assert (np.diff(np.bincount(found)) < 0).all()


def test_assign_equals_a_slow_search_and_sees_one_spot_at_a_time(monkeypatch):
    vectors, _ = blobs()
    groups = fit(vectors, n_groups=7)
    whole = groups.assign(vectors[0])
    slow = [np.square(groups.centroids - v).sum(axis=1).argmin() for v in vectors[0]]
    assert whole.tolist() == slow
    assert [int(groups.assign(v[None])[0]) for v in vectors[0]] == slow
    monkeypatch.setattr("preprocessing.coexpression.spot_groups._ROWS", 33)
    np.testing.assert_array_equal(groups.assign(vectors[0]), whole)
    tie = SpotGroups(np.array([[1, 0], [-1, 0]], np.float32))
    assert tie.assign(np.zeros((2, 2))).tolist() == [0, 0]


def test_one_group_is_the_mean_of_all_spots():
    vectors, _ = blobs()
    groups = fit(vectors, n_groups=1, max_spots=1)
    together = np.concatenate(vectors)
    np.testing.assert_allclose(groups.centroids, together.mean(axis=0)[None], atol=1e-6)
    assert not groups.assign(together).any()


def test_sample_is_even_bounded_and_by_seed():
    """A small and a large slide of one blob each: the sample has as many spots of both."""
    rng = np.random.default_rng(0)
    small, large = rng.normal(0, 1, (50, 2)), rng.normal(10, 1, (5000, 2))
    vectors = [small, large]
    one, again, other = (fit(vectors, 2, max_spots=90, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.centroids, again.centroids)
    assert (one.centroids != other.centroids).any()
    assert np.bincount(one.assign(small), minlength=2).max() == 50
    assert one.assign(small)[0] != one.assign(large)[0]


def test_whole_sample_does_not_depend_on_how_spots_are_cut_into_slides():
    vectors, _ = blobs()
    together = fit([np.concatenate(vectors)])
    np.testing.assert_allclose(fit(vectors).centroids, together.centroids, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: fit(v, 0), "at least 1 group"),
        (lambda v: fit(v, 5, max_spots=4), "at least as many spots"),
        (lambda v: fit([np.ones((40, 2))], 2), "2 groups of 1 different spots.*at most 1"),
        (lambda v: fit([]), "no training slide"),
        (lambda v: fit([v[0], v[0][:0]]), "no spots"),
        (lambda v: fit([v[0], v[1][:, :4]]), "expected \\(S, 6\\)"),
        (lambda v: fit([v[0] * np.nan]), "400 spot vectors are not finite"),
        (lambda v: fit_spot_groups(v, 2), "found list.*lambda"),
        (lambda v: fit(v).assign(v[0][:, :4]), "expected \\(S, 6\\)"),
        (lambda v: fit(v).assign(v[0] + np.inf), "not finite"),
        (lambda v: SpotGroups(np.zeros((0, 3), np.float32)), "expected finite"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(DataError, match=message):
        call(blobs()[0])


def test_a_stream_that_changes_is_noticed():
    vectors, _ = blobs()
    passes = iter([vectors, [v[:-1] for v in vectors]])
    with pytest.raises(DataError, match="fresh iterator"):
        fit_spot_groups(lambda: iter(next(passes)), 3)
