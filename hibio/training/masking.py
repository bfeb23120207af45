"""What the masked view of the omics branch hides (METHOD section 3.1).

Legend: S spots, K keyword genes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hibio.encoders.omics import OmicsMask


def draw_mask(present_SK: Tensor, genes: float, spots: float) -> OmicsMask:
    """Hide a share of the keyword genes, and all genes of a share of the spots."""
    spot_S = torch.rand(len(present_SK), device=present_SK.device) < spots
    gene_SK = torch.rand(present_SK.shape, device=present_SK.device) < genes
    return OmicsMask((gene_SK | spot_S[:, None]) & present_SK, spot_S)
