"""BLEEP: contrast with smoothed targets, and expression as the mean of retrieved spots.

Source: Xie et al., Spatially resolved gene expression prediction from histology images via
bi-modal contrastive learning, NeurIPS 2023.

Same: projection heads of one hidden layer with a residual and layer normalisation; targets are the
softmax of the mean of the image-image and the expression-expression similarity in the batch;
temperature 1; a query image gets the mean expression of its 50 nearest training spots, by the
cosine of its embedding with theirs on the expression side.
Differs: stored image features instead of a ResNet50; per-slide centring instead of Harmony; 64
dimensions, dropout on the inputs, AdamW with a cosine schedule, as all contrastive peers here.
``bleep_preprojection`` takes the similarities of the targets from the inputs of the heads instead
of their outputs, as H&Enium (bioRxiv 2025) proposes: their cosines over 0.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from eval.errors import FoldError
from eval.folds.fold import Prediction, Representation, SlideData, stack
from eval.measures.ridge import knn_mean
from eval.peers.peer import Features, TrainingData, known_expression, target_genes
from eval.peers.towers import FittedTowers, FlatClip, Inputs, Towers
from hibio.config.schema import Count, Temperature


@dataclass(frozen=True, kw_only=True)
class Bleep(FlatClip):
    """BLEEP and its pre-projection variant.

    Args:
        k: training spots in the mean.
        before_projection: targets from the inputs of the heads instead of their outputs.
        temperature: T of logits and targets.
        input_temperature: divides the cosines of the inputs when ``before_projection``.
    """

    k: Count = 50
    before_projection: bool = False
    temperature: Temperature = 1.0
    input_temperature: Temperature = 0.1
    name: str = "bleep"
    source: str = "BLEEP, Xie et al. 2023"

    def notes(self, data: TrainingData) -> tuple[str, ...]:
        """How expression is predicted."""
        return (f"pearson: mean expression of the {self.k} nearest training spots",)

    def fit(self, data: TrainingData, seed: int) -> "FittedBleep":
        """Train the towers; keep the training spots as the bank."""
        fitted = self.align(data, seed)
        slides, genes = data.paired(self.name), target_genes(data.slides)
        bank = stack(list(fitted.embed_omics(slides).values()))
        known = stack([known_expression(slide, genes) for slide in slides])
        return FittedBleep(fitted, bank, known, genes, self.k)

    def loss(self, towers: Towers, image: Inputs, omics: Inputs) -> Tensor:
        """See `smoothed_contrast`."""
        image_ND, omics_ND = towers.image(*image), towers.omics(*omics)
        if not self.before_projection:
            return smoothed_contrast(image_ND, omics_ND, image_ND, omics_ND, self.temperature)
        length = self.input_temperature**-0.5
        inputs = [length * normalize(rows, dim=1) for rows in (image[0], omics[0])]
        return smoothed_contrast(image_ND, omics_ND, inputs[0], inputs[1], self.temperature)


@dataclass(frozen=True)
class FittedBleep:
    """Towers, and the bank that a query is answered from.

    Args:
        towers: trained.
        bank: (N, D) expression embeddings of the training spots.
        known: (N, H) their expression.
        genes: (H,) vocabulary indices.
        k: spots in the mean.
    """

    towers: FittedTowers
    bank: np.ndarray
    known: np.ndarray
    genes: np.ndarray
    k: int

    def represent(self, slides: Sequence[SlideData], features: Features) -> Representation:
        """Embeddings of both sides, and the retrieved expression."""
        shown = self.towers.represent(slides, features)
        values = {
            name: knn_mean(self.bank, self.known, rows, self.k)
            for name, rows in (shown.image or {}).items()
        }
        return replace(shown, prediction=Prediction(self.genes, values) if values else None)


def smoothed_contrast(
    image_ND: Tensor, omics_ND: Tensor, image_NA: Tensor, omics_NB: Tensor, temperature: float
) -> Tensor:
    """Cross-entropy of the pair similarities against targets that similar spots share.

    Args:
        image_ND: image embeddings of N spots.
        omics_ND: their expression embeddings.
        image_NA: rows whose inner products are the image-image similarity of the targets.
        omics_NB: the same for expression.
        temperature: divides the logits and multiplies the mean similarity of the targets.

    Returns:
        Scalar, the mean of both directions; gradients flow into the targets as published.

    Raises:
        FoldError: row numbers differ, or the temperature is not positive.
    """
    sizes = {len(rows) for rows in (image_ND, omics_ND, image_NA, omics_NB)}
    if len(sizes) > 1 or temperature <= 0:
        raise FoldError(
            f"smoothed contrast: {sorted(sizes)} rows, temperature {temperature}; expected pairs "
            "row by row and a positive temperature"
        )
    logits_NN = omics_ND @ image_ND.T / temperature
    likeness_NN = (image_NA @ image_NA.T + omics_NB @ omics_NB.T) / 2
    target_NN = torch.softmax(likeness_NN * temperature, dim=1)
    by_omics_N = -(target_NN * logits_NN.log_softmax(dim=1)).sum(dim=1)
    by_image_N = -(target_NN.T * logits_NN.T.log_softmax(dim=1)).sum(dim=1)
    return (by_omics_N + by_image_N).mean() / 2
