"""Masked auto-encoding and profile terms of the omics branch (METHOD section 3.1).

Legend: S spots, V spot-vector length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hibio.losses.similarity import full_precision


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the masked entries only, divided by their number.

    What stands outside the mask takes no part, not even when it is NaN.

    Args:
        prediction: any shape.
        target: same shape.
        mask: same shape, bool; True entries were hidden and are predicted.

    Returns:
        Scalar; 0 (with a graph) when nothing is masked.

    Raises:
        ValueError: the three shapes differ or the mask is not bool.
    """
    if not prediction.shape == target.shape == mask.shape:
        raise ValueError(
            f"prediction is {tuple(prediction.shape)}, target {tuple(target.shape)}, mask "
            f"{tuple(mask.shape)}; expected one shape"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, expected torch.bool (True: masked)")
    difference = full_precision(prediction) - full_precision(target)
    difference = torch.where(mask, difference, torch.zeros_like(difference))
    return difference.square().sum() / mask.sum().clamp(min=1)


def profile_mse(prediction_SV: Tensor, target_SV: Tensor, core_S: Tensor) -> Tensor:
    """Mean squared error of predicted spot vectors over the core spots.

    Args:
        prediction_SV: (S, V) predicted spot vectors (the spot's own, or its neighbours' mean).
        target_SV: (S, V) what they should be.
        core_S: (S,) bool; halo spots (False) take no part.

    Returns:
        Scalar; 0 (with a graph) without core spots.

    Raises:
        ValueError: shapes that do not fit.
    """
    if prediction_SV.ndim != 2 or core_S.shape != prediction_SV.shape[:1]:
        raise ValueError(
            f"prediction is {tuple(prediction_SV.shape)}, core {tuple(core_S.shape)}; expected "
            "(S, V) and (S,)"
        )
    return masked_mse(prediction_SV, target_SV, core_S[:, None].expand_as(prediction_SV))
