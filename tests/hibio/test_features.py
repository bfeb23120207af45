"""`hibio features`: the same as a plain loop, resumable, told in a table, and trained on."""

import argparse
import dataclasses
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hibio.backbones import features
from hibio.backbones.features import features_report
from hibio.backbones.frozen import encode_patches, load_backbone
from hibio.backbones.networks import build_model
from hibio.backbones.resolve import resolve_backbone
from hibio.cli import COMMANDS
from hibio.config.files import ConfigError
from hibio.config.training import StageConfig
from hibio.run import build, expand
from preprocessing.errors import DataError
from preprocessing.files import file_sha256
from preprocessing.store import SlideStore, verify_store
from preprocessing.store.read import stores_in
from preprocessing.store.write import feature_origin
from tests.hibio.toy import SPOT, run_config


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "vit.safetensors", "test_vit")


def write_weights(path: Path, name: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = build_model(resolve_backbone(name))
    with torch.no_grad():
        for key, value in model.state_dict().items():  # running statistics too, to see eval mode
            if value.is_floating_point():
                value.add_(0.05 * torch.rand_like(value) if "var" in key else 0.05)
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def stores(toy_stores, tmp_path) -> Path:
    return Path(shutil.copytree(toy_stores, tmp_path / "stores"))


def plain_loop(store: Path, name: str, weights: Path) -> np.ndarray:
    """One patch after the other through the model in evaluation mode."""
    network = load_backbone(resolve_backbone(name), weights)
    with SlideStore(store) as opened:
        patches = opened.patches()
    with torch.no_grad():
        rows = [network.model(network.prepared(torch.from_numpy(p[None]))) for p in patches]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_the_features_are_those_of_a_plain_loop(stores, tmp_path, name):
    weights = write_weights(tmp_path / "weights.safetensors", name)
    report = features_report(stores, name, weights=weights, batch=16, device="cpu")
    assert [row.path for row in report.rows] == stores_in(stores)
    for path in stores_in(stores)[:1]:
        with SlideStore(path) as store:
            found = store.features(name)
        expected = plain_loop(path, name, weights)
        assert found.shape == expected.shape == (70, expected.shape[1])
        np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2e-3)
        assert found.std(axis=0).mean() > 1e-3  # the patches are told apart
        assert all(finding.level != "FAIL" for finding in verify_store(path))


def test_batches_and_threads_change_nothing(stores, weights):
    path, network = stores_in(stores)[0], load_backbone(resolve_backbone("test_vit"), weights)
    with SlideStore(path) as store:
        found = [
            encode_patches(store.patches, store.n_spots, network, batch=batch, workers=workers)
            for batch, workers in ((70, 0), (70, 2), (16, 0), (16, 3), (1, 1))
        ]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[2], found[3])
    for other in found[1:]:
        assert other.dtype == np.float16
        np.testing.assert_allclose(other, found[0], atol=2e-3, rtol=2e-3)


def test_the_origin_says_how_they_were_made(stores, weights):
    features_report(stores_in(stores)[0], "test_vit", weights=weights, device="cpu")
    with h5py.File(stores_in(stores)[0]) as file:
        assert file["features/test_vit"].dtype == np.float16
    assert feature_origin(stores_in(stores)[0], "test_vit") == {
        "encoder": "test_vit",
        "timm_name": "test_vit",
        "timm_arguments": {},
        "weights_sha256": file_sha256(weights),
        "input_px": 160,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "pooling": "none",
        "patch_um": 112.0,
        "precision": "float32",
    }


def statuses(stores, weights, **changes) -> list[str]:
    report = features_report(stores, "test_vit", weights=weights, device="cpu", **changes)
    return [row.status for row in report.rows]


def test_a_finished_store_is_skipped_and_other_weights_replace(
    stores, weights, tmp_path, monkeypatch
):
    features_report(stores_in(stores)[0], "test_vit", weights=weights, device="cpu")
    assert statuses(stores, weights) == ["skipped", "done", "done"]
    before = [file_sha256(path) for path in stores_in(stores)]
    with monkeypatch.context() as patched:  # not even loaded when nothing is left to do
        patched.setattr(features, "load_backbone", lambda *_: pytest.fail("loaded"))
        assert statuses(stores, weights) == ["skipped"] * 3
        report = features_report(stores, "test_vit", weights=weights, device="cpu")
        assert [(row.spots, row.dim) for row in report.rows] == [(70, 64)] * 3
    assert [file_sha256(path) for path in stores_in(stores)] == before
    other = write_weights(tmp_path / "other.safetensors", "test_vit", seed=1)
    assert statuses(stores, other) == ["replaced"] * 3


