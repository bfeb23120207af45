"""`hibio share`: no name is left, nothing else changes, and the hub is somebody else."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import huggingface_hub
import numpy as np
import pytest

from eval.embed import load_checkpoint, one_checkpoint
from eval.predict import Wanted, predict_folder, readout_of
from eval.query import query_folder
from hibio.artifacts import read_artifacts
from hibio.checkpoint import add_checksum, model_sha256, verify_files, write_checksums
from hibio.cli import main
from hibio.config.files import ConfigError
from hibio.model import HiBio
from hibio.readout import read_readout, write_readout
from preprocessing.store import SlideStore
from tests.eval.image_cohort import Cohort


@pytest.fixture(scope="module")
def checkpoint(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder whose checkpoint has a read-out, and results of `hibio eval` beside it."""
    run = tmp_path_factory.mktemp("share") / "run"
    path = run / "hibio" / "fold-x" / "seed-0" / "checkpoint"
    shutil.copytree(cohort.checkpoint, path)
    readout_of(load_checkpoint(path))
    fold, own = load_checkpoint(path).fold, model_sha256(path)
    values = {"values": [0.5, 0.7, 0.1], "keys": [f"{fold}/0/a", f"{fold}/0/b", "other/0/c"]}
    metric = {"r": {**values, "chance": 0.0}}
    rows = {"hibio": {"role": "model"}, "mean_gene": {"role": "baseline"}}
    task = {"short": ["r"], "models": dict.fromkeys(rows, metric), "rows": rows}
    (run / "eval" / "finished").mkdir(parents=True)
    (run / "eval" / "results.json").write_text(json.dumps({"tasks": {"expression": task}}))
    made_of = {"checkpoints": {f"hibio/{fold}/0": own}}
    (run / "eval" / "finished" / "made_of.json").write_text(json.dumps(made_of))
    return path


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Path:
    """What the command writes of it."""
    out = checkpoint.parents[4] / "my-model"
    assert main(["share", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    return out


def old_names(checkpoint: Path) -> set[str]:
    seals = read_artifacts(checkpoint / "artifacts.h5").seals
    return {*seals, *(seal["patient"] for seal in seals.values())}


def test_no_old_name_is_in_any_byte_and_no_path(checkpoint: Path, shared: Path, cohort: Cohort):
    names = {*old_names(checkpoint), str(cohort.stores)}
    assert len(names) == 7
    for path in shared.iterdir():
        told = path.read_bytes()
        assert [name for name in names if name.encode() in told] == [], path
    before = sum((checkpoint / "config.yaml").read_text().count(name) for name in names)
    assert before > 0
    verify_files(shared)
    assert not (shared / "trainer.pt").exists()


def test_it_answers_the_same_to_the_last_bit(
    checkpoint: Path, shared: Path, cohort: Cohort, tmp_path: Path
):
    with SlideStore(cohort.images / "bare.h5") as store:
        features = store.features("handcrafted")
    models = [HiBio.from_checkpoint(checkpoint), HiBio.from_pretrained(shared)]
    images = [model.encode_image(features) for model in models]
    assert images[0].tobytes() == images[1].tobytes()
    data = tmp_path / "data"
    data.mkdir()
    (data / "bare.h5").hardlink_to(cohort.images / "bare.h5")
    for name, work in {
        "predict": lambda path, out: predict_folder(path, [data], out, Wanted(gene_sets="default")),
        "query": lambda path, out: query_folder(path, data, "default", out),
    }.items():
        found = []
        for number, path in enumerate((checkpoint, shared)):
            work(path, tmp_path / f"{name}{number}")
            files = sorted((tmp_path / f"{name}{number}").glob("*.h5ad"))
            found.append([anndata.read_h5ad(one) for one in files])
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one.X, other.X)
            np.testing.assert_array_equal(one.var_names, other.var_names)
            assert list(one.layers) == list(other.layers)


def test_the_card_says_what_was_trained_on_measured_and_can_be_relied_on(
    checkpoint: Path, shared: Path
):
    card = (shared / "README.md").read_text()
    seals = read_artifacts(checkpoint / "artifacts.h5").seals
    assert all(seal["counts"][:12] in card for seal in seals.values())
    assert "| expression | r | hibio | model | 0.600 | 2 | 0.000 |" in card
    assert "| expression | r | mean_gene | baseline | 0.600 | 2 | 0.000 |" in card
    readout = read_readout(checkpoint / "readout.h5")
    best = readout.names[np.nanargmax(readout.reliability)]
    assert f"| {best} | {np.nanmax(readout.reliability):.3f} |" in card
    assert f"balanced accuracy\n{readout.labels[0].accuracy:.3f}, of chance 0." in card
    assert "Weights: not stated" in card
    assert 'from_pretrained("hf-hub:ORG/my-model")' in card


def test_a_slide_is_known_again_by_its_seal(shared: Path, cohort: Cohort, tmp_path: Path):
    with pytest.warns(UserWarning, match="has the counts of 'slide-[12]-"):
        predict_folder(shared, [cohort.stores], tmp_path, Wanted(genes=("all",)))


def test_a_name_that_cannot_be_taken_out_is_told_and_nothing_is_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoint")
    patient = min(
        seal["patient"] for seal in read_artifacts(run / "checkpoint/artifacts.h5").seals.values()
    )
    path = run / "checkpoint" / "readout.h5"
    readout = read_readout(path)
    readout.source["weights"] = f"/data/{patient}/encoder.bin"
    write_readout(path, readout)
    add_checksum(path)
    asked = ["share", "--checkpoint", str(run), "--out", str(tmp_path / "out")]
    assert main([*asked, "--licence", "a: b\nc: d"]) == 1  # it would break the card's front matter
    assert "expected an id as the hub writes it" in capsys.readouterr().err
    assert main(asked) == 1
    told = capsys.readouterr().err
    assert "readout.h5: /@settings: source: weights: " in told
    assert "--keep-ids" in told
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
    assert main([*asked, "--keep-ids"]) == 0
    assert patient in (tmp_path / "out" / "README.md").read_text()
    assert main(asked) == 1
    assert "is there and not empty" in capsys.readouterr().err


def test_changed_weights_are_shared_without_what_is_of_the_old_ones(
    checkpoint: Path, tmp_path: Path
):
    model = HiBio.from_checkpoint(checkpoint)
    model.log_scale.data += 1.0
    with pytest.warns(UserWarning, match="not those of"):
        model.save_pretrained(tmp_path / "new", licence="cc-by-4.0")
    again = HiBio.from_pretrained(tmp_path / "new")
    assert again.log_scale == model.log_scale
    assert not list((tmp_path / "new").glob("*k.h5"))
    assert "license: cc-by-4.0" in (tmp_path / "new" / "README.md").read_text()
    with pytest.raises(ConfigError, match="not loaded from a checkpoint"):
        again.with_artifacts(again.artifacts).save_pretrained(tmp_path / "none")


class Hub:
    """A hub in a folder: what the client's functions do, without a network."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        if not name.startswith("lab/"):
            raise huggingface_hub.errors.HfHubHTTPError(
                "403 Forbidden", response=SimpleNamespace(headers={}, request=None)
            )
        (self.folder / name).mkdir(parents=True)

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str]):
        for name in allow_patterns:
            shutil.copyfile(folder_path / name, self.folder / repo_id / name)
        return SimpleNamespace(oid="a1b2c3")

    def upload_file(self, *, repo_id: str, path_or_fileobj: bytes, path_in_repo: str) -> None:
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)

    def download(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert revision in (None, "a1b2c3")
        if not (self.folder / repo).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        return str(self.folder / repo)


def test_the_hub_and_back(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    Hub(tmp_path / "hub", monkeypatch)
    model = HiBio.from_checkpoint(checkpoint)
    place = model.push_to_hub("lab/hibio-breast")
    assert place == "hf-hub:lab/hibio-breast@a1b2c3"
    assert one_checkpoint(Path(place)) == tmp_path / "hub" / "lab" / "hibio-breast"
    again = HiBio.from_pretrained(place)
    assert all(map(np.array_equal, again.state_dict().values(), model.state_dict().values()))
    card = (tmp_path / "hub/lab/hibio-breast/README.md").read_text()
    assert 'from_pretrained("hf-hub:lab/hibio-breast")' in card
    for name, words in {
        "hf-hub:lab/none": "cannot be fetched",
        "hf-hub:../lab": "expected ORG/NAME",
    }.items():
        with pytest.raises(ConfigError, match=words):
            HiBio.from_pretrained(name)
    asked = ["share", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    assert main([*asked, "--push", "other/name"]) == 1
    assert "403 Forbidden); log in with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("checksums.json", "no checksums"),
        ("model.safetensors", "does not fit config.yaml"),
        ("bank.h5", "is a link; HiBio writes no such file"),
    ],
)
def test_what_comes_from_the_hub_is_looked_at_first(
    part: str,
    words: str,
    shared: Path,
    cohort: Cohort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    Hub(tmp_path / "hub", monkeypatch)
    folder = tmp_path / "hub" / "lab" / "bad"
    shutil.copytree(shared, folder)
    if part == "bank.h5":
        with h5py.File(folder / part, "r+") as file:
            del file["slide"]
            file["slide"] = h5py.ExternalLink("elsewhere.h5", "slide")
    elif part == "model.safetensors":
        (folder / part).write_bytes(b"\x80\x04K\x01.")  # a pickle
    write_checksums(folder)
    if part == "checksums.json":
        (folder / part).unlink()
    with pytest.raises(ConfigError, match=words):
        query_folder(Path("hf-hub:lab/bad"), cohort.images, "default", tmp_path / "out")
