"""PCA to 256 dimensions and ridge regression: the head of HEST-Bench, under two penalties.

Source: Jaume et al., HEST-1k: a dataset for spatial transcriptomics and histology image analysis,
NeurIPS 2024.

Same: PCA with 256 components fitted on training spots, ridge with penalty 100 / (dimensions x
genes) (``pca256_ridge_hest``).
Differs: features are z-scored per slide, an intercept is fitted (a constant does not change a
correlation), and ``pca256_ridge`` takes the penalty from inner folds over training patients.
The read-outs of the row ``raw_features`` are the same regression; these rows make it a model like
the others, with its cost.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from eval.errors import FoldError
from eval.folds.fold import (
    Cost,
    Prediction,
    Representation,
    SlideData,
    split_rows,
    spot_names,
    stack,
)
from eval.measures.inner_folds import inner_groups
from eval.measures.ridge import RidgeConfig, ridge_fit_predict
from eval.peers.peer import (
    N_TARGETS,
    Features,
    TrainingData,
    known_expression,
    pictured,
    target_genes,
)
from hibio.config.schema import Count

HEST_GENES = 50  # the fixed penalty is that of the benchmark's 50 genes


@dataclass(frozen=True)
class PcaRidge:
    """PCA and ridge.

    Args:
        alpha: ``cv`` (inner folds over patients) or ``hest`` (the fixed penalty).
        ridge: number of components and the grid of ``cv``.
        n_genes: genes that are predicted.
    """

    alpha: str = "cv"
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    n_genes: Count = N_TARGETS
    name: str = "pca256_ridge"
    source: str = "HEST-Bench head, Jaume et al. 2024"
    needs_image: bool = True
    seeded: bool = False
    per_slide: bool = False

    def __post_init__(self) -> None:
        if self.alpha not in ("cv", "hest"):
            raise FoldError(f"pca_ridge: alpha is {self.alpha!r}, expected 'cv' or 'hest'")

    def fit(self, data: TrainingData, seed: int) -> "FittedPcaRidge":
        """Keep what the regression needs; the PCA draws from a fixed seed of its own."""
        slides = data.paired(self.name)
        genes = target_genes(data.slides, self.n_genes)
        x = stack([np.asarray(data.features[s.slide_id], np.float64) for s in slides])
        y = stack([known_expression(s, genes).astype(np.float64) for s in slides])
        units = spot_names(slides, "slide")
        xy_um = stack([s.xy_um for s in slides])
        groups = inner_groups(spot_names(slides, "patient"), units, xy_um)
        return FittedPcaRidge(self, genes, x, y, groups, units)


@dataclass(frozen=True)
class FittedPcaRidge:
    """Training features (N, F) and targets (N, H); inner groups and slides (N,) of the spots."""

    settings: PcaRidge
    genes: np.ndarray
    x: np.ndarray
    y: np.ndarray
    groups: np.ndarray
    units: np.ndarray

    @property
    def alpha(self) -> float | str:
        """The penalty, or ``cv``."""
        if self.settings.alpha == "cv":
            return "cv"
        dims = min(self.x.shape[1], self.settings.ridge.n_components, len(self.x) - 1)
        return 100.0 / (dims * min(HEST_GENES, len(self.genes)))

    def represent(self, slides: Sequence[SlideData], features: Features) -> Representation:
        """Predicted expression of the slides with an image."""
        started = time.perf_counter()
        shown = pictured(slides, features)
        values = {}
        if shown:
            rows = stack([np.asarray(features[s.slide_id], np.float64) for s in shown])
            units = self.units if self.alpha == "cv" else None  # HEST takes targets as they are
            found = ridge_fit_predict(
                *(self.x, self.y, rows, self.alpha, self.groups, units, self.settings.ridge)
            )
            parts = split_rows(found, shown)
            values = {s.slide_id: part for s, part in zip(shown, parts, strict=True)}
        dims = min(self.x.shape[1], self.settings.ridge.n_components)
        size = (dims + 1) * self.y.shape[1]
        return Representation(
            self.settings.name,
            aligned=False,
            prediction=Prediction(self.genes, values) if values else None,
            cost=Cost(self.settings.source, size, time.perf_counter() - started),
        )
