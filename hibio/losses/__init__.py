"""Losses, one a file: tensors in, a scalar out; no rank, no configuration, no logging."""

from hibio.losses.contrastive import NearDuplicates, info_nce
from hibio.losses.masked import decorrelation, expression_mse, masked_mse, profile_mse
from hibio.losses.multilevel import combine
from hibio.losses.pathway import pathway_kl
from hibio.losses.region import region_info_nce, spot_to_region
from hibio.losses.spatial import SpatialPairs, spatial_contrast

__all__ = [
    "NearDuplicates",
    "SpatialPairs",
    "combine",
    "decorrelation",
    "expression_mse",
    "info_nce",
    "masked_mse",
    "pathway_kl",
    "profile_mse",
    "region_info_nce",
    "spatial_contrast",
    "spot_to_region",
]
