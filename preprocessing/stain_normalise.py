"""Patches as if stained like another slide, after Macenko et al. (ISBI 2009); never in a store.

The amounts of both stains are kept up to one factor each; their vectors and strengths are replaced.
Shapes: n patches, N pixels; vectors are (2, 3): hematoxylin, eosin in red, green, blue.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preprocessing.errors import DataError
from preprocessing.stain import MIN_DENSITY, WHITE, optical_density, stain_vectors

STRENGTH_PERCENT = 99.0
_LEAST_ANGLE = 1e-3  # determinant of the vectors' Gram matrix


@dataclass(frozen=True)
class Stain:
    """How a slide is stained.

    Attributes:
        vectors_23: unit vectors of hematoxylin and eosin, (2, 3) float64.
        strength_2: 99th percentile of the amount of each, (2,) float64, above 0.
    """

    vectors_23: NDArray[np.float64]
    strength_2: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Refuse what cannot be told apart or divided by."""
        if self.vectors_23.shape != (2, 3) or self.strength_2.shape != (2,):
            found = f"{self.vectors_23.shape} and {self.strength_2.shape}"
            raise DataError(f"stain of shapes {found}; expected (2, 3) and (2,)")
        if np.linalg.det(self.vectors_23 @ self.vectors_23.T) < _LEAST_ANGLE:
            raise DataError(
                f"the stain vectors {np.round(self.vectors_23, 3).tolist()} are nearly the same; "
                "the slide is not stained with two stains, leave it as it is"
            )
        if not (self.strength_2 > 0).all():
            raise DataError(f"stain strengths are {self.strength_2.tolist()}; expected above 0")


def measure_stain(pixels: NDArray[np.uint8]) -> Stain:
    """Estimate the stain of a slide from a sample of its pixels.

    Args:
        pixels: uint8 (..., 3); background is left out here.

    Raises:
        DataError: too few stained pixels, or only one stain.
    """
    density = optical_density(pixels.reshape(-1, 3))
    found = stain_vectors(density)
    if found is None:
        raise DataError(
            "too few stained pixels for a stain estimate; give more patches of the slide, or leave "
            "it as it is"
        )
    vectors = np.stack([found.hematoxylin, found.eosin])
    stained = density[(density > MIN_DENSITY).all(axis=1)]
    return Stain(vectors, np.percentile(_amounts(stained, vectors), STRENGTH_PERCENT, axis=0))


def normalise_stain(patches: NDArray[np.uint8], source: Stain, target: Stain) -> NDArray[np.uint8]:
    """Give patches another stain; white stays white.

    Args:
        patches: uint8 (..., 3), of the slide that ``source`` describes; not altered.
        source: of their slide.
        target: wanted.

    Returns:
        uint8 of the same shape. What neither stain explains (ink, pigment) is lost.
    """
    amounts = _amounts(optical_density(patches.reshape(-1, 3)), source.vectors_23)
    back = -np.log(10.0) * (target.strength_2 / source.strength_2)[:, None] * target.vectors_23
    light = WHITE * np.exp(amounts @ back.astype(np.float32))
    colours: NDArray[np.uint8] = np.rint(light).astype(np.uint8)  # amounts are not below 0
    return colours.reshape(patches.shape)


def _amounts(
    density_N3: NDArray[np.float32], vectors_23: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Amount of each stain in each pixel by least squares, not below 0; (N, 2)."""
    unmixed = density_N3 @ np.linalg.pinv(vectors_23).astype(np.float32)
    return np.asarray(np.maximum(unmixed, 0.0))
