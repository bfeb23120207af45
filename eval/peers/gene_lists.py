"""Peers that read a spot as a list of genes: OmiCLIP-like and Nicheformer-like.

Shapes: S spots of one slide, N spots of a batch, G genes, P places in a gene list, W width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from eval.errors import FoldError
from eval.folds.fold import SlideData
from eval.peers.peer import TrainingData
from eval.peers.towers import ContrastivePeer, OmicsInput, ProjectionHead, Towers
from hibio.config.schema import Count

LEFT_OUT = re.compile(r"[.-]|^RP[LS]\d", re.IGNORECASE)
DEPTH = 1e4
UNLISTED = -1e9  # before a softmax: no weight, and no NaN where nothing is listed


@dataclass(frozen=True, kw_only=True)
class OmiClip(ContrastivePeer):
    """Image against gene sentence.

    Source: Chen et al., A visual-omics foundation model to bridge histopathology with spatial
    transcriptomics (OmiCLIP / Loki), Nature Methods 2025.

    Same: the 50 genes with the highest counts of a spot, by falling count; symbols with a full stop
    or a hyphen are left out, and so are housekeeping genes; symmetric InfoNCE with the image.
    Differs: no text encoder and no tokenizer that cuts symbols into pieces: each gene has a learned
    vector, and the sentence is their mean (order within the 50 is not used); the housekeeping list
    is the ribosomal protein genes (RPL, RPS); stored image features; trained on this fold alone.

    Args:
        n_words: genes in a sentence.
    """

    n_words: Count = 50
    name: str = "omiclip"
    source: str = "OmiCLIP, Chen et al. 2025"

    def notes(self, data: TrainingData) -> tuple[str, ...]:
        """How many genes are left out."""
        keep = words(data.genes)
        return (f"{int((~keep).sum())} of {len(keep)} genes cannot be words of a sentence",)

    def omics_input(self, data: TrainingData) -> tuple[OmicsInput, int]:
        """The sentence of a spot."""
        keep = words(data.genes)
        return lambda s: (ranked_genes(without(s.counts, keep), self.n_words),), len(keep)

    def build(self, n_features: int, n_genes: int) -> Towers:
        """Gene vectors and both heads."""
        bag = GeneBag(n_genes, self.n_words, self.towers.dim, by_place=False)
        sentence = nn.Sequential(bag, ProjectionHead(self.towers.dim, self.towers))
        return Towers(ProjectionHead(n_features, self.towers), sentence, self.towers)


@dataclass(frozen=True, kw_only=True)
class Nicheformer(ContrastivePeer):
    """Image against rank tokens.

    Source: Schaar et al., Nicheformer: a foundation model for single-cell and spatial omics, 2024;
    the same tokens in UMPIRE and STAMP.

    Same: counts scaled to a common depth, divided by the mean of the gene over the training spots
    that express it, ranked; the first tokens of the ranking are the input, order matters.
    Differs: a weighted bag (a learned weight a place) instead of a 12-layer transformer, 256 tokens
    instead of 1,500, one mean a fold instead of one a technology, no pretraining on a cell atlas;
    it is trained against the image only, with symmetric InfoNCE.

    Args:
        n_tokens: length of the ranking that is read.
    """

    n_tokens: Count = 256
    name: str = "nicheformer"
    source: str = "Nicheformer, Schaar et al. 2024"

    def omics_input(self, data: TrainingData) -> tuple[OmicsInput, int]:
        """The rank tokens of a spot."""
        usual = usual_level(data.slides)
        n_tokens = min(self.n_tokens, len(usual))
        return lambda s: (ranked_genes(over_usual(s, usual), n_tokens),), len(usual)

    def build(self, n_features: int, n_genes: int) -> Towers:
        """Gene vectors, the weights of the places and both heads."""
        bag = GeneBag(n_genes, min(self.n_tokens, n_genes), self.towers.dim, by_place=True)
        ranking = nn.Sequential(bag, ProjectionHead(self.towers.dim, self.towers))
        return Towers(ProjectionHead(n_features, self.towers), ranking, self.towers)


def words(genes: Sequence[str] | np.ndarray) -> np.ndarray:
    """Which genes (G,) bool may stand in a sentence.

    Raises:
        FoldError: none may.
    """
    keep = np.array([LEFT_OUT.search(str(gene)) is None for gene in genes])
    if not keep.any():
        raise FoldError(
            f"omiclip: none of the {len(keep)} gene names may stand in a sentence; names with a "
            "full stop or hyphen and ribosomal genes are left out: give gene symbols "
            "(hibio prepare --gene-table)"
        )
    return keep


def usual_level(slides: Sequence[SlideData]) -> np.ndarray:
    """Mean (G,) of each gene at depth 10,000 over the spots that express it; 0 where none does."""
    total: np.ndarray | float = 0.0
    found: np.ndarray | float = 0.0
    for slide in slides:
        values = _at_depth(slide)
        total = total + np.asarray(values.sum(axis=0)).ravel()
        found = found + np.bincount(values.indices, minlength=values.shape[1])
    return np.asarray(total / np.maximum(found, 1))


def over_usual(slide: SlideData, usual: np.ndarray) -> sparse.csr_matrix:
    """Expression over the usual level (S, G); genes without one are 0."""
    inverse = np.divide(1.0, usual, out=np.zeros_like(usual), where=usual > 0)
    return sparse.csr_matrix(_at_depth(slide) @ sparse.diags(inverse))


def _at_depth(slide: SlideData) -> sparse.csr_matrix:
    """Counts (S, G) scaled to depth 10,000 (intensities as they are), without stored zeros."""
    values = sparse.csr_matrix(slide.counts, dtype=np.float64, copy=True)
    values.eliminate_zeros()
    if slide.modality == "rna":
        depth = np.asarray(values.sum(axis=1)).ravel()
        values.data *= DEPTH / np.repeat(depth, np.diff(values.indptr))
    return values


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
