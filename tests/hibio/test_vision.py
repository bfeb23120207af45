"""Vision towers: timm on patches, stain, weights files, frozen backbones, towers of the user."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hibio.backbones.networks import read_weights
from hibio.config.files import ConfigError
from hibio.config.model import VisionConfig
from hibio.encoders.vision import build_vision_encoder
from tests.hibio.toy import FEATURES, make_model, make_slide, whole_batch

TIMM = VisionConfig(name="timm", timm_name="test_resnet")


@pytest.fixture(scope="module")
def batch(toy_stores, toy_artifacts):
    return whole_batch(make_slide(toy_stores, toy_artifacts, image="patches"))


def tower(**changes):
    torch.manual_seed(0)
    return build_vision_encoder(dataclasses.replace(TIMM, **changes))


def test_forward_and_backward(batch):
    built = tower()
    out = built(batch)
    assert out.shape == (batch.n_spots, built.embed_dim) == (70, 96)
    out.square().mean().backward()
    assert all(p.grad is not None for p in built.parameters())


@pytest.mark.parametrize("name", ["test_vit", "mobilenetv3_small_050"])
@torch.no_grad()
def test_models_of_a_fixed_size_or_with_a_wide_head(batch, name):
    """32 px are resized to the 160 px of the transformer; the width is what comes out."""
    few = dataclasses.replace(batch, **_rows(batch, 4))
    built = tower(timm_name=name).eval()
    assert built(few).shape == (4, built.embed_dim)


def _rows(batch, n: int) -> dict:
    rows = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            rows[field.name] = value[:, :n] if field.name.startswith("region") else value[:n]
    return rows


@torch.no_grad()
def test_the_input_is_standardised_by_the_stain_of_the_slide(batch):
    built = tower().eval()
    seen = []
    built.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    built(batch)
    image = batch.patches_SCHW.double() / 255.0
    stain = batch.stain_S6[0].double()
    expected = (image - stain[:3, None, None]) / stain[3:, None, None]
    torch.testing.assert_close(seen[0].double(), expected, atol=1e-5, rtol=1e-5)
    assert abs(float(seen[0].mean())) < 0.2
    fixed = tower(standardise="pretrained").eval()
    fixed.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    fixed(batch)
    torch.testing.assert_close(seen[1].double(), (image - 0.5) / 0.5, atol=1e-6, rtol=0)


@torch.no_grad()
def test_brighter_scanners_cancel_out_by_slide_and_not_by_constants(batch):
    dark = (batch.patches_SCHW.float() / 2).round().to(torch.uint8)
    dimmed = dataclasses.replace(batch, patches_SCHW=dark, stain_S6=batch.stain_S6 / 2)
    by_slide, fixed = tower().eval(), tower(standardise="pretrained").eval()
    near = (by_slide(dimmed) - by_slide(batch)).norm() / by_slide(batch).norm()
    far = (fixed(dimmed) - fixed(batch)).norm() / fixed(batch).norm()
    assert near < 0.05
    assert far > 5 * near


def test_a_frozen_backbone_gets_no_gradient_and_does_not_move(batch):
    built = tower(tune="none").train()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    head = torch.nn.Linear(built.embed_dim, 1)
    head(built(batch)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in built.parameters())
    assert head.weight.grad.abs().sum() > 0
    assert all(torch.equal(built.state_dict()[name], value) for name, value in before.items())
    free = tower().train()
    free(batch)  # running statistics do move in a backbone that is trained
    assert any(not torch.equal(free.state_dict()[n], v) for n, v in before.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_file_round_trip(tmp_path, batch, suffix):
    source = tower()
    path = tmp_path / f"weights{suffix}"
    state = {**source.backbone.state_dict(), "fc.weight": torch.ones(10, 96)}  # with a classifier
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    torch.manual_seed(99)
    loaded = build_vision_encoder(dataclasses.replace(TIMM, weights=path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch), source.eval()(batch))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    state = tower().backbone.state_dict()
    renamed = {f"module.{key}": value for key, value in state.items()}
    save_file(renamed, path)
    with pytest.raises(ConfigError, match=r"not the weights of 'test_resnet': (\d+) of its \1 "):
        tower(weights=path)
    save_file({key: torch.zeros(value.numel() + 1) for key, value in state.items()}, path)
    with pytest.raises(ConfigError, match="have another shape"):
        tower(weights=path)


class _Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Evil()}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"weights\.pt: .*without running code") as told:
        read_weights(tmp_path / "weights.pt")
    assert "weights_only" not in str(told.value)  # torch's own advice is to run it
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_damaged_and_missing_weights(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError):
        read_weights(path)
    path.write_bytes(b"\x00\x01\x02 no weights at all")
    with pytest.raises(ConfigError, match=name):
        read_weights(path)
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "nested.pt")
    with pytest.raises(ConfigError, match="plain state dict"):
        read_weights(tmp_path / "nested.pt")


def test_unknown_names_list_the_choices():
    with pytest.raises(ConfigError, match=r"did you mean 'features'\? \(choices: features, timm"):
        tower(name="feature")
    with pytest.raises(ConfigError, match=r"cannot build 'resnet_fifty'.*list_models"):
        tower(timm_name="resnet_fifty")


LAB = '''
import torch


class Tower(torch.nn.Module):
    """Mean colour of the patch."""

    embed_dim = 3

    def __init__(self, config):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(float(config.width)))

    def forward(self, batch):
        return self.scale * batch.patches_SCHW.float().mean(dim=(2, 3)) / 255.0
'''


def test_a_tower_of_the_user(tmp_path, monkeypatch, batch, toy_artifacts):
    (tmp_path / "toy_lab.py").write_text(LAB)
    monkeypatch.syspath_prepend(str(tmp_path))
    built = tower(name="toy_lab:Tower", width=24)
    expected = 24.0 * batch.patches_SCHW.float().mean(dim=(2, 3)) / 255.0
    torch.testing.assert_close(built(batch), expected)
    model = make_model(toy_artifacts, vision=VisionConfig(name="toy_lab:Tower"))
    assert model(batch).image.shape == (70, 16)
    with pytest.raises(ConfigError, match=r"'toy_lab:Towr' cannot be imported"):
        tower(name="toy_lab:Towr")


def test_the_features_tower(toy_stores, toy_artifacts):
    slide = make_slide(toy_stores, toy_artifacts)
    batch = whole_batch(slide)
    built = tower(name="features", feature_dim=FEATURES, width=24).eval()
    out = built(batch)
    assert out.shape == (70, 24)
    clipped = dataclasses.replace(batch, features_SF=batch.features_SF.clamp(-6, 6))
    assert torch.equal(built(clipped), out)
    wild = dataclasses.replace(batch, features_SF=batch.features_SF * 1e4)
    assert torch.isfinite(built(wild)).all()
    assert np.abs(built(wild).detach().numpy()).max() < 100


@torch.no_grad()
def test_context_is_the_mean_of_the_neighbours_features(toy_stores, toy_artifacts):
    slide = make_slide(toy_stores, toy_artifacts)
    batch = whole_batch(slide)
    plain = tower(name="features", feature_dim=FEATURES, width=24).eval()
    niche = tower(name="features", feature_dim=FEATURES, width=24, context="neighbours").eval()
    seen = []
    niche.layers.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert niche(batch).shape == plain(batch).shape == (70, 24)
    clipped = slide.features_SF.clip(-6, 6)
    for spot in (0, 20, 69):
        near = [n for n in slide.neighbour_SN[spot] if n >= 0]
        expected = np.concatenate([clipped[spot], clipped[near].mean(axis=0)])
        np.testing.assert_allclose(seen[0][spot], expected, atol=1e-5)
    model = make_model(toy_artifacts, vision=niche_config())
    tiles, whole = (model.encode_slide(slide, tile_spots=n).image for n in (9, 1000))
    np.testing.assert_allclose(tiles, whole, atol=1e-5)


def niche_config() -> VisionConfig:
    return VisionConfig(width=24, feature_dim=FEATURES, context="neighbours")


def test_towers_say_what_they_miss(toy_stores, toy_artifacts, batch):
    features = whole_batch(make_slide(toy_stores, toy_artifacts))
    with pytest.raises(ConfigError, match=r"set data\.image: patches"):
        tower()(features)
    with pytest.raises(ConfigError, match=r"set data\.image to a stored"):
        tower(name="features", feature_dim=FEATURES)(batch)
    with pytest.raises(ConfigError, match="build the model from stores"):
        tower(name="features")
