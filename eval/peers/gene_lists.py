"""Peers that read a spot as a list of genes: OmiCLIP-like and Nicheformer-like.

Source: Chen et al., A visual-omics foundation model to bridge histopathology with spatial
transcriptomics (OmiCLIP / Loki), Nature Methods 2025.

Same: the 50 genes with the highest counts of a spot, by falling count; symbols with a full stop or
a hyphen are left out, and so are housekeeping genes; symmetric InfoNCE with the image.
Differs: no text encoder and no tokenizer that cuts symbols into pieces: each gene has a learned
vector, and the sentence is their mean (order within the 50 is not used); the housekeeping list is
the ribosomal protein genes (RPL, RPS); stored image features; trained on this fold alone.

Source: Schaar et al., Nicheformer: a foundation model for single-cell and spatial omics, 2024; the
same tokens in UMPIRE and STAMP.

Same: counts scaled to a common depth, divided by the mean of the gene over the training spots that
express it, ranked; the first tokens of the ranking are the input, order matters.
Differs: a weighted bag (a learned weight a place) instead of a 12-layer transformer, 256 tokens
instead of 1,500, one mean a fold instead of one a technology, no pretraining on a cell atlas; it is
trained against the image only, with symmetric InfoNCE.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse
from torch import nn

from eval.errors import FoldError
from eval.folds.fold import SlideData
from eval.peers.expression_input import GeneBag, ranked_genes, without
from eval.peers.peer import TrainingConfig, TrainingData
from eval.peers.towers import (
    Alignment,
    FittedTowers,
    ProjectionHead,
    TowerConfig,
    Towers,
    align,
    identity_loss,
    n_image_features,
    spot_features,
)

LEFT_OUT = re.compile(r"[.-]|^RP[LS]\d", re.IGNORECASE)


@dataclass(frozen=True)
class OmiClip:
    """Image against gene sentence.

    Args:
        n_words: genes in a sentence.
        towers: sizes.
        training: of the loop.
    """

    n_words: int = 50
    towers: TowerConfig = field(default_factory=TowerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    name: str = "omiclip"
    source: str = "OmiCLIP, Chen et al. 2025"
    needs_image: bool = True
    seeded: bool = True
    per_slide: bool = False

    def fit(self, data: TrainingData, seed: int) -> FittedTowers:
        """Train the gene vectors and both heads."""
        keep = words(data.genes)
        n_features = n_image_features(data, self.name)

        def build() -> Towers:
            bag = GeneBag(len(keep), self.n_words, self.towers.dim, by_place=False)
            sentence = nn.Sequential(bag, ProjectionHead(self.towers.dim, self.towers))
            return Towers(ProjectionHead(n_features, self.towers), sentence, self.towers)

        method = Alignment(
            self.name,
            self.source,
            spot_features(),
            lambda slide: (ranked_genes(without(slide.counts, keep), self.n_words),),
            build,
            identity_loss,
            self.training,
            (f"{int((~keep).sum())} of {len(keep)} genes cannot be words of a sentence",),
        )
        return align(method, data, seed)


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


DEPTH = 1e4


@dataclass(frozen=True)
class Nicheformer:
    """Image against rank tokens.

    Args:
        n_tokens: length of the ranking that is read.
        towers: sizes.
        training: of the loop.
    """

    n_tokens: int = 256
    towers: TowerConfig = field(default_factory=TowerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    name: str = "nicheformer"
    source: str = "Nicheformer, Schaar et al. 2024"
    needs_image: bool = True
    seeded: bool = True
    per_slide: bool = False

    def fit(self, data: TrainingData, seed: int) -> FittedTowers:
        """Train the gene vectors, the weights of the places and both heads."""
        usual = usual_level(data.slides)
        n_tokens = min(self.n_tokens, len(usual))
        n_features = n_image_features(data, self.name)

        def build() -> Towers:
            bag = GeneBag(len(usual), n_tokens, self.towers.dim, by_place=True)
            ranking = nn.Sequential(bag, ProjectionHead(self.towers.dim, self.towers))
            return Towers(ProjectionHead(n_features, self.towers), ranking, self.towers)

        method = Alignment(
            self.name,
            self.source,
            spot_features(),
            lambda slide: (ranked_genes(over_usual(slide, usual), n_tokens),),
            build,
            identity_loss,
            self.training,
        )
        return align(method, data, seed)


def usual_level(slides: Sequence[SlideData]) -> np.ndarray:
    """Mean (G,) of each gene at depth 10,000 over the spots that express it; 0 where none does.

    Args:
        slides: training slides.
    """
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
