"""Spatially-aware contrast of two views of the omics branch (METHOD section 3.1).

Legend: S spots, D embedding width, V spot-vector length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hibio.losses.contrastive import near_duplicates
from hibio.losses.similarity import cosine_logits, mean_of_rows


def spatial_contrast(
    view_a_SD: Tensor,
    view_b_SD: Tensor,
    xy_um_S2: Tensor,
    slide_of_spot_S: Tensor,
    profile_SV: Tensor,
    temperature: Tensor | float,
    *,
    radius_um: float = 150.0,
    correlation: float = 0.5,
    label_S: Tensor | None = None,
) -> Tensor:
    """Multi-positive InfoNCE between two views of the same spots, with space in micrometres.

    For spot i of one view the candidates are the spots j of the other. Positive: i itself, and the
    spots that `spatial_pairs` calls positive. Negative: spots far away or on another slide. What
    is near without being alike is neither. The loss of a row is the mean over its positives of
    -log softmax over all its positives and negatives (so with p positives its least value is
    ln p), and a row without a negative is left out.

    Args:
        view_a_SD: (S, D) embeddings of one view; normalised here.
        view_b_SD: (S, D) embeddings of the other, row by row the same spots.
        xy_um_S2: (S, 2) centres in micrometres.
        slide_of_spot_S: (S,) slide of each spot.
        profile_SV: (S, V) profiles of the unaltered spots.
        temperature: positive number or one-element tensor, typically 0.1.
        radius_um: near is closer than this.
        correlation: alike is a Pearson correlation of profiles above this.
        label_S: (S,) integer labels, -1 unlabelled; see `spatial_pairs`.

    Returns:
        Scalar, mean of both directions; 0 (with a graph) when no row has a negative.

    Raises:
        ValueError: shapes that do not fit, or a setting outside its range.
    """
    if view_a_SD.shape != view_b_SD.shape:
        raise ValueError(
            f"view a is {tuple(view_a_SD.shape)}, view b {tuple(view_b_SD.shape)}; expected two "
            "views of the same spots, row by row"
        )
    if len(view_a_SD) != len(profile_SV):
        raise ValueError(
            f"{len(view_a_SD)} embeddings and {len(profile_SV)} profiles; expected one a spot"
        )
    positive_SS, negative_SS = spatial_pairs(
        xy_um_S2,
        slide_of_spot_S,
        profile_SV,
        radius_um=radius_um,
        correlation=correlation,
        label_S=label_S,
    )
    logits_SS = cosine_logits(view_a_SD, view_b_SD, temperature)
    forward = _multi_positive(logits_SS, positive_SS, negative_SS)
    return (forward + _multi_positive(logits_SS.T, positive_SS, negative_SS)) / 2


def _multi_positive(logits_SS: Tensor, positive_SS: Tensor, negative_SS: Tensor) -> Tensor:
    """Mean over rows that have a negative of the mean over positives of -log softmax."""
    candidate_SS = positive_SS | negative_SS
    total_S = logits_SS.masked_fill(~candidate_SS, float("-inf")).logsumexp(dim=1)
    own_S = (logits_SS * positive_SS).sum(dim=1) / positive_SS.sum(dim=1)
    return mean_of_rows(total_S - own_S, negative_SS.any(dim=1))


@torch.no_grad()
def spatial_pairs(
    xy_um_S2: Tensor,
    slide_of_spot_S: Tensor,
    profile_SV: Tensor,
    *,
    radius_um: float = 150.0,
    correlation: float = 0.5,
    label_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which pairs of spots attract and which repel; the rest (near, but not alike) do neither.

    Args:
        xy_um_S2: (S, 2) centres in micrometres.
        slide_of_spot_S: (S,) slide of each spot.
        profile_SV: (S, V) profiles (a constant row correlates with nothing).
        radius_um: pairs of one slide closer than this are near.
        correlation: near pairs that correlate (Pearson) above this are positive.
        label_S: (S,) integer labels: a positive pair must then share its label as well, and an
            unlabelled spot (-1) shares it with nobody but itself. Never needed.

    Returns:
        Positive and negative pairs, (S, S) bool, symmetric, never both; the diagonal is positive.

    Raises:
        ValueError: shapes that do not fit, or a setting outside its range.
    """
    if not radius_um >= 0:
        raise ValueError(f"radius_um is {radius_um}, expected 0 or more micrometres; try 150")
    if not -1 <= correlation <= 1:
        raise ValueError(f"correlation is {correlation}, expected -1 to 1; try 0.5")
    n_spots = len(profile_SV)
    if label_S is not None and label_S.shape != (n_spots,):
        raise ValueError(f"label is {tuple(label_S.shape)}, expected ({n_spots},): one a spot")
    near_SS = near_duplicates(profile_SV, xy_um_S2, slide_of_spot_S, radius_um, -math.inf)
    alike_SS = near_duplicates(profile_SV, xy_um_S2, slide_of_spot_S, radius_um, correlation)
    if label_S is not None:
        alike_SS &= (label_S[:, None] == label_S[None, :]) & (label_S >= 0)[:, None]
    near_SS, alike_SS = near_SS | near_SS.T, alike_SS | alike_SS.T  # rounding may differ
    own_SS = torch.eye(n_spots, dtype=torch.bool, device=profile_SV.device)
    return alike_SS | own_SS, ~(near_SS | own_SS)
