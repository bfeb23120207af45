"""Which genes vary, decided on training slides only; used by expression targets and by PCA.

Shapes: S spots, G genes.
"""

from collections.abc import Iterable

import numpy as np
from scipy import sparse

from eval.errors import FoldError
from eval.folds.fold import SlideData
from preprocessing.expression import normalised


def expression(slide: SlideData) -> sparse.csr_matrix:
    """What expression means on this slide, sparse (S, G) float64; an empty spot stays 0.

    ln(1 + 10,000 x / depth) of counts, arcsinh of intensities (no depth scaling).
    """
    return normalised(slide.counts, slide.modality).astype(np.float64)


def dense_expression(slide: SlideData, genes: np.ndarray) -> np.ndarray:
    """The same of some genes (H,), dense (S, H)."""
    return np.asarray(expression(slide)[:, genes].toarray())


def variable_genes(slides: Iterable[SlideData], k: int, min_detected: float = 0.1) -> np.ndarray:
    """The k genes whose expression varies most within slides.

    The variance is taken within each slide and pooled, so that depth differences of patients do
    not choose the genes. Genes detected in too few spots come after all others (HEST-Bench keeps
    genes detected in 10 % of the spots).

    Args:
        slides: training slides, never test slides.
        k: number of genes; all genes when there are fewer.
        min_detected: share of spots in which a gene must be detected.

    Returns:
        (k,) gene indices by falling variance; ties in gene order.

    Raises:
        FoldError: no slide.
    """
    squares: np.ndarray | float = 0.0
    detected: np.ndarray | float = 0.0
    n_spots = 0
    for slide in slides:
        values = expression(slide)
        total = np.asarray(values.sum(axis=0)).ravel()
        power = np.asarray(values.multiply(values).sum(axis=0)).ravel()
        squares = squares + np.maximum(power - total**2 / slide.n_spots, 0.0)
        detected = detected + np.bincount(values.indices, minlength=values.shape[1])
        n_spots += slide.n_spots
    if not n_spots:
        raise FoldError("no training slide to choose variable genes on; check the split")
    variance, often = np.asarray(squares) / n_spots, np.asarray(detected) >= min_detected * n_spots
    return np.lexsort((-variance, ~often))[:k]
