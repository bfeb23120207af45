"""Clinical outcome: planted ones found, nothing leaks, pooled AUROC, notes where it cannot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score

from eval.errors import FoldError
from eval.folds.fold import Fold, Representation, SlideData
from eval.measures.metrics import macro_auroc
from eval.tasks import TASKS
from eval.tasks.outcome import OutcomeConfig, predict, run
from eval.tasks.patients import AttentionPoolConfig, patient_outcomes

N_SPOTS, WIDTH, N_FOLDS = 60, 6, 4
FAST = OutcomeConfig(attention=AttentionPoolConfig(steps=25, starts=2), draws=200)


def cohort(
    embed: Callable[[np.random.Generator, int, int], np.ndarray],
    n_patients: int = 16,
    n_classes: int = 2,
    seed: int = 0,
    twice: bool = False,
) -> list[Fold]:
    """Folds of four patients a time; ``embed(rng, class, n_spots)`` makes a slide's embedding."""
    rng = np.random.default_rng(seed)
    slides, rows = [], {}
    for patient in range(n_patients):
        # classes are dealt out within every fold of four patients
        outcome = (patient + patient // n_classes // 2) % n_classes
        for copy in range(1 + twice):
            name = f"s{patient:02d}{'ab'[copy]}"
            counts = sparse.csr_matrix(rng.poisson(2.0, (N_SPOTS, 5)).astype(np.int32))
            slides.append(_slide(name, f"p{patient:02d}", counts, str(outcome)))
            rows[name] = embed(rng, outcome, N_SPOTS)
    model = Representation("hibio", omics=rows, aligned=False)
    folds = []
    for held in range(N_FOLDS):
        mine = {f"p{p:02d}" for p in range(n_patients) if p * N_FOLDS // n_patients == held}
        test = tuple(s for s in slides if s.patient_id in mine)
        train = tuple(s for s in slides if s.patient_id not in mine)
        genes = np.array([f"G{g}" for g in range(5)])
        folds.append(Fold(f"f{held}", seed, genes, train, test, (model,)))
    return folds


def _slide(name: str, patient: str, counts: sparse.csr_matrix, outcome: str) -> SlideData:
    near = np.full((N_SPOTS, 1), -1)
    xy = np.zeros((N_SPOTS, 2))
    labels = pd.DataFrame(index=range(N_SPOTS))
    return SlideData(name, patient, counts, counts, xy, near, labels, False, outcome=outcome)


def oracle(rng: np.random.Generator, outcome: int, n: int) -> np.ndarray:
    return rng.standard_normal((n, WIDTH)) + 2.0 * np.eye(WIDTH)[outcome]


def noise(rng: np.random.Generator, outcome: int, n: int) -> np.ndarray:
    return rng.standard_normal((n, WIDTH))


def rare(rng: np.random.Generator, outcome: int, n: int) -> np.ndarray:
    """3 % of the spots carry the outcome, under a shift of the whole patient."""
    rows = rng.standard_normal((n, WIDTH)) + rng.standard_normal(WIDTH)
    rows[: round(0.03 * n), 0] += 8.0 * outcome
    return rows


def value(result, name: str, model: str = "hibio") -> float:
    return result.models[model][f"omics/{name}"].values[0]


def test_an_oracle_embedding_is_found_and_noise_is_not() -> None:
    found, null = run(cohort(oracle), FAST), run(cohort(noise, 24, seed=1), FAST)
    for pooling in ("mean", "attention"):
        assert value(found, f"{pooling}/auroc") > 0.95
        assert value(found, f"{pooling}/balanced_accuracy") > 0.85
        assert value(null, f"{pooling}/auroc_low") < 0.5 < value(null, f"{pooling}/auroc_high")
    assert value(found, "mean/auroc_low", "cohort_facts") < 0.6
    assert "omics/mean/auroc" in found.models["pseudobulk"]
    assert any("few test patients with an outcome (0: 8, 1: 8)" in note for note in found.notes)
    assert not any("few test patients" in note for note in null.notes)


def test_attention_finds_the_three_percent_of_spots_that_the_mean_loses() -> None:
    def bags(rng: np.random.Generator, outcome: int, n: int) -> np.ndarray:
        return rare(rng, outcome, 3 * n)[: 3 * n : 3]  # keeps two of the marked spots

    result = run(cohort(bags, n_patients=32), OutcomeConfig(draws=50))
    assert value(result, "attention/auroc") > 0.85
    assert value(result, "attention/auroc") > value(result, "mean/auroc") + 0.15


def test_auroc_is_that_of_the_pooled_probabilities() -> None:
    result = run(cohort(oracle_with_noise), FAST)
    for pooling in ("mean", "attention"):
        kept = result.models["hibio"][f"omics/{pooling}/probability_of_outcome"]
        outcome = np.array([int(key.rsplit(":", 1)[1]) for key in kept.keys])
        one = np.where(outcome == 1, kept.values, 1.0 - np.array(kept.values))
        assert len(kept.keys) == 16
        assert value(result, f"{pooling}/auroc") == pytest.approx(roc_auc_score(outcome, one))
        low, high = (value(result, f"{pooling}/auroc_{end}") for end in ("low", "high"))
        assert low <= value(result, f"{pooling}/auroc") <= high
        right = [np.mean(one[outcome == k].round() == k) for k in (0, 1)]
        assert value(result, f"{pooling}/balanced_accuracy") == pytest.approx(np.mean(right))


def oracle_with_noise(rng: np.random.Generator, outcome: int, n: int) -> np.ndarray:
    return noise(rng, outcome, n) + rng.standard_normal(WIDTH) + 1.0 * np.eye(WIDTH)[outcome]


@pytest.mark.parametrize("name", ["hibio", "pseudobulk", "cohort_facts"])
def test_outcomes_of_test_patients_cannot_change_the_predictions(name: str) -> None:
    fold = cohort(oracle)[0]
    outcomes = patient_outcomes([*fold.train, *fold.test])
    tested = [slide.patient_id for slide in fold.test]
    lied = outcomes | {p: "1" if outcomes[p] == "0" else "0" for p in tested}
    first = predict(fold, name, "omics", outcomes, ["0", "1"], FAST)
    again = predict(fold, name, "omics", lied, ["0", "1"], FAST)
    assert first.patients == again.patients == tuple(tested)
    for pooling, probability in first.by_pooling.items():
        np.testing.assert_array_equal(probability, again.by_pooling[pooling])


def test_a_test_patients_prediction_does_not_depend_on_the_other_test_patients() -> None:
    fold = cohort(oracle)[0]
    outcomes = patient_outcomes([*fold.train, *fold.test])
    every = predict(fold, "hibio", "omics", outcomes, ["0", "1"], FAST)
    alone = predict(replace(fold, test=fold.test[:1]), "hibio", "omics", outcomes, ["0", "1"], FAST)
    for pooling, probability in alone.by_pooling.items():
        np.testing.assert_allclose(probability, every.by_pooling[pooling][:1], atol=1e-12)


def test_order_of_spots_does_not_matter_and_runs_repeat() -> None:
    folds = cohort(oracle_with_noise)
    order = np.random.default_rng(1).permutation(N_SPOTS)
    model = folds[0].models[0]
    turned = replace(model, omics={s: rows[order] for s, rows in (model.omics or {}).items()})
    first, again = run(folds, FAST), run(folds, FAST)
    moved = run([replace(fold, models=(turned,)) for fold in folds], FAST)
    for name, metric in first.models["hibio"].items():
        assert metric == again.models["hibio"][name]
        np.testing.assert_allclose(metric.values, moved.models["hibio"][name].values, atol=1e-6)


def test_slides_of_a_patient_are_one_bag_and_large_ones_are_thinned() -> None:
    small = replace(FAST, attention=replace(FAST.attention, max_spots=20))
    result = run(cohort(oracle, twice=True), small)
    keys = result.models["hibio"]["omics/attention/probability_of_outcome"].keys
    assert len(keys) == len({key.split("/")[2] for key in keys}) == 16
    assert value(result, "attention/auroc") > 0.9


def test_three_classes_keep_every_probability() -> None:
    result = run(cohort(oracle, n_patients=24, n_classes=3), FAST)
    row = result.models["hibio"]
    assert row["omics/mean/auroc"].values[0] > 0.9
    parts = [row[f"omics/mean/probability_{c}"] for c in "012"]
    score = np.column_stack([part.values for part in parts])
    np.testing.assert_allclose(score.sum(axis=1), 1.0)
    truth = np.array([key.rsplit(":", 1)[1] for key in parts[0].keys])
    assert row["omics/mean/auroc"].values[0] == macro_auroc(truth, score, ["0", "1", "2"])
    assert row["omics/mean/balanced_accuracy"].chance == pytest.approx(1 / 3)


def test_embeddings_standardised_per_slide_have_no_mean_to_pool() -> None:
    def centred(rng: np.random.Generator, outcome: int, n: int) -> np.ndarray:
        rows = oracle(rng, outcome, n)
        return (rows - rows.mean(axis=0)) / rows.std(axis=0)

    result = run(cohort(centred), FAST)
    assert "omics/mean/auroc" not in result.models["hibio"]
    assert "omics/attention/auroc" in result.models["hibio"]
    assert any("mean pooling not run" in note for note in result.notes)


def test_too_few_patients_or_no_outcome_is_said_and_not_run() -> None:
    folds = cohort(oracle)
    blank = [_with_outcome(fold, lambda slide: "") for fold in folds]
    result = run(blank, FAST)
    assert result.models == {}
    assert "not run" in result.notes[0]
    lonely = [
        _with_outcome(fold, lambda s: "1" if s.patient_id in ("p00", "p04") else "0")
        for fold in folds
    ]
    notes = run(lonely, FAST).notes
    assert any("1 training patients with the outcome '1', 2 are needed" in note for note in notes)
    every = replace(folds[0], name="none", train=(), test=folds[0].test)
    assert run([every], FAST).models == {}


def test_unknown_outcomes_are_left_out_and_a_model_of_some_folds_is_not_pooled() -> None:
    folds = [
        _with_outcome(f, lambda s: "" if s.patient_id == "p01" else s.outcome)
        for f in cohort(oracle)
    ]
    extra = replace(folds[0].models[0], name="lsa")
    folds[0] = replace(folds[0], models=(*folds[0].models, extra))
    result = run(folds, FAST)
    keys = result.models["hibio"]["omics/mean/probability_of_outcome"].keys
    assert len(keys) == 15
    assert not any("p01" in key for key in keys)
    assert "lsa" not in result.models
    assert any("only 1 of 4 folds" in note for note in result.notes)


def test_two_outcomes_of_one_patient_are_refused() -> None:
    slides = list(cohort(oracle, twice=True)[0].train)
    slides[0] = replace(slides[0], outcome="other")
    with pytest.raises(FoldError, match="same one in the manifest"):
        patient_outcomes(slides)


def test_the_task_takes_all_folds_of_a_seed() -> None:
    assert TASKS["outcome"].pooled
    assert sum(task.pooled for task in TASKS.values()) == 1


def _with_outcome(fold: Fold, of: Callable[[SlideData], str]) -> Fold:
    train, test = (
        tuple(replace(slide, outcome=of(slide)) for slide in side)
        for side in (fold.train, fold.test)
    )
    return replace(fold, train=train, test=test)
