"""What peers make of the counts: expression of genes that vary, decided on training slides only.

Shapes: S spots of one slide, H chosen genes.
"""

from collections.abc import Sequence

import numpy as np

from eval.folds.fold import SlideData
from eval.folds.variable_genes import expression, variable_genes

#: Share of training spots in which a target should be detected, as in the expression task.
MIN_DETECTED = 0.1
#: Genes that a regression peer predicts: as many as the largest target set of the expression task.
N_TARGETS = 200


def target_genes(slides: Sequence[SlideData], n_genes: int = N_TARGETS) -> np.ndarray:
    """The genes (H,) that predictors are fitted on, those of the expression task."""
    return variable_genes(slides, n_genes, MIN_DETECTED)


def dense_expression(slide: SlideData, genes: np.ndarray) -> np.ndarray:
    """Log expression (S, H) float32 of some genes."""
    return np.asarray(expression(slide)[:, genes].toarray(), dtype=np.float32)
