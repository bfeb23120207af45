"""The genes of a spot: values, what a masked view hides, and edges of the gene graph.

Legend: S spots, K keyword genes, G vocabulary, T gene graphs, E edges a gene.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hibio.encoders.base import OmicsContext

MIN_ROWS = 256  # of a product; below this the call of oneDNN costs more than the product
POSITION_NUMBERS = 1_000_000  # gene positions and edges that are looked up at a time


@dataclass
class Scratch:
    """Large buffers that are used again: fresh memory of this size costs more than the work."""

    buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of ``shape``, the one that had this name when it is as large."""
        size = math.prod(shape)
        held = self.buffers.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self.buffers[name] = like.new_empty(size)
        return held[:size].view(shape)


class RowLinear(nn.Linear):
    """``nn.Linear`` on the last axis; same parameters, same result.

    On a CPU in float32 it calls oneDNN's 1x1 convolution instead of the BLAS that torch was built
    with: on AVX-512 machines that are not Intel's, it is about twice as fast in both directions.
    oneDNN keeps about a quarter of a megabyte of code for every new number of rows (of the last
    1024), so give it few different ones.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        n_rows = rows.numel() // self.in_features
        if n_rows < MIN_ROWS or not _by_convolution(rows, self.weight):
            return super().forward(rows)
        pixels = rows.reshape(1, n_rows, 1, self.in_features).permute(0, 3, 1, 2)
        # a dilation is nothing to one pixel, but with it torch asks oneDNN on one thread too
        result = F.conv2d(pixels, self.weight[:, :, None, None], self.bias, dilation=(1, 2))
        return result.permute(0, 2, 3, 1).reshape(*rows.shape[:-1], self.out_features)


def _by_convolution(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes these: float32 on a CPU, outside autocast."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


class GeneGraphs(nn.Module):
    """The gene graphs of the corpus, one a group of spots, as padded edge lists."""

    edge_TGE: Tensor
    weight_TGE: Tensor

    def __init__(self, context: OmicsContext) -> None:
        super().__init__()
        self.n_genes = context.n_genes
        n_graphs, _, n_edges = context.edge_TGE.shape
        shape = (n_graphs, context.n_genes + 1, n_edges)  # the last gene, the padding, has none
        edge = torch.full(shape, context.n_genes, dtype=torch.long)
        weight = torch.zeros(shape)
        edge[:, :-1] = torch.from_numpy(context.edge_TGE)
        weight[:, :-1] = torch.from_numpy(context.weight_TGE)
        self.register_buffer("edge_TGE", edge, persistent=False)
        self.register_buffer("weight_TGE", weight, persistent=False)

    def pairs(self, gene_SK: Tensor, spot_group_S: Tensor) -> Tensor:
        """Weight of every pair of a spot's genes, (S, K, K); 0 where there is no edge.

        The place of each partner in the spot is looked up, so no edge is copied per spot ahead of
        time; in parts of spots, because edges and the table of places are longer than K.

        Args:
            gene_SK: vocabulary indices, no gene twice in a spot.
            spot_group_S: which gene graph each spot reads.
        """
        n_spots, n_genes = gene_SK.shape
        dense_SKK = self.weight_TGE.new_zeros(n_spots, n_genes, n_genes)
        row_SK = spot_group_S[:, None] * (self.n_genes + 1) + gene_SK
        edges, weights = self.edge_TGE.flatten(0, 1), self.weight_TGE.flatten(0, 1)
        places = torch.arange(n_genes, device=gene_SK.device)
        size = max(1, POSITION_NUMBERS // (self.n_genes + 1 + n_genes * edges.shape[1]))
        for start in range(0, n_spots, size):
            part = slice(start, start + size)
            gene = gene_SK[part]
            position = places.new_full((len(gene), self.n_genes + 1), n_genes)
            position.scatter_(1, gene, places.expand(len(gene), -1))
            position[:, self.n_genes] = n_genes  # padding has no place
            partner = F.embedding(row_SK[part], edges)
            place = position.gather(1, partner.flatten(1)).view_as(partner)
            table = weights.new_zeros(len(gene), n_genes, n_genes + 1)
            table.scatter_(2, place, F.embedding(row_SK[part], weights))
            dense_SKK[part] = table[..., :n_genes]
        return dense_SKK


@dataclass(frozen=True)
class OmicsMask:
    """What the masked view hides: keyword genes (S, K) and whole spots (S,), True = hidden."""

    gene_SK: Tensor
    spot_S: Tensor


def mean_value(value_SK: Tensor, shown_SK: Tensor) -> Tensor:
    """Mean value of a spot's shown genes, (S, 1), at least 1e-8."""
    shown = shown_SK.to(value_SK.dtype)
    total_S1 = (value_SK * shown).sum(dim=1, keepdim=True)
    return (total_S1 / shown.sum(dim=1, keepdim=True).clamp(min=1.0)).clamp(min=1e-8)


def relative_values(value_SK: Tensor, shown_SK: Tensor) -> Tensor:
    """Values over the mean of the spot's shown ones: the scale of depth and set size cancels."""
    return value_SK * shown_SK.to(value_SK.dtype) / mean_value(value_SK, shown_SK)
