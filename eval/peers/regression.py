"""Peers that predict expression from the image: how each is fitted, MLP, ST-Net-like.

Targets are the log expression of the variable genes of the expression task. Shapes: N spots of L
slides stacked, F features, k neighbours, B blocks of a slide, H target genes, W hidden width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from eval.folds.fold import Cost, Prediction, Representation, SlideData, stack
from eval.measures.inner_folds import spatial_blocks
from eval.measures.ridge import zscore
from eval.peers.peer import (
    Features,
    TrainingConfig,
    TrainingData,
    device,
    fit,
    known_expression,
    pictured,
    target_genes,
)
from hibio.config.schema import Dropout, Size


@dataclass(frozen=True)
class SlideStack:
    """Image side of some slides as tensors on the device of training; no count is read.

    Args:
        feature_NF: z-scored per slide.
        near_Nk: row of each spatial neighbour in the stack, padded with -1.
        place_N2: position, z-scored per slide.
        slide_N: number of the slide.
        block_LBF: mean features of the blocks that a slide is cut into.
        block_place_LB2: mean position of each block.
        filled_LB: whether a block has spots.
    """

    feature_NF: Tensor
    near_Nk: Tensor
    place_N2: Tensor
    slide_N: Tensor
    block_LBF: Tensor
    block_place_LB2: Tensor
    filled_LB: Tensor

    @staticmethod
    def of(slides: Sequence[SlideData], features: Features, side: int = 6) -> "SlideStack":
        """Stack slides; each is cut into side x side blocks of about equally many spots."""
        rows = [np.asarray(features[s.slide_id], np.float32) for s in slides]
        places = [zscore(s.xy_um).astype(np.float32) for s in slides]
        starts = np.cumsum([0, *(s.n_spots for s in slides)])
        near = [
            np.where(s.neighbours >= 0, s.neighbours + start, -1)
            for s, start in zip(slides, starts, strict=False)
        ]
        cut = [
            _blocks(row, place, spatial_blocks(s.xy_um, side), side * side)
            for s, row, place in zip(slides, rows, places, strict=True)
        ]
        number = [np.full(s.n_spots, index) for index, s in enumerate(slides)]
        columns = (stack(rows), stack(near), stack(places), stack(number))
        blocks = [np.stack(parts) for parts in zip(*cut, strict=True)]
        return SlideStack(*(torch.from_numpy(v).to(device()) for v in (*columns, *blocks)))

    @property
    def n_spots(self) -> int:
        """N."""
        return len(self.feature_NF)


def _blocks(
    rows: np.ndarray, places: np.ndarray, block: np.ndarray, n_blocks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean features (B, F), mean position (B, 2) and whether there is any spot (B,)."""
    size = np.bincount(block, minlength=n_blocks)
    share = np.zeros((n_blocks, len(rows)), np.float32)
    share[block, np.arange(len(rows))] = 1.0 / size[block]
    return share @ rows, share @ places, size > 0


class Output(NamedTuple):
    """What a regression module gives for N spots.

    Args:
        hidden: (N, W) shown as the peer's image embedding, or None.
        prediction: (N, H).
        branches: further predictions (N, H) that take part in training only.
    """

    hidden: Tensor | None
    prediction: Tensor
    branches: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RegressionPeer(ABC):
    """A network ``(stack, items) -> Output``; a method says which, and what is minimised.

    Targets lose their mean over the training spots, and where ``scaled`` are divided by their
    standard deviation; predictions get both back.

    Args:
        training: of the loop.
    """

    scaled: ClassVar[bool] = True
    training: TrainingConfig = field(default_factory=TrainingConfig)
    name: str
    source: str
    needs_image: bool = True
    seeded: bool = True
    per_slide: bool = False

    @abstractmethod
    def build(self, n_features: int, n_genes: int) -> nn.Module:
        """The network."""

    def loss(self, output: Output, target_NH: Tensor) -> Tensor:
        """Mean squared error of the prediction."""
        return nn.functional.mse_loss(output.prediction, target_NH)

    def fit(self, data: TrainingData, seed: int) -> "FittedRegression":
        """Train the network on the training slides with an image.

        Raises:
            FoldError: no training slide has image features.
        """
        slides = data.paired(self.name)
        genes = target_genes(data.slides)
        known = stack([known_expression(slide, genes) for slide in slides])
        mean = known.mean(axis=0)
        spread = np.maximum(known.std(axis=0), 1e-6) if self.scaled else np.ones_like(mean)
        inputs = SlideStack.of(slides, data.features)
        target_NH = torch.from_numpy((known - mean) / spread).to(device())

        def loss(module: nn.Module, items: Tensor) -> Tensor:
            return self.loss(module(inputs, items), target_NH[items])

        n_features = inputs.feature_NF.shape[1]
        module, cost = fit(
            lambda: self.build(n_features, len(genes)),
            loss,
            inputs.n_spots,
            self.training,
            data.budget,
            seed,
        )
        return FittedRegression(self, module, genes, mean, spread, Cost(self.source, *cost))


