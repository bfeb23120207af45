"""The known encoders: what they build, how they pool, whose weights they take, what they refuse."""

import json
import os
import re
import socket

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from hibio.backbones.features import scale_note
from hibio.backbones.frozen import FrozenBackbone, load_backbone
from hibio.backbones.networks import build_model, pooled, timm_names
from hibio.backbones.registry import BACKBONES, Backbone, known_backbone, registry_table
from hibio.backbones.resolve import fetch_weights, find_weights, hub_backbone, resolve_backbone
from hibio.config.files import ConfigError

RUNNABLE = list(BACKBONES.values())
VIT = Backbone("toy", "test_vit", {}, input_px=160)


def random_model(backbone: Backbone = VIT, seed: int = 0):
    torch.manual_seed(seed)
    model = build_model(backbone).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # layer scales too, so that every tensor matters
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Nobody logged in, nothing cached, and any connection is a failure of the test."""

    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)


@pytest.mark.parametrize("backbone", RUNNABLE, ids=lambda backbone: backbone.encoder)
def test_every_entry_builds_and_has_its_dimension(backbone):
    model = build_model(backbone, "meta")
    assert {name for name, _ in model.named_buffers()} <= set(model.state_dict())  # see load
    image = torch.zeros(2, 3, backbone.input_px, backbone.input_px, device="meta")
    assert pooled(model(image), backbone, model).shape == (2, backbone.dim)


@pytest.mark.parametrize(
    ("encoder", "millions"), [("uni", 303), ("uni2-h", 681), ("virchow2", 631), ("gigapath", 1135)]
)
def test_the_published_number_of_parameters(encoder, millions):
    model = build_model(BACKBONES[encoder], "meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


@torch.no_grad()
def test_pooling_is_the_class_token_and_the_mean_of_the_patch_tokens():
    tokens = torch.randn(3, 1 + 4 + 9, 8)

    class Tokens:
        num_prefix_tokens = 5

    both = Backbone("toy", "test_vit", pooling="cls+mean")
    for row, found in zip(tokens, pooled(tokens, both, Tokens), strict=True):
        expected = torch.cat([row[0], sum(row[i] for i in range(5, 14)) / 9])
        torch.testing.assert_close(found, expected)
    assert torch.equal(pooled(tokens, VIT, Tokens), tokens[:, 0])
    with pytest.raises(ConfigError, match="an array of 2 axes, pooling 'cls' needs 3"):
        pooled(tokens[:, 0], VIT, Tokens)


@torch.no_grad()
def test_the_class_token_is_what_timm_itself_returns():
    own = Backbone("toy", "test_vit", {"global_pool": "token"}, pooling="none")
    model, image = random_model(), torch.randn(2, 3, 160, 160)
    theirs = build_model(own).eval()
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(pooled(model(image), VIT, model), theirs(image))


def test_patches_are_normalised_and_resized_like_pictures():
    network = FrozenBackbone(VIT, random_model())
    flat = torch.full((1, 160, 160, 3), 51, dtype=torch.uint8)
    found = network.prepared(flat)[0, :, 0, 0]
    expected = [(0.2 - m) / s for m, s in zip(VIT.mean, VIT.std, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected))
    noise = np.random.default_rng(0).integers(80, 176, (40, 40, 3), dtype=np.uint8)  # no clipping
    for picture in (noise, np.repeat(np.repeat(noise, 6, 0), 6, 1)):  # enlarged, and reduced
        seen = network.prepared(torch.from_numpy(picture[None].copy()))[0]
        seen = (seen * network.std_C11 + network.mean_C11).permute(1, 2, 0).numpy() * 255
        resized = Image.fromarray(picture).resize((160, 160), Image.Resampling.BICUBIC)
        assert np.abs(seen - np.asarray(resized, dtype=float)).max() < 1.6  # PIL rounds twice


def test_it_stays_frozen():
    network = FrozenBackbone(VIT, random_model()).train()
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@torch.no_grad()
def test_weights_go_round_with_and_without_a_classifier(tmp_path, suffix):
    model, path = random_model(), tmp_path / f"weights{suffix}"
    state = {**model.state_dict(), "head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    image = torch.randn(2, 3, 160, 160)
    loaded = load_backbone(VIT, path)
    assert torch.equal(loaded.model(image), model(image))


def to_transformers(state: dict, dinov2: bool) -> dict:
    """The names that transformers' ViTModel or Dinov2Model would have written."""
    inside = {
        "attn.proj": "attention.output.dense",
        "norm1": "norm1" if dinov2 else "layernorm_before",
        "norm2": "norm2" if dinov2 else "layernorm_after",
        "mlp.fc1": "mlp.fc1" if dinov2 else "intermediate.dense",
        "mlp.fc2": "mlp.fc2" if dinov2 else "output.dense",
        "ls1": "layer_scale1",
        "ls2": "layer_scale2",
    }
    outside = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    result = {"embeddings.mask_token": torch.zeros(1)} if dinov2 else {}
    result |= {} if dinov2 else {"pooler.dense.weight": torch.zeros(2, 2)}
    for key, value in state.items():
        if key in outside:
            result[outside[key]] = value
            continue
        _, block, *rest, kind = key.split(".")
        where = f"encoder.layer.{block}"
        if rest == ["attn", "qkv"]:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[f"{where}.attention.attention.{name}.{kind}"] = part.clone()
        else:
            kind = "lambda1" if kind == "gamma" else kind
            result[f"{where}.{inside['.'.join(rest)]}.{kind}"] = value
    return result


