"""What of a backbone is trained: LoRA, its last blocks, all or none of it; and saved again."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from hibio.backbones.networks import build_model
from hibio.backbones.registry import BACKBONES, Backbone
from hibio.config.files import ConfigError
from hibio.config.model import ModelConfig, VisionConfig
from hibio.config.run import DataConfig
from hibio.config.training import ObjectiveConfig, OptimConfig
from hibio.encoders import vision
from hibio.encoders.vision import LoraLinear, build_vision_encoder
from hibio.model import HiBio
from hibio.training.engine.base import GRAPH_SCALE
from hibio.training.engine.torch import TorchEngine
from hibio.training.objective import Objective
from tests.hibio.test_features_backbones import to_transformers
from tests.hibio.toy import OMICS, make_slide, run_config, whole_batch

VIT = VisionConfig(name="timm", timm_name="test_vit", input_px=64)
BLOCKS = 6  # of test_vit


@pytest.fixture(scope="module")
def batch(toy_stores, toy_artifacts):
    whole = whole_batch(make_slide(toy_stores, toy_artifacts, image="patches"))
    few = {}
    for field in dataclasses.fields(whole):
        value = getattr(whole, field.name)
        if isinstance(value, torch.Tensor):
            few[field.name] = value[:, :6] if field.name.startswith("region") else value[:6]
    return dataclasses.replace(whole, **few)


def tower(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return build_vision_encoder(dataclasses.replace(VIT, **changes))


def trained(built) -> set[str]:
    return {name for name, p in built.backbone.named_parameters() if p.requires_grad}


def shaken(built):
    """Every trained parameter moved, as after some steps."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return built


@torch.no_grad()
def test_lora_starts_as_the_frozen_backbone(batch):
    assert torch.equal(tower(tune="lora")(batch), tower(tune="none")(batch))


def test_lora_trains_its_additions_and_nothing_else(batch):
    built = tower(tune="lora", lora_rank=3)
    assert trained(built) == {
        f"blocks.{i}.attn.{layer}.{part}"
        for i in range(BLOCKS)
        for layer in ("qkv", "proj")
        for part in ("down", "up")
    }
    layer = built.backbone.blocks[0].attn.qkv
    assert isinstance(layer, LoraLinear)
    assert (layer.down.shape[0], layer.up.shape[1]) == (3, 3)
    built(batch).square().sum().backward()
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)
    x = torch.randn(4, layer.base.in_features)
    shaken(built)
    expected = [layer.base(row) + layer.up @ (layer.down @ row) for row in x]
    torch.testing.assert_close(layer(x), torch.stack(expected))


