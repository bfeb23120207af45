"""Quality of image patches: focus, pen marks, glass, and the stain of the slide, in one pass.

Patches are read a block at a time, so memory does not grow with the slide. Nothing is removed.
Shapes: n patches of a block, S spots, px pixels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from preprocessing.errors import DataError
from preprocessing.stain import StainVectors, optical_density, stain_vectors
from preprocessing.store import SlideStore

BLOCK = 32
SAMPLE = 100_000  # pixels that the stain vectors rest on
_CELLS = 8  # pen marks are looked for on a grid of 8 x 8 cells a patch
_STEP = 2  # colours are measured on every second pixel of every second row
_GLASS_SATURATION, _GLASS_VALUE = 0.06, 0.6
_BLACK_VALUE, _BLACK_SPREAD = 0.22, 0.08
_GREEN_SATURATION = 0.25
_BLUE_SATURATION, _BLUE_HUE = 0.4, 1 / 6  # (green - red) / (blue - red): hue below 230 degrees
_EVEN = 0.06  # deviation of the grey value in a cell of blue ink
PENS = ("blue", "green", "black")


@dataclass(frozen=True)
class PatchQuality:
    """What the patches of a slide look like.

    Attributes:
        spots: (S, 6) glass (share of the pixels), pen (share of 8 x 8 cells, any ink), pen_blue,
            pen_green, pen_black, focus (variance of the Laplacian of the grey value 0..255).
        rgb_mean: (3,) mean red, green, blue of the pixels that are not glass, 0..255; NaN of none.
        rgb_sd: (3,) their standard deviations.
        density: mean optical density of these pixels over the three channels.
        stains: estimated vectors, or None.
    """

    spots: pd.DataFrame
    rgb_mean: NDArray[np.float64]
    rgb_sd: NDArray[np.float64]
    density: float
    stains: StainVectors | None


@dataclass
class _Sums:
    """Running sums over the pixels that are not glass."""

    n: int = 0
    first: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    second: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    density: float = 0.0
    sample: list[NDArray[np.uint8]] = field(default_factory=list)


def patch_quality(store: SlideStore) -> PatchQuality:
    """Measure every patch of a store, with a progress bar.

    Raises:
        DataError: the store has no patches, or damaged ones.
    """
    if not store.has_image:
        raise DataError(f"{store.path} has no patches (counts only); nothing to measure")
    return measure_patches(_blocks(store), store.n_patches)


def measure_patches(blocks: Iterable[NDArray[np.uint8]], n_patches: int) -> PatchQuality:
    """Measure patches that come in blocks.

    Args:
        blocks: uint8 (n, px, px, 3) each.
        n_patches: S, all together; decides how many pixels of each go into the stain estimate.
    """
    share = -(-SAMPLE // max(n_patches, 1))
    rng = np.random.default_rng(0)
    sums, frames = _Sums(), []
    for block in blocks:
        colours = block[:, ::_STEP, ::_STEP]
        frame, stained = _colour_columns(colours)
        frame["focus"] = focus(block)
        frames.append(frame)
        _add(sums, colours, stained, share, rng)
    spots = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return _summary(spots, sums)


def focus(patches: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Variance of the Laplacian of the grey value: small where the picture is blurred, or empty.

    Args:
        patches: uint8 (n, px, px, 3), px at least 3.

    Returns:
        (n,) float64, in squared grey values (0..255).
    """
    grey = patches @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    middle = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    laplacian -= 4 * middle
    return np.asarray(laplacian.var(axis=(1, 2), dtype=np.float64))


def _blocks(store: SlideStore) -> Iterator[NDArray[np.uint8]]:
    """Read the patches in order, a block at a time."""
    starts = range(0, store.n_patches, BLOCK)
    for start in tqdm(starts, desc=store.slide_id, unit="block", leave=False, disable=None):
        yield store.patches(np.arange(start, min(start + BLOCK, store.n_patches)))


def _colour_columns(colours: NDArray[np.uint8]) -> tuple[pd.DataFrame, NDArray[np.bool_]]:
    """Shares of glass and pen a patch, and which pixels are not glass (n, h, w)."""
    high, low = colours.max(axis=-1), colours.min(axis=-1)
    saturation = (high - low) / np.maximum(high, 1).astype(np.float32)
    glass = (saturation < _GLASS_SATURATION) & (high > _GLASS_VALUE * 255)
    inks = _inks(*_cells(colours))
    columns = {"glass": glass, "pen": np.logical_or.reduce(list(inks.values()))}
    columns |= {f"pen_{name}": inks[name] for name in PENS}
    return pd.DataFrame({k: v.mean(axis=(1, 2)) for k, v in columns.items()}), ~glass


def _cells(colours: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean colour (n, c, c, 3) and deviation of the grey value (n, c, c) of a grid of cells, 0..1.

    A cell is wider than a nucleus, so that single blue nuclei are no pen marks.
    """
    n, size = len(colours), colours.shape[1]
    cells = min(_CELLS, size)
    step = size // cells
    cut = colours[:, : cells * step, : cells * step].reshape(n, cells, step, cells, step, 3)
    mean = cut.mean(axis=(2, 4), dtype=np.float32) / 255
    deviation = cut.mean(axis=-1, dtype=np.float32).std(axis=(2, 4)) / 255
    return mean, deviation


def _inks(
    cells: NDArray[np.float32], deviation: NDArray[np.float32]
) -> dict[str, NDArray[np.bool_]]:
    """Tell which cells have the colour of an ink, ink -> bool (n, c, c).

    Both stains absorb green most. Where green is the brightest channel, or clearly brighter than
    red beside a strong blue, it is ink. Crowded nuclei can be as blue, but are never as even.
    """
    red, green, blue = cells[..., 0], cells[..., 1], cells[..., 2]
    high = cells.max(axis=-1)
    spread = high - cells.min(axis=-1)
    saturation = spread / np.maximum(high, 1e-6)
    light = high > _BLACK_VALUE
    bluish = (blue >= high) & (green - red > _BLUE_HUE * spread)
    return {
        "blue": bluish & (saturation > _BLUE_SATURATION) & (deviation < _EVEN) & light,
        "green": (green >= high) & (saturation > _GREEN_SATURATION) & light,
        "black": ~light & (spread < _BLACK_SPREAD),
    }


def _add(
    sums: _Sums,
    colours: NDArray[np.uint8],
    stained: NDArray[np.bool_],
    share: int,
    rng: np.random.Generator,
) -> None:
    """Add the pixels of a block that are not glass; at most ``share`` of a patch to the sample."""
    pixels = colours[stained]
    if len(pixels) == 0:
        return
    wide = pixels.astype(np.float64)
    sums.n += len(pixels)
    sums.first += wide.sum(axis=0)
    sums.second += (wide * wide).sum(axis=0)
    sums.density += float(optical_density(pixels).sum(dtype=np.float64)) / 3
    wanted = min(len(pixels), share * len(colours))
    sums.sample.append(pixels[rng.choice(len(pixels), wanted, replace=False)])


def _summary(spots: pd.DataFrame, sums: _Sums) -> PatchQuality:
    if sums.n == 0:
        nothing = np.full(3, np.nan)
        return PatchQuality(spots, nothing, nothing.copy(), float("nan"), None)
    mean = sums.first / sums.n
    deviation = np.sqrt(np.maximum(sums.second / sums.n - mean**2, 0.0))
    stains = stain_vectors(optical_density(np.concatenate(sums.sample)))
    return PatchQuality(spots, mean, deviation, sums.density / sums.n, stains)
