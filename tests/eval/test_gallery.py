"""Pictures of a report read the settings that its numbers were made with."""

from types import SimpleNamespace

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