@torch.no_grad()
def test_merged_weights_are_the_tuned_backbone_in_plain_names(batch, tmp_path):
    built = shaken(tower(tune="lora")).eval()
    out = built(batch)
    assert not torch.allclose(out, tower(tune="none").eval()(batch), atol=1e-3)
    path = tmp_path / "tuned.safetensors"
    save_file(built.backbone_weights(), path)
    assert set(load_file(path)) == set(tower(tune="none").backbone.state_dict())
    again = tower(seed=9, weights=path, tune="none").eval()
    torch.testing.assert_close(again(batch), out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(built(batch), out)  # the tower itself is not merged


def test_the_last_blocks_are_trained_and_the_others_stay(batch):
    built = tower(tune="last_n", tune_blocks=2)
    found = trained(built)
    assert {name.split(".")[1] for name in found if name.startswith("blocks")} == {"4", "5"}
    assert {name for name in found if not name.startswith("blocks")} == {"norm.weight", "norm.bias"}
    before = {name: value.clone() for name, value in built.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=0.1)
    built.train()(batch).square().sum().backward()
    optimizer.step()
    moved = {n for n, v in built.backbone.state_dict().items() if not torch.equal(v, before[n])}
    assert moved <= found
    assert any(name.startswith("blocks.5") for name in moved)
    last = tower(timm_name="test_resnet", tune="last_n", tune_blocks=1, input_px=None)
    assert all(name.startswith("layer4") for name in trained(last))
    modes = {name: module.training for name, module in last.train().backbone.named_modules()}
    assert modes["layer4.0.bn1"]
    assert not modes["bn1"]  # running statistics of frozen layers do not move


def test_layers_computed_again_give_the_same_gradient(batch):
    gradients = []
    for checkpoint in (False, True):
        built = tower(tune="lora", checkpoint=checkpoint).train()
        assert built.backbone.grad_checkpointing == checkpoint
        shaken(built)(batch).square().sum().backward()
        gradients.append({n: p.grad for n, p in built.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_an_encoder_of_the_registry_is_tuned_from_weights_of_transformers(
    batch, tmp_path, monkeypatch
):
    """The same tower for every backbone; its own colours, size and pooling."""
    entry = Backbone("toy", "test_vit", {}, 128, "cls+mean", 160, mean=(0.5,) * 3, std=(0.2,) * 3)
    monkeypatch.setattr(vision, "known_backbone", lambda name: entry if name == "toy" else None)
    torch.manual_seed(0)
    state = to_transformers(build_model(entry).state_dict(), dinov2=False)
    path = tmp_path / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    built = tower(timm_name="toy", weights=path, tune="lora", standardise="pretrained")
    assert (built.embed_dim, built.size) == (128, 64)  # input_px, with positions resampled
    frozen = tower(timm_name="toy", weights=path, tune="none", standardise="pretrained", seed=5)
    with torch.no_grad():
        out = built(batch)
        assert torch.equal(out, frozen(batch))
        image = (batch.patches_SCHW[:6].float() / 255 - 0.5) / 0.2
        image = torch.nn.functional.interpolate(image, (64, 64), mode="bilinear", antialias=True)
        tokens = frozen.backbone(image)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert len(trained(built)) == 4 * BLOCKS


def test_the_backbone_learns_at_its_own_rate(toy_artifacts):
    config = ModelConfig(vision=dataclasses.replace(VIT, lr_scale=0.1), omics=OMICS, embed_dim=16)
    objective = Objective(HiBio(config, toy_artifacts), ObjectiveConfig(), ())
    engine = TorchEngine(objective, OptimConfig(), "cpu")
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    loss = sum((p * torch.ones_like(p)).sum() for p in objective.parameters())
    engine.step(loss, 1e-2)
    for name, value in objective.named_parameters():  # Adam's first step is the rate itself
        if name.endswith(GRAPH_SCALE):
            continue  # has another rate of its own
        decay = 1e-2 * before[name].abs().max() if value.ndim >= 2 else 0.0
        step = (value.detach() - before[name]).abs().max()
        rate = 1e-3 if name.startswith("model.vision.backbone.") else 1e-2
        assert rate * 0.9 < float(step) < rate * (1.1 + float(decay)), name
    plain = TorchEngine(
        Objective(
            HiBio(dataclasses.replace(config, vision=VIT), toy_artifacts), ObjectiveConfig(), ()
        ),
        OptimConfig(),
        "cpu",
    )
    assert {group["rate"] for group in plain.optimizer.param_groups} <= {
        1.0,
        OptimConfig().graph_rate,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timm_name": "test_resnet", "tune": "lora", "input_px": None}, "has none.*last_n, all"),
        ({"tune": "last_n", "tune_blocks": BLOCKS + 1}, rf"is {BLOCKS + 1}.*has {BLOCKS} blocks"),
    ],
)
def test_what_a_backbone_does_not_have_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        tower(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "features", "tune": "lora"}, "tune: of a backbone that reads patches"),
        ({"name": "features", "input_px": 64}, "input_px: of a backbone"),
        ({"tune": "none", "checkpoint": True}, "tune is none"),
        ({"tune": "none", "lr_scale": 0.1}, "tune is none"),
    ],
)
def test_settings_that_cannot_be_together_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        VisionConfig(**{"name": "timm", **changes})


def test_a_frozen_backbone_without_weights_is_refused(toy_stores, tmp_path):
    data = DataConfig(toy_stores, image="patches")
    for tune in ("lora", "last_n"):
        model = ModelConfig(vision=dataclasses.replace(VIT, tune=tune))
        with pytest.raises(ValueError, match=rf"tune: {tune} keeps most.*weights: FILE"):
            run_config(toy_stores, tmp_path, data=data, model=model)


def test_sizes_of_the_registry_follow_input_px():
    assert BACKBONES["midnight"].at(112).arguments["img_size"] == 112
    assert BACKBONES["midnight"].at(224) is BACKBONES["midnight"]
    assert BACKBONES["midnight"].at(None) is BACKBONES["midnight"]
