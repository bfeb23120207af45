"""OmiCLIP-like: a spot's profile as the sentence of its 50 most expressed genes.

Source: Chen et al., A visual-omics foundation model to bridge histopathology with spatial
transcriptomics (OmiCLIP / Loki), Nature Methods 2025.

Same: the 50 genes with the highest counts of a spot, by falling count; symbols with a full stop or
a hyphen are left out, and so are housekeeping genes; symmetric InfoNCE with the image.
Differs: no text encoder and no tokenizer that cuts symbols into pieces: each gene has a learned
vector, and the sentence is their mean (order within the 50 is not used); the housekeeping list is
the ribosomal protein genes (RPL, RPS); stored image features; trained on this fold alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from eval.fold import FoldError
from eval.peers.expression_input import ranked_genes, without
from eval.peers.flat_clip import n_image_features, spot_features
from eval.peers.gene_bag import GeneBag
from eval.peers.peer import TrainingData
from eval.peers.towers import (
    Alignment,
    FittedTowers,
    ProjectionHead,
    TowerConfig,
    Towers,
    align,
    identity_loss,
)
from eval.peers.training import TrainingConfig

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
