"""Terms of values and vectors: masked genes, profiles, expression from the image, decorrelation.

Legend: S spots, V spot-vector length or target genes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hibio.losses.logits import full_precision


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


def rows_mse(prediction_SV: Tensor, target_SV: Tensor, used_S: Tensor | None = None) -> Tensor:
    """Mean squared error over the spots that are used and over all columns.

    Args:
        prediction_SV: (S, V) predicted spot vectors, or standardised expression.
        target_SV: (S, V) what they should be.
        used_S: (S,) bool; False rows (halo) take no part. All rows when None.

    Returns:
        Scalar; 0 (with a graph) when no row is used.

    Raises:
        ValueError: shapes that do not fit.
    """
    if used_S is None:
        used_S = torch.ones(len(prediction_SV), dtype=torch.bool, device=prediction_SV.device)
    if prediction_SV.ndim != 2 or used_S.shape != prediction_SV.shape[:1]:
        raise ValueError(
            f"prediction is {tuple(prediction_SV.shape)}, used {tuple(used_S.shape)}; expected "
            "(S, V) and (S,)"
        )
    return masked_mse(prediction_SV, target_SV, used_S[:, None].expand_as(prediction_SV))


def decorrelation(embedding_SD: Tensor) -> Tensor:
    """Sum of the squared off-diagonal covariances of the dimensions, divided by D.

    Args:
        embedding_SD: (S, D) embeddings, not normalised.

    Returns:
        Scalar; 0 (with a graph) with fewer than two spots.

    Raises:
        ValueError: not a matrix.
    """
    if embedding_SD.ndim != 2:
        raise ValueError(f"embedding is {tuple(embedding_SD.shape)}, expected (S, D)")
    n_spots, width = embedding_SD.shape
    if n_spots < 2:
        return (embedding_SD * 0).sum()
    with torch.autocast(embedding_SD.device.type, enabled=False):
        value = full_precision(embedding_SD)
        centred_SD = value - value.mean(dim=0)
        covariance_DD = centred_SD.T @ centred_SD / (n_spots - 1)
    off_diagonal = covariance_DD - torch.diag(covariance_DD.diagonal())
    return off_diagonal.square().sum() / width
