"""Region level: image against omics, and spot against its own region (docs/method.md 5).

Legend: S spots, R regions of one level of the tree, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hibio.losses.contrastive import Negatives, info_nce
from hibio.losses.logits import CHUNK_ROWS, TilePairs, logit_sums, mean_of_rows


def region_info_nce(
    image_RD: Tensor,
    omics_RD: Tensor,
    temperature: Tensor | float,
    group_R: Tensor | None = None,
    negatives: Negatives = "all",
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Symmetric InfoNCE between the two towers' region embeddings at one level of the tree.

    Args:
        image_RD: (R, D) pooled image embeddings.
        omics_RD: (R, D) pooled omics embeddings of the same regions.
        temperature: positive number or one-element tensor.
        group_R: (R,) slide of each region, needed for ``same_slide`` and ``mixed``.
        negatives: see `hibio.losses.contrastive.info_nce`.
        chunk_rows: see there.

    Returns:
        Scalar; 0 with fewer than two regions.
    """
    return info_nce(
        image_RD,
        omics_RD,
        temperature,
        group_N=group_R,
        negatives=negatives,
        chunk_rows=chunk_rows,
    )


def spot_to_region(
    spot_SD: Tensor,
    region_RD: Tensor,
    region_of_spot_S: Tensor,
    temperature: Tensor | float,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Cross entropy of a spot to its own region, with the other regions as negatives.

    Args:
        spot_SD: (S, D) spot embeddings.
        region_RD: (R, D) region embeddings (of the other tower).
        region_of_spot_S: (S,) row of ``region_RD``; -1 (halo) leaves the spot out.
        temperature: positive number or one-element tensor.
        chunk_rows: rows and columns of a tile (`hibio.losses.logits`).

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
    if n_spots == 0 or n_regions == 0:
        return (spot_SD * 0).sum() + (region_RD * 0).sum()
    own = _Own(region_of_spot_S.long())
    sums = logit_sums(spot_SD, region_RD, temperature, own, chunk_rows, by_column=False)
    return mean_of_rows(sums.row_KN[0] - sums.own_N, region_of_spot_S >= 0)


@dataclass(frozen=True)
class _Own:
    """Every region is a candidate of every spot, and its own is the target."""

    target_N: Tensor

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        """See `hibio.losses.logits.Pairs`."""
        return TilePairs((None,))
