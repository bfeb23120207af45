"""`hibio features` on context patches, on both scales, and on patches of one stain."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hibio.backbones.features import features_report
from hibio.backbones.frozen import load_backbone
from hibio.backbones.resolve import resolve_backbone
from hibio.config.files import ConfigError
from hibio.data.slide import prepare_slide
from preprocessing.manifest import read_manifest
from preprocessing.patches import PatchConfig
from preprocessing.run import prepare
from preprocessing.stain import sample_patches, stain_normaliser
from preprocessing.store import SlideStore, verify_store
from preprocessing.store.read import stores_in
from preprocessing.store.write import feature_origin
from tests.hibio.test_features import write_weights

PATCH = PatchConfig(112.0, 16, 448.0)


@pytest.fixture(scope="module")
def prepared(toy_cohort, tmp_path_factory) -> Path:
    """One slide with a context, and weights."""
    folder = tmp_path_factory.mktemp("scales")
    report = prepare(read_manifest(toy_cohort)[-1:], folder / "stores", patch=PATCH, images="raw")
    assert not report.failed, str(report)
    write_weights(folder / "vit.safetensors", "test_vit")
    return folder


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def report_of(folder: Path, **changes):
    weights = folder / "vit.safetensors"
    return features_report(
        folder / "stores", "test_vit", weights=weights, device="cpu", batch=16, **changes
    )


def features_of(folder: Path, name: str) -> np.ndarray:
    with SlideStore(folder / "stores" / "sim003.h5") as store:
        return store.features(name)


def plainly(folder: Path, patches: np.ndarray) -> np.ndarray:
    """All patches through the model at once."""
    network = load_backbone(resolve_backbone("test_vit"), folder / "vit.safetensors")
    with torch.no_grad():
        return network.model(network.prepared(torch.from_numpy(patches))).numpy()


def test_scales_get_names_of_their_own_and_both_stand_side_by_side(folder):
    for scale, name in (("spot", "test_vit"), ("context", "test_vit_context")):
        report = report_of(folder, scale=scale)
        assert [row.status for row in report.rows] == ["done"], str(report)
        assert report.encoder == name
    report_of(folder, scale="both")
    spot, around = features_of(folder, "test_vit"), features_of(folder, "test_vit_context")
    with SlideStore(folder / "stores" / "sim003.h5") as store:
        near, wide = store.patches(), store.context()
    np.testing.assert_allclose(spot, plainly(folder, near), atol=2e-3, rtol=2e-3)
    np.testing.assert_allclose(around, plainly(folder, wide), atol=2e-3, rtol=2e-3)
    assert np.abs(spot - around).max() > 0.01
    both = features_of(folder, "test_vit_both")
    np.testing.assert_array_equal(both, np.hstack([spot, around]))
    origin = feature_origin(folder / "stores" / "sim003.h5", "test_vit_both")
    assert (origin["scale"], origin["context_um"]) == ("both", 448.0)
    assert "stain" not in origin
    assert [row.status for row in report_of(folder, scale="both").rows] == ["skipped"]
    assert all(f.level != "FAIL" for f in verify_store(folder / "stores" / "sim003.h5"))


@pytest.mark.parametrize("stain", ["macenko", "reinhard"])
def test_the_stain_of_the_slide_is_taken_off_first(folder, stain):
    report = report_of(folder, scale="both", stain=stain)
    assert report.encoder == f"test_vit_both_{stain}", str(report)
    with SlideStore(folder / "stores" / "sim003.h5") as store:
        normaliser = stain_normaliser(stain, sample_patches(store))
        pictures = [normaliser(store.patches()), normaliser(store.context())]
    expected = np.hstack([plainly(folder, one) for one in pictures])
    found = features_of(folder, f"test_vit_both_{stain}")
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2e-3)
    assert feature_origin(folder / "stores" / "sim003.h5", report.encoder)["stain"] == stain


def test_a_store_without_context_fails_with_the_remedy(toy_stores, prepared, tmp_path):
    stores = tmp_path / "mixed"
    shutil.copytree(prepared / "stores", stores)
    shutil.copy(toy_stores / "sim001.h5", stores)
    weights = prepared / "vit.safetensors"
    report = features_report(stores, "test_vit", weights=weights, device="cpu", scale="context")
    assert [row.status for row in report.rows] == ["failed", "done"]
    assert "prepare the slide again with --context-um" in str(report)


@pytest.mark.parametrize("change", [{"scale": "wide"}, {"stain": "vahadane"}])
def test_unknown_choices_are_refused(folder, change):
    with pytest.raises(ConfigError, match="choose "):
        report_of(folder, **change)


def test_a_slide_reads_them_by_name(toy_stores, toy_artifacts, tmp_path):
    path = Path(shutil.copy(toy_stores / "sim001.h5", tmp_path))
    weights = write_weights(tmp_path / "vit.safetensors", "test_vit")
    features_report(path, "test_vit", weights=weights, device="cpu", stain="reinhard")
    slide = prepare_slide(path, toy_artifacts, "test_vit_reinhard")
    assert slide.features_SF.shape == (70, 64)
    assert stores_in(tmp_path) == [path]
