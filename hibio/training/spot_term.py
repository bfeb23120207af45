"""The spot level of a step: identity targets without near-duplicates, or soft targets."""

from __future__ import annotations

import torch
from torch import Tensor

from hibio.losses.contrastive import NearDuplicates, info_nce
from hibio.losses.soft_targets import soft_info_nce
from hibio.training.objective_config import ObjectiveConfig
from hibio.training.step_outputs import Rows


def spot_contrast(paired: Rows, config: ObjectiveConfig, temperature: Tensor) -> Tensor:
    """Patch against profile over all rows of a step.

    Args:
        paired: ``image`` and ``omics`` (N, D), ``slide`` (N,); ``vector`` and ``xy_um`` where
            near-duplicates are left out.
        config: kind of the targets, negatives, near-duplicates.
        temperature: of the contrast.
    """
    image_ND, omics_ND, slide_N = paired["image"], paired["omics"], paired["slide"]
    if config.targets == "soft":
        groups: list[Tensor | None] = [None] if config.negatives in ("all", "mixed") else []
        groups += [slide_N] if config.negatives in ("same_slide", "mixed") else []
        losses = [
            soft_info_nce(image_ND, omics_ND, temperature, config.target_temperature, group_N)
            for group_N in groups
        ]
        return torch.stack(losses).mean()
    exclude = None
    if config.duplicate_um > 0:
        exclude = NearDuplicates(
            paired["vector"],
            paired["xy_um"],
            slide_N,
            config.duplicate_um,
            config.duplicate_correlation,
        )
    return info_nce(
        image_ND,
        omics_ND,
        temperature,
        exclude=exclude,
        group_N=slide_N,
        negatives=config.negatives,
    )
