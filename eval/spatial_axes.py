"""Axes of an embedding in order of spatial smoothness: the minimum noise fraction transform.

Switzer & Green (1984); Green et al. (1988), IEEE TGRS 26:65; close to MULTISPATI (Dray et al.
2008). Noise of a spot is its embedding minus the mean of its spatial neighbours. The result is one
linear map of each spot's own embedding, fitted on the slide itself without labels.
Shapes: S spots, D dimensions, R their rank, C components, k neighbours.
"""

import numpy as np
from scipy.linalg import eigh

from eval.fold import FoldError, neighbour_weights

#: Directions of less variance than this share of the widest are rounding and are dropped.
RANK_TOLERANCE = 1e-10
#: Spots whose standard deviation is at most this share of the largest number are all the same.
ROUNDING = 1e-12
#: Smallest noise share: a direction without any noise counts as a signal-to-noise ratio of 1e6.
MIN_NOISE_SHARE = 1e-6
#: With fewer spots for each dimension white noise too has smooth axes, those of the graph itself.
SPOTS_PER_DIMENSION = 4


def spatial_axes(rows: np.ndarray, neighbours: np.ndarray, n_components: int) -> np.ndarray:
    """Project on the axes u of largest w in `covariance @ u = w * noise_covariance @ u`.

    Noise has unit variance on every axis, so what is smooth over the tissue has a large scale. The
    pair of covariances is diagonalised by whitening the embedding and then turning it by the
    eigenvectors of its noise: any well-conditioned linear map of the embedding gives the same axes.

    Args:
        rows: (S, D) embedding.
        neighbours: (S, k) spatial neighbours padded with -1. A spot without any counts in the
            covariance and is projected, but has no part in the noise.
        n_components: axes to keep, the one of largest signal-to-noise ratio first.

    Returns:
        (S, C), centred, in float64; C is the smaller of ``n_components`` and the rank R. Signs are
        arbitrary.

    Raises:
        FoldError: fewer than two spots, no component asked for, one embedding at all spots, or
            fewer than four spots with neighbours for each dimension.
    """
    if len(rows) < 2 or n_components < 1:
        raise FoldError(
            f"found {len(rows)} spots and {n_components} components asked for; spatial axes need "
            "two spots and one component: leave the slide out or ask for more components"
        )
    white = _whitened(rows)
    size = white.shape[1]
    present = (neighbours >= 0).any(axis=1)
    if present.sum() < SPOTS_PER_DIMENSION * size:
        raise FoldError(
            f"found {present.sum()} spots with spatial neighbours for {size} dimensions; expected "
            f"{SPOTS_PER_DIMENSION} a dimension: build the spatial graph or reduce the embedding "
            "first"
        )
    noise = (white - neighbour_weights(neighbours) @ white)[present]
    kept = [0, min(n_components, size) - 1]
    share, turn = eigh(noise.T @ noise / len(noise), subset_by_index=kept)
    return np.asarray(white @ (turn / np.sqrt(np.maximum(share, MIN_NOISE_SHARE))))


def _whitened(rows: np.ndarray) -> np.ndarray:
    """Centred rows (S, R) of identity covariance, without directions that do not vary."""
    centred = np.asarray(rows, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    variance, turn = eigh(centred.T @ centred / len(centred))
    kept = variance > RANK_TOLERANCE * variance[-1]
    if variance[-1] <= (ROUNDING * np.abs(rows).max()) ** 2:
        raise FoldError(
            f"found one embedding at all {len(rows)} spots; expected spots that differ: leave "
            "this embedding out"
        )
    return np.asarray(centred @ (turn[:, kept] / np.sqrt(variance[kept])))