def transformers_class_token(w: dict, image: torch.Tensor, heads: int, dinov2: bool):
    """Slow oracle: the published vision transformer, straight from transformers' tensors."""

    def lin(x, name):
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    names = ("layernorm_before", "layernorm_after", "intermediate.dense", "output.dense")
    first, second, up, down = ("norm1", "norm2", "mlp.fc1", "mlp.fc2") if dinov2 else names
    at = "embeddings.patch_embeddings.projection"
    kernel = w[f"{at}.weight"]
    x = conv2d(image, kernel, w[f"{at}.bias"], stride=kernel.shape[-1]).flatten(2).mT
    x = torch.cat([w["embeddings.cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + w["embeddings.position_embeddings"]
    for i in range(sum(key.endswith("attention.query.weight") for key in w)):
        at = f"encoder.layer.{i}"
        seen = norm(x, f"{at}.{first}")
        q, k, v = (
            lin(seen, f"{at}.attention.attention.{n}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
        mixed = lin(mixed.transpose(1, 2).flatten(2), f"{at}.attention.output.dense")
        x = x + mixed * w.get(f"{at}.layer_scale1.lambda1", torch.ones(()))
        out = lin(gelu(lin(norm(x, f"{at}.{second}"), f"{at}.{up}")), f"{at}.{down}")
        x = x + out * w.get(f"{at}.layer_scale2.lambda1", torch.ones(()))
    return norm(x, "layernorm")[:, 0]


@pytest.mark.parametrize("dinov2", [False, True])
@torch.no_grad()
def test_weights_of_transformers_are_read(tmp_path, dinov2):
    arguments = {"init_values": 0.5} if dinov2 else {}
    backbone = Backbone("toy", "test_vit", arguments, input_px=160)
    state = to_transformers(random_model(backbone).state_dict(), dinov2)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "weights.safetensors")
    network = load_backbone(backbone, tmp_path / "weights.safetensors")
    image = torch.randn(2, 3, 160, 160)
    expected = transformers_class_token(
        state, image, network.model.blocks[0].attn.num_heads, dinov2
    )
    found = pooled(network.model(image), backbone, network.model)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert "something.else" in timm_names({**state, "something.else": torch.ones(1)})


@torch.no_grad()
def test_registers_and_gated_layers_of_transformers_are_read(tmp_path):
    """DINOv2 with registers and SwiGLU: the class token's position is added once."""
    arguments = {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 2.0}
    arguments |= {"init_values": 0.5, "mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
    backbone = Backbone("toy", "vit_small_patch14_reg4_dinov2", arguments, input_px=56)
    model = random_model(backbone)
    state = dict(model.state_dict())
    own = torch.randn(1, 1, 48)
    registers, position = state.pop("reg_token"), state.pop("pos_embed")
    theirs = to_transformers({**state, "pos_embed": position}, dinov2=True)
    theirs["embeddings.cls_token"] = theirs["embeddings.cls_token"] - own
    theirs["embeddings.position_embeddings"] = torch.cat([own, position], dim=1)
    theirs["embeddings.register_tokens"] = registers
    theirs = {
        key.replace("mlp.fc1", "mlp.weights_in").replace("mlp.fc2", "mlp.weights_out"): value
        for key, value in theirs.items()
    }
    save_file({k: v.contiguous() for k, v in theirs.items()}, tmp_path / "weights.safetensors")
    network = load_backbone(backbone, tmp_path / "weights.safetensors")
    image = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(network.model(image), model(image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_of_another_grid_are_resampled(tmp_path):
    """A constant position stays constant; the class token's own is not mixed in."""
    model, path = random_model(), tmp_path / "weights.safetensors"
    own, flat = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    state = {**model.state_dict(), "pos_embed": torch.cat([own, flat.expand(1, 100, 64)], dim=1)}
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    found = load_backbone(VIT.at(64), path).model.pos_embed
    assert found.shape == (1, 1 + 16, 64)
    torch.testing.assert_close(found[:, :1], own)
    torch.testing.assert_close(found[:, 1:], flat.expand(1, 16, 64), atol=1e-5, rtol=1e-5)


def conch_slowly(w: dict, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """The attention pooling of CONCH, head by head, straight from its published tensors."""
    at = "visual.attn_pool_contrast"
    norm = {name: (w[f"{at}.{name}.weight"], w[f"{at}.{name}.bias"]) for name in ("ln_q", "ln_k")}
    query = layer_norm(w[f"{at}.query"], w[f"{at}.query"].shape[-1:], *norm["ln_q"])
    seen = layer_norm(tokens, tokens.shape[-1:], *norm["ln_k"])
    bias = w[f"{at}.attn.in_proj_bias"].chunk(3)
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    sources = (query.expand(len(tokens), 1, -1), seen, seen)
    q, k, v = (
        (x @ w[f"{at}.attn.{name}"].T + b).unflatten(-1, (heads, -1))
        for x, name, b in zip(sources, names, bias, strict=True)
    )
    parts = []
    for head in range(heads):
        weight = torch.softmax(q[:, :, head] @ k[:, :, head].mT / q.shape[-1] ** 0.5, dim=-1)
        parts.append(weight @ v[:, :, head])
    out = linear(
        torch.cat(parts, dim=-1)[:, 0],
        w[f"{at}.attn.out_proj.weight"],
        w[f"{at}.attn.out_proj.bias"],
    )
    return layer_norm(
        out, out.shape[-1:], w["visual.ln_contrast.weight"], w["visual.ln_contrast.bias"]
    )


@torch.no_grad()
def test_the_image_side_of_conch_is_read_out_of_the_whole_model(tmp_path):
    small = Backbone("toy", "test_vit", {}, 32, "attention", input_px=160)
    model = random_model(small)
    theirs = {f"visual.{name}": value for name, value in model.state_dict().items()}
    others = ("visual.proj_contrast", "visual.attn_pool_caption.query", "text.cls_emb")
    path = tmp_path / "weights.safetensors"
    save_file({**theirs, **{name: torch.ones(3) for name in others}}, path)
    network, image = load_backbone(small, path), torch.randn(2, 3, 160, 160)
    found = pooled(network.model(image), small, network.model)
    torch.testing.assert_close(found, pooled(model(image), small, model))
    expected = conch_slowly(theirs, model.trunk.forward_features(image), heads=8)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    del theirs["visual.attn_pool_contrast.query"]
    save_file(theirs, path)
    with pytest.raises(ConfigError, match=r"1 missing \(first: attn_pool_contrast\.query"):
        load_backbone(small, path)


def test_weights_that_do_not_fit_name_the_first_tensors(tmp_path):
    state, path = random_model().state_dict(), tmp_path / "weights.safetensors"
    save_file({f"module.{key}": value for key, value in state.items()}, path)
    with pytest.raises(ConfigError) as told:
        load_backbone(VIT, path)
    assert f"{len(state)} missing (first: cls_token, pos_embed" in str(told.value)
    assert f"{len(state)} unexpected (first: module." in str(told.value)
    save_file({**state, "pos_embed": torch.zeros(1, 7, 64)}, path)  # six are no square grid
    with pytest.raises(ConfigError, match=r"1 other shape \(first: pos_embed \(1, 7, 64\) instead"):
        load_backbone(VIT, path)
    save_file({**state, "reg_token": torch.zeros(1, 4, 64)}, path)
    with pytest.raises(ConfigError, match=r"1 unexpected \(first: reg_token\)"):
        load_backbone(VIT, path)


class _Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"weights{suffix}"
    torch.save({**random_model().state_dict(), "extra": _Evil()}, path)
    with pytest.raises(ConfigError, match="without running code"):
        load_backbone(VIT, path)
    assert not (tmp_path / "unpickled").exists()


def test_names(offline):
    assert known_backbone("hf-hub:MahmoodLab/uni2-h") is BACKBONES["uni2-h"]
    assert known_backbone("bioptimus/H0-mini") is BACKBONES["h0-mini"]
    assert resolve_backbone("UNI") is BACKBONES["uni"]
    found = resolve_backbone("test_vit")
    assert (found.hub, found.input_px, found.mpp) == ("timm/test_vit.r160_in1k", 160, ())
    for name, words in [
        ("virchow3", r"did you mean 'virchow' or 'virchow2'\?.*choices: uni, uni2-h, conch"),
        ("vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'"),
        ("resnet50.no_such_tag", "unknown encoder"),
        ("hf-hub:no slash/at all/x", r"expected hf-hub:ORG/NAME"),
    ]:
        with pytest.raises(ConfigError, match=words):
            resolve_backbone(name)


def test_gated_weights_are_explained_without_the_network(offline, tmp_path):
    for backbone in RUNNABLE:
        if backbone.gated:
            with pytest.raises(ConfigError, match=rf"gated.*{backbone.hub}.*--weights FILE"):
                find_weights(backbone, None)
    with pytest.raises(ConfigError, match=r"none\.bin: no such weights file"):
        find_weights(BACKBONES["uni"], tmp_path / "none.bin")
    with pytest.raises(ConfigError, match="no published weights"):
        find_weights(resolve_backbone("vit_giant_patch14_224"), None)


def test_weights_in_the_cache_need_no_login(offline, monkeypatch, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    known = {("MahmoodLab/UNI", "pytorch_model.bin"): str(path)}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *key: known.get(key))
    assert find_weights(BACKBONES["uni"], None) == path


def test_errors_of_the_hub_say_what_to_do(offline, monkeypatch, tmp_path):
    from huggingface_hub import errors

    def hub(error):
        def download(repository, name):
            if error is None:
                return str(tmp_path / name)
            made = error.__new__(error)
            made.args = ("from the hub",)
            raise made

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    hub(None)
    assert find_weights(BACKBONES["phikon"], None) == tmp_path / "model.safetensors"
    for error, words in [
        (errors.GatedRepoError, "accept the licence"),
        (errors.RepositoryNotFoundError, "no repository 'owkin/phikon'"),
        (errors.LocalEntryNotFoundError, r"no network\?"),
        (errors.EntryNotFoundError, "has neither model.safetensors nor pytorch_model.bin"),
        (ConnectionError, r"no network\?"),
    ]:
        hub(error)
        with pytest.raises(ConfigError, match=words):
            fetch_weights(BACKBONES["phikon"])


def test_a_hub_configuration_in_timms_form(tmp_path):
    config = {
        "architecture": "test_vit",
        "num_classes": 10,
        "global_pool": "",
        "model_args": {"num_classes": 10, "init_values": 1e-5},
        "pretrained_cfg": {
            "input_size": [3, 160, 160],
            "mean": [0.7, 0.6, 0.7],
            "std": [0.2, 0.2, 0.2],
            "interpolation": "bilinear",
            "license": "mit",
        },
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    found = hub_backbone("lab/net", path)
    assert found.encoder == "lab--net"
    assert found.arguments == {"init_values": 1e-5}
    assert (found.pooling, found.input_px, found.interpolation) == ("cls", 160, "bilinear")
    assert pooled(random_model(found)(torch.zeros(1, 3, 160, 160)), found, None).shape == (1, 64)
    for text, words in [
        ('{"model_type": "vit"}', "names no timm architecture"),
        ("[1]", "names no timm architecture"),
        ('{"architecture": "test_vit", "mean": [0.5]}', r"mean is \[0\.5\]; expected one number"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            hub_backbone("lab/net", path)
    with pytest.raises(ConfigError, match=r"timm .* cannot build 'test_vit'"):
        build_model(Backbone("toy", "test_vit", {"no_such": 1}))


@pytest.mark.parametrize(
    ("encoder", "um", "px", "mpp", "words"),
    [
        ("uni", 112, 224, 0.25, ""),
        ("uni", 128, 256, 0.55, ""),
        ("uni", 224, 224, 0.25, "sees 1 um/px, was trained at 0.5: prepare with --patch-um 112"),
        ("virchow2", 224, 224, 0.25, ""),
        ("uni", 112, 32, 0.25, "stored at 3.5 um/px.*--patch-px 224"),
        ("uni", 112, 224, 4.0, "the slide has only 4 um/px"),
    ],
)
def test_resolutions_more_than_a_fifth_off_are_told(encoder, um, px, mpp, words):
    assert re.search(words or "^$", scale_note(BACKBONES[encoder], um, px, mpp))


def test_the_list_shows_every_encoder():
    table = registry_table()
    assert all(f"\n{encoder} " in table for encoder in BACKBONES)
    assert "--weights FILE" in table
    assert max(len(line) for line in table.splitlines()) <= 120
