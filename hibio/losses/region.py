"""Region level: image region against omics region, and spot against its own region (METHOD 5).

Legend: S spots, R regions of one level of the tree, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hibio.losses.contrastive import Negatives, info_nce
from hibio.losses.similarity import cosine_logits, mean_of_rows


def region_info_nce(
    image_RD: Tensor,
    omics_RD: Tensor,
    temperature: Tensor | float,
    group_R: Tensor | None = None,
    negatives: Negatives = "all",
) -> Tensor:
    """Symmetric InfoNCE between the two towers' region embeddings at one level of the tree.

    Args:
        image_RD: (R, D) pooled image embeddings.
        omics_RD: (R, D) pooled omics embeddings of the same regions.
        temperature: positive number or one-element tensor.
        group_R: (R,) slide of each region, needed for ``same_slide`` and ``mixed``.
        negatives: see `hibio.losses.contrastive.info_nce`.

    Returns:
        Scalar; 0 with fewer than two regions.
    """
    return info_nce(image_RD, omics_RD, temperature, group_N=group_R, negatives=negatives)


def spot_to_region(
    spot_SD: Tensor, region_RD: Tensor, region_of_spot_S: Tensor, temperature: Tensor | float
) -> Tensor:
    """Cross entropy of a spot to its own region, with the other regions as negatives.

    Args:
        spot_SD: (S, D) spot embeddings.
        region_RD: (R, D) region embeddings (of the other tower).
        region_of_spot_S: (S,) row of ``region_RD``; -1 (halo) leaves the spot out.
        temperature: positive number or one-element tensor.

    Returns:
        Scalar; 0 (with a graph) when no spot has a region or there is only one region.

    Raises:
        ValueError: shapes that do not fit or a region id outside -1..R-1.
    """
    n_spots, n_regions = spot_SD.shape[0], region_RD.shape[0]
    if region_of_spot_S.shape != (n_spots,):
        raise ValueError(
            f"region_of_spot is {tuple(region_of_spot_S.shape)}, expected ({n_spots},): one a spot"
        )
    if n_spots and not -1 <= int(region_of_spot_S.min()) <= int(region_of_spot_S.max()) < n_regions:
        raise ValueError(
            f"region ids run from {int(region_of_spot_S.min())} to {int(region_of_spot_S.max())}, "
            f"expected -1 (none) to {n_regions - 1}: number the regions within the batch"
        )
    logits_SR = cosine_logits(spot_SD, region_RD, temperature)
    if n_regions == 0:
        return (spot_SD * 0).sum() + (region_RD * 0).sum()
    own_S = region_of_spot_S.long().clamp(min=0)
    loss_S = torch.nn.functional.cross_entropy(logits_SR, own_S, reduction="none")
    return mean_of_rows(loss_S, region_of_spot_S >= 0)
