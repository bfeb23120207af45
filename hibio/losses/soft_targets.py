"""Spot level with soft targets: similar spots share the target mass (Xie et al. 2023, BLEEP).

A control for the identity targets of `hibio.losses.contrastive`. Legend: N pairs, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hibio.losses.similarity import checked_temperature, cosine_logits


def soft_info_nce(
    image_ND: Tensor,
    omics_ND: Tensor,
    temperature: Tensor | float,
    target_temperature: float = 0.1,
    group_N: Tensor | None = None,
) -> Tensor:
    """Cross entropy against soft targets from the similarities within both towers, both ways.

    The target of spot i is the softmax over the candidates j of the mean of cos(image i, image j)
    and cos(omics i, omics j) over the target temperature, without gradient. As it falls to 0 the
    targets become identity ones. The whole N x N matrix is held.

    Args:
        image_ND: (N, D) image embeddings; normalised here.
        omics_ND: (N, D) omics embeddings; normalised here.
        temperature: positive number or one-element tensor, typically 0.1.
        target_temperature: positive; larger spreads the target.
        group_N: (N,) slide of every pair: candidates are those of the same slide. None: all.

    Returns:
        Scalar, mean of both directions; 0 (with a graph) when N is 0.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    if image_ND.shape != omics_ND.shape:
        raise ValueError(
            f"image is {tuple(image_ND.shape)}, omics {tuple(omics_ND.shape)}; expected pairs, "
            "row by row"
        )
    n = len(image_ND)
    if group_N is not None and group_N.shape != (n,):
        raise ValueError(f"group is {tuple(group_N.shape)}, expected ({n},): one a pair")
    checked_temperature(target_temperature)
    logits_NN = cosine_logits(image_ND, omics_ND, temperature)
    if n == 0:
        return (image_ND * 0).sum() + (omics_ND * 0).sum()
    other_NN = torch.zeros_like(logits_NN, dtype=torch.bool)
    if group_N is not None:
        other_NN = group_N[:, None] != group_N[None, :]
    with torch.no_grad():
        within = [cosine_logits(one, one, target_temperature) for one in (image_ND, omics_ND)]
        target_NN = ((within[0] + within[1]) / 2).masked_fill(other_NN, -torch.inf).softmax(dim=1)
    return (
        _entropy(logits_NN, target_NN, other_NN) + _entropy(logits_NN.T, target_NN, other_NN)
    ) / 2


def _entropy(logits_NN: Tensor, target_NN: Tensor, other_NN: Tensor) -> Tensor:
    """Mean over the rows of - sum of target x log softmax over the row's candidates."""
    log_NN = logits_NN.masked_fill(other_NN, -torch.inf).log_softmax(dim=1)
    return -(target_NN * log_NN.masked_fill(other_NN, 0.0)).sum(dim=1).mean()
