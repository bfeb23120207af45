"""Pictures of a report read the settings that its numbers were made with."""

import dataclasses
from types import SimpleNamespace

import pytest

from eval.folds.fold import Representation
from eval.report import gallery
from eval.tasks.domains import DomainsConfig


def test_niches_are_smoothed_as_the_task_says(toy_fold, monkeypatch):
    asked = []

    def seen(rows, near, rounds):
        asked.append((near.shape[1], rounds))
        return rows

    monkeypatch.setattr(gallery, "smooth", seen)
    entry = SimpleNamespace(slide_id=toy_fold.test[0].slide_id)
    config = DomainsConfig(n_neighbours=2, rounds=7)
    assert gallery._niches(toy_fold, "hibio", entry, config)
    assert asked
    assert set(asked) == {(2, 7)}


@pytest.mark.parametrize("pictured", [False, True])
def test_a_model_without_images_has_no_figures_of_them(toy_fold, monkeypatch, pictured):
    """Its slides may well have pictures, which other models read."""
    for part in ("_regions", "_retrieval"):
        monkeypatch.setattr(gallery, part, lambda *_, part=part: part)
    for part in ("_losses", "_history", "_heatmaps"):
        monkeypatch.setattr(gallery, part, lambda *_: [])
    own = toy_fold.model("hibio")
    if not pictured:
        own = Representation("hibio", None, own.omics, aligned=False)
    fold = dataclasses.replace(toy_fold, models=(own,))
    assert fold.paired_test
    entries = [SimpleNamespace(slide_id=slide.slide_id) for slide in fold.test]
    groups = [SimpleNamespace(main=SimpleNamespace(variant="hibio", path=None))]
    found = gallery.gallery(groups, fold, entries, {"tasks": {}}, {})
    assert found == ["_regions"] + ["_retrieval"] * pictured
