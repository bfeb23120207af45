"""Checkpoints and models from somebody else: nothing in them runs, nothing leaves its folder.

Whoever can write a checkpoint can write its checksums, so every malicious one here has right ones.
"""

import ast
import json
import os
import shutil
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from hibio.backbones.resolve import hub_backbone
from hibio.bank import read_bank
from hibio.checkpoint import write_checksums
from hibio.config.files import ConfigError, load_config, load_saved
from hibio.config.model import ModelConfig, VisionConfig
from hibio.config.run import RunConfig
from hibio.config.training import StageConfig
from hibio.encoders.vision import build_vision_encoder
from hibio.model import HiBio
from hibio.run import train_all
from preprocessing.errors import DataError
from preprocessing.store import SlideStore
from tests.hibio.toy import SPOT, edit_store, run_config

ROOT = Path(__file__).resolve().parents[2]
MARK = "somebody_elses_code_ran"
READERS = {
    "artifacts.h5": HiBio.from_checkpoint,
    "bank.h5": lambda checkpoint: read_bank(checkpoint / "bank.h5"),
}


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (MARK,)


@pytest.fixture(scope="module")
def trained(toy_stores, tmp_path_factory) -> Path:
    """A run folder with one good checkpoint."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train_all(run_config(toy_stores, out, stages=(StageConfig("spot", 1, SPOT),)))
    return out


@pytest.fixture
def checkpoint(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, in a folder that the test works in; no code of the checkpoint ran after it."""
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "run/hibio/fold-patient03/seed-0/checkpoint"
    assert not list(tmp_path.rglob(MARK))


def settings_of(checkpoint: Path) -> dict:
    return yaml.safe_load((checkpoint / "config.yaml").read_text())


def refused(run, checkpoint: Path, stores: Path, *words: str) -> None:
    """Every command that reads a checkpoint ends with code 1 and one line that says this."""
    write_checksums(checkpoint)
    read = ["--checkpoint", checkpoint, "--data", stores, "--out", checkpoint.parents[3] / "out"]
    for command in (["check", checkpoint], ["embed", *read], ["eval", *read]):
        code, out, told = run(*command)
        assert code == 1, (command, out, told)
        assert "Traceback" not in told
        for word in words:
            assert word in out + told, (command, out, told)


# ------------------------------------------------------------------ pickles
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_in_the_place_of_the_weights(run, checkpoint, toy_stores, zipped):
    path = checkpoint / "model.safetensors"
    torch.save({"w": Evil()}, path, _use_new_zipfile_serialization=zipped)
    refused(run, checkpoint, toy_stores, "model.safetensors")


def test_a_pickle_beside_the_weights_is_never_read(run, checkpoint, toy_stores):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"w": Evil()}, checkpoint / "pytorch_model.bin")
    refused(run, checkpoint, toy_stores, "checkpoint")
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        HiBio.from_checkpoint(checkpoint)


def test_a_pickle_in_the_state_of_the_trainer(run, checkpoint, toy_stores):
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    torch.save({**state, "finished": False, "optimizer": Evil()}, checkpoint / "trainer.pt")
    write_checksums(checkpoint)
    out = checkpoint.parents[3]
    code, _, told = run("train", "--config", out / "config.yaml", "--resume", out)
    assert code == 1
    assert "trainer.pt: damaged" in told
    assert "Traceback" not in told
    code, out, told = run("check", checkpoint)
    assert "trainer.pt: damaged" in out + told


def test_pickles_and_texts_in_the_place_of_arrays(checkpoint):
    """HDF5 holds no objects: bytes that would be a pickle are refused as values."""
    opaque = np.void(b"cos\nmkdir\n(V" + MARK.encode() + b"\ntR.")
    for name, read in READERS.items():
        with h5py.File(checkpoint / name, "r+") as file:
            member = "genes" if name == "artifacts.h5" else "slide"
            del file[member]
            file[member] = opaque
        write_checksums(checkpoint)
        with pytest.raises(ConfigError, match=name):
            read(checkpoint)


# ------------------------------------------------------------------ settings
@pytest.mark.parametrize(
    "tag",
    [
        f"!!python/object/apply:os.mkdir [{MARK}]",
        f"!!python/object/new:os.mkdir [{MARK}]",
        "!!python/name:os.system",
        "!!python/module:os",
        f"!!python/object/apply:subprocess.check_call [[mkdir, {MARK}]]",
    ],
)
def test_python_in_the_settings(run, checkpoint, toy_stores, tag):
    text = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(text.replace("variant: hibio", f"variant: {tag}"))
    refused(run, checkpoint, toy_stores, "config.yaml", "python/")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(RunConfig, checkpoint / "config.yaml")


