"""Roles are said: what is measured, what of it was seen in training, and where that is told."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from eval.embed import checked, load_checkpoint
from eval.folds import assemble as module
from eval.folds.assemble import group_checkpoints, seed_means, split_entries
from eval.folds.fold import Fold, Representation
from eval.results import Metric, Row, TaskResult
from eval.run import apart, evaluate, with_seen
from hibio.checkpoint import CHECKSUMS, NAME, TRAINER
from hibio.config.files import ConfigError
from hibio.config.training import StageConfig
from hibio.data.splits import INDEX_NAME, read_entries, split_by_patient
from hibio.run import expand, train_job
from preprocessing.store import SlideStore, say_anew
from preprocessing.store.read import stores_in
from tests.hibio.toy import SPOT, run_config


def say(store: Path, patient: str, role: str) -> None:
    with SlideStore(store) as old:
        settings = old.attrs["settings"]
    say_anew(store, {"patient_id": patient, "role": role}, settings)


@pytest.fixture(scope="module")
def trained(toy_stores, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint of fold none, trained on sim001 of patient01 alone, and its stores.

    sim002 is a test section of the same patient; sim003 of another came after the training.
    """
    root = tmp_path_factory.mktemp("seen")
    shutil.copytree(toy_stores, root / "stores", ignore=shutil.ignore_patterns(INDEX_NAME))
    say(root / "stores" / "sim002.h5", "patient01", "test")
    later = (root / "stores" / "sim003.h5").rename(root / "sim003.h5")
    stages = (StageConfig("spot", 1, SPOT),)
    config = run_config(root / "stores", root / "run", stages=stages, folds=("each",))
    (job,) = expand(config)
    assert job.fold == "none"  # the roles are the split
    checkpoint = train_job(job)
    later.rename(root / "stores" / "sim003.h5")
    return checkpoint, root / "stores"


@pytest.fixture
def stores(trained, tmp_path) -> Path:
    shutil.copytree(trained[1], tmp_path / "stores")
    return tmp_path / "stores"


def split_in(checkpoint: Path, stores: Path, *test: str):
    (group,) = group_checkpoints([checkpoint])
    return split_entries(group, read_entries(stores_in(stores)), test)


def measured(checkpoint: Path, stores: Path, out: Path, *test: str) -> tuple[dict, str, str]:
    evaluate(checkpoint, stores, out, ["retrieval"], test=test)
    body = json.loads((out / "results.json").read_text())
    return body, (out / "results.md").read_text(), (out / "report.html").read_text()


def test_unseen_slides_and_seen_patients_have_rows_of_their_own(trained, tmp_path):
    body, markdown, page = measured(*trained, tmp_path)
    task = body["tasks"]["retrieval"]
    metric = task["short"][0]
    assert task["models"]["hibio"][metric]["keys"] == ["none/0/sim003"]
    assert task["models"]["hibio (seen patient)"][metric]["keys"] == ["none/0/sim002"]
    assert "seen" not in task["rows"]["hibio"]
    assert task["rows"]["hibio (seen patient)"]["seen"] == "patient"
    assert task["rows"]["hibio (seen patient)"]["role"] == "model"
    assert body["data"]["seen"] == {"seen patient": ["none/sim002"]}
    for text in (markdown, page):
        assert "hibio (seen patient)" in text
        assert "none/sim002" in text


def test_slides_that_are_asked_for_are_measured_alone_and_marked(trained, tmp_path):
    body, markdown, page = measured(*trained, tmp_path, "sim002")
    task = body["tasks"]["retrieval"]
    assert task["models"]["hibio"][task["short"][0]]["keys"] == ["none/0/sim002"]
    assert {row["seen"] for row in task["rows"].values()} == {"patient"}
    for text in (markdown, page):
        assert "hibio (seen patient)" in text


def test_training_slides_are_no_test_slides_while_there_are_others(trained, stores):
    split = split_in(trained[0], stores)
    assert [[e.slide_id for e in side] for side in (split.train, split.test)] == [
        ["sim001"],
        ["sim002", "sim003"],
    ]
    (group,) = group_checkpoints([trained[0]])
    artifacts = group.main.model.artifacts
    assert module._seen(split, artifacts) == {"sim002": "patient"}
    for name in ("sim002", "sim003"):
        (stores / f"{name}.h5").unlink()
    alone = split_in(trained[0], stores)  # nothing else is there: transductive, and marked
    assert (alone.train, [e.slide_id for e in alone.test]) == ((), ["sim001"])
    assert module._seen(alone, artifacts) == {"sim001": "slide"}


def test_a_test_slide_of_a_trained_patient_must_be_said(trained, stores):
    say(stores / "sim002.h5", "patient01", "")
    with pytest.raises(ConfigError, match=r"patients patient01 .* If sim002 .*--test SLIDES"):
        split_in(trained[0], stores)
    assert [e.slide_id for e in split_in(trained[0], stores, "sim002").test] == ["sim002"]
    say(stores / "sim002.h5", "patient01", "train")
    assert [e.slide_id for e in split_in(trained[0], stores).test] == ["sim003"]
    say(stores / "sim001.h5", "patient01", "test")
    with pytest.raises(ConfigError, match=r"sim001 has the role test, but .* was trained on it"):
        split_in(trained[0], stores)


