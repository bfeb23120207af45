"""What peers make of the counts: variable genes, scaled expression, ranked gene tokens.

Which genes and which scale is decided on training slides only.

Shapes: S spots of one slide, G genes, H chosen genes, P places in a gene list.

Shapes: N spots, P places, W width, G genes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from eval.errors import FoldError
from eval.folds.fold import SlideData
from eval.folds.variable_genes import expression, variable_genes

#: Share of training spots in which a target should be detected, as in the expression task.
MIN_DETECTED = 0.1

#: Genes that a regression peer predicts: as many as the largest target set of the expression task.
N_TARGETS = 200


def target_genes(slides: Sequence[SlideData], n_genes: int = N_TARGETS) -> np.ndarray:
    """The genes (H,) that predictors are fitted on, those of the expression task.

    Args:
        slides: training slides.
        n_genes: how many; all genes when there are fewer.
    """
    return variable_genes(slides, n_genes, MIN_DETECTED)


def dense_expression(slide: SlideData, genes: np.ndarray) -> np.ndarray:
    """Log expression (S, H) float32 of some genes."""
    return np.asarray(expression(slide)[:, genes].toarray(), dtype=np.float32)


def ranked_genes(values: sparse.csr_matrix, n_places: int) -> np.ndarray:
    """For every spot its genes by falling value.

    Args:
        values: (S, G), never negative; genes with value 0 are not listed.
        n_places: P.

    Returns:
        (S, P) int64 gene indices, ties in gene order, padded with -1.

    Raises:
        FoldError: fewer than one place.
    """
    if n_places < 1:
        raise FoldError(f"a gene list has {n_places} places; at least 1 is needed")
    table = sparse.csr_matrix(values, copy=True)
    table.eliminate_zeros()
    table.sort_indices()
    ranked = np.full((table.shape[0], n_places), -1, dtype=np.int64)
    for spot in range(table.shape[0]):
        own = slice(table.indptr[spot], table.indptr[spot + 1])
        order = np.argsort(-table.data[own], kind="stable")[:n_places]
        ranked[spot, : len(order)] = table.indices[own][order]
    return ranked


def without(values: sparse.csr_matrix, keep: np.ndarray) -> sparse.csr_matrix:
    """The table (S, G) with the columns outside ``keep`` (G,) bool set to 0."""
    return sparse.csr_matrix(values @ sparse.diags(keep.astype(np.float64)))


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
