"""STAGATE-like: an attention autoencoder on the spatial graph of one slide, for its domains.

Source: Dong and Zhang, Deciphering spatial domains from spatially resolved transcriptomics with an
adaptive graph attention auto-encoder, Nature Communications 2022 (STAGATE); GraphST (Long et al.,
Nature Communications 2023) is of the same family.

Same: fitted on every slide alone, without labels; encoder with attention over a spot and its
spatial neighbours (sigmoid scores, softmax), a latent of 30, a decoder with the transposed weights
and the same attention; mean squared error of log expression of variable genes.
Differs: genes are chosen on the training slides; fewer genes, a narrower hidden layer and fewer
steps, for a CPU; expression is z-scored per slide; neighbours are the k nearest instead of those
within a radius; no pruning of edges between pre-clusters; no contrast with corrupted graphs
(GraphST). With ``rows: tfidf`` it reconstructs the TF-IDF rows of docs/method.md 1 instead, in the
variant of the run: a per-slide graph head, not a published model. As genes are z-scored, idf takes
no part in it; what differs is the term frequency (raw or log) and the unit rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import elu, mse_loss

from eval.errors import FoldError
from eval.folds.fold import Cost, Representation, SlideData
from eval.measures.ridge import zscore
from eval.peers.peer import (
    Budget,
    Features,
    FitCost,
    TrainingConfig,
    TrainingData,
    device,
    fit,
    known_expression,
    target_genes,
)
from hibio.config.schema import Count, Positive, Size, Weight

ROWS = ("expression", "tfidf")


@dataclass(frozen=True)
class Stagate:
    """Graph attention autoencoder of a slide.

    Args:
        n_genes: variable genes of the training slides that are reconstructed.
        hidden: width between expression and latent.
        latent: of the embedding.
        neighbours: that a spot attends to, beside itself.
        steps: each on the whole slide, so many for every slide, whatever the run beside had.
        lr: of the training loop.
        weight_decay: of the training loop.
        rows: what is reconstructed: log expression, or TF-IDF rows.
    """

    n_genes: Count = 1000
    hidden: Size = 128
    latent: Size = 30
    neighbours: Count = 6
    steps: Count = 200
    lr: Positive = 1e-3
    weight_decay: Weight = 1e-4
    rows: Literal["expression", "tfidf"] = "expression"
    name: str = "stagate"
    source: str = "STAGATE, Dong and Zhang 2022"
    needs_image: bool = False
    seeded: bool = True
    per_slide: bool = True

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise FoldError(f"stagate rows is {self.rows!r}; expected one of {', '.join(ROWS)}")

    def fit(self, data: TrainingData, seed: int) -> "FittedStagate":
        """Choose the genes; the autoencoders are trained slide by slide."""
        return FittedStagate(self, target_genes(data.slides, self.n_genes), seed)


@dataclass(frozen=True)
class FittedStagate:
    """The genes (H,) of all autoencoders, and their seed."""

    settings: Stagate
    genes: np.ndarray
    seed: int

    def represent(self, slides: Sequence[SlideData], features: Features) -> Representation:
        """One autoencoder a slide, trained on it alone; its latent is the omics embedding."""
        omics, size, seconds = {}, 0, 0.0
        for slide in slides:
            omics[slide.slide_id], one = self._embedded(slide)
            size, seconds = one.n_parameters, seconds + one.seconds
        note = "an autoencoder a slide (transductive, no labels); its space is the slide's own"
        return Representation(
            self.settings.name,
            omics=omics,
            notes=(note,),
            aligned=False,
            cost=Cost(self.settings.source, size, seconds, self.settings.steps),
        )

    def _rows(self, slide: SlideData) -> np.ndarray:
        """What is reconstructed, (S, H)."""
        if self.settings.rows == "tfidf":
            return np.asarray(slide.profiles[:, self.genes].toarray())
        return known_expression(slide, self.genes)

    def _embedded(self, slide: SlideData) -> tuple[np.ndarray, FitCost]:
        """Latent (S, latent), and what it took."""
        config = self.settings
        values = zscore(self._rows(slide)).astype(np.float32)
        own = np.arange(slide.n_spots)[:, None]
        near = np.hstack([own, slide.neighbours[:, : config.neighbours]])
        value_SH, near_Sk = (torch.from_numpy(v).to(device()) for v in (values, near))

        def loss(module: nn.Module, items: Tensor) -> Tensor:
            return mse_loss(module(value_SH, near_Sk)[1], value_SH)

        whole = Budget(config.steps, max(slide.n_spots, 2))
        module, cost = fit(
            lambda: GraphAutoencoder(len(self.genes), config.hidden, config.latent),
            loss,
            slide.n_spots,
            TrainingConfig(lr=config.lr, weight_decay=config.weight_decay),
            whole,
            self.seed,
        )
        with torch.inference_mode():
            latent = module(value_SH, near_Sk)[0].cpu().numpy()
        return latent, cost


class GraphAutoencoder(nn.Module):
    """Expression to latent and back with tied weights; attention in the first and last layer."""

    def __init__(self, n_genes: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.first = nn.Parameter(nn.init.xavier_normal_(torch.empty(n_genes, hidden)))
        self.second = nn.Parameter(nn.init.xavier_normal_(torch.empty(hidden, latent)))
        self.score_self = nn.Parameter(nn.init.xavier_normal_(torch.empty(hidden, 1)))
        self.score_near = nn.Parameter(nn.init.xavier_normal_(torch.empty(hidden, 1)))

    def forward(self, value_SH: Tensor, near_Sk: Tensor) -> tuple[Tensor, Tensor]:
        """Latent (S, latent) and reconstruction (S, H).

        Args:
            value_SH: expression.
            near_Sk: each spot's own row, then its neighbours, padded with -1.
        """
        projected_SW = value_SH @ self.first
        weight_Sk = self.attention(projected_SW, near_Sk)
        hidden_SW = elu(_mixed(projected_SW, near_Sk, weight_Sk))
        latent_SL = hidden_SW @ self.second
        back_SW = elu(_mixed(latent_SL @ self.second.T, near_Sk, weight_Sk))
        return latent_SL, back_SW @ self.first.T

    def attention(self, projected_SW: Tensor, near_Sk: Tensor) -> Tensor:
        """Weights (S, k) over a spot and its neighbours; absent ones get 0, the others sum to 1."""
        near_S = (projected_SW @ self.score_near)[:, 0]
        score_Sk = torch.sigmoid(projected_SW @ self.score_self + near_S[near_Sk.clamp(min=0)])
        return score_Sk.masked_fill(near_Sk < 0, float("-inf")).softmax(dim=1)


def _mixed(rows_SW: Tensor, near_Sk: Tensor, weight_Sk: Tensor) -> Tensor:
    return torch.einsum("sk,skw->sw", weight_Sk, rows_SW[near_Sk.clamp(min=0)])
