"""Gene-graph edges among the keyword genes of a spot, read from the graphs of the corpus.

Legend: S spots, K keyword genes, G vocabulary, T gene graphs, E edges a gene.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hibio.encoders.base import OmicsContext
from hibio.encoders.scratch import Scratch

POSITION_NUMBERS = 500_000  # entries of the table of positions that is held at a time


@dataclass(frozen=True)
class GenePairs:
    """Gene-graph edges between the keyword genes of each spot: a few numbers a gene, not K.

    Attributes:
        place_SKE: flat place (row * K + column) in the spot's K x K table; K * K when the partner
            is not among its genes.
        weight_SKE: weight of that edge.
    """

    place_SKE: Tensor
    weight_SKE: Tensor

    def __getitem__(self, rows: slice) -> GenePairs:
        """The edges of some spots."""
        return GenePairs(self.place_SKE[rows], self.weight_SKE[rows])

    def dense(self, scratch: Scratch | None = None) -> Tensor:
        """Weight of every pair of a spot's genes, (S, K, K)."""
        n_spots, n_genes, _ = self.place_SKE.shape
        buffer = Scratch() if scratch is None else scratch
        table = buffer.take("pairs", (n_spots, n_genes * n_genes + 1), self.weight_SKE).zero_()
        table.scatter_(1, self.place_SKE.flatten(1).long(), self.weight_SKE.flatten(1))
        return table[:, :-1].view(n_spots, n_genes, n_genes)


class GeneGraphs(nn.Module):
    """The gene graphs of the corpus, one a group of spots, as padded edge lists.

    Args:
        context: ``edge_TGE`` and ``weight_TGE``.
    """

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

    def pairs(self, gene_SK: Tensor, spot_group_S: Tensor) -> GenePairs:
        """The edges among each spot's genes.

        The position of each partner in the spot is looked up, so no edge is copied per spot ahead
        of time; in parts of spots, because the table of positions has a row of the whole
        vocabulary for each.

        Args:
            gene_SK: vocabulary indices, no gene twice in a spot.
            spot_group_S: which gene graph each spot reads.
        """
        n_spots, n_genes = gene_SK.shape
        place_SKE = gene_SK.new_empty(n_spots, n_genes, self.edge_TGE.shape[2], dtype=torch.int32)
        row_SK = spot_group_S[:, None] * (self.n_genes + 1) + gene_SK
        places = torch.arange(n_genes, device=gene_SK.device, dtype=torch.int32)
        absent = n_genes * n_genes
        size = max(1, POSITION_NUMBERS // (self.n_genes + 1))
        for start in range(0, n_spots, size):
            part = slice(start, start + size)
            gene = gene_SK[part]
            position = places.new_full((len(gene), self.n_genes + 1), absent)
            position.scatter_(1, gene, places.expand(len(gene), -1))
            position[:, self.n_genes] = absent  # padding has no place
            partner = F.embedding(row_SK[part], self.edge_TGE.flatten(0, 1))
            place = position.gather(1, partner.flatten(1)).view_as(partner)
            place_SKE[part] = (place + places[:, None] * n_genes).clamp_(max=absent)
        return GenePairs(place_SKE, F.embedding(row_SK, self.weight_TGE.flatten(0, 1)))
