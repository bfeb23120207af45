"""Stored features of a fold are read once, and only where something reads them."""

import pytest

from eval.folds import assemble
from eval.folds.assemble import make_ruler
from hibio.data.splits import Split, read_entries
from preprocessing.store.read import stores_in


@pytest.fixture
def reads(monkeypatch):
    """How often stored features are read."""
    found = []
    read = assemble.stored_features

    def counted(entries, image):
        found.append(len(entries))
        return read(entries, image)

    monkeypatch.setattr(assemble, "stored_features", counted)
    return found


@pytest.mark.parametrize(
    ("tasks", "baselines", "expected"),
    [(["domains"], False, 0), (["domains"], True, 1), (["retrieval"], False, 1)],
)
def test_features_are_read_where_they_are_used(
    toy_stores, toy_artifacts, reads, tasks, baselines, expected
):
    entries = tuple(read_entries(stores_in(toy_stores)))
    split = Split("patient03", entries[:2], entries[2:])
    ruler = make_ruler(split, toy_artifacts, "handcrafted", tasks)
    folds = [ruler.with_models((), seed, with_baselines=baselines) for seed in (0, 1)]
    assert len(reads) == expected
    beside = folds[0].raw_features is not None
    assert beside == (tasks == ["retrieval"])
