"""Stain of H&E: optical density, and the vectors of hematoxylin and eosin of a slide.

The vectors are estimated for reports, after Macenko et al. (ISBI 2009): light that passes stained
tissue is weakened by the factor 10^-(amount x vector), so pixels lie in the plane of the two
vectors, and the outermost directions in that plane are the stains. Shapes: N pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WHITE = 255.0
MIN_DENSITY = 0.15  # pixels with less in any channel are background (Macenko's beta)
MIN_PIXELS = 200
EDGE_PERCENT = 1.0  # robust extremes of the angle (Macenko's alpha)


@dataclass(frozen=True)
class StainVectors:
    """Optical density of one unit of each stain in red, green, blue.

    Attributes:
        hematoxylin: (3,) float64, length 1.
        eosin: (3,) float64, length 1.
        n_pixels: pixels that the estimate rests on.
    """

    hematoxylin: NDArray[np.float64]
    eosin: NDArray[np.float64]
    n_pixels: int


def optical_density(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return -log10(value / 255) of each channel; 0 counts as 1, so the largest value is 2.41.

    Args:
        pixels: uint8, any shape.
    """
    table = -np.log10(np.maximum(np.arange(256), 1) / WHITE)
    return np.asarray(table.astype(np.float32)[pixels])


def stain_vectors(density_N3: NDArray[np.float32]) -> StainVectors | None:
    """Estimate the two stains of a slide.

    Args:
        density_N3: optical densities (red, green, blue) of a sample of pixels; background is left
            out here.

    Returns:
        The vectors, that of hematoxylin absorbing more of the red; None when fewer than 200 pixels
        are stained or all have one colour.
    """
    stained = density_N3[(density_N3 > MIN_DENSITY).all(axis=1)].astype(np.float64)
    if len(stained) < MIN_PIXELS:
        return None
    values, vectors = np.linalg.eigh(np.cov(stained, rowvar=False))
    if values[1] <= 1e-9:
        return None
    plane = vectors[:, [2, 1]]
    plane = plane * np.where(plane.sum(axis=0) < 0, -1.0, 1.0)
    along = stained @ plane
    angle = np.arctan2(along[:, 1], along[:, 0])
    edges = np.percentile(angle, [EDGE_PERCENT, 100 - EDGE_PERCENT])
    pair = np.stack([np.cos(edges), np.sin(edges)], axis=1) @ plane.T
    pair = np.clip(pair, 0.0, None)
    length = np.linalg.norm(pair, axis=1, keepdims=True)
    if (length <= 0).any():
        return None
    pair = pair / length
    first, second = (0, 1) if pair[0, 0] >= pair[1, 0] else (1, 0)
    return StainVectors(pair[first], pair[second], len(stained))


def stain_colour(vector: NDArray[np.float64], amount: float = 0.6) -> tuple[int, int, int]:
    """Return the colour (red, green, blue) of some of one stain on white, for a swatch.

    Args:
        vector: (3,) of length 1.
        amount: optical density along the vector.
    """
    red, green, blue = np.rint(WHITE * 10.0 ** (-amount * vector)).astype(int)
    return int(red), int(green), int(blue)
