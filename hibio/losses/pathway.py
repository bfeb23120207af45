"""Pathway level: soft pathway targets against cosine to the pathway anchors (docs/method.md 2).

Legend: S spots, M pathways, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hibio.losses.logits import cosine_logits, full_precision, mean_of_rows


def pathway_kl(
    embedding_SD: Tensor, anchor_MD: Tensor, target_SM: Tensor, temperature: Tensor | float
) -> Tensor:
    """KL(q || softmax_p(cos(z, z_p) / T)), mean over the spots that have a target.

    Args:
        embedding_SD: (S, D) embeddings of one tower.
        anchor_MD: (M, D) anchor embeddings, in the column order of the target.
        target_SM: (S, M) soft targets q, at least 0; a row is divided by its sum, and a row of
            zeros is a spot without target, which is left out.
        temperature: positive number or one-element tensor, typically 0.1.

    Returns:
        Scalar, 0 or more; 0 (with a graph) when no spot has a target.

    Raises:
        ValueError: shapes that do not fit or a temperature that is not positive.
    """
    expected = (embedding_SD.shape[0], anchor_MD.shape[0])
    if target_SM.shape != expected:
        raise ValueError(
            f"target is {tuple(target_SM.shape)}, expected {expected}: a row for every spot and a "
            "column for every anchor"
        )
    log_p_SM = cosine_logits(embedding_SD, anchor_MD, temperature).log_softmax(dim=1)
    mass_S = full_precision(target_SM).sum(dim=1)
    used_S = mass_S > 0
    q_SM = full_precision(target_SM) / torch.where(used_S, mass_S, 1.0)[:, None]
    divergence_S = (torch.xlogy(q_SM, q_SM) - q_SM * log_p_SM).sum(dim=1)
    return mean_of_rows(divergence_S, used_S)
