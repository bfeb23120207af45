"""How every peer that predicts expression from the image is fitted and used.

A peer gives a module ``(stack, items) -> hidden, predictions`` and what is minimised; the rest is
here. Targets are the log expression of the variable genes of the expression task.

Shapes: N training spots, S spots of a slide, H target genes, W hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from eval.fold import Cost, Prediction, Representation, SlideData, stack
from eval.peers.expression_input import N_TARGETS, dense_expression, target_genes
from eval.peers.peer import Features, TrainingData, pictured
from eval.peers.slide_stack import SlideStack
from eval.peers.training import TrainingConfig, device, fit


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


@dataclass(frozen=True)
class Regression:
    """One method that predicts expression.

    Args:
        name: row name in the results.
        source: paper.
        build: of the numbers of features and of genes: makes the module.
        loss: of the output and the targets (N, H), a scalar.
        scaled: whether targets are divided by their standard deviation over the training spots
            (their mean is always taken off, and put back into predictions).
        training: of the loop.
        n_genes: H.
        notes: printed with the results.
    """

    name: str
    source: str
    build: Callable[[int, int], nn.Module]
    loss: Callable[[Output, Tensor], Tensor]
    scaled: bool
    training: TrainingConfig
    n_genes: int = N_TARGETS
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FittedRegression:
    """A trained module; ``mean`` (H,) and ``spread`` (H,) are those of the training spots."""

    method: Regression
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
            notes=self.method.notes,
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


def regress(method: Regression, data: TrainingData, seed: int) -> FittedRegression:
    """Train a method on the training slides with an image.

    Args:
        method: what to train.
        data: training slides.
        seed: of weights and order.

    Raises:
        FoldError: no training slide has image features.
    """
    slides = data.paired(method.name)
    genes = target_genes(data.slides, method.n_genes)
    known = stack([dense_expression(slide, genes) for slide in slides])
    mean = known.mean(axis=0)
    spread = np.maximum(known.std(axis=0), 1e-6) if method.scaled else np.ones_like(mean)
    inputs = SlideStack.of(slides, data.features)
    target_NH = torch.from_numpy((known - mean) / spread).to(device())

    def loss(module: nn.Module, items: Tensor) -> Tensor:
        return method.loss(module(inputs, items), target_NH[items])

    n_features = inputs.feature_NF.shape[1]
    module, size, seconds = fit(
        lambda: method.build(n_features, len(genes)), loss, inputs.n_spots, method.training, seed
    )
    cost = Cost(method.source, size, seconds)
    return FittedRegression(method, module, genes, mean, spread, cost)


def squared_error(output: Output, target_NH: Tensor) -> Tensor:
    """Mean squared error of the prediction."""
    return nn.functional.mse_loss(output.prediction, target_NH)
