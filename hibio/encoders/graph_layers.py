"""A layer of the graph-hierarchy encoder (METHOD section 3): dense batched kernels only.

Legend: S spots, K keyword genes, N neighbours, H heads, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hibio.encoders.gene_attention import GeneAttention, Scratch
from hibio.encoders.row_linear import RowLinear
from hibio.encoders.spot_attention import SpotAttention


def feed_forward(width: int, dropout: float, linear: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """Position-wise perceptron of factor 2."""
    return nn.Sequential(
        linear(width, 2 * width),
        nn.GELU(),
        nn.Dropout(dropout),
        linear(2 * width, width),
        nn.Dropout(dropout),
    )


class CrossMessages(nn.Module):
    """Spot <- attention pooling over its genes; genes <- their spot (gated addition).

    Args:
        width: D.
        dropout: on both messages.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm_gene = nn.LayerNorm(width)
        self.norm_spot = nn.LayerNorm(width)
        self.score = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.to_gene = nn.Linear(width, width)
        self.gate_up = nn.Parameter(torch.full((width,), 0.1))
        self.gate_down = nn.Parameter(torch.full((width,), 0.1))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, spot_SD: Tensor, gene_SKD: Tensor, present_SK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Updated spot (S, D) and gene (S, K, D) tokens.

        The value map is linear, so it acts on the pooled gene token instead of on every one.
        """
        normed_SKD = self.norm_gene(gene_SKD)
        query_SD = self.score(self.norm_spot(spot_SD)) / math.sqrt(spot_SD.shape[1])
        logit_SK = torch.bmm(normed_SKD, query_SD.to(normed_SKD.dtype)[:, :, None]).squeeze(2)
        weight_SK = logit_SK.masked_fill(~present_SK, -1e4).softmax(dim=-1)
        pooled_SD = torch.bmm(weight_SK[:, None, :].to(normed_SKD.dtype), normed_SKD).squeeze(1)
        up_SD = self.value(pooled_SD) * present_SK.any(dim=1, keepdim=True)
        spot_SD = spot_SD + self.gate_up * self.dropout(up_SD)
        down_SD = self.to_gene(self.norm_spot(spot_SD))
        return spot_SD, gene_SKD + (self.gate_down * self.dropout(down_SD))[:, None, :]


class HierarchyLayer(nn.Module):
    """One layer: genes, then spots, then messages between them; pre-norm, residuals everywhere.

    The spots do not wait for the genes of their own layer, so a layer is `move_spots` on all
    spots, then `move_genes` on any part of them.

    Args:
        width: D.
        heads: H.
        dropout: everywhere.
        spatial_graph: attend over neighbours (False: the spot alone).
        cross: exchange messages between the levels.
    """

    def __init__(
        self, width: int, heads: int, dropout: float, *, spatial_graph: bool, cross: bool
    ) -> None:
        super().__init__()
        self.gene_attention = GeneAttention(width, heads, dropout)
        self.gene_forward = nn.Sequential(
            nn.LayerNorm(width), feed_forward(width, dropout, RowLinear)
        )
        self.spot_attention = SpotAttention(width, heads, dropout) if spatial_graph else None
        self.spot_forward = nn.Sequential(nn.LayerNorm(width), feed_forward(width, dropout))
        self.cross = CrossMessages(width, dropout) if cross else None

    def forward(
        self,
        spot_SD: Tensor,
        gene_SKD: Tensor,
        present_SK: Tensor,
        edge_SKK: Tensor | None,
        neighbour_SN: Tensor,
        distance_um_SN: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Updated spot (S, D) and gene (S, K, D) tokens."""
        spot_SD = self.move_spots(spot_SD, neighbour_SN, distance_um_SN)
        return self.move_genes(spot_SD, gene_SKD, present_SK, edge_SKK)

    def move_spots(self, spot_SD: Tensor, neighbour_SN: Tensor, distance_um_SN: Tensor) -> Tensor:
        """The first ``len(neighbour_SN)`` spot tokens after attention and feed-forward."""
        moved_SD = spot_SD[: len(neighbour_SN)]
        if self.spot_attention is not None:
            moved_SD = moved_SD + self.spot_attention(spot_SD, neighbour_SN, distance_um_SN)
        return moved_SD + self.spot_forward(moved_SD)

    def move_genes(
        self,
        spot_SD: Tensor,
        gene_SKD: Tensor,
        present_SK: Tensor,
        edge_SKK: Tensor | None,
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gene tokens after attention and feed-forward, then the messages; spots and genes.

        Args:
            spot_SD: tokens of these spots after `move_spots`.
            gene_SKD: their gene tokens.
            present_SK: False marks padding.
            edge_SKK: gene-graph weight of each pair, or None.
            scratch: buffers of earlier calls, for inference.
        """
        gene_SKD = gene_SKD + self.gene_attention(gene_SKD, present_SK, edge_SKK, scratch)
        gene_SKD = gene_SKD + self.gene_forward(gene_SKD)
        if self.cross is None:
            return spot_SD, gene_SKD
        return self.cross(spot_SD, gene_SKD, present_SK)
