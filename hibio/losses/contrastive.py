"""Spot level: symmetric InfoNCE between patch and profile (METHOD section 5, stage 1).

Legend: N pairs, S spots, D embedding width, V spot-vector length.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hibio.losses.similarity import cosine_logits, full_precision

Negatives = Literal["all", "same_slide", "mixed"]


def info_nce(
    image_ND: Tensor,
    omics_ND: Tensor,
    temperature: Tensor | float,
    exclude_NN: Tensor | None = None,
    group_N: Tensor | None = None,
    negatives: Negatives = "all",
) -> Tensor:
    """Symmetric InfoNCE with identity targets: row i of one tower belongs to row i of the other.

    Args:
        image_ND: (N, D) image embeddings; normalised here.
        omics_ND: (N, D) omics embeddings; normalised here.
        temperature: positive number or one-element tensor, typically 0.07.
        exclude_NN: (N, N) bool, True takes the pair (image i, omics j) out of the negatives of
            both directions; the diagonal always stays.
        group_N: (N,) slide of every pair, needed for ``same_slide`` and ``mixed``.
        negatives: ``all`` rows, only those of the ``same_slide``, or the mean of both losses.

    Returns:
        Scalar, mean of image -> omics and omics -> image; 0 when N is 0.

    Raises:
        ValueError: shapes that do not fit, a missing ``group_N`` or an unknown ``negatives``.
    """
    if image_ND.shape != omics_ND.shape:
        raise ValueError(
            f"image is {tuple(image_ND.shape)}, omics {tuple(omics_ND.shape)}; expected pairs, "
            "row by row"
        )
    n = image_ND.shape[0]
    if exclude_NN is not None and exclude_NN.shape != (n, n):
        raise ValueError(f"exclude_NN is {tuple(exclude_NN.shape)}, expected {(n, n)}")
    logits_NN = cosine_logits(image_ND, omics_ND, temperature)
    losses = [
        _cross_entropy(logits_NN, allowed_NN)
        for allowed_NN in _candidates(logits_NN, exclude_NN, group_N, negatives)
    ]
    return torch.stack(losses).mean()


def _candidates(
    logits_NN: Tensor, exclude_NN: Tensor | None, group_N: Tensor | None, negatives: str
) -> list[Tensor]:
    """One (N, N) mask of allowed pairs for every kind of negatives that is asked for."""
    if negatives not in ("all", "same_slide", "mixed"):
        raise ValueError(f"negatives is {negatives!r}, expected one of: all, same_slide, mixed")
    allowed_NN = torch.ones_like(logits_NN, dtype=torch.bool)
    if exclude_NN is not None:
        allowed_NN = ~exclude_NN.bool()
    masks = [allowed_NN] if negatives in ("all", "mixed") else []
    if negatives in ("same_slide", "mixed"):
        if group_N is None or group_N.shape != logits_NN.shape[:1]:
            found = "none" if group_N is None else f"{tuple(group_N.shape)}"
            raise ValueError(
                f"negatives={negatives!r} needs group_N of shape {tuple(logits_NN.shape[:1])} "
                f"(slide of each pair), found {found}"
            )
        masks.append(allowed_NN & (group_N[:, None] == group_N[None, :]))
    diagonal_NN = torch.eye(len(logits_NN), dtype=torch.bool, device=logits_NN.device)
    return [mask | diagonal_NN for mask in masks]


def _cross_entropy(logits_NN: Tensor, allowed_NN: Tensor) -> Tensor:
    """Mean over both directions of -log softmax at the diagonal, over the allowed pairs only."""
    masked_NN = logits_NN.masked_fill(~allowed_NN, float("-inf"))
    forward_N = masked_NN.logsumexp(dim=1)
    backward_N = masked_NN.logsumexp(dim=0)
    per_pair_N = (forward_N + backward_N) / 2 - logits_NN.diagonal()
    return per_pair_N.sum() / max(len(logits_NN), 1)


@torch.no_grad()
def near_duplicates(
    vector_SV: Tensor,
    xy_um_S2: Tensor,
    slide_of_spot_S: Tensor,
    radius_um: float,
    threshold: float,
) -> Tensor:
    """Pairs of spots too alike to be negatives: close by on one slide with near-identical profiles.

    Args:
        vector_SV: (S, V) profiles; rows are compared by Pearson correlation (a constant row
            correlates with nothing).
        xy_um_S2: (S, 2) centres in micrometres.
        slide_of_spot_S: (S,) slide of each spot.
        radius_um: pairs closer than this, typically 150 um.
        threshold: and correlated above this, typically 0.9.

    Returns:
        (S, S) bool, symmetric, the diagonal False: ``exclude_NN`` of `info_nce`.

    Raises:
        ValueError: shapes that do not fit, or a radius that is negative.
    """
    n = len(vector_SV)
    if vector_SV.ndim != 2 or xy_um_S2.shape != (n, 2) or slide_of_spot_S.shape != (n,):
        raise ValueError(
            f"vector is {tuple(vector_SV.shape)}, xy {tuple(xy_um_S2.shape)}, slide "
            f"{tuple(slide_of_spot_S.shape)}; expected (S, V), (S, 2) and (S,)"
        )
    if radius_um < 0:
        raise ValueError(f"radius_um is {radius_um}, expected 0 or more micrometres")
    vector = full_precision(vector_SV)
    centred = vector - vector.mean(dim=1, keepdim=True)
    flat = centred.norm(dim=1) <= 1e-5 * vector.norm(dim=1)  # rounding of a constant row
    centred = torch.where(flat[:, None], torch.zeros_like(centred), centred)
    correlation_SS = cosine_logits(centred, centred, 1.0)
    xy = full_precision(xy_um_S2)
    distance_SS = torch.cdist(xy, xy, compute_mode="donot_use_mm_for_euclid_dist")
    same_SS = slide_of_spot_S[:, None] == slide_of_spot_S[None, :]
    near_SS = same_SS & (distance_SS < radius_um) & (correlation_SS > threshold)
    return near_SS.fill_diagonal_(False)
