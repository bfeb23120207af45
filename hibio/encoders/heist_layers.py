"""The layers of the reference mode: the published HEIST arithmetic as dense batched kernels.

Legend: S spots ("cells"), K genes of a spot, N neighbours, H heads, D width, T gene graphs, G
vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hibio.encoders.gene_pairs import GeneGraphs
from hibio.encoders.row_linear import RowLinear

#: Gene tokens worked on at once: what fits the caches of a processor, what fills an accelerator.
#: It bounds the memory of a whole slide; a result differs by rounding only.
CPU_TOKENS, ACCELERATOR_TOKENS = 4096, 2**18


def spots_at_once(n_genes: int, device: torch.device) -> int:
    """Spots whose gene tokens are worked on together, for K genes a spot."""
    tokens = CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS
    return max(1, tokens // max(n_genes, 1))


def rank_encoding(n_ranks: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sinusoid of the integer ranks 0, 1, ..., (n_ranks, D).

    Columns 2j and 2j + 1 are the sine and cosine of rank * 10000^(-2j/D) (the corrected published
    form, exponent instead of product).
    """
    power_d = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    rank_K = torch.arange(n_ranks, device=device, dtype=torch.float32)
    angle_Kd = rank_K[:, None] * torch.pow(10000.0, -power_d)
    return torch.stack([angle_Kd.sin(), angle_Kd.cos()], dim=2).flatten(1)


