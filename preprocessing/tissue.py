"""A slide as a whole: its thumbnail, painted-over background, and where the tissue lies.

The tissue mask serves the quality control of docs/method.md 0's spots; it is no segmentation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

from preprocessing.errors import DataError
from preprocessing.patches import level_for
from preprocessing.slides import BLACK, Pixels, Slide

BAND_PIXELS = 4_000_000  # level pixels reduced at once while a thumbnail is made
TILE_ROW_PIXELS = 64_000_000  # of a row of tiles that is held meanwhile
DARK = 30  # resampled edges of a painted-over background are not quite black
SATURATION_RANGE = (0.03, 0.25)  # Otsu's threshold is kept in here: see `tissue_mask`
DARKNESS_RANGE = (0.05, 0.50)


@dataclass(frozen=True)
class TissueMask:
    """Where the tissue lies.

    Attributes:
        mask: bool (h, w), True on tissue.
        downsample: level-0 pixels per mask pixel.
        cue: "saturation", or "darkness" for a grey picture.
        threshold: of the cue (0..1), as used.
    """

    mask: NDArray[np.bool_]
    downsample: float
    cue: str = "saturation"
    threshold: float = math.nan


def thumbnail(slide: Slide, max_px: int = 1024) -> tuple[Pixels, float]:
    """Make a small picture of the whole slide.

    Args:
        slide: an open slide; its coarsest sufficient level is read, band by band.
        max_px: longest edge of the picture, pixels; a smaller slide is not enlarged.

    Returns:
        uint8 (h, w, 3), and the level-0 pixels per thumbnail pixel (at least 1).

    Raises:
        DataError: max_px is not positive, or a damaged file.
    """
    if max_px < 1:
        raise DataError(f"{slide.path}: max_px is {max_px}; expected at least 1 pixel, e.g. 1024")
    width, height = slide.level_dimensions[0]
    downsample = max(1.0, max(width, height) / max_px)
    out_w, out_h = (max(1, round(value / downsample)) for value in (width, height))
    level = level_for(slide, downsample)
    level_w, level_h = slide.level_dimensions[level]
    step = level_h / out_h
    bands, top = [], 0
    held, first = np.empty((0, level_w, 3), dtype=np.uint8), 0  # rows of the level from `first` on
    for rows in _rows(slide, level):
        held = np.concatenate([held, rows])
        end = first + len(held)
        bottom = out_h if end == level_h else math.floor(end / step)
        if bottom > top:
            box = (0.0, top * step - first, float(level_w), min(bottom * step, end) - first)
            size = (out_w, bottom - top)
            small = Image.fromarray(held).resize(size, Image.Resampling.BOX, box)
            bands.append(np.asarray(small))
            kept = math.floor(bottom * step) - first
            held, first, top = held[kept:], first + kept, bottom
    return np.concatenate(bands), downsample


def _rows(slide: Slide, level: int) -> Iterator[Pixels]:
    """All rows of a level, a band at a time, each good until the next; every tile is read once.

    (Of rows of tiles over `TILE_ROW_PIXELS`, a part at a time.)
    """
    width, height = slide.level_dimensions[level]
    tile_h, tile_w = slide.tile(level)
    band = max(1, BAND_PIXELS // width)
    high = band // tile_h * tile_h or min(tile_h, max(band, TILE_ROW_PIXELS // width))
    wide = width if high <= band else max(1, BAND_PIXELS // high // tile_w) * tile_w
    down = slide.level_downsamples[level]
    space = np.empty((min(high, height), width, 3), dtype=np.uint8)
    for top in range(0, height, high):
        region = space[: height - top]
        for left in range(0, width, wide):
            part = region[:, left : left + wide]
            corner = (round(left * down), round(top * down))
            part[:] = slide.read_region(corner, level, (part.shape[1], len(part)))
        for start in range(0, len(region), band):
            yield region[start : start + band]


def has_black_background(slide: Slide, share: float = 0.05) -> bool:
    """Tell whether the background was painted black: more than `share` of a thumbnail is.

    The slide was opened without `black_is_background`.
    """
    small, _ = thumbnail(slide, 512)
    return bool((small <= BLACK).all(axis=2).mean() > share)


def tissue_mask(slide: Slide, max_px: int = 2048) -> TissueMask:
    """Find the tissue by Otsu's threshold on the saturation of a thumbnail.

    Stained tissue is coloured, glass is not. The threshold is Otsu's of the square root, which
    gives pale tissue (fat, white matter) its due beside strongly stained tissue. Otsu always splits
    a picture in two, also one that is all tissue or all glass; so the threshold is kept inside
    `SATURATION_RANGE`. Of a grey picture the darkness is used instead. Black, painted-over
    background counts as glass. Specks below 0.02 % of the picture are dropped, and holes of that
    size are filled. Very pale tissue (fat) is still missed in part, so use it with a low bar. The
    longest edge of the mask is `max_px` pixels.
    """
    small, downsample = thumbnail(slide, max_px)
    mask, cue, threshold = tissue_pixels(small)
    return TissueMask(mask, downsample, cue, threshold)


def tissue_pixels(small: Pixels) -> tuple[NDArray[np.bool_], str, float]:
    """The tissue of a small picture (h, w, 3), (h, w), with cue and threshold: `tissue_mask`."""
    red, green, blue = np.moveaxis(small, 2, 0)  # as planes: numpy reduces three values slowly
    brightest = np.maximum(red, np.maximum(green, blue))
    darkest = np.minimum(red, np.minimum(green, blue))
    usable = brightest > DARK
    spread = (brightest - darkest).astype(np.float32)
    if usable.any() and np.percentile(spread[usable], 99) <= 3:
        cue, limits, value = "darkness", DARKNESS_RANGE, 1.0 - brightest / np.float32(255.0)
    else:
        cue, limits = "saturation", SATURATION_RANGE
        value = spread / np.maximum(brightest, 1)
    value = ndimage.uniform_filter(np.where(usable, value, 0.0), size=3, mode="nearest")
    root = np.sqrt(np.maximum(value, 0.0))
    otsu = limits[1]
    if np.ptp(root) > 0:
        otsu = float(threshold_otsu(root)) ** 2  # type: ignore[no-untyped-call]
    threshold = min(max(otsu, limits[0]), limits[1])
    mask = (value > threshold) & usable
    least = max(4, round(2e-4 * mask.size))
    mask = ~_without_specks(~_without_specks(mask, least), least) & usable
    return mask, cue, threshold


def _without_specks(mask: NDArray[np.bool_], least: int) -> NDArray[np.bool_]:
    """Drop the connected parts of fewer than `least` pixels."""
    parts, _ = ndimage.label(mask)
    keep = np.bincount(parts.ravel()) >= least
    keep[0] = False
    kept: NDArray[np.bool_] = keep[parts]
    return kept


def tissue_fraction(
    mask: TissueMask, xy_px0: NDArray[np.float64], um: float, mpp: float
) -> NDArray[np.float32]:
    """Part of the square around each spot that is tissue.

    The area is exact, also for windows smaller than a mask pixel: the summed-area table, linear
    between its nodes, is the integral of the mask.

    Args:
        mask: of the same picture.
        xy_px0: (S, 2) spot centres (x, y), level-0 pixels.
        um: edge of the square, micrometres, e.g. the spot diameter or the patch.
        mpp: micrometres per level-0 pixel.

    Returns:
        float32 (S,), 0 (glass) to 1; what lies outside the picture counts as glass.

    Raises:
        DataError: um or mpp is not positive.
    """
    if not (um > 0 and mpp > 0):
        raise DataError(f"um is {um} and mpp is {mpp}; expected numbers above 0")
    table = np.pad(mask.mask.cumsum(axis=0, dtype=np.float64).cumsum(axis=1), ((1, 0), (1, 0)))
    half = um / mpp / mask.downsample / 2
    x, y = (np.asarray(xy_px0, dtype=np.float64) / mask.downsample).reshape(-1, 2).T

    def below(at_y: NDArray[np.float64], at_x: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = ndimage.map_coordinates(
            table, np.stack([at_y, at_x]), order=1, mode="nearest"
        )
        return found

    area = below(y + half, x + half) - below(y - half, x + half)
    area += below(y - half, x - half) - below(y + half, x - half)
    return np.clip(area / (2 * half) ** 2, 0.0, 1.0).astype(np.float32)
