"""Annotation probe: planted labels carry over to the unseen patient, shuffled ones do not."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from eval.tasks.annotation import AnnotationConfig, Labelled, choose_c, run
from tests.eval.conftest import make_fold

CONFIG = AnnotationConfig()


@pytest.fixture(scope="module")
def result(toy_fold):
    return run(toy_fold, CONFIG)


def labelled(n: int, noise: float, patients: str) -> Labelled:
    rng = np.random.default_rng(4)
    y = rng.choice(["x", "y"], n)
    x = noise * rng.standard_normal((n, 30)) + (y == "x")[:, None] * np.eye(30)[0]
    return Labelled(x, y, rng.choice(list(patients), n))


def relabelled(slide, **changes: str):
    """The slide with every spot of a domain named otherwise."""
    labels = slide.labels.copy()
    labels["domain"] = labels["domain"].replace(changes)
    return replace(slide, labels=labels)


def test_planted_labels_carry_over_to_the_unseen_patient(result):
    row = result.models["hibio"]
    for side in ("omics", "image"):
        assert row[f"{side}/balanced_accuracy"].mean > 0.8
        assert row[f"{side}/macro_f1"].mean > 0.8
        assert row[f"{side}/macro_auroc"].mean > 0.95
    assert row["omics/macro_f1"].keys == ["toy/0/C:domain"]
    assert row["omics/balanced_accuracy"].chance == pytest.approx(1 / 3)
    better = row["omics/macro_auroc"].mean
    assert better > result.models["coordinates"]["omics/macro_auroc"].mean + 0.2


def test_shuffled_labels_are_at_chance(null_fold):
    models = run(null_fold, CONFIG).models
    assert {"omics/macro_auroc", "image/macro_auroc"} <= models["hibio"].keys()
    for name, row in models.items():
        for side in ("omics", "image"):
            if f"{side}/macro_auroc" in row:
                assert row[f"{side}/macro_auroc"].mean == pytest.approx(0.5, abs=0.1), name
                found = row[f"{side}/balanced_accuracy"].mean
                assert found == pytest.approx(1 / 3, abs=0.12), name


def test_the_probe_is_scikit_learns_on_labelled_spots(toy_fold, result):
    def data(slides):
        rows = [toy_fold.model("lsa").omics[s.slide_id] for s in slides]
        x = np.concatenate([(r - r.mean(axis=0)) / r.std(axis=0) for r in rows])
        y = np.concatenate([s.labels["domain"].to_numpy() for s in slides]).astype(str)
        return x[y != "undetermined"], y[y != "undetermined"]

    train, test = data(toy_fold.train), data(toy_fold.test)
    scores = []
    for c in CONFIG.grid:
        probe = LogisticRegression(
            C=c, class_weight="balanced", max_iter=CONFIG.max_iter, tol=CONFIG.tolerance
        ).fit(*train)
        scores.append(balanced_accuracy_score(test[1], probe.predict(test[0])))
    found = result.models["lsa"]["omics/balanced_accuracy"].mean
    assert any(found == pytest.approx(score) for score in scores)


def test_c_is_chosen_between_patients_and_is_the_default_with_one():
    assert choose_c(labelled(200, 1.0, "p"), CONFIG) == CONFIG.default_c
    many = replace(CONFIG, grid=(1e-6, 1.0))
    data = labelled(400, 0.3, "pqrs")
    assert choose_c(data, many) == 1.0
    own = (data.patient == "p") & (np.arange(400) < 200)  # a class that no other patient has
    moved = data.x + 5.0 * own[:, None] * np.eye(30)[1]
    assert choose_c(replace(data, x=moved, y=np.where(own, "z", data.y)), many) == 1.0


def test_test_counts_do_not_reach_the_probe(toy_fold, result):
    def patient_c_without_c2(fold):
        return replace(fold, test=fold.test[:1], models=(fold.model("pca_expression"),))

    before = run(patient_c_without_c2(toy_fold), CONFIG).models["pca_expression"]
    after = run(patient_c_without_c2(make_fold(changed="c2")), CONFIG).models["pca_expression"]
    assert before == after


def test_classes_without_training_spots_are_left_out_and_counted(toy_fold):
    slides = tuple(relabelled(s, right="new") for s in toy_fold.test)
    result = run(replace(toy_fold, test=slides, models=toy_fold.models[:1]), CONFIG)
    assert any("of classes without training spots left out: ['new']" in n for n in result.notes)
    row = result.models["hibio"]
    assert row["omics/balanced_accuracy"].chance == pytest.approx(1 / 2)
    assert row["omics/balanced_accuracy"].mean > 0.75


def test_large_training_sets_are_thinned_and_noted(toy_fold):
    small = replace(toy_fold, models=toy_fold.models[:1])
    result = run(small, replace(CONFIG, max_train_spots=60))
    assert any("60 of 351 labelled training spots" in note for note in result.notes)
    assert result.models["hibio"]["omics/macro_auroc"].mean > 0.8


def test_images_are_only_probed_where_there_are_some(toy_fold):
    blind = tuple(replace(s, has_image=False) for s in toy_fold.test)
    row = run(replace(toy_fold, test=blind, models=toy_fold.models[:1]), CONFIG).models["hibio"]
    assert {"omics/balanced_accuracy", "omics/macro_f1", "omics/macro_auroc"} <= set(row)
    assert not any(name.startswith("image/") for name in row)


def test_without_labels_on_both_sides_the_task_says_so(toy_fold):
    bare = tuple(replace(s, labels=s.labels.drop(columns="domain")) for s in toy_fold.test)
    result = run(replace(toy_fold, test=bare), CONFIG)
    assert result.models == {}
    assert "not run" in result.notes[0]
