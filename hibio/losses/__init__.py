"""Losses, one a file: tensors in, a scalar out; no rank, no configuration, no logging."""

from hibio.losses.contrastive import NearDuplicates, info_nce, spot_to_region
from hibio.losses.masked import decorrelation, masked_mse, rows_mse
from hibio.losses.multilevel import combine
from hibio.losses.pathway import pathway_kl
from hibio.losses.spatial import SpatialPairs, spatial_contrast

__all__ = [
    "NearDuplicates",
    "SpatialPairs",
    "combine",
    "decorrelation",
    "info_nce",
    "masked_mse",
    "pathway_kl",
    "rows_mse",
    "spatial_contrast",
    "spot_to_region",
]
