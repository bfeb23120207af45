"""The layers of the graph-hierarchy encoder (METHOD section 3): dense batched kernels only.

Legend: S spots, K keyword genes, N neighbours, H heads, D width, d = D / H, B distance bases.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def feed_forward(width: int, dropout: float) -> nn.Sequential:
    """Position-wise perceptron of factor 2."""
    return nn.Sequential(
        nn.Linear(width, 2 * width),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(2 * width, width),
        nn.Dropout(dropout),
    )


class GeneAttention(nn.Module):
    """Attention among the keyword genes of one spot, biased by co-expression.

    Args:
        width: D.
        heads: H.
        dropout: on the output.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.bias_scale_H = nn.Parameter(torch.ones(heads))
        self.dropout = nn.Dropout(dropout)

    def forward(self, gene_SKD: Tensor, present_SK: Tensor, edge_SKK: Tensor | None) -> Tensor:
        """Update of the gene tokens, (S, K, D).

        Args:
            gene_SKD: gene tokens.
            present_SK: False marks padding, which nobody attends to.
            edge_SKK: gene-graph weight of each pair, or None for no gene graph.
        """
        n_spots, n_genes, width = gene_SKD.shape
        packed = self.query_key_value(self.norm(gene_SKD))
        query, key, value = packed.view(n_spots, n_genes, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask_S1K = torch.zeros_like(present_SK, dtype=query.dtype)
        mask_S1K = mask_S1K.masked_fill(~present_SK, -1e4)[:, None, None, :]
        bias = mask_S1K
        if edge_SKK is not None:
            bias = mask_S1K + self.bias_scale_H[:, None, None] * edge_SKK[:, None].to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(n_spots, n_genes, width)))


class SpotAttention(nn.Module):
    """Attention of each spot over itself and its spatial neighbours, biased by distance.

    The bias is a learned function of the distance in micrometres (Gaussian bases, log-spaced),
    so nothing depends on where on the slide a spot lies. The update is gated and starts small:
    the spot vector already holds the neighbours' mean, and more smoothing costs retrieval.

    Args:
        width: D.
        heads: H.
        dropout: on the output.
    """

    centre_B: Tensor

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        centre_B = torch.linspace(math.log(5.0), math.log(1000.0), 8)
        self.register_buffer("centre_B", centre_B, persistent=False)
        self.gate = nn.Parameter(torch.full((width,), 0.1))
        self.distance_bias = nn.Linear(8, heads, bias=False)
        nn.init.zeros_(self.distance_bias.weight)

    def forward(self, spot_SD: Tensor, neighbour_SN: Tensor, distance_um_SN: Tensor) -> Tensor:
        """Update of the spot tokens, (S, D)."""
        n_spots, width = spot_SD.shape
        normed_SD = self.norm(spot_SD)
        own_S1 = torch.arange(n_spots, device=spot_SD.device)[:, None]
        index_SN = torch.cat([own_S1, neighbour_SN], dim=1)
        present_SN = index_SN >= 0
        key_SD, value_SD = self.key_value(normed_SD).chunk(2, dim=1)
        gathered = index_SN.clamp(min=0)
        key = key_SD[gathered].view(n_spots, -1, self.heads, width // self.heads)
        value = value_SD[gathered].view_as(key)
        query = self.query(normed_SD).view(n_spots, self.heads, -1)
        logit_SHN = torch.einsum("shd,snhd->shn", query, key) / math.sqrt(width // self.heads)
        logit_SHN = logit_SHN + self._bias(distance_um_SN)
        logit_SHN = logit_SHN.masked_fill(~present_SN[:, None, :], -1e4)
        mixed = torch.einsum("shn,snhd->shd", logit_SHN.softmax(dim=-1), value)
        return self.gate * self.dropout(self.out(mixed.reshape(n_spots, width)))

    def _bias(self, distance_um_SN: Tensor) -> Tensor:
        """Bias (S, H, 1 + N): 0 for the spot itself."""
        finite = torch.isfinite(distance_um_SN)
        log_distance = torch.where(finite, distance_um_SN, 1.0).clamp(min=1.0).log()
        bases = torch.exp(-2.0 * (log_distance[..., None] - self.centre_B) ** 2)
        bias_SHN = self.distance_bias(bases).transpose(1, 2)
        return F.pad(bias_SHN, (1, 0))


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
        """Updated spot (S, D) and gene (S, K, D) tokens."""
        normed_SKD = self.norm_gene(gene_SKD)
        query_SD = self.score(self.norm_spot(spot_SD))
        logit_SK = torch.einsum("sd,skd->sk", query_SD, normed_SKD) / math.sqrt(spot_SD.shape[1])
        weight_SK = logit_SK.masked_fill(~present_SK, -1e4).softmax(dim=-1)
        weight_SK = weight_SK * present_SK.any(dim=1, keepdim=True)
        up_SD = torch.einsum("sk,skd->sd", weight_SK, self.value(normed_SKD))
        spot_SD = spot_SD + self.gate_up * self.dropout(up_SD)
        down_SD = self.to_gene(self.norm_spot(spot_SD))
        return spot_SD, gene_SKD + self.gate_down * self.dropout(down_SD)[:, None, :]


class HierarchyLayer(nn.Module):
    """One layer: genes, then spots, then messages between them; pre-norm, residuals everywhere.

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
        self.gene_forward = nn.Sequential(nn.LayerNorm(width), feed_forward(width, dropout))
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
        gene_SKD = gene_SKD + self.gene_attention(gene_SKD, present_SK, edge_SKK)
        gene_SKD = gene_SKD + self.gene_forward(gene_SKD)
        if self.spot_attention is not None:
            spot_SD = spot_SD + self.spot_attention(spot_SD, neighbour_SN, distance_um_SN)
        spot_SD = spot_SD + self.spot_forward(spot_SD)
        if self.cross is not None:
            spot_SD, gene_SKD = self.cross(spot_SD, gene_SKD, present_SK)
        return spot_SD, gene_SKD
