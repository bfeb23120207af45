"""A backbone with its weights, and the uint8 patches of a store that it turns into features.

Legend: S patches, C colours, H and W pixels, T tokens, F features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hibio.backbones.registry import BACKBONES, Backbone
from hibio.config.files import ConfigError
from hibio.data.counts import ordered_map
from hibio.encoders.vision import ensure_torchvision, read_weights

#: Spot numbers (n,) -> uint8 patches (n, H, W, 3).
Reader = Callable[[np.ndarray], np.ndarray]

_FLOAT16_MAX = float(np.finfo(np.float16).max)
#: Tensor names of transformers' ViT and Dinov2 -> timm's; a block is ``encoder.layer.<number>``.
_RENAMES = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_before|norm1)", r"blocks.\1.norm1"),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_after|norm2)", r"blocks.\1.norm2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"blocks.\1.attn.proj"),
    (r"encoder\.layer\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)", r"blocks.\1.mlp.fc1"),
    (r"encoder\.layer\.(\d+)\.(?:output\.dense|mlp\.fc2)", r"blocks.\1.mlp.fc2"),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"layernorm", "norm"),
)
_QUERY = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)")
#: Parts of transformers' models that take no part in the features.
_UNUSED = ("pooler.", "embeddings.mask_token")


class FrozenBackbone(nn.Module):
    """A patch encoder, a timm model with its weights, in evaluation mode without gradients."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, backbone: Backbone, model: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = model.eval().requires_grad_(False)
        self.register_buffer("mean_C11", torch.tensor(backbone.mean).view(3, 1, 1))
        self.register_buffer("std_C11", torch.tensor(backbone.std).view(3, 1, 1))

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, patches_SHWC: Tensor) -> Tensor:
        """Features (S, F) float32 of uint8 patches (S, H, W, 3)."""
        image_SCHW = self.prepared(patches_SHWC)
        enabled = image_SCHW.is_cuda and torch.cuda.is_bf16_supported()
        with torch.autocast(image_SCHW.device.type, dtype=torch.bfloat16, enabled=enabled):
            out = self.model(image_SCHW)
        return pooled(out.float(), self.backbone, self.model)

    def prepared(self, patches_SHWC: Tensor) -> Tensor:
        """The whole patch resized to the encoder's input, normalised; (S, C, H, W) float32."""
        image = patches_SHWC.permute(0, 3, 1, 2).float() / 255.0
        side = self.backbone.input_px
        if image.shape[-2:] != (side, side):
            image = nn.functional.interpolate(
                image, (side, side), mode=self.backbone.interpolation, antialias=True
            ).clamp(0.0, 1.0)
        return (image - self.mean_C11) / self.std_C11


def pooled(out: Tensor, backbone: Backbone, model: Any) -> Tensor:
    """The feature vector (S, F) of what a model returns.

    Raises:
        ConfigError: it returns neither vectors nor, where the pooling needs them, tokens.
    """
    expected = 2 if backbone.pooling == "none" else 3
    if out.ndim != expected:
        raise ConfigError(
            f"encoder {backbone.encoder!r} returns an array of {out.ndim} axes, pooling "
            f"{backbone.pooling!r} needs {expected}; use an encoder that returns one vector a patch"
        )
    if backbone.pooling == "none":
        return out
    cls_SF = out[:, 0]
    if backbone.pooling == "cls":
        return cls_SF
    return torch.cat([cls_SF, out[:, model.num_prefix_tokens :].mean(dim=1)], dim=1)


def build_model(backbone: Backbone, device: str = "cpu") -> Any:
    """The timm model without classifier and weights, on "cpu" or, for shapes alone, "meta".

    Raises:
        ConfigError: timm cannot build it.
    """
    ensure_torchvision()
    import timm

    named: dict[str, Any] = {"SwiGLUPacked": timm.layers.SwiGLUPacked, "SiLU": nn.SiLU}
    arguments: dict[str, Any] = {
        key: named[value] if key in ("mlp_layer", "act_layer") else value
        for key, value in backbone.arguments.items()
    }
    if backbone.pooling != "none":
        arguments["global_pool"] = ""
    try:
        with torch.device(device):
            return timm.create_model(
                backbone.timm_name, pretrained=False, num_classes=0, **arguments
            )
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"encoder {backbone.encoder!r}: timm {timm.__version__} cannot build "
            f"{backbone.timm_name!r} with {dict(backbone.arguments)} ({error}); try a newer timm"
        ) from error


