"""Encoders of patches give what the stores of the same slides give."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np
import pytest

from eval.embed import Checkpoint
from eval.hest_bench.encoders import (
    Handcrafted,
    HandcraftedPatch,
    ImageTower,
    PatchReader,
    checkpoint_encoder,
    device_of,
    make_encoder,
)
from eval.hest_bench.samples import read_facts
from hibio.artifacts import Artifacts
from hibio.config.files import ConfigError
from hibio.config.model import VisionConfig
from hibio.config.run import DataConfig
from hibio.data.slide import prepare_slide
from preprocessing.errors import DataError
from preprocessing.handcrafted import handcrafted_batch
from preprocessing.store import SlideStore
from tests.eval.hest_bench.bench_folder import TASK
from tests.hibio.toy import make_model, run_config


def patches_of(bench: Path, name: str = "sim001") -> Path:
    return bench / TASK / "patches" / f"{name}.h5"


def barcodes_of(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return np.ravel(file["barcode"].asstr()[()]).astype(object)


def checkpoint(artifacts: Artifacts, folder: Path, image: str | None, **changes) -> Checkpoint:
    model = make_model(artifacts, **changes)
    for name in ("model.safetensors", "artifacts.h5"):
        (folder / name).write_bytes(b"toy")
    run = run_config(folder, folder, data=DataConfig(folder, image=image))
    return Checkpoint(folder, model, run)


@pytest.mark.parametrize("context", ["none", "neighbours"])
def test_a_tower_on_features_reads_neighbours_as_in_a_store(
    bench_once: Path, toy_artifacts: Artifacts, tmp_path: Path, toy_stores: Path, context: str
) -> None:
    path = patches_of(bench_once)
    with SlideStore(toy_stores / "sim001.h5") as store:
        values = store.features("handcrafted")

    class Known:
        name = "known"
        origin: ClassVar = {"encoder": "known"}

        def encode(self, patches: Path, barcodes: np.ndarray) -> np.ndarray:
            return values

    vision = VisionConfig(width=24, context=context, feature_dim=values.shape[1])
    made = checkpoint(toy_artifacts, tmp_path, "handcrafted", vision=vision)
    found = ImageTower(made, Known()).encode(path, barcodes_of(path))
    slide = prepare_slide(toy_stores / "sim001.h5", toy_artifacts, "handcrafted")
    expected = made.model.encode_slide(slide).image
    same = np.abs(found - expected).max(axis=1) < 1e-4
    # corners are whole pixels, which decides between equally far neighbours at the margin
    assert same.mean() == 1.0 if context == "none" else same.mean() > 0.7
    assert np.abs(found[1:] - found[:-1]).max() > 1e-2


@pytest.mark.parametrize("stain", ["none", "reinhard"])
def test_a_tower_on_patches_equals_the_store(
    bench_once: Path, toy_artifacts: Artifacts, tmp_path: Path, toy_stores: Path, stain: str
) -> None:
    vision = VisionConfig(name="timm", timm_name="resnet10t", stain=stain)
    made = checkpoint(toy_artifacts, tmp_path, "patches", vision=vision)
    path = patches_of(bench_once)
    tower = checkpoint_encoder(made)
    found = tower.encode(path, barcodes_of(path))
    slide = prepare_slide(toy_stores / "sim001.h5", toy_artifacts, made.image_input)
    np.testing.assert_allclose(found, made.model.encode_slide(slide).image, atol=1e-4)
    assert tower.origin["features"] is None


def test_hand_made_features_at_two_scales_resemble_the_store(
    bench_once: Path, toy_stores: Path
) -> None:
    path = patches_of(bench_once)
    found = Handcrafted().encode(path, barcodes_of(path))
    with SlideStore(toy_stores / "sim001.h5") as store:
        stored = store.features("handcrafted")
    assert found.shape == stored.shape
    for column in (0, found.shape[1] // 2):  # mean red of the patch and of its context
        assert np.corrcoef(found[:, column], stored[:, column])[0, 1] > 0.8


def test_features_of_the_patch_alone_are_those_of_the_resized_patch(bench_once: Path) -> None:
    path = patches_of(bench_once)
    found = HandcraftedPatch().encode(path, barcodes_of(path))
    np.testing.assert_array_equal(found[3:4], handcrafted_batch(PatchReader(path, 64)([3])))
    assert PatchReader(path)([0, 2]).shape == (2, 32, 32, 3)


def test_a_file_without_scale_is_refused_where_it_matters(bench: Path) -> None:
    path = patches_of(bench)
    with h5py.File(path, "r+") as file:
        del file["img"].attrs["pixel_size"]
    with pytest.raises(DataError, match="no attribute pixel_size"):
        Handcrafted().encode(path, barcodes_of(path))
    assert len(HandcraftedPatch().encode(path, barcodes_of(path))) == 70


def test_checkpoints_that_cannot_read_the_patches_are_refused(
    toy_artifacts: Artifacts, tmp_path: Path
) -> None:
    blind = checkpoint(toy_artifacts, tmp_path, None, vision=VisionConfig(name="none"))
    with pytest.raises(ConfigError, match="reads no image"):
        checkpoint_encoder(blind)
    settings = dataclasses.replace(toy_artifacts.settings, patch_um=55.0)
    narrow = dataclasses.replace(toy_artifacts, settings=settings)
    small = checkpoint(narrow, tmp_path, "handcrafted")
    with pytest.raises(ConfigError, match="trained on patches 55 um wide"):
        checkpoint_encoder(small)
    wide = VisionConfig(name="timm", timm_name="resnet10t", context="patch")
    with pytest.raises(ConfigError, match="reads wider patches too"):
        checkpoint_encoder(checkpoint(toy_artifacts, tmp_path, "patches", vision=wide))
    with pytest.raises(ConfigError, match="unknown encoder"):
        make_encoder("resnet5x")
    assert device_of("cpu") == "cpu"


def test_facts_follow_the_order_of_the_patches(bench: Path) -> None:
    from eval.hest_bench.layout import Sample

    sample = Sample("s", patches_of(bench), bench / TASK / "adata" / "sim001.h5ad")
    before = read_facts(sample)
    with h5py.File(sample.patches, "r+") as file:
        for name in ("img", "barcode", "coords"):
            file[name][:] = file[name][:][::-1]
    after = read_facts(sample)
    np.testing.assert_array_equal(after.spot_keys, before.spot_keys[::-1])
    np.testing.assert_array_equal(after.patch_keys, before.patch_keys[::-1])
    assert before.xy is not None
    np.testing.assert_array_equal(after.xy, before.xy[::-1])
    assert (before.spot_keys > 0).all()


def test_a_frozen_backbone_with_local_weights_encodes_every_patch(
    bench_once: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    from hibio.backbones.networks import build_model
    from hibio.backbones.resolve import resolve_backbone

    torch.manual_seed(0)
    model = build_model(resolve_backbone("resnet10t"))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder = make_encoder("resnet10t", tmp_path / "w.safetensors", batch=32)
    path = patches_of(bench_once)
    found = encoder.encode(path, barcodes_of(path))
    pixels = torch.from_numpy(PatchReader(path)(np.arange(70)))
    np.testing.assert_allclose(found, encoder.network(pixels).numpy(), atol=5e-3)
    assert len(np.unique(found.round(3), axis=0)) > 60
    assert len(encoder.origin["weights_sha256"]) == 64