def place_encoding(place_S2: Tensor, width: int) -> Tensor:
    """Sinusoid of a place in the plane, (S, D): D/2 columns of x, then D/2 of y.

    Columns 2i and 2i + 1 of an axis with a = D/2 columns are the sine and cosine of
    x / 10000^(4i/a).

    Args:
        place_S2: standardised coordinates, no unit.
        width: D, a multiple of 4.
    """
    axis = width // 2
    power_d = 4 * torch.arange(axis // 2, device=place_S2.device, dtype=torch.float32) / axis
    angle_S2d = place_S2[:, :, None] * torch.pow(10000.0, -power_d)
    return torch.stack([angle_S2d.sin(), angle_S2d.cos()], dim=3).flatten(1)


def standardised_places(xy_um_S2: Tensor, slide_of_spot_S: Tensor) -> Tensor:
    """Coordinates with mean 0 and sd 1 on each axis of each slide, (S, 2), no unit.

    This is a published defect (physical scale and aspect ratio are lost), kept for the reference
    mode only. An axis on which all spots of a slide agree becomes 0.
    """
    _, slide_S = torch.unique(slide_of_spot_S, return_inverse=True)
    n_B1 = xy_um_S2.new_zeros(len(slide_S)).index_add(0, slide_S, torch.ones_like(xy_um_S2[:, 0]))
    n_B1 = n_B1.clamp(min=1.0)[:, None]
    mean_B2 = torch.zeros_like(xy_um_S2).index_add(0, slide_S, xy_um_S2) / n_B1
    centred_S2 = xy_um_S2 - mean_B2[slide_S]
    sd_B2 = (torch.zeros_like(xy_um_S2).index_add(0, slide_S, centred_S2**2) / n_B1).sqrt()
    one = torch.ones_like(sd_B2)
    flat_B2 = sd_B2 <= 1e-6 * (mean_B2.abs() + 1.0)  # rounding of equal coordinates
    scaled_S2 = centred_S2 / torch.where(flat_B2, one, sd_B2)[slide_S]
    return torch.where(flat_B2[slide_S], torch.zeros_like(scaled_S2), scaled_S2)


def gene_edges(graphs: GeneGraphs, gene_SK: Tensor, spot_group_S: Tensor) -> Tensor:
    """Which genes of a spot are connected in the graph of its group, (S, K, K) bool, symmetric.

    Args:
        graphs: the shared edge lists; an edge of weight above 0 counts, in both directions.
        gene_SK: vocabulary index of each gene; G is padding.
        spot_group_S: 0..T-1.
    """
    pairs = graphs.pairs(gene_SK, spot_group_S)
    size = spots_at_once(gene_SK.shape[1], gene_SK.device)
    starts = range(0, max(len(gene_SK), 1), size)
    one_way = [pairs[start : start + size].dense() > 0 for start in starts]
    return torch.cat([edge | edge.transpose(1, 2) for edge in one_way])


@dataclass(frozen=True)
class HeistGraphs:
    """What the layers of one batch share.

    Attributes:
        neighbour_SN: index in the batch of each spatial neighbour; -1 is none.
        same_slide_SS: True where one spot sees another; None when all are of one slide.
        present_SK: False marks padding.
        edge_SKK: see `gene_edges`.
    """

    neighbour_SN: Tensor
    same_slide_SS: Tensor | None
    present_SK: Tensor
    edge_SKK: Tensor


class NeighbourSum(nn.Module):
    """Graph isomorphism convolution with a trained epsilon: W((1 + eps) x_i + sum_j x_j) + b.

    As published, the edges of a spot hold a loop to itself, so its own token enters the sum too.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(1))
        self.linear = RowLinear(width, width)

    def forward(self, spot_SD: Tensor, neighbour_SN: Tensor) -> Tensor:
        """Update of the spot tokens, (S, D)."""
        present_SN = (neighbour_SN >= 0).to(spot_SD.dtype)
        around_SD = torch.einsum("sn,snd->sd", present_SN, spot_SD[neighbour_SN.clamp(min=0)])
        return self.linear((2 + self.eps) * spot_SD + around_SD)


class SlideAttention(nn.Module):
    """Dense multi-head attention over all spots of the batch that lie on the same slide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = RowLinear(width, 3 * width)
        self.out = RowLinear(width, width)

    def forward(self, spot_SD: Tensor, same_slide_SS: Tensor | None) -> Tensor:
        """Update of the spot tokens, (S, D)."""
        n_spots, width = spot_SD.shape
        packed = self.query_key_value(spot_SD).view(n_spots, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(1, 2, 0, 3)[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=same_slide_SS)
        return self.out(mixed[0].transpose(0, 1).reshape(n_spots, width))


class GeneGraphConvolution(nn.Module):
    """Transformer convolution: attention over the edges of a gene, heads side by side, root skip.

    W_skip x_i + b + [sum_j softmax_j(<q_i, k_j> / sqrt(D/H)) v_j of every head]; a gene without an
    edge keeps the skip alone.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value_skip = RowLinear(width, 4 * width)

    def forward(self, gene_SKD: Tensor, edge_SKK: Tensor) -> Tensor:
        """Update of the gene tokens, (S, K, D)."""
        n_spots, n_genes, width = gene_SKD.shape
        packed, skip_SKD = self.query_key_value_skip(gene_SKD).split([3 * width, width], dim=2)
        packed = packed.view(n_spots, n_genes, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        has_edge_SK1 = edge_SKK.any(dim=2, keepdim=True)
        seen_S1KK = (edge_SKK | ~has_edge_SK1)[:, None]  # no row is empty: that would be NaN
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_S1KK)
        mixed_SKD = mixed.transpose(1, 2).reshape(n_spots, n_genes, width)
        return skip_SKD + mixed_SKD * has_edge_SK1


class NormedPerceptron(nn.Module):
    """Norm, three-layer ReLU perceptron (D, 4D, 4D, D), residual, norm: u = LN(x), LN(u + f(u)).

    Args:
        width: D.
        dropout: on the input and on f; 0 is the published arithmetic.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm_in = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            RowLinear(width, 4 * width),
            nn.ReLU(inplace=True),
            RowLinear(4 * width, 4 * width),
            nn.ReLU(inplace=True),
            RowLinear(4 * width, width),
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(self, token: Tensor) -> Tensor:
        """Tokens (..., D)."""
        normed = self.norm_in(self.dropout(token))
        return self.norm_out(normed + self.dropout(self.layers(normed)))


class CrossGate(nn.Module):
    """Message between the levels: (<t W_q, s W_k> / sqrt(D)) * (t W_v) for target t and source s.

    One number for each target; no softmax, and the value is the target's own (as published: the
    source only scales the target, or turns its sign).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = RowLinear(width, width, bias=False)
        self.key = RowLinear(width, width, bias=False)
        self.value = RowLinear(width, width, bias=False)

    def forward(self, target_SKD: Tensor, source_SD: Tensor) -> Tensor:
        """Gated targets (S, K, D); the source belongs to all K targets of its row."""
        # <W_q t, W_k s> = <t, W_q' W_k s>: one product a source, not one a target
        turned_SD = F.linear(self.key(source_SD), self.query.weight.T)
        gate_SK1 = torch.matmul(target_SKD, turned_SD[:, :, None])
        return gate_SK1 / math.sqrt(source_SD.shape[1]) * self.value(target_SKD)


class HeistLayer(nn.Module):
    """One layer: spots, genes, then the cross messages; the residual around it is the encoder's.

    Args:
        width: D.
        heads: H, of both attentions.
        dropout: see :class:`NormedPerceptron`.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.neighbour_sum = NeighbourSum(width)
        self.slide_attention = SlideAttention(width, heads)
        self.gene_convolution = GeneGraphConvolution(width, heads)
        self.spot_forward = NormedPerceptron(width, dropout)
        self.gene_forward = NormedPerceptron(width, dropout)
        self.spot_gate = CrossGate(width)
        self.gene_gate = CrossGate(width)

    def forward(
        self, spot_SD: Tensor, gene_SKD: Tensor, graphs: HeistGraphs
    ) -> tuple[Tensor, Tensor]:
        """Spot (S, D) and gene (S, K, D) tokens after the layer."""
        spot_SD = self.spot_forward(
            self.neighbour_sum(spot_SD, graphs.neighbour_SN)
            + self.slide_attention(spot_SD, graphs.same_slide_SS)
        )
        size = spots_at_once(gene_SKD.shape[1], gene_SKD.device)
        pieces = zip(
            *(x.split(size) for x in (spot_SD, gene_SKD, graphs.present_SK, graphs.edge_SKK)),
            strict=True,
        )
        parts = [self._genes(*piece) for piece in pieces]
        return torch.cat([spot for spot, _ in parts]), torch.cat([gene for _, gene in parts])

    def _genes(
        self, spot_SD: Tensor, gene_SKD: Tensor, present_SK: Tensor, edge_SKK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gene level and both cross messages of some spots; no spot needs another here."""
        gene_SKD = self.gene_forward(self.gene_convolution(gene_SKD, edge_SKK))
        pooled_SD = mean_of_genes(gene_SKD, present_SK)
        crossed_SD = self.spot_gate(spot_SD[:, None], pooled_SD)[:, 0]
        return F.gelu(crossed_SD), F.gelu(self.gene_gate(gene_SKD, spot_SD))


def mean_of_genes(gene_SKD: Tensor, present_SK: Tensor) -> Tensor:
    """Mean of a spot's gene tokens without padding, (S, D); 0 for a spot without genes."""
    weight_SK = present_SK.to(gene_SKD.dtype)
    weight_SK = weight_SK / weight_SK.sum(dim=1, keepdim=True).clamp(min=1.0)
    return torch.einsum("sk,skd->sd", weight_SK, gene_SKD)
