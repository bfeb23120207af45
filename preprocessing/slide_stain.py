"""One slide's stain -> what brings its patches to the reference, whatever the method.

Everything is measured on the slide itself; the reference is a constant, so nothing is fitted on
other slides. Shapes: n patches.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from preprocessing.errors import DataError
from preprocessing.stain_normalise import Stain, measure_stain, normalise_stain
from preprocessing.stain_reinhard import Colours, measure_colours, transfer_colours
from preprocessing.store import SlideStore

StainMethod = Literal["none", "macenko", "reinhard"]
#: uint8 (n, px, px, 3) -> the same patches in the reference's colours.
StainNormaliser = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]

_VECTORS = np.array([[0.56, 0.72, 0.41], [0.22, 0.80, 0.56]])  # hematoxylin, eosin
#: Close to the reference of Macenko et al.; strengths are optical densities of base 10.
REFERENCE_STAIN = Stain(
    _VECTORS / np.linalg.norm(_VECTORS, axis=1, keepdims=True), np.array([0.86, 0.45])
)
#: The same stain's colours, each amount u^3 times its strength with u even in 0..1: mostly pale.
REFERENCE_COLOURS = Colours(np.array([-0.66, -0.084, 0.017]), np.array([0.19, 0.031, 0.0103]))

_PATCHES = 64  # of a slide, spread over it
_PIXELS = 200_000  # of them


def sample_patches(store: SlideStore) -> NDArray[np.uint8]:
    """Some 64 patches spread over the slide, uint8 (n, px, px, 3): its colours rest on them."""
    chosen = np.linspace(0, store.n_spots - 1, min(store.n_spots, _PATCHES)).astype(int)
    return store.patches(np.unique(chosen))


def stain_normaliser(method: StainMethod, patches: NDArray[np.uint8]) -> StainNormaliser:
    """Measure a slide's stain and return what brings its patches to the reference.

    Args:
        method: macenko | reinhard, or none, which changes nothing.
        patches: uint8 (n, px, px, 3), a sample of the slide.

    Returns:
        What normalises patches (n, px, px, 3) of this slide, of any scale; it can be pickled.

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
