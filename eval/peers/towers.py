"""Two towers into one space: how every contrastive peer is fitted and used; CLIP is the plain one.

Shapes: N spots of a batch, S spots of one slide, F inputs of a tower, D shared dimensions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from eval.folds.fold import Cost, Representation, SlideData
from eval.measures.ridge import centre
from eval.peers.peer import (
    Features,
    FittedPeer,
    TrainingConfig,
    TrainingData,
    device,
    fit,
    known_expression,
    pictured,
    target_genes,
)
from hibio.config.schema import Count, Dropout, Size, Temperature
from hibio.losses import info_nce

Arrays: TypeAlias = tuple[np.ndarray, ...]
Inputs: TypeAlias = tuple[Tensor, ...]
OmicsInput: TypeAlias = Callable[[SlideData], Arrays]

MIN_TEMPERATURE = 0.01


@dataclass(frozen=True)
class TowerConfig:
    """Settings that all contrastive peers share; the defaults suit a few thousand spots.

    Args:
        dim: D of the shared space.
        input_dropout: share of the inputs of a head that is zeroed in training.
        dropout: in the heads.
        temperature: where the learned temperature starts.
    """

    dim: Size = 64
    input_dropout: Dropout = 0.5
    dropout: Dropout = 0.3
    temperature: Temperature = 0.07


class ProjectionHead(nn.Module):
    """Dropout, linear, a residual block of GELU and linear, layer normalisation."""

    def __init__(self, n_inputs: int, config: TowerConfig) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Dropout(config.input_dropout), nn.Linear(n_inputs, config.dim)
        )
        self.refine = nn.Sequential(
            nn.GELU(), nn.Linear(config.dim, config.dim), nn.Dropout(config.dropout)
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, input_NF: Tensor) -> Tensor:
        """(N, F) to (N, D)."""
        projected_ND = self.project(input_NF)
        normed_ND: Tensor = self.norm(projected_ND + self.refine(projected_ND))
        return normed_ND


class Towers(nn.Module):
    """An image tower, an omics tower and a temperature."""

    def __init__(self, image: nn.Module, omics: nn.Module, config: TowerConfig) -> None:
        super().__init__()
        self.image, self.omics = image, omics
        self.log_temperature = nn.Parameter(torch.tensor(config.temperature).log())

    @property
    def temperature(self) -> Tensor:
        """The learned temperature, never below `MIN_TEMPERATURE`."""
        return self.log_temperature.exp().clamp(min=MIN_TEMPERATURE)


@dataclass(frozen=True, kw_only=True)
class ContrastivePeer(ABC):
    """Two towers into one space; a method says what they read, how they are built, and the loss.

    Args:
        towers: sizes.
        training: of the loop.
    """

    towers: TowerConfig = field(default_factory=TowerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    name: str
    source: str
    needs_image: bool = True
    seeded: bool = True
    per_slide: bool = False

    def image_input(self, slide: SlideData, features: np.ndarray) -> Arrays:
        """What the image tower reads, one row a spot: the spot's own features."""
        return (features,)

    @abstractmethod
    def omics_input(self, data: TrainingData) -> tuple[OmicsInput, int]:
        """What the omics tower reads of a slide, one row a spot, and its number of genes."""

    def build(self, n_features: int, n_genes: int) -> Towers:
        """The towers: a projection head each."""
        image = ProjectionHead(n_features, self.towers)
        return Towers(image, ProjectionHead(n_genes, self.towers), self.towers)

    def loss(self, towers: Towers, image: Inputs, omics: Inputs) -> Tensor:
        """Symmetric InfoNCE: a spot's image belongs to its own profile and to no other."""
        return info_nce(towers.image(*image), towers.omics(*omics), towers.temperature)

    def notes(self, data: TrainingData) -> tuple[str, ...]:
        """Printed with the results."""
        return ()

    def fit(self, data: TrainingData, seed: int) -> FittedPeer:
        """See `align`."""
        return self.align(data, seed)

    def align(self, data: TrainingData, seed: int) -> "FittedTowers":
        """Train the towers on the training slides with an image.

        Raises:
            FoldError: no training slide has image features.
        """
        slides = data.paired(self.name)
        omics_input, n_genes = self.omics_input(data)
        image = _stacked([self.image_input(s, data.features[s.slide_id]) for s in slides])
        omics = _stacked([omics_input(s) for s in slides])
        n_features = data.features[slides[0].slide_id].shape[1]

        def loss(module: nn.Module, items: Tensor) -> Tensor:
            assert isinstance(module, Towers)
            return self.loss(module, _rows(image, items), _rows(omics, items))

        towers, cost = fit(
            lambda: self.build(n_features, n_genes),
            loss,
            len(image[0]),
            self.training,
            data.budget,
            seed,
        )
        assert isinstance(towers, Towers)
        return FittedTowers(self, towers, omics_input, self.notes(data), Cost(self.source, *cost))


