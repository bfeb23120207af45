"""Bootstrap interval of an AUROC: drawn again slowly, closed forms, invariances, errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from eval.errors import FoldError
from eval.measures.intervals import auroc_interval, holm, paired_bootstrap, sign_flip_p
from eval.measures.metrics import macro_auroc


def case(n: int = 18, n_classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list]:
    rng = np.random.default_rng(seed)
    classes = [f"c{k}" for k in range(n_classes)]
    number = np.arange(n) % n_classes
    score = rng.dirichlet(np.ones(n_classes), n).round(1) + 0.15 * np.eye(n_classes)[number]
    return np.array(classes)[number], score, classes


def test_equals_macro_auroc_of_patients_drawn_one_by_one() -> None:
    truth, score, classes = case()
    units = np.array([f"p{i // 2}" for i in range(len(truth))])
    names = np.unique(units)
    draw = np.random.default_rng(4).integers(len(names), size=(60, len(names)))
    values = []
    for one in draw:
        rows = np.concatenate([np.flatnonzero(units == names[u]) for u in one])
        values.append(macro_auroc(truth[rows], score[rows], classes))
    expected = np.quantile(np.array(values)[np.isfinite(values)], [0.05, 0.95])
    found = auroc_interval(truth, score, classes, units, level=0.9, n=60, seed=4)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_perfect_order_is_one_and_ties_are_a_half() -> None:
    truth, classes = np.array(["0"] * 5 + ["1"] * 5), ["0", "1"]
    units = np.arange(10)
    right = np.column_stack([truth == "0", truth == "1"]).astype(float)
    assert auroc_interval(truth, right, classes, units) == (1.0, 1.0)
    assert auroc_interval(truth, np.full((10, 2), 0.5), classes, units) == (0.5, 0.5)


def test_monotone_change_and_order_of_classes_do_not_matter() -> None:
    truth, score, classes = case(n_classes=2)
    units = np.arange(len(truth))
    first = auroc_interval(truth, score, classes, units)
    assert auroc_interval(truth, np.exp(3 * score), classes, units) == first
    assert auroc_interval(truth, score[:, ::-1], classes[::-1], units) == pytest.approx(first)


def test_interval_holds_the_value_and_narrows_with_more_patients() -> None:
    width = []
    for n in (20, 400):
        truth, score, classes = case(n, 2)
        low, high = auroc_interval(truth, score, classes, np.arange(n))
        assert low <= macro_auroc(truth, score, classes) <= high
        width.append(high - low)
    assert width[1] < 0.4 * width[0]


def test_one_unit_has_no_interval() -> None:
    truth, score, classes = case(6, 2)
    assert all(math.isnan(x) for x in auroc_interval(truth, score, classes, ["p"] * 6))
    same = np.array(["c0"] * 6)
    assert all(math.isnan(x) for x in auroc_interval(same, score, classes, np.arange(6)))


def test_arrays_that_do_not_fit_are_refused() -> None:
    truth, score, classes = case(6, 2)
    with pytest.raises(FoldError, match="expected one row"):
        auroc_interval(truth, score[:5], classes, np.arange(6))
    with pytest.raises(FoldError, match="not finite"):
        auroc_interval(truth, np.full_like(score, np.nan), classes, np.arange(6))


def test_paired_bootstrap_equals_units_drawn_one_by_one() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((2, 20)) + np.array([[0.5], [0.0]])
    found = paired_bootstrap(first, second, seed=3, draws=200, level=0.9)
    draw = np.random.default_rng(3).integers(20, size=(200, 20))
    means = [np.mean([first[u] - second[u] for u in one]) for one in draw]
    np.testing.assert_allclose((found.low, found.high), np.quantile(means, [0.05, 0.95]))
    assert found.mean == pytest.approx(np.mean(first - second))
    assert found.units == 20


def test_a_constant_gain_is_certain_and_pairing_removes_what_units_share() -> None:
    level = np.random.default_rng(2).standard_normal(30) * 100
    found = paired_bootstrap(level + 1, level)
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    turned = paired_bootstrap(level, level + 1)
    assert turned.high == pytest.approx(-found.low)
    one = paired_bootstrap([1.0], [0.5])
    assert one.mean == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.p)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        gain = rng.standard_normal(25) + 0.3
        found = paired_bootstrap(gain, np.zeros(25), seed=trial, draws=400)
        inside += found.low <= 0.3 <= found.high
    assert 0.86 <= inside / 200 <= 0.99


@pytest.mark.parametrize("second", [[1.0], [1.0, math.nan], []])
def test_values_that_do_not_pair_are_refused(second: list[float]) -> None:
    with pytest.raises(FoldError):
        paired_bootstrap([1.0, 2.0] if second else [], second)


def test_sign_flips_equal_all_signs_tried_in_a_loop() -> None:
    gain = np.array([0.5, -0.2, 0.9, 0.1])
    reached = 0
    for signs in itertools.product((1, -1), repeat=4):
        total = sum(s * g for s, g in zip(signs, gain, strict=True))
        reached += abs(total) >= abs(gain.sum()) - 1e-12
    assert sign_flip_p(gain) == pytest.approx(reached / 16)
    assert sign_flip_p(np.array([1.0, 1.0, 1.0])) == pytest.approx(2 / 8)
    assert sign_flip_p(-gain) == sign_flip_p(gain)
    assert sign_flip_p(np.zeros(5)) == 1.0


def test_random_signs_agree_with_all_of_them() -> None:
    gain = np.random.default_rng(5).standard_normal(12) + 0.4
    many = np.concatenate([gain, [0.0]])  # 13 units: drawn, not tried
    assert sign_flip_p(many, draws=20_000) == pytest.approx(sign_flip_p(gain), abs=0.02)


def test_p_is_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(8)
    found = [sign_flip_p(rng.standard_normal(10)) for _ in range(300)]
    assert np.mean(np.array(found) < 0.1) == pytest.approx(0.1, abs=0.05)


def test_holm_equals_the_rule_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    found = holm([0.01, math.nan, 0.02])
    assert found[0] == pytest.approx(0.02)
    assert math.isnan(found[1])
    assert holm([]) == []
