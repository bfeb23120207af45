"""Vision towers: stored features, or a patch encoder on patches, tuned (docs/method.md 4)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hibio.backbones.networks import (
    build_model,
    ensure_torchvision,
    load_model,
    plain_names,
    pooled,
    read_weights,
)
from hibio.backbones.registry import Backbone, Triple, known_backbone
from hibio.backbones.resolve import find_weights
from hibio.batch import SlideBatch
from hibio.config.files import ConfigError
from hibio.config.model import VisionConfig
from hibio.encoders.base import build_encoder, mlp, neighbour_mean


class FeatureTower(nn.Module):
    """Perceptron on stored features, standardised per slide.

    Args:
        config: ``feature_dim``, ``width``, ``dropout`` and ``context`` are used.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.feature_dim is None:
            raise ConfigError("model.vision.feature_dim is missing; build the model from stores")
        if config.context == "patch" or config.stain != "none":
            raise ConfigError(
                "model.vision.context: patch and model.vision.stain change patches; the features "
                "tower reads none: set model.vision.name to timm, or use hibio features"
            )
        self.embed_dim, self.feature_dim = config.width, config.feature_dim
        self.context = config.context
        n_inputs = config.feature_dim * (1 if config.context == "none" else 2)
        self.layers = nn.Sequential(
            nn.Dropout(config.dropout),
            mlp(n_inputs, config.width, config.width, config.dropout),
        )

    def forward(self, batch: SlideBatch) -> Tensor:
        """Embeddings (S, width)."""
        if batch.features_SF is None:
            raise ConfigError(
                "the features tower got a batch without features; set data.image to a stored "
                "feature key, or model.vision.name to timm"
            )
        if (width := batch.features_SF.shape[1]) != self.feature_dim:
            raise ConfigError(
                f"these features have {width} columns, and the model reads {self.feature_dim}: "
                "give those of the encoder that it was trained on (data.image)"
            )
        features_SF = batch.features_SF.clamp(-6.0, 6.0)
        if self.context == "neighbours":
            around_SF = neighbour_mean(features_SF, batch.neighbour_SN)
            features_SF = torch.cat([features_SF, around_SF], dim=1)
        return self.layers(features_SF)


