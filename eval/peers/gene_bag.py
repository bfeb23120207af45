"""A list of genes as one vector: learned gene vectors, averaged with a learned weight a place.

Shapes: N spots, P places, W width, G genes.
"""

import torch
from torch import Tensor, nn

UNLISTED = -1e9  # before a softmax: no weight, and no NaN where nothing is listed


class GeneBag(nn.Module):
    """Weighted mean of the vectors of listed genes, then a head.

    Args:
        n_genes: G.
        n_places: P; one weight each, softmax over the places that a spot fills.
        width: W of the gene vectors and of the output.
        by_place: whether the weight of a place is learned; otherwise all places weigh the same.
    """

    def __init__(self, n_genes: int, n_places: int, width: int, by_place: bool) -> None:
        super().__init__()
        self.gene_vector = nn.EmbeddingBag(n_genes + 1, width, mode="sum", padding_idx=n_genes)
        self.place_P = nn.Parameter(torch.zeros(n_places), requires_grad=by_place)
        self.norm = nn.LayerNorm(width)

    def forward(self, gene_NP: Tensor) -> Tensor:
        """Vectors (N, W) of gene lists (N, P) padded with -1; of an empty list the norm's bias."""
        listed_NP = gene_NP >= 0
        padding = self.gene_vector.num_embeddings - 1
        weight_NP = torch.where(listed_NP, self.place_P, UNLISTED).softmax(dim=1) * listed_NP
        index_NP = torch.where(listed_NP, gene_NP, padding)
        own_NW = self.gene_vector(index_NP, per_sample_weights=weight_NP)
        normed: Tensor = self.norm(own_NW)
        return normed
