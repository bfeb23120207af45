"""The objective section of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ObjectiveConfig:
    """Settings of the loss terms.

    Attributes:
        negatives: same_slide | all | mixed (METHOD section 5, slide shortcut).
        targets: identity | soft (a control: alike spots share the target mass, and none is left
            out of the negatives).
        target_temperature: of the soft targets; larger spreads them.
        duplicate_um: of identity targets: pairs of one slide closer than this ...
        duplicate_correlation: ... whose spot vectors correlate above this are no negatives.
        mask_genes: share of keyword genes hidden in the masked view.
        mask_spots: share of whole spots hidden.
        query_genes: genes outside its keywords that the masked view of a spot is asked about
            (most are 0), so that the decoder learns absence too; imputation needs it.
        contrast_um: radius of the spatial contrast (METHOD 3.1) ...
        contrast_correlation: ... within which spots whose spot vectors correlate above this are
            positives.
        drop_genes: share of keyword genes that each view of the spatial contrast lacks.
        keep_counts: share of its counts that the second view keeps.
        anchors_per_step: pathways encoded anew in a step; the others come from the cache.
    """

    negatives: Literal["same_slide", "all", "mixed"] = "same_slide"
    targets: Literal["identity", "soft"] = "identity"
    target_temperature: float = 0.1
    duplicate_um: float = 150.0
    duplicate_correlation: float = 0.95
    mask_genes: float = 0.2
    mask_spots: float = 0.15
    query_genes: int = 0
    contrast_um: float = 150.0
    contrast_correlation: float = 0.5
    drop_genes: float = 0.2
    keep_counts: float = 0.7
    anchors_per_step: int = 32

    def __post_init__(self) -> None:
        for name in ("mask_genes", "mask_spots", "drop_genes", "keep_counts"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
        if not self.target_temperature > 0:
            raise ValueError(
                f"target_temperature is {self.target_temperature}, more than 0 is needed"
            )
        if self.query_genes < 0:
            raise ValueError(f"query_genes is {self.query_genes}, 0 or more is needed")
