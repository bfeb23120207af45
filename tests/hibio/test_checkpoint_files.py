"""Checksums of a checkpoint: what they find, what is done about it, other schemas."""

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hibio.artifacts import read_artifacts, write_artifacts
from hibio.checkpoint import (
    BANK,
    CHECKSUMS,
    NAME,
    PREVIOUS,
    DamagedError,
    _seal,
    add_checksum,
    damaged_files,
    read_checksums,
    verify_file,
    verify_files,
    write_checksums,
)
from hibio.config.files import ConfigError
from hibio.model import HiBio
from hibio.run import Job, build, expand, train_all
from hibio.training import checkpoint as module
from hibio.training.checkpoint import DAMAGED, recover_checkpoint, save_checkpoint, whole_checkpoint
from preprocessing import DataError
from preprocessing.store import SlideStore
from tests.hibio.test_artifacts import assert_same
from tests.hibio.toy import edit_store, run_config

MODEL_PARTS = ("artifacts.h5", "config.yaml", "model.safetensors", "trainer.pt")


def save(folder: Path, version: int) -> Path:
    """A checkpoint whose files are small and say which version they are of."""
    model = SimpleNamespace(
        artifacts=f"genes {version}", state_dict=lambda: {"w": torch.full((3,), float(version))}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_artifacts", lambda path, text: path.write_text(text))
        return save_checkpoint(
            folder, model, lambda path: path.write_text(f"v: {version}\n"), {"step": version}
        )


@pytest.fixture
def two(tmp_path) -> Path:
    """A run folder with a checkpoint (2) and the one before it (1)."""
    for version in (1, 2):
        save(tmp_path, version)
    return tmp_path


def flip(path: Path, place: int = -1) -> None:
    """Turn one bit over, in the middle where no place is given."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place < 0 else place] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def rewrite_list(checkpoint: Path, **changes) -> None:
    """The list as somebody who knows how to seal it would write it."""
    content = {**json.loads((checkpoint / CHECKSUMS).read_text()), **changes}
    del content["sha256"]
    content["sha256"] = _seal(content)
    (checkpoint / CHECKSUMS).write_text(json.dumps(content))


DAMAGES = {"flipped": flip, "cut": cut, "empty": lambda p: p.write_bytes(b""), "gone": Path.unlink}


@pytest.mark.parametrize(
    ("damage", "name"),
    [(d, n) for d in DAMAGES for n in MODEL_PARTS] + [("flipped", CHECKSUMS), ("cut", CHECKSUMS)],
)
def test_a_damaged_file_is_told_and_the_one_before_is_used(two, damage, name):
    DAMAGES[damage](two / NAME / name)
    before, problem = whole_checkpoint(two)
    assert before == two / PREVIOUS
    assert name in problem
    assert (two / NAME).is_dir()  # only looked at
    with pytest.warns(UserWarning, match=rf"{NAME}/{name}: .*Going on from .*{PREVIOUS}") as told:
        assert recover_checkpoint(two) == two / PREVIOUS
    assert len(told) == 1
    assert "remove it, and check the disk" in str(told[0].message)
    assert sorted(p.name for p in two.iterdir()) == [DAMAGED, PREVIOUS]
    with warnings.catch_warnings():  # it was said once
        warnings.simplefilter("error")
        assert recover_checkpoint(two) == two / PREVIOUS


def test_a_process_that_is_slower_leaves_what_was_set_aside(two):
    cut(two / NAME / MODEL_PARTS[-1])
    with pytest.warns(UserWarning, match="Going on from"):
        recover_checkpoint(two)
    kept = sorted((two / DAMAGED).iterdir())
    assert module._set_aside(two / NAME) is False
    assert sorted((two / DAMAGED).iterdir()) == kept != []


@settings(deadline=None, max_examples=60)
@given(place=st.integers(0, 10**6))
def test_any_flipped_bit_is_found(tmp_path_factory, place):
    folder = tmp_path_factory.mktemp("flip")
    target = save(folder, 1)
    files = [target / name for name in (*MODEL_PARTS, CHECKSUMS)]
    path = files[place % 5]
    flip(path, place // 5 % path.stat().st_size)
    with pytest.raises(DamagedError, match=rf"{path.name}: (not what was saved|cannot be read)"):
        verify_files(target)
    shutil.rmtree(folder)


def test_the_checkpoint_before_outlives_the_save_after_a_damage(two):
    """The damaged one must not take the place of the good one when the next save comes."""
    flip(two / NAME / "model.safetensors")
    with pytest.warns(UserWarning, match="Going on from"):
        recover_checkpoint(two)
    save(two, 3)
    verify_files(two / NAME)
    verify_files(two / PREVIOUS)
    assert (two / PREVIOUS / "config.yaml").read_text() == "v: 1\n"


def test_with_both_damaged_there_is_an_error_with_both_reasons(two):
    flip(two / NAME / "trainer.pt")
    cut(two / PREVIOUS / "config.yaml")
    with pytest.raises(ConfigError, match=r"trainer\.pt: not .*config\.yaml: not .*remove them"):
        recover_checkpoint(two)
    assert sorted(p.name for p in two.iterdir()) == [NAME, PREVIOUS]
    shutil.rmtree(two / PREVIOUS)
    with pytest.raises(ConfigError, match=r"no checkpoint is whole .*trainer\.pt"):
        recover_checkpoint(two)


def test_the_bank_is_entered_after_the_save_and_condemns_nothing(two):
    bank = two / NAME / BANK
    bank.write_bytes(b"bank")
    with pytest.raises(DamagedError, match=r"bank\.h5: not listed"):
        verify_file(bank)  # killed before it was entered
    assert BANK not in read_checksums(two / NAME)
    add_checksum(bank)
    verify_file(bank)
    verify_files(two / NAME)
    flip(bank)
    assert list(damaged_files(two / NAME)) == [BANK]
    assert whole_checkpoint(two) == (two / NAME, None)  # it is written anew


def test_a_checkpoint_of_an_older_version_is_read_with_a_warning(two):
    (two / NAME / CHECKSUMS).unlink()
    assert damaged_files(two / NAME) is None
    with pytest.warns(UserWarning, match=r"no checksums\.json .*older HiBio"):
        assert recover_checkpoint(two) == two / NAME
    verify_file(two / NAME / "trainer.pt")
    add_checksum(two / NAME / "trainer.pt")
    assert not (two / NAME / CHECKSUMS).exists()  # one file's sum would condemn the others
    (two / NAME / "artifacts.h5").unlink()
    with pytest.warns(UserWarning, match=r"artifacts\.h5: missing"):
        assert recover_checkpoint(two) == two / PREVIOUS


def test_a_newer_checkpoint_is_refused_and_not_set_aside(two):
    rewrite_list(two / NAME, schema_version=9)
    with pytest.raises(ConfigError, match=r"checkpoint schema 9, .* up to 1; update HiBio"):
        recover_checkpoint(two)
    assert (two / NAME).is_dir()


@pytest.mark.parametrize("name", ["../trainer.pt", "/etc/passwd", "a/../../b", "", "c:x", "a\\b"])
def test_names_outside_the_folder_are_refused(two, name):
    rewrite_list(two / NAME, files={name: {"n_bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(ConfigError, match=r"outside its folder; .* do not use this checkpoint"):
        verify_files(two / NAME)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"sha256": 1, "files": [2]}', "[" * 99_999])
def test_a_list_that_is_none_is_damaged(two, text):
    (two / NAME / CHECKSUMS).write_text(text)
    with pytest.raises(DamagedError, match=r"checksums\.json: (cannot be read|not what)"):
        read_checksums(two / NAME)


def test_files_below_the_folder_are_listed_too(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "rank0.safetensors").write_bytes(b"x")
    (tmp_path / ".half.part").write_bytes(b"y")
    write_checksums(tmp_path)
    assert list(read_checksums(tmp_path)) == ["engine/rank0.safetensors"]


# ------------------------------------------------------------------ in a run
def one_job(stores: Path, out: Path, **changes) -> Job:
    (job,) = expand(run_config(stores, out, checkpoint_every=2, **changes))
    return job


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(toy_stores, tmp_path):
    """And ends as if nothing had been: the finished job is trained on from where it was whole."""
    job = one_job(toy_stores, tmp_path, bank=False)
    trainer = build(job)
    trainer.fit()
    expected = trainer.model.state_dict()
    flip(job.folder / NAME / "model.safetensors")
    assert not job.finished
    with pytest.warns(UserWarning, match=r"model\.safetensors: not what was saved"):
        train_all(run_config(toy_stores, tmp_path, checkpoint_every=2, bank=False), resume=True)
    assert job.finished
    weights = build(job, resume=True).model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_damaged_bank_is_written_anew(toy_stores, tmp_path):
    config = run_config(toy_stores, tmp_path, stages=run_config(toy_stores, tmp_path).stages[:1])
    (checkpoint,) = train_all(config)
    before = (checkpoint / BANK).read_bytes()
    flip(checkpoint / BANK)
    with pytest.warns(UserWarning, match=r"bank\.h5: not what was saved .* written anew"):
        train_all(config, resume=True)
    assert damaged_files(checkpoint) == {}
    assert len((checkpoint / BANK).read_bytes()) == len(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_all(config, resume=True)


# ------------------------------------------------------------------ schemas
def test_a_run_of_an_older_version_still_embeds_and_is_not_trained_on(toy_stores, tmp_path):
    job = one_job(toy_stores, tmp_path, bank=False)
    trainer = build(job)
    trainer.fit(until_step=1)
    checkpoint = job.folder / NAME
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    del state["schema_version"]
    torch.save(state, checkpoint / "trainer.pt")
    (checkpoint / CHECKSUMS).unlink()
    with pytest.warns(UserWarning, match="older HiBio"):
        weights = HiBio.from_checkpoint(checkpoint).state_dict()
    assert all(torch.equal(weights[k], v) for k, v in trainer.model.state_dict().items())
    with (
        pytest.warns(UserWarning, match="older HiBio"),
        pytest.raises(ConfigError, match=r"older HiBio began, .*evaluates as it is; train again"),
    ):
        build(job, resume=True)


def as_schema_1(path: Path) -> None:
    """Rewrite artifacts as the first schema had them."""
    with h5py.File(path, "r+") as file:
        file.move("gene_graphs/0", "gene_graph")
        for name in ("gene_graphs", "groups", "scales"):
            del file[name]
        for name in ("has_database", "n_folded_in"):
            del file.attrs[name]
        settings = json.loads(file.attrs["settings"])
        for name in ("modality", "pretrain_slides"):
            del settings[name]
        file.attrs["settings"] = json.dumps(settings)
        file.attrs["schema_version"] = 1


def test_artifacts_of_the_first_schema_are_migrated(toy_artifacts, tmp_path):
    write_artifacts(tmp_path / "artifacts.h5", toy_artifacts)
    as_schema_1(tmp_path / "artifacts.h5")
    old = read_artifacts(tmp_path / "artifacts.h5")
    for name in ("genes", "tfidf", "factors", "gene_graphs", "database", "anchors", "settings"):
        assert_same(getattr(old, name), getattr(toy_artifacts, name))
    spots = np.random.default_rng(0).normal(size=(5, old.factors.rank)).astype(np.float32)
    assert old.groups.assign(spots).tolist() == toy_artifacts.groups.assign(spots).tolist()
    assert (old.n_folded_in, old.modality, old.scales) == (0, "rna", None)


@pytest.mark.parametrize(("version", "remedy"), [(0, "train again"), (4, "update HiBio")])
def test_artifacts_of_other_schemas_are_refused(toy_artifacts, tmp_path, version, remedy):
    write_artifacts(tmp_path / "artifacts.h5", toy_artifacts)
    with h5py.File(tmp_path / "artifacts.h5", "r+") as file:
        file.attrs["schema_version"] = version
    with pytest.raises(ConfigError, match=rf"artifacts schema {version}, .*{remedy}"):
        read_artifacts(tmp_path / "artifacts.h5")


@pytest.mark.parametrize("version", [0, 99])
def test_stores_of_other_schemas_are_refused(toy_stores, tmp_path, version):
    path = edit_store(
        toy_stores / "sim001.h5",
        tmp_path / "sim001.h5",
        lambda file: file.attrs.update({"schema_version": version}),
    )
    with pytest.raises(DataError, match=rf"schema version {version}, .*`hibio prepare` again"):
        SlideStore(path)
