"""A frozen encoder, and the uint8 patches of a store that it turns into features.

Legend: S patches, C colours, H and W pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hibio.backbones.networks import load_model, pooled
from hibio.backbones.registry import Backbone
from hibio.config.files import ConfigError
from hibio.data.counts import ordered_map

#: Spot numbers (n,) -> uint8 patches (n, H, W, 3).
Reader = Callable[[np.ndarray], np.ndarray]

_FLOAT16_MAX = float(np.finfo(np.float16).max)


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


def load_backbone(backbone: Backbone, weights: Path) -> FrozenBackbone:
    """Build an encoder and give it the weights of a file.

    Raises:
        ConfigError: the file is not the weights of this encoder, is damaged, or would run code.
    """
    return FrozenBackbone(backbone, load_model(backbone, weights))


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
