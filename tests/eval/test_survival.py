"""Survival outcomes: C-index against all pairs, Cox against loops, the task on planted times."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from eval.errors import FoldError
from eval.folds.fold import Fold, Representation, SlideData
from eval.measures.survival import (
    Survival,
    concordance_index,
    concordance_interval,
    cox_loss,
    cox_risk,
    cox_weights,
    is_survival,
    survival_of,
)
from eval.tasks.outcome import OutcomeConfig, SurvivalConfig, fold_risk, run
from tests.eval.test_tasks_outcome import _slide

FAST = OutcomeConfig(survival=SurvivalConfig(draws=100))


def patients(n: int = 40, seed: int = 0, ties: bool = True) -> tuple[Survival, np.ndarray]:
    rng = np.random.default_rng(seed)
    time = rng.integers(1, 12, n).astype(float) if ties else rng.random(n) + 0.1
    return Survival(time, rng.random(n) < 0.6), rng.integers(0, 6, n).astype(float)


def slow_index(survival: Survival, risk: np.ndarray) -> float:
    won = pairs = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            t, e = survival.time, survival.event
            if e[i] and (t[i] < t[j] or (t[i] == t[j] and not e[j])):
                pairs += 1
                won += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    return won / pairs


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [True, False])
def test_concordance_equals_all_pairs(seed: int, ties: bool) -> None:
    survival, risk = patients(seed=seed, ties=ties)
    assert concordance_index(survival, risk) == pytest.approx(slow_index(survival, risk))


def test_perfect_reversed_and_constant_risks() -> None:
    survival, _ = patients(ties=False)
    assert concordance_index(survival, -survival.time) == 1.0
    assert concordance_index(survival, survival.time) == 0.0
    assert concordance_index(survival, np.ones(40)) == 0.5
    nobody = Survival(survival.time, np.zeros(40, dtype=bool))
    assert math.isnan(concordance_index(nobody, survival.time))


def test_concordance_knows_only_the_order() -> None:
    survival, risk = patients()
    base = concordance_index(survival, risk)
    assert concordance_index(Survival(survival.time**2, survival.event), risk) == base
    assert concordance_index(survival, np.exp(risk)) == base
    order = np.random.default_rng(1).permutation(40)
    assert concordance_index(survival.only(order), risk[order]) == pytest.approx(base)
    with pytest.raises(FoldError, match="one finite each"):
        concordance_index(survival, risk[:3])
    with pytest.raises(FoldError, match="one finite each"):
        concordance_index(survival, np.full(40, np.nan))


def test_interval_equals_patients_drawn_one_by_one() -> None:
    survival, risk = patients(15)
    rng = np.random.default_rng(2)
    slow = []
    for _ in range(50):
        rows = rng.integers(15, size=15)
        slow.append(concordance_index(survival.only(rows), risk[rows]))
    found = concordance_interval(survival, risk, 0.9, 50, 2)
    np.testing.assert_allclose(found, np.quantile(slow, [0.05, 0.95]))


def slow_loss(w: np.ndarray, x: np.ndarray, survival: Survival, penalty: float) -> float:
    total = 0.0
    for i in range(len(x)):
        if survival.event[i]:
            at_risk = [j for j in range(len(x)) if survival.time[j] >= survival.time[i]]
            total -= x[i] @ w - math.log(sum(math.exp(x[j] @ w) for j in at_risk))
    return total / survival.event.sum() + penalty / 2 * float(w @ w)


def test_cox_loss_and_gradient_equal_loops_and_differences() -> None:
    survival, _ = patients(20)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((20, 3)), rng.standard_normal(3)
    loss, gradient = cox_loss(w, x, survival, 0.3)
    assert loss == pytest.approx(slow_loss(w, x, survival, 0.3))
    for d in range(3):
        step = 1e-6 * np.eye(3)[d]
        slope = slow_loss(w + step, x, survival, 0.3) - slow_loss(w - step, x, survival, 0.3)
        assert gradient[d] == pytest.approx(slope / 2e-6, abs=1e-6)


def test_cox_finds_a_planted_hazard_and_needs_events() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((800, 2))
    time = rng.exponential(np.exp(-x[:, 0]))
    survival = Survival(time, rng.random(800) < 0.8)
    w = cox_weights(x, survival, 1e-6)
    np.testing.assert_allclose(w, [1.0, 0.0], atol=0.12)
    assert np.linalg.norm(cox_weights(x, survival, 1.0)) < np.linalg.norm(w)
    risk = cox_risk(x[:600], survival.only(np.arange(600)), x[600:], (0.01, 1.0), 4)
    assert concordance_index(survival.only(np.arange(600, 800)), risk) > 0.7
    with pytest.raises(FoldError, match="0 events"):
        cox_weights(x, Survival(time, np.zeros(800, dtype=bool)), 1.0)


def test_the_form_of_survival_outcomes() -> None:
    assert is_survival({"a": "34.5;1", "b": " 3 ; 0"})
    assert not is_survival({"a": "0", "b": "1"})
    assert not is_survival({})
    found = survival_of({"a": "34.5;1", "b": "3;0"}, ("b", "a"))
    assert found.time.tolist() == [3.0, 34.5]
    assert found.event.tolist() == [False, True]
    for odd in ("alive", "0;1", "5;2", "-1;1"):
        with pytest.raises(FoldError, match="TIME;EVENT"):
            is_survival({"a": "34.5;1", "b": odd})


def cohort(effect: float, n_folds: int = 4, seed: int = 0) -> list[Fold]:
    """24 patients; the mean of one dimension drives the hazard."""
    rng = np.random.default_rng(seed)
    slides, rows = [], {}
    for patient in range(24):
        level = rng.standard_normal()
        time = rng.exponential(math.exp(-effect * level)) + 0.01
        counts = sparse.csr_matrix(rng.poisson(2.0, (60, 5)).astype(np.int32))
        name = f"s{patient:02d}"
        text = f"{time:.4f};{int(rng.random() < 0.8)}"
        slides.append(_slide(name, f"p{patient:02d}", counts, text))
        rows[name] = 0.1 * rng.standard_normal((60, 6)) + level * np.eye(6)[0]
    model = Representation("hibio", omics=rows, aligned=False)
    folds = []
    for held in range(n_folds):
        test = tuple(s for i, s in enumerate(slides) if i % n_folds == held)
        train = tuple(s for i, s in enumerate(slides) if i % n_folds != held)
        folds.append(Fold(f"f{held}", seed, np.array(list("abcde")), train, test, (model,)))
    return folds


def test_a_planted_hazard_is_found_in_unseen_patients_and_noise_is_not() -> None:
    row = run(cohort(2.0), FAST).models["hibio"]
    assert row["omics/mean/c_index"].values[0] > 0.65
    low, high = (row[f"omics/mean/c_index_{end}"].values[0] for end in ("low", "high"))
    assert low <= row["omics/mean/c_index"].values[0] <= high
    assert row["omics/mean/c_index"].chance == 0.5
    assert len(row["omics/mean/log_hazard"].values) == 24
    nothing = [
        run(cohort(0.0, seed=s), FAST).models["hibio"]["omics/mean/c_index"].values[0]
        for s in range(6)
    ]
    assert np.mean(nothing) == pytest.approx(0.5, abs=0.12)


def test_tables_without_a_model_stand_beside_it_and_classes_still_run() -> None:
    result = run(cohort(2.0), FAST)
    assert {"pseudobulk", "cohort_facts"} < set(result.models)
    assert not any("auroc" in name for name in result.models["hibio"])


def changed(slide: SlideData, outcome: str) -> SlideData:
    return replace(slide, outcome=outcome)


def test_test_patients_outcomes_do_not_change_their_risk() -> None:
    fold = cohort(2.0)[0]
    outcomes = {s.patient_id: s.outcome for s in (*fold.train, *fold.test)}
    before = fold_risk(fold, "hibio", "omics", outcomes, FAST.survival)
    other = {**outcomes, **{s.patient_id: "99;0" for s in fold.test}}
    assert fold_risk(fold, "hibio", "omics", other, FAST.survival) == before
    trained = {**outcomes, **{s.patient_id: "5;1" for s in fold.train}}
    assert fold_risk(fold, "hibio", "omics", trained, FAST.survival) != before


def test_too_few_events_and_equal_means_are_told() -> None:
    folds = cohort(2.0)
    censored = [
        replace(f, train=tuple(changed(s, "3;0") for s in f.train), test=f.test[:0]) for f in folds
    ]
    result = run(censored, FAST)
    assert result.models == {}
    assert "0 training patients with an event, 3 are needed" in result.notes[0]
    flat = {n: x - x.mean(axis=0) for n, x in folds[0].models[0].omics.items()}
    model = replace(folds[0].models[0], omics=flat)
    result = run([replace(f, models=(model,)) for f in folds], FAST)
    assert "hibio" not in result.models
    assert any("same for all patients" in note for note in result.notes)


def test_one_event_and_one_censored_patient_give_a_risk_and_no_crash():
    survival = Survival(np.array([2.0, 5.0]), np.array([True, False]))
    train = np.array([[1.0], [-1.0]])
    risk = cox_risk(train, survival, train, grid=(1.0, 10.0), n_folds=5)
    assert np.isfinite(risk).all()
    assert risk[0] > risk[1]
