"""Annotation within slides: the probe is held out by spatial block when nothing else is."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from eval.folds.fold import Representation
from eval.folds.spatial_blocks import BlocksConfig, block_splits
from eval.results import Question, ResultTable
from eval.tasks.annotation import AnnotationConfig, run

CONFIG = AnnotationConfig(blocks=BlocksConfig(4, 120.0))


def one_slide(fold, labels=None):
    """Fold ``none``: the first test slide, seen by the models, and no training slide."""
    slide = fold.test[0]
    if labels is not None:
        slide = replace(slide, labels=pd.DataFrame({"domain": labels}))
    rows = {slide.slide_id: np.random.default_rng(3).standard_normal((slide.n_spots, 8))}
    models = (fold.model("hibio"), Representation("noise", omics=rows), fold.model("lsa"))
    return replace(fold, name="none", train=(), test=(slide,), models=models)


@pytest.fixture(scope="module")
def result(toy_fold):
    return run(one_slide(toy_fold), CONFIG)


def test_planted_labels_are_read_in_the_held_out_block_and_noise_is_at_chance(result):
    for side in ("omics", "image"):
        assert result.models["hibio"][f"{side}/balanced_accuracy"].mean > 0.7
        assert result.models["hibio"][f"{side}/macro_auroc"].mean > 0.8
    noise = result.models["noise"]
    assert noise["omics/macro_auroc"].mean == pytest.approx(0.5, abs=0.12)
    keys = [f"none/0/c1:domain:block{number}" for number in range(4)]
    assert result.models["hibio"]["omics/balanced_accuracy"].keys == keys
    assert result.models["hibio"]["omics/balanced_accuracy"].unit.endswith("per block")


def test_shuffled_labels_are_at_chance(toy_fold):
    rng = np.random.default_rng(6)
    for seed in range(2):
        labels = rng.permutation(toy_fold.test[0].labels["domain"].to_numpy())
        row = run(one_slide(toy_fold, labels), CONFIG).models["hibio"]
        assert row["omics/macro_auroc"].mean == pytest.approx(0.5, abs=0.14), seed


def test_labels_inside_the_buffer_do_not_reach_the_probe(toy_fold, result):
    slide = toy_fold.test[0]
    split = block_splits(slide, CONFIG.blocks, ResultTable(Question("x")))[1]
    inside = ~split.train & ~split.test
    assert inside.sum() == split.n_left_out > 5
    labels = slide.labels["domain"].to_numpy().copy()
    labels[inside] = "left"
    after = run(one_slide(toy_fold, labels), CONFIG).models["hibio"]
    before = result.models["hibio"]
    for name, metric in before.items():
        assert after[name].values[1] == metric.values[1], name
    assert after["omics/macro_auroc"].values != before["omics/macro_auroc"].values


def test_notes_say_what_was_seen_and_what_was_left_out(result):
    notes = " ".join(result.notes)
    assert "without labels (transductive)" in notes
    assert "4 spatial blocks, each held out once; training cells closer than 120 um" in notes


def test_a_block_without_anything_to_learn_or_to_test_is_noted(toy_fold):
    slide = toy_fold.test[0]
    splits = block_splits(slide, CONFIG.blocks, ResultTable(Question("x")))
    labels = slide.labels["domain"].to_numpy().copy()
    labels[splits[0].test] = "unknown"
    result = run(one_slide(toy_fold, labels), CONFIG)
    assert any("block0: 3 classes to learn outside the buffer, 0" in n for n in result.notes)
    assert len(result.models["hibio"]["omics/macro_f1"].keys) == 3
    wide = replace(CONFIG, blocks=BlocksConfig(4, 5000.0))
    blocked = run(one_slide(toy_fold), wide)
    assert blocked.models == {}
    assert "no slide with two classes to split; not run" in " ".join(blocked.notes)


def test_only_the_columns_asked_for_and_only_with_two_classes(toy_fold):
    none = run(one_slide(toy_fold), replace(CONFIG, columns=("cell_type",)))
    assert none.models == {}
    assert "not run" in none.notes[0]
    same = run(one_slide(toy_fold, ["x"] * toy_fold.test[0].n_spots), CONFIG)
    assert same.models == {}
