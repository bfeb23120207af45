"""Vision towers: stored features through a perceptron, or a timm backbone on patches (METHOD 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hibio.batch import SlideBatch
from hibio.config import ConfigError
from hibio.encoders.base import resolve_encoder
from hibio.encoders.mlp import mlp
from hibio.torchvision_ops import ensure_torchvision


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    Attributes:
        name: features (stored ones, e.g. handcrafted or a frozen backbone's) | timm |
            package.module:Class.
        width: hidden and output width of the features tower.
        dropout: of the features tower, on its input and hidden layer.
        timm_name: model of the timm tower, e.g. ``vit_small_patch16_224``, ``resnet50``,
            ``hf-hub:MahmoodLab/UNI``.
        pretrained: ask timm for its weights (needs them cached, or the network).
        weights: local weights file (safetensors, or a plain state dict) instead.
        tune: all | none (frozen backbone) of the timm tower.
        standardise: slide (per-slide stain mean and sd) | pretrained (the model's own constants).
        feature_dim: F, filled in from the stores.
    """

    name: str = "features"
    width: int = 256
    dropout: float = 0.2
    timm_name: str = "resnet10t"
    pretrained: bool = False
    weights: Path | None = None
    tune: Literal["all", "none"] = "all"
    standardise: Literal["slide", "pretrained"] = "slide"
    feature_dim: int | None = None


class FeatureTower(nn.Module):
    """Perceptron on stored features, standardised per slide.

    Args:
        config: ``feature_dim``, ``width`` and ``dropout`` are used.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.feature_dim is None:
            raise ConfigError("model.vision.feature_dim is missing; build the model from stores")
        self.embed_dim = config.width
        self.layers = nn.Sequential(
            nn.Dropout(config.dropout),
            mlp(config.feature_dim, config.width, config.width, config.dropout),
        )

    def forward(self, batch: SlideBatch) -> Tensor:
        """Embeddings (S, width)."""
        if batch.features_SF is None:
            raise ConfigError(
                "the features tower got a batch without features; set data.image to a stored "
                "feature key, or model.vision.name to timm"
            )
        return self.layers(batch.features_SF.clamp(-6.0, 6.0))


class TimmTower(nn.Module):
    """A timm model without its classifier, on uint8 patches.

    Args:
        config: ``timm_name``, ``pretrained``, ``weights``, ``tune`` and ``standardise`` are used.
    """

    backbone: Any
    mean_C: Tensor
    sd_C: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        ensure_torchvision()
        import timm

        try:
            self.backbone = timm.create_model(
                config.timm_name, pretrained=config.pretrained, num_classes=0
            )
        except RuntimeError as error:
            raise ConfigError(
                f"timm cannot build {config.timm_name!r}: {error}; `timm.list_models()` lists names"
            ) from error
        if config.weights is not None:
            self.backbone.load_state_dict(read_weights(config.weights), strict=False)
        if config.tune == "none":
            self.backbone.requires_grad_(False)
        self.standardise = config.standardise
        self.embed_dim = int(self.backbone.num_features)
        data = timm.data.resolve_model_data_config(self.backbone)
        self.register_buffer("mean_C", torch.tensor(data["mean"]), persistent=False)
        self.register_buffer("sd_C", torch.tensor(data["std"]), persistent=False)
        self.size: int | None = data["input_size"][-1] if data.get("fixed_input_size") else None

    def forward(self, batch: SlideBatch) -> Tensor:
        """Embeddings (S, num_features)."""
        if batch.patches_SCHW is None:
            raise ConfigError("the timm tower got a batch without patches; set data.image: patches")
        image = batch.patches_SCHW.float() / 255.0
        if self.size is not None and image.shape[-1] != self.size:
            image = nn.functional.interpolate(
                image, size=(self.size, self.size), mode="bilinear", antialias=True
            )
        mean, sd = self.mean_C.expand(len(image), 3), self.sd_C.expand(len(image), 3)
        if self.standardise == "slide" and batch.stain_S6 is not None:
            mean, sd = batch.stain_S6[:, :3], batch.stain_S6[:, 3:].clamp(min=1e-3)
        return self.backbone((image - mean[..., None, None]) / sd[..., None, None])


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file, or from a torch file without unpickling code."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


VISION_ENCODERS: Mapping[str, Any] = {"features": FeatureTower, "timm": TimmTower}


def build_vision_encoder(config: VisionConfig) -> nn.Module:
    """The vision tower that ``config.name`` names."""
    return resolve_encoder(config.name, VISION_ENCODERS, "vision")(config)