class TimmTower(nn.Module):
    """A patch encoder without its classifier, on uint8 patches, frozen or trained in part.

    Args:
        config: all keys but ``width``, ``dropout``, ``feature_dim`` and ``settings`` are used.
    """

    backbone: Any
    mean_C: Tensor
    sd_C: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.context == "neighbours":
            raise ConfigError(
                "model.vision.context: neighbours is for stored features; the timm tower reads "
                "patch (a wider patch of each spot), or none"
            )
        known = known_backbone(config.timm_name)
        self.known = None if known is None else known.at(config.input_px)
        self.backbone = _of_timm(config) if self.known is None else _of_registry(self.known, config)
        train_part(self.backbone, config)
        if config.checkpoint:
            self.backbone.set_grad_checkpointing(True)
        self.standardise, self.stain = config.standardise, config.stain
        self.context = config.context == "patch"
        width = int(self.backbone.head_hidden_size)
        if self.known is not None and self.known.dim is not None:
            width = self.known.dim
        self.embed_dim = width * (2 if self.context else 1)
        mean, sd, self.size = self._input(config)
        self.register_buffer("mean_C", torch.tensor(mean), persistent=False)
        self.register_buffer("sd_C", torch.tensor(sd), persistent=False)

    def _input(self, config: VisionConfig) -> tuple[Triple, Triple, int | None]:
        """Mean and sd of the colours, and side of the square that it reads (None: any)."""
        if self.known is not None:
            return self.known.mean, self.known.std, self.known.input_px
        import timm

        data = timm.data.resolve_model_data_config(self.backbone)
        fixed = self.backbone.pretrained_cfg.get("fixed_input_size", False)
        return (
            data["mean"],
            data["std"],
            config.input_px or (data["input_size"][-1] if fixed else None),
        )

    def train(self, mode: bool = True) -> TimmTower:
        """What is frozen stays in evaluation mode: its running statistics do not move."""
        super().train(mode)
        for module in self.backbone.modules():
            weights = list(module.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                module.eval()
        return self

    def forward(self, batch: SlideBatch) -> Tensor:
        """Embeddings (S, embed_dim); those of the spot and of its context side by side.

        A spot's embedding depends on its own patches alone, so halo spots get zeros.
        """
        if batch.patches_SCHW is None:
            raise ConfigError("the timm tower got a batch without patches; set data.image: patches")
        if batch.stain != self.stain:
            raise ConfigError(
                f"the timm tower was built for model.vision.stain: {self.stain}, and got patches "
                f"of stain {batch.stain}; read slides with model.config.vision.image_input(key)"
            )
        core_S = batch.core_S
        stain_S6 = None if batch.stain_S6 is None else batch.stain_S6[core_S]
        patches = [batch.patches_SCHW[core_S]]
        if self.context:
            if batch.context_SCHW is None:
                raise ConfigError(
                    "the timm tower got a batch without context patches, which "
                    "model.vision.context: patch reads; read slides with "
                    "model.config.vision.image_input(key)"
                )
            patches.append(batch.context_SCHW[core_S])
        image = torch.cat([self._prepared(one, stain_S6) for one in patches])
        out = self.backbone(image)
        if self.known is not None:
            out = pooled(out, self.known, self.backbone)
        embedded = out.chunk(len(patches))  # one batch, one batch norm
        core_SD = torch.cat(embedded, dim=1)
        return core_SD.new_zeros(batch.n_spots, self.embed_dim).index_put((core_S,), core_SD)

    def _prepared(self, patches_SCHW: Tensor, stain_S6: Tensor | None) -> Tensor:
        """Patches at the backbone's size, standardised; (S, C, H, W) float32."""
        image = patches_SCHW.float() / 255.0
        if self.size is not None and image.shape[-1] != self.size:
            image = nn.functional.interpolate(
                image, size=(self.size, self.size), mode="bilinear", antialias=True
            )
        mean, sd = self.mean_C.expand(len(image), 3), self.sd_C.expand(len(image), 3)
        if self.standardise == "slide" and stain_S6 is not None:
            mean, sd = stain_S6[:, :3], stain_S6[:, 3:].clamp(min=1e-3)
        return (image - mean[..., None, None]) / sd[..., None, None]

    def backbone_weights(self) -> dict[str, Tensor]:
        """Weights of the backbone under timm's names, LoRA added in: for ``hibio features``.

        Saved with ``safetensors.torch.save_file`` they are a file for ``--weights``.
        """
        merged = copy.deepcopy(self.backbone)
        for name, module in list(merged.named_modules()):
            if isinstance(module, LoraLinear):
                merged.set_submodule(name, module.merged())
        return {name: value.detach().contiguous() for name, value in merged.state_dict().items()}


class LoraLinear(nn.Module):
    """A frozen linear layer and a trained addition of low rank (Hu et al. 2022, LoRA).

    ``y = W x + b + up (down x)``; ``up`` starts at 0, so nothing changes before the first step.

    Args:
        base: the layer; it is frozen.
        rank: r of ``down`` (r, inputs) and ``up`` (outputs, r).
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.base(x) + x @ self.down.T @ self.up.T

    def merged(self) -> nn.Linear:
        """The base layer with the addition in its weights."""
        with torch.no_grad():
            self.base.weight += self.up @ self.down
        return self.base


def train_part(backbone: Any, config: VisionConfig) -> None:
    """Freeze what ``config.tune`` leaves alone, and put LoRA in.

    Raises:
        ConfigError: LoRA without attention layers, or more blocks than there are.
    """
    if config.tune == "all":
        return
    backbone.requires_grad_(False)
    if config.tune == "lora":
        layers = [
            name
            for name, module in backbone.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(("attn.qkv", "attn.proj"))
        ]
        if not layers:
            raise ConfigError(
                f"model.vision.tune: lora changes attention layers, and {config.timm_name!r} has "
                "none (attn.qkv, attn.proj); set it to last_n, all or none"
            )
        for name in layers:
            backbone.set_submodule(name, LoraLinear(backbone.get_submodule(name), config.lora_rank))
    elif config.tune == "last_n":
        for name in last_blocks(backbone, config.tune_blocks, config.timm_name):
            backbone.get_parameter(name).requires_grad_(True)


def last_blocks(backbone: Any, n: int, name: str) -> list[str]:
    """Names of the parameters of the last ``n`` blocks, with what follows them (a norm).

    Raises:
        ConfigError: there are fewer blocks; the first one, with the stem, counts as one.
    """
    from timm.models import group_parameters

    layer = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    order = sorted(set(layer.values()))
    if n >= len(order):
        raise ConfigError(
            f"model.vision.tune_blocks is {n}, and {name!r} has {len(order) - 1} blocks behind its "
            "stem; set tune: all, or fewer blocks"
        )
    return [one for one, place in layer.items() if place in set(order[-n:])]


def _of_registry(known: Backbone, config: VisionConfig) -> Any:
    weights = config.weights
    if weights is None and config.pretrained:
        weights = find_weights(known, None)
    return build_model(known) if weights is None else load_model(known, weights)


def _of_timm(config: VisionConfig) -> Any:
    ensure_torchvision()
    import timm

    def build(**size: Any) -> Any:
        try:
            return timm.create_model(
                config.timm_name, pretrained=config.pretrained, num_classes=0, **size
            )
        except RuntimeError as error:
            raise ConfigError(
                f"timm cannot build {config.timm_name!r}: {error}; `timm.list_models()` lists names"
            ) from error

    backbone = build()
    if config.input_px is not None and backbone.pretrained_cfg.get("fixed_input_size"):
        backbone = build(img_size=config.input_px)
    if config.weights is not None:
        load_weights(backbone, config.weights, config.timm_name)
    return backbone


def load_weights(backbone: nn.Module, path: Path, name: str) -> None:
    """Load a weights file into a backbone; what only the file has (a classifier) is left out.

    Raises:
        ConfigError: the file lacks weights of the model, or they have other shapes.
    """
    weights = plain_names(read_weights(path), backbone)
    own = backbone.state_dict()
    missing = [key for key in own if key not in weights]
    other = [key for key in own if key in weights and weights[key].shape != own[key].shape]
    if missing or other:
        raise ConfigError(
            f"{path}: not the weights of {name!r}: {len(missing)} of its {len(own)} tensors are "
            f"missing and {len(other)} have another shape (first: {(missing + other)[0]}); check "
            "model.vision.timm_name, and save a plain state dict with timm's own names"
        )
    backbone.load_state_dict({key: weights[key] for key in own})


VISION_ENCODERS: Mapping[str, Any] = {"features": FeatureTower, "timm": TimmTower}


def build_vision_encoder(config: VisionConfig) -> nn.Module:
    """The vision tower that ``config.name`` names."""
    return build_encoder(config.name, VISION_ENCODERS, "vision", config.settings, config=config)
