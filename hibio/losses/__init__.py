"""Losses, one a file: tensors in, a scalar out; no rank, no configuration, no logging."""

from hibio.losses.contrastive import info_nce, near_duplicates
from hibio.losses.decorrelation import decorrelation
from hibio.losses.expression import expression_mse
from hibio.losses.masked import masked_mse, profile_mse
from hibio.losses.multilevel import combine
from hibio.losses.pathway import pathway_kl
from hibio.losses.region import region_info_nce, spot_to_region
from hibio.losses.spatial import spatial_contrast, spatial_pairs

__all__ = [
    "combine",
    "decorrelation",
    "expression_mse",
    "info_nce",
    "masked_mse",
    "near_duplicates",
    "pathway_kl",
    "profile_mse",
    "region_info_nce",
    "spatial_contrast",
    "spatial_pairs",
    "spot_to_region",
]
