"""Stain of H&E: its vectors, and patches brought to a reference by Macenko or Reinhard.

Macenko et al. (ISBI 2009): light that passes stained tissue is weakened by the factor
10^-(amount x vector), so pixels lie in the plane of the two vectors, and the outermost directions
in that plane are the stains. The amounts of both are kept up to one factor each; their vectors and
strengths are replaced.

Reinhard et al. (2001): mean and deviation of three nearly independent channels (l alpha beta:
lightness, yellow-blue, red-green of the logarithm of the cones' answers) are moved to wanted ones.
Needs no stain vectors, so it also works where one stain is nearly missing. Unlike in the paper
glass stays as it is: the change fades out towards white.

Everything is measured on the slide itself; the reference is a constant, so nothing is fitted on
other slides. Shapes: n patches, N pixels; vectors are (2, 3): hematoxylin, eosin in red, green,
blue.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from preprocessing.errors import DataError
from preprocessing.store import SlideStore

WHITE = 255.0
MIN_DENSITY = 0.15  # pixels with less in any channel are background (Macenko's beta)
MIN_PIXELS = 200
EDGE_PERCENT = 1.0  # robust extremes of the angle (Macenko's alpha)
STRENGTH_PERCENT = 99.0
_LEAST_ANGLE = 1e-3  # determinant of the vectors' Gram matrix
_LEAST_SD = 1e-3  # of a channel; below it the pixels have one colour
_PATCHES = 64  # of a slide, spread over it
_PIXELS = 200_000  # of them
_VECTORS = np.array([[0.56, 0.72, 0.41], [0.22, 0.80, 0.56]])  # of the reference
#: Equations 4 and 6 of Reinhard: RGB -> answers of the three cones -> l alpha beta of their log10.
_CONES_OF_RGB = np.array(
    [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]]
)
_LAB_OF_CONES = np.diag(1 / np.sqrt([3.0, 6.0, 2.0])) @ np.array(
    [[1.0, 1.0, 1.0], [1.0, 1.0, -2.0], [1.0, -1.0, 0.0]]
)
StainMethod = Literal["none", "macenko", "reinhard"]
#: uint8 (n, px, px, 3) -> the same patches in the reference's colours.
StainNormaliser = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


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
    """Return -log10(value / 255) of each channel; 0 counts as 1, so the largest value is 2.41."""
    table = -np.log10(np.maximum(np.arange(256), 1) / WHITE)
    return np.asarray(table.astype(np.float32)[pixels])


def scaled_stains(patches: NDArray[np.uint8], factor_n3: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The patches as if more or less of each stain had been taken (HED augmentation).

    Optical density is split into hematoxylin, eosin (of the reference) and what neither explains,
    each amount is multiplied, and the density put together again; glass stays white. Source:
    Tellez et al. (Medical Image Analysis 2019), without their shift, which colours the glass.

    Args:
        patches: uint8 (n, px, px, 3).
        factor_n3: of hematoxylin, eosin and the rest, of each patch.
    """
    pair = _VECTORS / np.linalg.norm(_VECTORS, axis=1, keepdims=True)
    rest = np.cross(pair[0], pair[1])
    basis = np.vstack([pair, rest / np.linalg.norm(rest)])
    mixed_n33 = np.linalg.inv(basis) @ (np.asarray(factor_n3)[:, :, None] * basis)
    n, px = patches.shape[:2]
    density = optical_density(patches).reshape(n, px * px, 3) @ mixed_n33.astype(np.float32)
    light = np.rint(WHITE * 10.0 ** -np.clip(density, 0.0, None))
    return np.asarray(light, dtype=np.uint8).reshape(patches.shape)


def stain_vectors(density_N3: NDArray[np.float32]) -> StainVectors | None:
    """Estimate the two stains of a slide from a sample of its pixels; background is left out here.

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
    """The colour (red, green, blue) of an amount (optical density) of one stain on white."""
    red, green, blue = np.rint(WHITE * 10.0 ** (-amount * vector)).astype(int)
    return int(red), int(green), int(blue)


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
    """Estimate the stain of a slide from a sample of its pixels (..., 3), background or not.

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
    """Give patches (..., 3) of a slide stained like ``source`` the stain ``target``.

    White stays white; what neither stain explains (ink, pigment) is lost.
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
    """Mean and deviation of the stained ones of a sample of a slide's pixels (..., 3).

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
    """Give patches (..., 3) of a slide with the colours ``source`` those of ``target``.

    White stays white: a pixel whose strongest density is below 0.15 is changed in proportion to
    it. Colours beyond 0..255 are cut off.
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


#: Close to the reference of Macenko et al.; strengths are optical densities of base 10.
REFERENCE_STAIN = Stain(
    _VECTORS / np.linalg.norm(_VECTORS, axis=1, keepdims=True), np.array([0.86, 0.45])
)
#: The same stain's colours, each amount u^3 times its strength with u even in 0..1: mostly pale.
REFERENCE_COLOURS = Colours(np.array([-0.66, -0.084, 0.017]), np.array([0.19, 0.031, 0.0103]))


def sample_patches(store: SlideStore) -> NDArray[np.uint8]:
    """Some 64 patches spread over the slide, uint8 (n, px, px, 3): its colours rest on them."""
    chosen = np.linspace(0, store.n_spots - 1, min(store.n_spots, _PATCHES)).astype(int)
    return store.patches(np.unique(chosen))


def stain_normaliser(method: StainMethod, patches: NDArray[np.uint8]) -> StainNormaliser:
    """Measure a slide's stain and return what brings its patches to the reference.

    ``patches`` (n, px, px, 3) are a sample of the slide; what is returned normalises patches of any
    scale, and can be pickled. The method none changes nothing.

    Raises:
        DataError: an unknown method, too few stained pixels, or a single stain.
    """
    if method == "none":
        return np.asarray
    pixels = patches.reshape(-1, 3)
    pixels = pixels[:: len(pixels) // _PIXELS | 1]  # an odd step meets every column
    if method == "macenko":
        change = partial(normalise_stain, source=measure_stain(pixels), target=REFERENCE_STAIN)
    elif method == "reinhard":
        found = measure_colours(pixels)
        change = partial(transfer_colours, source=found, target=REFERENCE_COLOURS)
    else:
        raise DataError(f"stain is {method!r}; choose none, macenko or reinhard")
    return partial(_one_by_one, change)


def _one_by_one(change: StainNormaliser, patches: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A patch fits into the processor's cache, many do not: about ten times as fast."""
    result = np.empty_like(patches)
    for place, patch in enumerate(patches):
        result[place] = change(patch)
    return result