def doubling(first: str, form: str) -> str:
    """Ten lines, each of which names the one before ten times."""
    lines = [
        f"{name}: &{name} " + form.format(", ".join([f"*{before}"] * 10))
        for before, name in pairwise("abcdefghij")
    ]
    return "\n".join([f"a: &a {first}", *lines, "folds: *j", ""])


BOMBS = {
    "aliases": doubling("[1, 1]", "[{}]"),
    "merges": doubling("{k: 1}", "{{<<: [{}]}}"),
    "circle": "model: &m [*m]\n",
    "deep": "model: " + "[" * 20_000,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_the_settings_is_refused_at_once(checkpoint, bomb):
    path = checkpoint / "config.yaml"
    path.write_text(BOMBS[bomb])
    # From PyYAML 6.0.4 on, merges of one mapping into itself are one: no bomb, but no settings.
    harmless = "|unknown key 'a'|no section 'model'" if bomb == "merges" else ""
    with pytest.raises(ConfigError, match=f"not valid YAML{harmless}"):
        load_config(RunConfig, path)
    with pytest.raises(ConfigError, match=f"not valid YAML{harmless}"):
        load_saved(ModelConfig, path, "model")


def test_settings_cannot_read_another_file(run, checkpoint, toy_stores, tmp_path):
    (tmp_path / "secret.yaml").write_text("password: 123\n")
    text = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(f"base: {tmp_path}/secret.yaml\n{text}")
    refused(run, checkpoint, toy_stores, "config.yaml", "'base'")


def test_settings_without_what_a_run_has(run, checkpoint, toy_stores):
    text = yaml.safe_dump({"model": settings_of(checkpoint)["model"]})
    (checkpoint / "config.yaml").write_text(text)
    write_checksums(checkpoint)
    out = checkpoint.parent / "out"
    code, _, told = run("embed", "--checkpoint", checkpoint, "--data", toy_stores, "--out", out)
    assert code == 1
    assert "not the settings of a HiBio run" in told


# ------------------------------------------------------------------ code that a name would import
CODE = f"""
import os, torch
os.mkdir({MARK!r})
class Tower(torch.nn.Module):
    embed_dim = 4
    def __init__(self, config):
        super().__init__()
"""


@pytest.mark.parametrize("tower", ["vision", "omics"])
def test_a_checkpoint_cannot_import_a_module_that_nobody_asked_for(
    run, checkpoint, toy_stores, tmp_path, monkeypatch, tower
):
    """Such as one that lies beside it, in the folder that Python is started in."""
    (tmp_path / "its_own_module.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    settings = settings_of(checkpoint)
    settings["model"][tower]["name"] = "its_own_module:Tower"
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(settings))
    refused(run, checkpoint, toy_stores, "wants to run code", "HIBIO_PLUGINS=its_own_module")
    assert "its_own_module" not in sys.modules
    monkeypatch.setenv("HIBIO_PLUGINS", "its_own, its_own_module_2,,its_own_module.inner")
    with pytest.raises(ConfigError, match="wants to run code"):
        HiBio.from_checkpoint(checkpoint)


def test_a_plug_in_that_is_listed_is_imported(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "my_lab_towers.py").write_text(CODE.replace("os.mkdir", "str"))
    monkeypatch.syspath_prepend(tmp_path)
    settings = settings_of(checkpoint)
    settings["model"]["vision"]["name"] = "my_lab_towers:Tower"
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(settings))
    write_checksums(checkpoint)
    monkeypatch.setenv("HIBIO_PLUGINS", "another, my_lab_towers")
    with pytest.raises(ConfigError, match=r"does not fit config\.yaml"):  # built, other weights
        HiBio.from_checkpoint(checkpoint)
    assert "my_lab_towers" in sys.modules


@pytest.mark.parametrize("name", ["os:system", "builtins:exec", "code:interact"])
def test_only_a_module_of_torch_is_an_encoder(name):
    with pytest.raises(ConfigError, match=r"no torch\.nn\.Module class"):
        build_vision_encoder(VisionConfig(name=name))


# ------------------------------------------------------------------ names that would escape
def outside_links(file: h5py.File, member: str, secret: Path) -> None:
    del file[member]
    file[member] = h5py.ExternalLink(str(secret), "/genes")


def outside_bytes(file: h5py.File, member: str, secret: Path) -> None:
    del file[member]
    file.create_dataset(member, shape=(8,), dtype="u1", external=[(str(secret), 0, 8)])


def virtual_values(file: h5py.File, member: str, secret: Path) -> None:
    del file[member]
    layout = h5py.VirtualLayout(shape=(8,), dtype="u1")
    layout[:] = h5py.VirtualSource(str(secret), "genes", shape=(8,))
    file.create_virtual_dataset(member, layout)


