"""Vision towers: stored features, or a timm backbone on patches (docs/method.md 4).

The ordinary torchvision wheel links its compiled operators to CUDA. Beside a torch without CUDA
they do not load, and torchvision then fails on import because it registers shape functions for
operators that nobody declared. Declaring the two that it asks for is enough: nothing calls them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hibio.batch import SlideBatch
from hibio.config.files import ConfigError
from hibio.config.model import VisionConfig
from hibio.encoders.base import build_encoder, mlp, neighbour_mean

_MISSING = "operator torchvision::"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def ensure_torchvision() -> bool:
    """Make torchvision importable; call it before the first import of timm or torchvision.

    Returns:
        Whether torchvision's compiled operators are there (nms, roi_align, decode_jpeg). Without
        them models and transforms work all the same.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: torchvision fails for any other reason than its missing operators.
    """
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
        self.embed_dim = config.width
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
        features_SF = batch.features_SF.clamp(-6.0, 6.0)
        if self.context == "neighbours":
            around_SF = neighbour_mean(features_SF, batch.neighbour_SN)
            features_SF = torch.cat([features_SF, around_SF], dim=1)
        return self.layers(features_SF)


class TimmTower(nn.Module):
    """A timm model without its classifier, on uint8 patches.

    Args:
        config: ``timm_name``, ``pretrained``, ``weights``, ``tune``, ``standardise``, ``stain`` and
            ``context`` are used.
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
            load_weights(self.backbone, config.weights, config.timm_name)
        self.frozen = config.tune == "none"
        if self.frozen:
            self.backbone.requires_grad_(False)
        self.standardise, self.stain = config.standardise, config.stain
        self.context = config.context == "patch"
        self.embed_dim = int(self.backbone.head_hidden_size) * (2 if self.context else 1)
        data = timm.data.resolve_model_data_config(self.backbone)
        self.register_buffer("mean_C", torch.tensor(data["mean"]), persistent=False)
        self.register_buffer("sd_C", torch.tensor(data["std"]), persistent=False)
        fixed = self.backbone.pretrained_cfg.get("fixed_input_size", False)
        self.size: int | None = data["input_size"][-1] if fixed else None

    def train(self, mode: bool = True) -> TimmTower:
        """A frozen backbone stays in evaluation mode: its running statistics do not move."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
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
        embedded = self.backbone(image).chunk(len(patches))  # one batch, one batch norm
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


def load_weights(backbone: nn.Module, path: Path, name: str) -> None:
    """Load a weights file into a backbone; what only the file has (a classifier) is left out.

    Raises:
        ConfigError: the file lacks weights of the model, or they have other shapes.
    """
    weights = read_weights(path)
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


VISION_ENCODERS: Mapping[str, Any] = {"features": FeatureTower, "timm": TimmTower}


def build_vision_encoder(config: VisionConfig) -> nn.Module:
    """The vision tower that ``config.name`` names."""
    return build_encoder(config.name, VISION_ENCODERS, "vision", config.settings, config=config)
