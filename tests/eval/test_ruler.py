"""Stored features of a fold are read once, and only where something reads them."""

from types import SimpleNamespace

import numpy as np
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


def test_a_slide_is_prepared_once_for_models_with_the_same_artifacts(monkeypatch):
    prepared = []

    def prepare(path, artifacts, image):
        prepared.append((path, artifacts, image))
        return SimpleNamespace(fused=lambda *_: np.zeros((4, 2)), graph=None)

    def model(artifacts, value):
        found = SimpleNamespace(image=None, omics=np.full((4, 2), value), tower=np.ones((4, 3)))
        return SimpleNamespace(artifacts=artifacts, encode_slide=lambda slide: found)

    monkeypatch.setattr(assemble, "prepare_slide", prepare)
    monkeypatch.setattr(assemble, "fit_region_tree", lambda *_: None)
    monkeypatch.setattr(assemble, "_artifacts_digest", lambda path: path)
    checkpoints = [
        SimpleNamespace(path=path, variant=name, role="model", image_input=image, model=model(*of))
        for path, name, image, of in (
            ("same", "hibio", "f", ("first", 1.0)),
            ("same", "flat", "f", ("first", 2.0)),
            ("same", "patches", "p", ("first", 3.0)),
            ("other", "random", "f", ("second", 4.0)),
        )
    ]
    entries = [SimpleNamespace(slide_id=name, path=name) for name in ("a", "b")]
    rows = assemble.representations(checkpoints, entries, None)
    each = [("first", "f"), ("first", "p"), ("second", "f")]
    assert prepared == [(slide, *one) for slide in ("a", "b") for one in each]
    assert [row.name for row in rows] == ["hibio", "hibio_tower", "flat", "patches", "random"]
    assert [row.omics["b"][0, 0] for row in rows if row.name != "hibio_tower"] == [1, 2, 3, 4]
