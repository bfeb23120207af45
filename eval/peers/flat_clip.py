"""Flat CLIP: spot-level InfoNCE with identity targets, nothing else.

Source: Radford et al., ICML 2021 (CLIP), with spots in the place of captions.

Same: two towers, one shared space, symmetric cross-entropy over the batch, learned temperature.
Differs: stored image features instead of a trained image encoder; log expression of variable genes,
centred per slide, instead of text. The run variant ``flat_clip`` of a configuration is the same
idea inside HiBio's own code (same encoders, same sampler); this peer shares the towers and the loop
of the other peers instead, so that BLEEP and the rest differ from it in one thing each.
"""

from dataclasses import dataclass, field

import numpy as np

from eval.fold import SlideData
from eval.peers.expression_input import dense_expression, target_genes
from eval.peers.peer import TrainingData
from eval.peers.towers import (
    Alignment,
    FittedTowers,
    ImageInput,
    OmicsInput,
    ProjectionHead,
    TowerConfig,
    Towers,
    align,
    identity_loss,
)
from eval.peers.training import TrainingConfig
from eval.readouts import centre


@dataclass(frozen=True)
class FlatClip:
    """CLIP of spots.

    Args:
        n_genes: variable genes that the omics tower reads.
        towers: sizes.
        training: of the loop.
    """

    n_genes: int = 1000
    towers: TowerConfig = field(default_factory=TowerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    name: str = "clip"
    source: str = "CLIP, Radford et al. 2021, on spots"
    needs_image: bool = True
    seeded: bool = True
    per_slide: bool = False

    def fit(self, data: TrainingData, seed: int) -> FittedTowers:
        """Train both towers."""
        omics_input, n_genes = scaled_expression(data, self.n_genes)
        n_features = n_image_features(data, self.name)

        def build() -> Towers:
            image = ProjectionHead(n_features, self.towers)
            return Towers(image, ProjectionHead(n_genes, self.towers), self.towers)

        method = Alignment(
            self.name,
            self.source,
            spot_features(),
            omics_input,
            build,
            identity_loss,
            self.training,
        )
        return align(method, data, seed)


def n_image_features(data: TrainingData, peer: str) -> int:
    """Number of image features F."""
    return int(data.features[data.paired(peer)[0].slide_id].shape[1])


def spot_features() -> ImageInput:
    """The image tower reads a spot's own features."""
    return lambda slide, features: (features,)


def scaled_expression(data: TrainingData, n_genes: int) -> tuple[OmicsInput, int]:
    """The omics tower reads log expression of variable genes, centred per slide.

    All genes are divided by one number, so that noisy genes are not brought to the variance of the
    others.

    Args:
        data: whose slides choose the genes and the number.
        n_genes: how many.

    Returns:
        The input, and the number of genes there are.
    """
    genes = target_genes(data.slides, n_genes)

    def centred(slide: SlideData) -> np.ndarray:
        return centre(dense_expression(slide, genes))

    variance = float(np.mean([centred(slide).var() for slide in data.slides]))
    scale = max(variance, 1e-12) ** 0.5
    return lambda slide: ((centred(slide) / scale).astype(np.float32),), len(genes)
