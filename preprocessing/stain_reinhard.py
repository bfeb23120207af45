"""Patches with the colours of another slide, after Reinhard et al. (IEEE CG&A 2001).

Mean and deviation of three nearly independent channels (l alpha beta: lightness, yellow-blue,
red-green of the logarithm of the cones' answers) are moved to wanted ones. Needs no stain vectors,
so it also works where one stain is nearly missing. Unlike in the paper glass stays as it is: the
change fades out towards white. Shapes: N pixels, n patches.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preprocessing.errors import DataError
from preprocessing.stain import MIN_DENSITY, MIN_PIXELS, WHITE, optical_density

_LEAST_SD = 1e-3  # of a channel; below it the pixels have one colour
#: Equations 4 and 6 of the paper: RGB -> answers of the three cones -> l alpha beta of their log10.
_CONES_OF_RGB = np.array(
    [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]]
)
_LAB_OF_CONES = np.diag(1 / np.sqrt([3.0, 6.0, 2.0])) @ np.array(
    [[1.0, 1.0, 1.0], [1.0, 1.0, -2.0], [1.0, -1.0, 0.0]]
)


@dataclass(frozen=True)
class Colours:
    """The colours of a slide in l alpha beta.

    Attributes:
        mean_3: (3,) float64 of the stained pixels.
        sd_3: (3,) float64, above 0.
    """

    mean_3: NDArray[np.float64]
    sd_3: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Refuse what cannot be divided by."""
        if self.mean_3.shape != (3,) or self.sd_3.shape != (3,):
            found = f"{self.mean_3.shape} and {self.sd_3.shape}"
            raise DataError(f"colours of shapes {found}; expected (3,) and (3,)")
        if not (self.sd_3 >= _LEAST_SD).all():
            raise DataError(
                f"the stained pixels are of one colour (deviations {np.round(self.sd_3, 5)} in l "
                "alpha beta); leave the slide as it is"
            )


def measure_colours(pixels: NDArray[np.uint8]) -> Colours:
    """Mean and deviation of the stained pixels of a slide.

    Args:
        pixels: uint8 (..., 3); background is left out here.

    Raises:
        DataError: too few stained pixels, or all of one colour.
    """
    flat = pixels.reshape(-1, 3)
    stained = flat[(optical_density(flat) > MIN_DENSITY).all(axis=1)]
    if len(stained) < MIN_PIXELS:
        raise DataError(
            f"only {len(stained)} of {len(flat)} sampled pixels are stained, at least {MIN_PIXELS} "
            "are needed; leave the slide as it is"
        )
    lab = _log_cones(stained).astype(np.float64) @ _LAB_OF_CONES.T
    return Colours(lab.mean(axis=0), lab.std(axis=0))


def transfer_colours(
    patches: NDArray[np.uint8], source: Colours, target: Colours
) -> NDArray[np.uint8]:
    """Give patches other colours, pixel by pixel; white stays white.

    Args:
        patches: uint8 (..., 3), of the slide that ``source`` describes; not altered.
        source: of their slide.
        target: wanted.

    Returns:
        uint8 of the same shape; colours beyond 0..255 are cut off. A pixel whose strongest density
        is below 0.15 is changed in proportion to it.
    """
    flat = patches.reshape(-1, 3)
    scale = target.sd_3 / source.sd_3
    turn = np.linalg.inv(_LAB_OF_CONES) @ np.diag(scale) @ _LAB_OF_CONES
    shift = np.linalg.inv(_LAB_OF_CONES) @ (target.mean_3 - scale * source.mean_3)
    moved = _log_cones(flat) @ turn.T.astype(np.float32)
    cones = np.exp(np.log(10.0).astype(np.float32) * (moved + shift.astype(np.float32)))
    rgb = cones @ np.linalg.inv(_CONES_OF_RGB).T.astype(np.float32)
    weight = np.minimum(optical_density(flat.min(axis=1)) / np.float32(MIN_DENSITY), 1)[:, None]
    mixed = weight * np.clip(WHITE * rgb, 0, WHITE) + (1 - weight) * flat
    colours: NDArray[np.uint8] = np.rint(mixed).astype(np.uint8)
    return colours.reshape(patches.shape)


def _log_cones(pixels_N3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logarithm (base 10) of the cones' answers, (N, 3); a value of 0 counts as 1."""
    light = np.maximum(pixels_N3, 1).astype(np.float32) / np.float32(WHITE)
    return np.asarray(np.log10(light @ _CONES_OF_RGB.T.astype(np.float32)))
