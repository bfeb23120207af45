"""ST-Align-like: contrast of spots, of niches and of the two fused.

Source: Lin et al., ST-Align: a multimodal foundation model for image-gene alignment in spatial
transcriptomics, arXiv 2411.16793.

Same: a spot and its niche (the spot with its spatial neighbours) on both sides; three symmetric
contrasts (spot, niche, fused) weighted 0.3, 0.3 and 0.4 at temperature 0.1.
Differs: a niche is the mean over its members of features or expression, not a transformer over
them; spot and niche are fused by a linear layer on both, not by attention; negatives are the other
spots of the batch instead of five from other clusters; stored image features of one scale.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from eval.folds.fold import SlideData
from eval.peers.peer import TrainingData
from eval.peers.towers import (
    Arrays,
    FlatClip,
    Inputs,
    OmicsInput,
    ProjectionHead,
    TowerConfig,
    Towers,
    scaled_expression,
)
from hibio.config.schema import Temperature, Weight
from hibio.losses import info_nce
from preprocessing.graphs import smooth


@dataclass(frozen=True, kw_only=True)
class StAlign(FlatClip):
    """Spot and niche contrast.

    Args:
        weights: of the spot, the niche and the fused contrast.
        temperature: fixed.
    """

    weights: tuple[Weight, Weight, Weight] = (0.3, 0.3, 0.4)
    temperature: Temperature = 0.1
    name: str = "st_align"
    source: str = "ST-Align, Lin et al. 2024"

    def image_input(self, slide: SlideData, features: np.ndarray) -> Arrays:
        """Features of the spot and of its niche."""
        return features, niche(features, slide)

    def omics_input(self, data: TrainingData) -> tuple[OmicsInput, int]:
        """Expression of the spot and of its niche."""
        expression, n_genes = scaled_expression(data, self.n_genes)
        return lambda slide: (own := expression(slide)[0], niche(own, slide)), n_genes

    def build(self, n_features: int, n_genes: int) -> Towers:
        """The spot and niche heads and the fusion of both sides."""
        sides = [TwoLevels(size, self.towers) for size in (n_features, n_genes)]
        return Towers(sides[0], sides[1], self.towers)

    def loss(self, towers: Towers, image: Inputs, omics: Inputs) -> Tensor:
        """Weighted sum of three symmetric contrasts."""
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
    return np.asarray(smooth(rows, slide.neighbours, 1), dtype=np.float32)
