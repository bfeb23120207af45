"""Decorrelation of embedding dimensions, VICReg's covariance term (METHOD section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from hibio.losses.similarity import full_precision


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
