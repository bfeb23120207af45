"""The model section of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hibio.encoders.omics import OmicsConfig
from hibio.encoders.vision import VisionConfig


@dataclass(frozen=True)
class ModelConfig:
    """Both towers and the shared space.

    Attributes:
        vision: see :class:`VisionConfig`; ``name: none`` for counts alone.
        omics: see :class:`OmicsConfig`.
        embed_dim: D.
        dropout: of the projections.
        temperature: first value of the learned contrast temperature.
        anchor_temperature: first value of the learned anchor temperature.
        anchor: omics (a pathway goes through the omics branch) | table (learned, the baseline).
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    omics: OmicsConfig = field(default_factory=OmicsConfig)
    embed_dim: int = 128
    dropout: float = 0.1
    temperature: float = 0.1
    anchor_temperature: float = 0.1
    anchor: Literal["omics", "table"] = "omics"