@pytest.mark.parametrize("plant", [outside_links, outside_bytes, virtual_values])
def test_a_store_with_values_of_other_files_is_refused(toy_stores, tmp_path, plant):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["genes"] = np.arange(8, dtype="u1")
    path = Path(shutil.copy(toy_stores / "sim001.h5", tmp_path))
    with SlideStore(path) as store:
        assert store.n_spots
    with h5py.File(path, "r+") as file:
        plant(file, "counts/data", tmp_path / "secret.h5")
    with pytest.raises(DataError, match=r"/counts/data (is a link|has its values in another file)"):
        SlideStore(path)


@pytest.mark.parametrize("plant", [outside_links, outside_bytes, virtual_values])
@pytest.mark.parametrize(("name", "member"), [("artifacts.h5", "genes"), ("bank.h5", "image")])
def test_values_of_other_files_are_not_read(checkpoint, tmp_path, plant, name, member):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["genes"] = np.arange(8, dtype="u1")
    with h5py.File(checkpoint / name, "r+") as file:
        plant(file, member, tmp_path / "secret.h5")
    write_checksums(checkpoint)
    with pytest.raises(ConfigError, match=rf"/{member} (is a link|has its values in another file)"):
        HiBio.from_checkpoint(checkpoint) if name == "artifacts.h5" else read_bank(
            checkpoint / name
        )


def test_a_group_that_contains_itself_is_read_once(checkpoint):
    with h5py.File(checkpoint / "artifacts.h5", "r+") as file:
        file["tfidf/again"] = file["/"]
    write_checksums(checkpoint)
    with pytest.raises(ConfigError, match=r"artifacts\.h5: cannot be read"):
        HiBio.from_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "a/b"])
def test_a_slide_cannot_name_its_output_elsewhere(run, checkpoint, toy_stores, tmp_path, name):
    stores = tmp_path / "stores"
    edit_store(
        toy_stores / "sim001.h5",
        stores / "sim001.h5",
        lambda file: file.attrs.update({"slide_id": name}),
    )
    out = tmp_path / "a" / "b"
    code, _, told = run("embed", "--checkpoint", checkpoint, "--data", stores, "--out", out)
    assert code == 1
    assert "not a plain name" in told
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize(
    ("described", "word"),
    [
        (
            {"architecture": "resnet10t", "model_args": {"checkpoint_path": "x.bin"}},
            "checkpoint_path",
        ),
        (
            {"architecture": "resnet10t", "model_args": {"pretrained_cfg": {"file": "x"}}},
            "pretrained_cfg",
        ),
        ({"architecture": "local-dir:/somewhere"}, "local-dir"),
        ({"architecture": "hf-hub:other/model"}, "hf-hub:other/model"),
    ],
)
def test_a_hub_description_cannot_load_something_else(tmp_path, described, word):
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=rf"{word}.*load something else"):
        hub_backbone("lab/net", tmp_path / "config.json")


# ------------------------------------------------------------------ the code itself
SAFE_LOADERS = {"_Loader", "yaml.SafeLoader", "yaml.CSafeLoader"}


def unsafe_calls(source: str) -> list[str]:
    """Calls that would run, or unpack to any place, what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("yaml.load", "yaml.load_all") and given.get("Loader") not in SAFE_LOADERS:
            found.append(f"{name} without a safe loader")
        if name.startswith("yaml.") and name.split("_")[0] in ("yaml.unsafe", "yaml.full"):
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name.rpartition(".")[2] in ("extractall", "unpack_archive", "read_pickle"):
            found.append(name)
        if given.get("trust_remote_code", "False") != "False":
            found.append("trust_remote_code")
        if name in ("eval", "exec", "os.system") or given.get("shell") == "True":
            found.append(name)
    return found


def test_no_code_here_runs_what_a_file_holds():
    folders = ("hibio", "eval", "preprocessing", "pathways")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {p.name: told for p in files if (told := unsafe_calls(p.read_text(encoding="utf-8")))}
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "yaml.full_load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "zipfile.ZipFile(path).extractall(out)",
        "shutil.unpack_archive(path)",
        "pd.read_pickle(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
    ],
)
def test_a_planted_call_is_found(code):
    assert unsafe_calls(code)


def test_the_pickles_of_these_tests_do_run_where_they_are_let(tmp_path, monkeypatch):
    """Otherwise the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Evil()}, "evil.pt")
    with zipfile.ZipFile("evil.pt") as file:
        assert MARK.encode() in file.read("evil/data.pkl")
    Evil().__reduce__()[0](*Evil().__reduce__()[1])
    assert (tmp_path / MARK).is_dir()