@dataclass(frozen=True)
class FittedRegression:
    """A trained module; ``mean`` (H,) and ``spread`` (H,) are those of the training spots."""

    method: RegressionPeer
    module: nn.Module
    genes: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    cost: Cost

    def represent(self, slides: Sequence[SlideData], features: Features) -> Representation:
        """Predicted expression, and the hidden layer as an image embedding where there is one."""
        hidden, values = {}, {}
        for slide in pictured(slides, features):
            inside, prediction = self._applied(SlideStack.of([slide], features))
            values[slide.slide_id] = prediction * self.spread + self.mean
            if inside is not None:
                hidden[slide.slide_id] = inside
        return Representation(
            self.method.name,
            image=hidden or None,
            aligned=False,
            prediction=Prediction(self.genes, values) if values else None,
            cost=self.cost,
        )

    def _applied(
        self, inputs: SlideStack, block: int = 4096
    ) -> tuple[np.ndarray | None, np.ndarray]:
        hidden, prediction = [], []
        with torch.inference_mode():
            for items in torch.arange(inputs.n_spots, device=device()).split(block):
                output = self.module(inputs, items)
                prediction.append(output.prediction.cpu().numpy())
                if output.hidden is not None:
                    hidden.append(output.hidden.cpu().numpy())
        return (stack(hidden) if hidden else None), stack(prediction)


@dataclass(frozen=True, kw_only=True)
class Mlp(RegressionPeer):
    """MLP on frozen features.

    Source: the head that HEST-Bench (Jaume et al., NeurIPS 2024) and later papers put beside ridge;
    no single paper.

    Same: layer normalisation, ReLU and dropout; log expression of variable genes.
    Differs: targets are scaled to unit variance over the training spots, so that every gene counts
    alike; a fixed number of epochs instead of early stopping on validation slides.

    Args:
        width: of both hidden layers.
        dropout: after each.
    """

    width: Size = 256
    dropout: Dropout = 0.2
    name: str = "mlp_regression"
    source: str = "MLP on frozen features"

    def build(self, n_features: int, n_genes: int) -> nn.Module:
        """Two hidden layers and a linear output."""
        return MlpNetwork(n_features, n_genes, self.width, self.dropout)


class MlpNetwork(nn.Module):
    """Two hidden layers and a linear output; the second hidden layer is the embedding."""

    def __init__(self, n_features: int, n_genes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(n_features, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(dropout)),
        )
        self.head = nn.Linear(width, n_genes)

    def forward(self, inputs: SlideStack, items: Tensor) -> Output:
        """Hidden (N, W) and predictions (N, H) of the items."""
        hidden_NW = self.body(inputs.feature_NF[items])
        return Output(hidden_NW, self.head(hidden_NW))


@dataclass(frozen=True, kw_only=True)
class StNet(RegressionPeer):
    """Linear head by gradient descent.

    Source: He et al., Integrating spatial gene expression and breast tumour morphology via deep
    learning, Nature Biomedical Engineering 2020 (ST-Net).

    Same: a single patch, one linear output layer, log expression unscaled, mean squared error
    summed alike over genes, trained by gradient descent.
    Differs: the convolutional network below the layer is frozen (the stored features), not a
    DenseNet121 that is fine-tuned; the variable genes of the expression task instead of the 250
    most expressed; AdamW instead of SGD; no averaging over the eight flips and turns of a patch.
    """

    scaled: ClassVar[bool] = False
    name: str = "st_net"
    source: str = "ST-Net, He et al. 2020"

    def build(self, n_features: int, n_genes: int) -> nn.Module:
        """One linear layer."""
        return LinearHead(n_features, n_genes)


class LinearHead(nn.Module):
    """Features to genes; it has no hidden layer, hence no embedding of its own."""

    def __init__(self, n_features: int, n_genes: int) -> None:
        super().__init__()
        self.head = nn.Linear(n_features, n_genes)

    def forward(self, inputs: SlideStack, items: Tensor) -> Output:
        """Predictions (N, H) of the items."""
        return Output(None, self.head(inputs.feature_NF[items]))
