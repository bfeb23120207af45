"""Bootstrap interval of an AUROC: drawn again slowly, closed forms, invariances, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.fold import FoldError
from eval.intervals import auroc_interval
from eval.metrics import macro_auroc


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