def load_backbone(backbone: Backbone, weights: Path) -> FrozenBackbone:
    """Build an encoder and give it the weights of a file.

    Raises:
        ConfigError: the file is not the weights of this encoder, is damaged, or would run code.
    """
    state = read_weights(weights)
    if backbone.layout == "transformers" and any(key.startswith("embeddings.") for key in state):
        state = timm_names(state)
    # without spending minutes on random values for a billion parameters; all of these are plain
    # transformers, whose every tensor is in the file
    model = build_model(backbone, "meta" if backbone.encoder in BACKBONES else "cpu")
    state = {key: value for key, value in state.items() if not _is_classifier(key, model)}
    _check_fit(model.state_dict(), state, backbone, weights)
    model.load_state_dict(state, assign=True)
    return FrozenBackbone(backbone, model.float())


def _is_classifier(key: str, model: Any) -> bool:
    """Whether a tensor belongs to the classifier, which features do without."""
    heads = model.pretrained_cfg.get("classifier") or ()
    names = (heads,) if isinstance(heads, str) else tuple(heads)
    return any(key.startswith(f"{name}.") for name in names)


def _check_fit(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], backbone: Backbone, path: Path
) -> None:
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    other = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    told = [
        f"{len(keys)} {word} (first: {', '.join(keys[:3])})"
        for keys, word in ((missing, "missing"), (unexpected, "unexpected"), (other, "other shape"))
        if keys
    ]
    if told:
        raise ConfigError(
            f"{path}: not the weights of encoder {backbone.encoder!r} ({backbone.timm_name}, "
            f"{len(own)} tensors): {'; '.join(told)}; check --encoder, or save the plain state "
            "dict with timm's own names"
        )


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' ViTModel or Dinov2Model under timm's names.

    Query, key and value become one matrix; names that are not known stay as they are.
    """
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(_UNUSED) or ".attention.attention." in key:
            continue
        result[_renamed(key)] = value
    for key in state:
        found = _QUERY.fullmatch(key)
        if found:
            parts = [key, key.replace(".query.", ".key."), key.replace(".query.", ".value.")]
            if all(part in state for part in parts):
                name = f"blocks.{found[1]}.attn.qkv.{found[2]}"
                result[name] = torch.cat([state[part] for part in parts])
    return result


def _renamed(key: str) -> str:
    for pattern, name in _RENAMES:
        found = re.match(rf"{pattern}(?=\.|$)", key)
        if found:
            return found.expand(name) + key[found.end() :]
    return key


def encode_patches(
    read: Reader,
    spots: int,
    network: FrozenBackbone,
    *,
    batch: int = 64,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Encode all patches of a store.

    Args:
        read: gives the patches of some spots; called from threads when ``workers`` > 0.
        spots: S.
        network: the encoder, on its device.
        batch: patches of one forward pass.
        workers: threads that read ahead, two batches each; 0 reads between the passes.
        progress: told the number of patches after every pass.

    Returns:
        (S, F) float16, or float32 from the first batch on that exceeds its range.

    Raises:
        ConfigError: a batch does not fit into the memory of the device.
    """
    device = network.mean_C11.device
    result: np.ndarray | None = None
    indices = [np.arange(i, min(i + batch, spots)) for i in range(0, spots, batch)]
    read_in = ordered_map(read, indices, max(workers, 1), ahead=2 * workers)
    for index, patches_SHWC in zip(indices, read_in, strict=True):
        features = _forward(network, patches_SHWC, device)
        if result is None:
            result = np.empty((spots, features.shape[1]), dtype=np.float16)
        if result.dtype == np.float16 and np.abs(features).max() > _FLOAT16_MAX:
            result = result.astype(np.float32)
        result[index] = features
        if progress is not None:
            progress(len(index))
    if result is None:
        raise ConfigError(f"{spots} patches to encode; expected at least 1")
    return result


def _forward(network: FrozenBackbone, patches_SHWC: np.ndarray, device: torch.device) -> np.ndarray:
    try:
        patches = torch.from_numpy(np.ascontiguousarray(patches_SHWC)).to(device)
        return network(patches).cpu().numpy()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{len(patches_SHWC)} patches at once do not fit into the memory of {device}; give a "
            f"smaller --batch (half: {max(1, len(patches_SHWC) // 2)})"
        ) from error