def test_a_stopped_run_goes_on_where_it_was(stores, weights, monkeypatch):
    encode, calls = features.encode_patches, []

    def stop_at_the_second(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(features, "encode_patches", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            statuses(stores, weights)
    assert statuses(stores, weights) == ["skipped", "done", "done"]


def damage_patches(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["patches/bytes"][:] = 0


def drop_patches(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["patches"]


def test_one_bad_store_does_not_stop_the_others(stores, weights):
    first, second, _ = stores_in(stores)
    damage_patches(first)
    drop_patches(second)
    report = features_report(stores, "test_vit", weights=weights, device="cpu")
    assert [row.status for row in report.rows] == ["failed", "no image", "done"]
    assert re.search(r"patch \d+ is damaged", str(report))
    assert [row.path for row in report.failed] == [first]


class _Fake(torch.nn.Module):
    """One number a patch, beyond float16 for the later ones."""

    mean_C11 = torch.zeros(1)

    def forward(self, patches):
        return patches.float().mean(dim=(1, 2, 3))[:, None] * 1000.0


def test_values_beyond_float16_are_kept():
    grey = np.arange(0, 250, 10, dtype=np.uint8)

    def read(index):
        return np.broadcast_to(grey[index][:, None, None, None], (len(index), 2, 2, 3)).copy()

    found = encode_patches(read, 25, _Fake(), batch=4, workers=0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], grey * 1000.0, rtol=1e-3)
    with pytest.raises(ConfigError, match="0 patches"):
        encode_patches(read, 0, _Fake())


def test_a_full_device_names_a_smaller_batch():
    class Full(_Fake):
        def forward(self, patches):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match=r"smaller --batch \(half: 4\)"):
        encode_patches(lambda index: np.zeros((len(index), 2, 2, 3), np.uint8), 9, Full(), batch=8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"threads": -1}, "threads -1"),
        ({"device": "gpu"}, "choose auto, cpu or cuda"),
        ({"weights": Path("none.bin")}, "no such weights file"),
    ],
)
def test_settings_that_cannot_be_used(stores, weights, changes, words):
    settings = {"weights": weights, "device": "cpu", **changes}
    with pytest.raises(ConfigError, match=words):
        features_report(stores, "test_vit", **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_asked_for_and_not_there(stores, weights):
    with pytest.raises(ConfigError, match="hibio doctor"):
        features_report(stores, "test_vit", weights=weights, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_on_cuda_is_near_float32(stores, weights):
    path, network = stores_in(stores)[0], load_backbone(resolve_backbone("test_vit"), weights)
    with SlideStore(path) as store:
        slow = encode_patches(store.patches, store.n_spots, network).astype(np.float64)
        fast = encode_patches(store.patches, store.n_spots, network.to("cuda")).astype(np.float64)
    assert np.linalg.norm(fast - slow) < 0.05 * np.linalg.norm(slow)


def options(**changes) -> argparse.Namespace:
    settings = {
        "stores": None,
        "encoder": "test_vit",
        "weights": None,
        "batch": 32,
        "device": "cpu",
        "threads": 1,
        "workers": 0,
        "scheduler": None,
        "scale": "spot",
        "stain": "none",
        "input_px": None,
        "list": False,
    }
    return argparse.Namespace(**{**settings, **changes})


run = COMMANDS["features"].run


def test_the_command(stores, weights, capsys):
    assert run(options(list=True)) == 0
    assert "virchow2" in capsys.readouterr().out
    assert run(options(stores=stores, weights=weights)) == 0
    told = capsys.readouterr().out
    assert "sim002  done" in told
    assert "data.image=test_vit" in told
    damage_patches(stores_in(stores)[0])
    other = write_weights(stores.parent / "other.safetensors", "test_vit", seed=1)
    assert run(options(stores=stores, weights=other)) == 1
    assert "sim001  failed" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="hibio features STORES --encoder NAME"):
        run(options(stores=stores, encoder=None))
    for path in stores_in(stores):
        drop_patches(path)
    with pytest.raises(DataError, match="prepare slides with images"):
        run(options(stores=stores, weights=weights))


def test_a_model_trains_on_them(stores, weights, tmp_path):
    features_report(stores, "test_vit", weights=weights, device="cpu")
    config = run_config(stores, tmp_path / "run", stages=(StageConfig("spot", 1, SPOT),))
    data = dataclasses.replace(config.data, image="test_vit")
    trainer = build(expand(dataclasses.replace(config, data=data))[0])
    assert trainer.model.config.vision.feature_dim == 64
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.fit(until_step=1)
    moved = [n for n, v in trainer.model.named_parameters() if not torch.equal(v, before[n])]
    assert any("vision" in name or "image" in name for name in moved)
