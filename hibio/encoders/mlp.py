"""Two-layer perceptrons: the omics baseline, and the head every tower ends in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hibio.batch import SlideBatch
from hibio.encoders.base import OmicsContext


def mlp(width_in: int, hidden: int, width_out: int, dropout: float) -> nn.Sequential:
    """Linear, GELU, dropout, linear."""
    return nn.Sequential(
        nn.Linear(width_in, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width_out)
    )


def neighbour_mean(
    vector_SV: Tensor, neighbour_SN: Tensor, usable_S: Tensor | None = None
) -> Tensor:
    """Mean vector of the spatial neighbours, (S, V); a spot without any gets its own vector.

    Args:
        vector_SV: one vector a spot.
        neighbour_SN: index of each neighbour, -1 is none.
        usable_S: spots that may be read (the unmasked ones); all when None.
    """
    present_SN = neighbour_SN >= 0
    index_SN = neighbour_SN.clamp(min=0)
    if usable_S is not None:
        present_SN = present_SN & usable_S[index_SN]
    weight_SN = present_SN.to(vector_SV.dtype)
    total_SV = torch.einsum("sn,snv->sv", weight_SN, vector_SV[index_SN])
    n_S1 = weight_SN.sum(dim=1, keepdim=True)
    return torch.where(n_S1 > 0, total_SV / n_S1.clamp(min=1.0), vector_SV)


class MlpOmicsEncoder(nn.Module):
    """Perceptron on the spot vector and its neighbours' mean: the flat baseline.

    Args:
        config: an ``OmicsConfig``; ``width`` and ``dropout`` are used.
        context: gene factors (only their number is used).
    """

    def __init__(self, config: object, context: OmicsContext) -> None:
        super().__init__()
        width: int = config.width  # type: ignore[attr-defined]
        dropout: float = config.dropout  # type: ignore[attr-defined]
        n_factors = context.factors_GV.shape[1]
        self.embed_dim = width
        self.hops = 1
        self.layers = mlp(2 * n_factors, 2 * width, width, dropout)

    def forward(self, batch: SlideBatch) -> Tensor:
        """Embeddings (S, width)."""
        around_SV = neighbour_mean(batch.vector_SV, batch.neighbour_SN)
        return self.layers(torch.cat([batch.vector_SV, around_SV], dim=1))
