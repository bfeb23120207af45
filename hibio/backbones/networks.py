"""A patch encoder as a timm model with its weights, whatever names these carry.

The ordinary torchvision wheel links its compiled operators to CUDA. Beside a torch without CUDA
they do not load, and torchvision then fails on import because it registers shape functions for
operators that nobody declared. Declaring the two that it asks for is enough: nothing calls them.

Legend: S patches, C colours, H and W pixels, T tokens, D token width, F features.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hibio.backbones.registry import BACKBONES, Backbone
from hibio.config.files import ConfigError

_MISSING = "operator torchvision::"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
#: Tensor names of transformers' ViT and Dinov2 -> timm's; a block is ``encoder.layer.<number>``.
_RENAMES = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_before|norm1)", r"blocks.\1.norm1"),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_after|norm2)", r"blocks.\1.norm2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"blocks.\1.attn.proj"),
    (
        r"encoder\.layer\.(\d+)\.(?:intermediate\.dense|mlp\.(?:fc1|weights_in))",
        r"blocks.\1.mlp.fc1",
    ),
    (r"encoder\.layer\.(\d+)\.(?:output\.dense|mlp\.(?:fc2|weights_out))", r"blocks.\1.mlp.fc2"),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"layernorm", "norm"),
)
_QUERY = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)")
#: Parts of transformers' models that take no part in the features.
_UNUSED = ("pooler.", "embeddings.mask_token")
#: Of an image-text model, what its image side is made of.
_IMAGE_SIDE = re.compile(r"visual\.((?:trunk|attn_pool_contrast|ln_contrast)\..*)")


def ensure_torchvision() -> bool:
    """Make torchvision importable; call it before the first import of timm or torchvision.

    Returns:
        Whether torchvision's compiled operators are there (nms, roi_align, decode_jpeg). Without
        them models and transforms work all the same.

    Raises:
        ConfigError: timm or torchvision is not installed.
        RuntimeError: torchvision fails for any other reason than its missing operators.
    """
    for name in ("timm", "torchvision"):
        if find_spec(name) is None:
            raise ConfigError(
                f"encoders of patches other than handcrafted need {name}: pip install "
                "'hibio[encoders]'"
            )
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:  # declared only now: a loadable extension would do it twice
        if _MISSING not in str(error):
            raise
        _declared_operators()
        importlib.import_module("torchvision")
    return bool(importlib.import_module("torchvision.extension")._has_ops())


@functools.cache
def _declared_operators() -> Any:
    """The declarations; they last as long as this object, which the cache keeps."""
    make: Any = torch.library.Library
    library = make("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


class AttentionPooled(nn.Module):
    """The image side of CONCH: one learned query attends to the tokens of a vision transformer.

    Source: Lu et al., A visual-language foundation model for computational pathology (Nat Med
    2024); the vector before the projection into the space of texts, as its authors use it for
    everything but texts. Parameters carry the names of the published weights.

    Args:
        trunk: a vision transformer of timm.
        width: F.
        heads: of the attention.
    """

    def __init__(self, trunk: Any, width: int, heads: int = 8) -> None:
        super().__init__()
        self.trunk = trunk
        self.attn_pool_contrast = _QueryAttention(width, trunk.num_features, heads)
        self.ln_contrast = nn.LayerNorm(width)
        self.pretrained_cfg = trunk.pretrained_cfg
        self.head_hidden_size = width

    def forward(self, image_SCHW: Tensor) -> Tensor:
        """Features (S, F)."""
        tokens_STD = self.trunk.forward_features(image_SCHW)
        return self.ln_contrast(self.attn_pool_contrast(tokens_STD))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See timm."""
        self.trunk.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from the input to the output, as timm names them; the pooling goes with the last.

        Patterns are of parameter names.
        """
        last = r"^trunk\.norm|^attn_pool_contrast|^ln_contrast"
        return {
            "stem": r"^trunk\.(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^trunk\.blocks\.(\d+)", None), (last, (99999,))],
        }


class _QueryAttention(nn.Module):
    def __init__(self, width: int, token_width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width))
        self.attn = nn.MultiheadAttention(
            width, heads, kdim=token_width, vdim=token_width, batch_first=True
        )
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(token_width)

    def forward(self, tokens_STD: Tensor) -> Tensor:
        seen_STD = self.ln_k(tokens_STD)
        query_S1F = self.ln_q(self.query).expand(len(tokens_STD), 1, -1)
        return self.attn(query_S1F, seen_STD, seen_STD, need_weights=False)[0][:, 0]


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
            model = timm.create_model(
                backbone.timm_name, pretrained=False, num_classes=0, **arguments
            )
            if backbone.pooling == "attention":
                assert backbone.dim is not None
                model = AttentionPooled(model, backbone.dim)
            return model
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"encoder {backbone.encoder!r}: timm {timm.__version__} cannot build "
            f"{backbone.timm_name!r} with {dict(backbone.arguments)} ({error}); try a newer timm"
        ) from error


def pooled(out: Tensor, backbone: Backbone, model: Any) -> Tensor:
    """The feature vector (S, F) of what a model returns.

    Raises:
        ConfigError: it returns neither vectors nor, where the pooling needs them, tokens.
    """
    expected = 2 if backbone.pooling in ("none", "attention") else 3
    if out.ndim != expected:
        raise ConfigError(
            f"encoder {backbone.encoder!r} returns an array of {out.ndim} axes, pooling "
            f"{backbone.pooling!r} needs {expected}; use an encoder that returns one vector a patch"
        )
    if expected == 2:
        return out
    cls_SF = out[:, 0]
    if backbone.pooling == "cls":
        return cls_SF
    return torch.cat([cls_SF, out[:, model.num_prefix_tokens :].mean(dim=1)], dim=1)


def load_model(backbone: Backbone, weights: Path) -> Any:
    """Build an encoder and give it the weights of a file, in timm's or in the authors' names.

    Raises:
        ConfigError: the file is not the weights of this encoder, is damaged, or would run code.
    """
    # without spending minutes on random values for a billion parameters; all of these are plain
    # transformers, whose every tensor is in the file
    model = build_model(backbone, "meta" if backbone.encoder in BACKBONES else "cpu")
    state = plain_names(read_weights(weights), model)
    state = {key: value for key, value in state.items() if not _is_classifier(key, model)}
    _check_fit(model.state_dict(), state, backbone, weights)
    model.load_state_dict(state, assign=True)
    return model.float()


def plain_names(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights under timm's names, with position embeddings of the model's grid.

    Args:
        state: under timm's names, those of transformers' ViTModel and Dinov2Model, or those of an
            image-text model whose image side is ``visual.trunk``.
        model: the timm model that they are for.
    """
    image_side = {found[1]: state[key] for key in state if (found := _IMAGE_SIDE.fullmatch(key))}
    state = image_side or dict(state)
    if any(key.startswith("embeddings.") for key in state):
        state = timm_names(state)
        if getattr(model, "no_embed_class", False) and {"pos_embed", "cls_token"} <= state.keys():
            position_1TD = state["pos_embed"]  # timm has none for the class token: it is added once
            state["cls_token"] = state["cls_token"] + position_1TD[:, :1]
            state["pos_embed"] = position_1TD[:, 1:]
    return _on_grid(state, model)


def _on_grid(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Position embeddings, of a square grid, resampled to the model's; others stay as they are."""
    trunk = getattr(model, "trunk", model)
    key = "trunk.pos_embed" if trunk is not model else "pos_embed"
    own, given = getattr(trunk, "pos_embed", None), state.get(key)
    if own is None or given is None or given.shape == own.shape or given.ndim != 3:
        return state
    prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    side = round((given.shape[1] - prefix) ** 0.5)
    if side < 2 or side**2 != given.shape[1] - prefix or given.shape[2] != own.shape[2]:
        return state
    from timm.layers import resample_abs_pos_embed

    resampled = resample_abs_pos_embed(
        given, new_size=trunk.patch_embed.grid_size, num_prefix_tokens=prefix
    )
    return {**state, key: resampled}


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


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file, or from a torch file without unpickling code.

    Raises:
        ConfigError: the file is damaged, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{path}: no weights can be read without running code of the file "
            f"({type(error).__name__}); give a safetensors file or a plain state dict"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ConfigError(f"{path}: holds more than tensors; save the plain state dict")
    return weights