@dataclass(frozen=True)
class FittedTowers:
    """Two trained towers of a method."""

    method: ContrastivePeer
    towers: Towers
    omics_input: OmicsInput
    notes: tuple[str, ...]
    cost: Cost

    def embed_image(self, slides: Sequence[SlideData], features: Features) -> dict[str, np.ndarray]:
        """slide_id -> (S, D) of the slides that have image features."""
        read = self.method.image_input
        return {
            s.slide_id: _applied(self.towers.image, read(s, features[s.slide_id]))
            for s in pictured(slides, features)
        }

    def embed_omics(self, slides: Sequence[SlideData]) -> dict[str, np.ndarray]:
        """slide_id -> (S, D) of all slides."""
        return {s.slide_id: _applied(self.towers.omics, self.omics_input(s)) for s in slides}

    def represent(self, slides: Sequence[SlideData], features: Features) -> Representation:
        """Both sides in one space."""
        return Representation(
            self.method.name,
            image=self.embed_image(slides, features) or None,
            omics=self.embed_omics(slides),
            notes=self.notes,
            cost=self.cost,
        )


def _stacked(parts: Sequence[Arrays]) -> Inputs:
    """Rows of all slides below each other, on the device of training."""
    columns = zip(*parts, strict=True)
    return tuple(torch.from_numpy(np.concatenate(column)).to(device()) for column in columns)


def _rows(inputs: Inputs, items: Tensor) -> Inputs:
    return tuple(value[items] for value in inputs)


def _applied(tower: nn.Module, inputs: Arrays, block: int = 4096) -> np.ndarray:
    """A tower on the spots of one slide, (S, D) float32, some thousand spots at a time."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(inputs[0]), block):
            rows = [torch.from_numpy(v[start : start + block]).to(device()) for v in inputs]
            parts.append(tower(*rows).cpu().numpy())
    return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class FlatClip(ContrastivePeer):
    """CLIP of spots.

    Source: Radford et al., ICML 2021 (CLIP), with spots in the place of captions.

    Same: two towers, one shared space, symmetric cross-entropy over the batch, learned temperature.
    Differs: stored image features instead of a trained image encoder; log expression of variable
    genes, centred per slide, instead of text. The run variant ``flat_clip`` of a configuration is
    the same idea inside HiBio's own code (same encoders, same sampler); this peer shares the towers
    and the loop of the other peers, so that BLEEP and the rest differ from it in one thing each.

    Args:
        n_genes: variable genes that the omics tower reads.
    """

    n_genes: Count = 1000
    name: str = "clip"
    source: str = "CLIP, Radford et al. 2021, on spots"

    def omics_input(self, data: TrainingData) -> tuple[OmicsInput, int]:
        """See `scaled_expression`."""
        return scaled_expression(data, self.n_genes)


def scaled_expression(data: TrainingData, n_genes: int) -> tuple[OmicsInput, int]:
    """The omics tower reads log expression of variable genes, centred per slide.

    All genes are divided by one number, so that noisy genes are not brought to the variance of the
    others.

    Returns:
        The input, and the number of genes there are.
    """
    genes = target_genes(data.slides, n_genes)

    def centred(slide: SlideData) -> np.ndarray:
        return centre(known_expression(slide, genes))

    variance = float(np.mean([centred(slide).var() for slide in data.slides]))
    scale = max(variance, 1e-12) ** 0.5
    return lambda slide: ((centred(slide) / scale).astype(np.float32),), len(genes)
