"""Few-shot curves: nested draws, what k = 1 means, more labels help, chance without signal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from eval.errors import FoldError
from eval.report.figures.lines import few_shot_curves
from eval.tasks.annotation import (
    AnnotationConfig,
    FewShotConfig,
    Labelled,
    draw_spots,
    few_shot_scores,
    run,
)
from preprocessing.errors import DataError

FAST = AnnotationConfig(grid=(0.1,), few_shot=FewShotConfig(k=(1, 5, 20), draws=4))


def test_draws_take_k_of_each_class_and_are_nested() -> None:
    classes = np.array(["a"] * 30 + ["b"] * 4 + ["c"] * 9)
    small, large = (set(draw_spots(classes, k, (0, 1)).tolist()) for k in (2, 8))
    assert small < large
    for name, size in (("a", 8), ("b", 4), ("c", 8)):
        assert sum(classes[i] == name for i in large) == size
    assert set(draw_spots(classes, 2, (0, 2)).tolist()) != small
    every = np.concatenate([draw_spots(classes, 1, (0, d)) for d in range(400)])
    share = np.bincount(every, minlength=43)[:30] / 400
    assert share.max() < 0.12  # no spot is preferred


def test_scores_equal_a_probe_written_out() -> None:
    rng = np.random.default_rng(0)
    y = rng.choice(["a", "b", "c"], 60)
    x = rng.standard_normal((60, 5)) + (y == "a")[:, None]
    test_y, patient = rng.choice(["a", "b"], 40), rng.choice(["p", "q"], 40)
    test_x = rng.standard_normal((40, 5)) + (test_y == "a")[:, None]
    config = FewShotConfig(k=(3,), draws=2)
    found = list(few_shot_scores(Labelled(x, y, y), Labelled(test_x, test_y, patient), 7, config))
    assert [(s.k, s.draw, s.patient) for s in found] == [
        (3, 0, "p"),
        (3, 0, "q"),
        (3, 1, "p"),
        (3, 1, "q"),
    ]
    for score in found:
        few = draw_spots(y, 3, (7, score.draw))
        probe = LogisticRegression(C=0.1, class_weight="balanced", max_iter=300)
        own = patient == score.patient
        guess = probe.fit(x[few], y[few]).predict(test_x[own])
        hit = [np.mean(guess[test_y[own] == c] == c) for c in ("a", "b")]
        assert score.value == pytest.approx(np.mean(hit))
        assert score.chance == 0.5
    assert balanced_accuracy_score(["a", "b"], ["a", "a"]) == 0.5


def test_more_labels_help_and_all_draws_are_kept(toy_fold) -> None:
    fold = replace(toy_fold, models=(toy_fold.model("hibio"), toy_fold.model("coordinates")))
    result = run(fold, FAST)
    row = result.models["hibio"]
    assert row["omics/few_shot@1"].keys == [f"toy/0/C:domain:draw{d}" for d in range(4)]
    assert row["omics/few_shot@20"].mean > row["omics/few_shot@1"].mean
    assert row["omics/few_shot@20"].mean > 0.7
    assert row["omics/few_shot@20"].mean <= row["omics/balanced_accuracy"].mean + 0.05
    assert row["image/few_shot@5"].chance == pytest.approx(1 / 3)
    figure = few_shot_curves({"tasks": {"annotation": result.to_json()}}, "image")
    assert figure.png[:4] == b"\x89PNG"
    with pytest.raises(DataError, match="few-shot values"):
        few_shot_curves({"tasks": {"annotation": result.to_json()}}, "other")


def test_labels_without_signal_stay_at_chance(null_fold) -> None:
    fold = replace(null_fold, models=null_fold.models[:1])
    row = run(fold, FAST).models["hibio"]
    assert row["omics/few_shot@20"].mean == pytest.approx(1 / 3, abs=0.1)


def test_labels_of_test_patients_are_only_scored_with(toy_fold) -> None:
    fold = replace(toy_fold, models=toy_fold.models[:1])
    before = run(fold, FAST).models["hibio"]["omics/few_shot@5"].values
    labels = fold.test[0].labels.copy()
    labels["domain"] = labels["domain"].to_numpy()[::-1]
    other = (replace(fold.test[0], labels=labels), fold.test[1])
    after = run(replace(fold, test=other), FAST).models["hibio"]["omics/few_shot@5"].values
    assert len(before) == len(after)
    assert np.mean(after) < np.mean(before)


def test_a_rare_class_is_told_and_empty_curves_are_none(toy_fold) -> None:
    fold = replace(toy_fold, models=toy_fold.models[:1])
    many = replace(FAST, few_shot=FewShotConfig(k=(500,), draws=1))
    assert any("take all of them" in note for note in run(fold, many).notes)
    none = replace(FAST, few_shot=FewShotConfig(k=()))
    assert not any("few_shot" in name for name in run(fold, none).models["hibio"])
    with pytest.raises(FoldError, match="at least 1"):
        FewShotConfig(k=(0,))
