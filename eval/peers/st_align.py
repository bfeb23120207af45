"""ST-Align-like: contrast of spots, of niches and of the two fused.

Source: Lin et al., ST-Align: a multimodal foundation model for image-gene alignment in spatial
transcriptomics, arXiv 2411.16793.

Same: a spot and its niche (the spot with its spatial neighbours) on both sides; three symmetric
contrasts (spot, niche, fused) weighted 0.3, 0.3 and 0.4 at temperature 0.1.
Differs: a niche is the mean over its members of features or expression, not a transformer over
them; spot and niche are fused by a linear layer on both, not by attention; negatives are the other
spots of the batch instead of five from other clusters; stored image features of one scale.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from eval.folds.fold import SlideData, neighbour_mean
from eval.peers.peer import TrainingConfig, TrainingData
from eval.peers.towers import (
    Alignment,
    FittedTowers,
    Inputs,
    ProjectionHead,
    TowerConfig,
    Towers,
    align,
    n_image_features,
    scaled_expression,
)
from hibio.losses import info_nce


@dataclass(frozen=True)
class StAlign:
    """Spot and niche contrast.

    Args:
        n_genes: variable genes that the omics side reads.
        weights: of the spot, the niche and the fused contrast.
        temperature: fixed.
        towers: sizes.
        training: of the loop.
    """

    n_genes: int = 1000
    weights: tuple[float, float, float] = (0.3, 0.3, 0.4)
    temperature: float = 0.1
    towers: TowerConfig = field(default_factory=TowerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    name: str = "st_align"
    source: str = "ST-Align, Lin et al. 2024"
    needs_image: bool = True
    seeded: bool = True
    per_slide: bool = False

    def fit(self, data: TrainingData, seed: int) -> FittedTowers:
        """Train the spot and niche heads and the fusion of both sides."""
        expression, n_genes = scaled_expression(data, self.n_genes)
        n_features = n_image_features(data, self.name)

        def build() -> Towers:
            sides = [TwoLevels(size, self.towers) for size in (n_features, n_genes)]
            return Towers(sides[0], sides[1], self.towers)

        method = Alignment(
            self.name,
            self.source,
            lambda slide, features: (features, niche(features, slide)),
            lambda slide: (expression(slide)[0], niche(expression(slide)[0], slide)),
            build,
            self._loss,
            self.training,
        )
        return align(method, data, seed)

    def _loss(self, towers: Towers, image: Inputs, omics: Inputs) -> Tensor:
        assert isinstance(towers.image, TwoLevels)
        assert isinstance(towers.omics, TwoLevels)
        levels = zip(towers.image.levels(*image), towers.omics.levels(*omics), strict=True)
        losses = [info_nce(one, other, self.temperature) for one, other in levels]
        weighted = [weight * loss for weight, loss in zip(self.weights, losses, strict=True)]
        return torch.stack(weighted).sum()


class TwoLevels(nn.Module):
    """One side: a head for the spot, a head for the niche, and both fused."""

    def __init__(self, n_inputs: int, config: TowerConfig) -> None:
        super().__init__()
        self.spot = ProjectionHead(n_inputs, config)
        self.niche = ProjectionHead(n_inputs, config)
        self.fuse = nn.Linear(2 * config.dim, config.dim)

    def levels(self, spot_NF: Tensor, niche_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spot, niche and fused embeddings, each (N, D)."""
        spot_ND, niche_ND = self.spot(spot_NF), self.niche(niche_NF)
        return spot_ND, niche_ND, self.fuse(torch.cat([spot_ND, niche_ND], dim=1))

    def forward(self, spot_NF: Tensor, niche_NF: Tensor) -> Tensor:
        """The fused embedding (N, D)."""
        return self.levels(spot_NF, niche_NF)[2]


def niche(rows: np.ndarray, slide: SlideData) -> np.ndarray:
    """Mean (S, F) float32 of each spot and its spatial neighbours."""
    degree = (slide.neighbours >= 0).sum(axis=1, keepdims=True)
    around = neighbour_mean(rows, slide.neighbours)
    return np.asarray((rows + degree * around) / (1 + degree), dtype=np.float32)