def test_new_slides_are_measured_without_the_training_slides(trained, stores):
    (stores / "sim001.h5").unlink()
    with pytest.warns(UserWarning, match="none of the 1 training slides is in the data"):
        split = split_in(trained[0], stores)
    assert [e.slide_id for e in split.test] == ["sim002", "sim003"]
    (group,) = group_checkpoints([trained[0]])
    assert module._seen(split, group.main.model.artifacts) == {"sim002": "patient"}


def test_a_run_knows_its_slides_by_content(trained, stores):
    checkpoint = load_checkpoint(trained[0])
    shutil.copy(stores / "sim001.h5", stores / "again.h5")
    with h5py.File(stores / "again.h5", "r+") as file:
        file.attrs.update({"slide_id": "again", "patient_id": "patient09"})
    with pytest.raises(ConfigError, match=r"'again' has the counts of the training slide 'sim001'"):
        split_in(trained[0], stores)
    with pytest.warns(UserWarning, match="slide 'again' has the counts of 'sim001'"):
        checked(checkpoint, read_entries(stores_in(stores)))
    (stores / "again.h5").unlink()
    shutil.copy(stores / "sim003.h5", stores / "sim001.h5")
    (stores / "sim003.h5").unlink()
    with h5py.File(stores / "sim001.h5", "r+") as file:
        file.attrs.update({"slide_id": "sim001", "patient_id": "patient01"})
    with pytest.raises(ConfigError, match=r"other content under the ids sim001 \(counts"):
        split_in(trained[0], stores)
    with pytest.raises(ConfigError, match=r"other content under the ids sim001 \(counts"):
        checked(checkpoint, read_entries(stores_in(stores)))
    artifacts = dataclasses.replace(checkpoint.model.artifacts, seals={})
    checkpoint.model.artifacts = artifacts  # as an older version left it
    with pytest.warns(UserWarning, match="an older HiBio kept no seals"):
        checked(checkpoint, read_entries(stores_in(stores)))


def test_a_training_that_was_stopped_is_not_measured(trained, tmp_path):
    folder = tmp_path / "run" / "hibio" / "fold-none" / "seed-0"
    shutil.copytree(trained[0], folder / NAME)
    (tmp_path / "run" / "config.yaml").touch()
    state = torch.load(folder / NAME / TRAINER, weights_only=True)
    assert state["n_steps"] == state["step"]
    torch.save({**state, "finished": False, "step": 1, "n_steps": 89}, folder / NAME / TRAINER)
    (folder / NAME / CHECKSUMS).unlink()
    told = (
        r"1 of 1 trainings are not finished: .* stopped at step 1 of 89\. Go on with `hibio train "
    )
    with pytest.raises(ConfigError, match=told + r"--config .*run/config.yaml --resume .*run`"):
        group_checkpoints([folder / NAME])


def test_a_variant_that_a_seed_lacks_is_left_out_there(monkeypatch):
    def loaded(path: Path) -> SimpleNamespace:
        variant, seed = path.name.split("-")
        model = SimpleNamespace(artifacts=SimpleNamespace(train_slides=("s",)))
        return SimpleNamespace(variant=variant, fold="A", seed=int(seed), model=model)

    monkeypatch.setattr(module, "load_checkpoint", loaded)
    names = ("hibio-0", "flat-0", "hibio-1", "flat-2")
    with pytest.warns(
        UserWarning, match=r"fold A, seed 2 has no checkpoint of 'hibio' \(only flat"
    ):
        groups = group_checkpoints([Path(name) for name in names])
    assert [(g.seed, [c.variant for c in g.checkpoints], g.lacking) for g in groups] == [
        (0, ["hibio", "flat"], ()),
        (1, ["hibio"], ("flat",)),
    ]


def test_the_mean_over_seeds_leaves_out_what_a_seed_lacks():
    def fold(seed: int, *names: str) -> Fold:
        rows = {"s": np.eye(3)}
        models = tuple(Representation(name, rows, rows) for name in names)
        return Fold("A", seed, np.array(["G"]), (), (), models)

    mean = seed_means([fold(0, "hibio", "flat"), fold(1, "hibio")])
    assert mean is not None
    assert [model.name for model in mean.models] == ["hibio_seed_mean"]


def test_rows_are_apart_only_where_both_kinds_are_there():
    metric = Metric([1.0], "u", None, ["f/0/s"])
    result = TaskResult("t", {"hibio": {"m": metric}}, rows={"hibio": Row("model")})
    seen = with_seen(result, "patient")
    assert list(apart([seen])[0].models) == ["hibio"]
    assert [list(one.models) for one in apart([result, seen])] == [
        ["hibio"],
        ["hibio (seen patient)"],
    ]


def test_a_split_tells_seen_patients(trained):
    split = split_by_patient(read_entries(stores_in(trained[1])), "patient03")
    assert [entry.slide_id for entry in split.seen_patients] == ["sim002"]
