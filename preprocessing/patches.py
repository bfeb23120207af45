"""Square patches of tissue around spot centres, at one physical size (docs/method.md 0, I_i).

A patch covers `um` micrometres and has `px` pixels, whatever the scan's resolution was. Its centre
lies on the spot centre to within half a patch pixel, and to within half a level-0 pixel when level
0 is read.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from preprocessing.errors import DataError
from preprocessing.image_transform import image_matrix, moved
from preprocessing.slides import Pixels, Slide

CELL_PATCH_UM = 112.0  # where spots are no array, or finer than one: 224 px of 0.5 um (20x)
ARRAY_UM = (50.0, 500.0)  # pitches of arrays of spots; below them lie bins and cells
SQUARE_PX = 2048  # level pixels: spots of a square of this edge are read together
BLOCK_PIXELS = 32_000_000  # level pixels that are read at once
WIDEST_UM = 10_000  # as wide as a section: a wider patch means other units
MAX_WINDOW_PX = 8192  # a wider window means a wrong mpp, and would fill the memory
#: What may have been done to places that lie outside: axes swapped, or pointing the other way.
_TURNED = ("transpose", "affine:1 0 0 0 -1 0", "affine:-1 0 0 0 1 0")


@dataclass(frozen=True)
class PatchConfig:
    """Size of the patches.

    Attributes:
        patch_um: edge in micrometres; None: as wide as the pitch of the slide's array (see
            `on_array`), so that each spot is seen with what lies between it and the next ones.
        patch_px: edge in pixels.
        context_um: edge of a second, wider patch of the same spot with as many pixels, e.g. 448;
            None: no such patches.
    """

    patch_um: float | None = None
    patch_px: int = 224
    context_um: float | None = None

    def __post_init__(self) -> None:
        um = self.patch_um
        if um is not None and not 0 < um <= WIDEST_UM:
            raise DataError(
                f"patch_um is {um}; expected micrometres above 0, at most {WIDEST_UM:,}, e.g. 112"
            )
        if not 1 <= self.patch_px <= MAX_WINDOW_PX:
            raise DataError(
                f"patch_px is {self.patch_px}; expected 1 to {MAX_WINDOW_PX:,} pixels, e.g. 224"
            )
        wide = self.context_um
        if wide is not None and not (um or 0.0) < wide <= WIDEST_UM:
            patch = "" if um is None else f", patch_um {um:g}"
            raise DataError(
                f"context_um is {wide}{patch}; the context must be wider than the patch (e.g. "
                f"four times) and at most {WIDEST_UM:,} micrometres, or leave it out"
            )

    @property
    def um(self) -> float:
        """Edge in micrometres, once it is known.

        Raises:
            DataError: it follows an array, and no array was given.
        """
        if self.patch_um is None:
            raise DataError("patch_um follows the array; call PatchConfig.on_array first")
        return self.patch_um

    def on_array(self, pitch_um: float | None) -> "PatchConfig":
        """The same with a width: the given one, else the pitch, else `CELL_PATCH_UM`.

        Args:
            pitch_um: centre-to-centre distance of the array (200 on first-generation arrays, 100
                on Visium), or None; outside `ARRAY_UM` it is that of bins or cells.

        Raises:
            DataError: the context is not wider than the pitch.
        """
        if self.patch_um is not None:
            return self
        array = pitch_um is not None and ARRAY_UM[0] <= pitch_um <= ARRAY_UM[1]
        return replace(self, patch_um=pitch_um if array else CELL_PATCH_UM)


def measured_pitch_um(xy_um: NDArray[np.float64]) -> float | None:
    """Centre-to-centre distance of a regular array, to 10 um; None where the spots are none.

    The median distance of a spot's four nearest neighbours, and of these the median over the
    spots: spots that were printed or found off their place, or are missing, move it little; the
    nearest neighbour alone would be biased by them. An array is told by the lower quartile over
    the spots, which lies above .9 of that median; of scattered cells it lies below.

    Args:
        xy_um: (S, 2) spot centres, micrometres.
    """
    if len(xy_um) < 9:
        return None
    distance, _ = cKDTree(xy_um).query(xy_um, k=5)
    low, median = np.quantile(np.median(distance[:, 1:], axis=1), [0.25, 0.5])
    if low < 0.9 * median:
        return None
    return round(float(median) / 10.0) * 10.0 or None


@dataclass(frozen=True)
class PatchWindow:
    """Where a patch lies in a slide.

    Attributes:
        level: the level to read.
        corner_px0: left upper corner of the rectangle to read, level-0 pixels.
        size: edge of the rectangle to read, level pixels.
        box: (left, top, right, bottom) of the patch inside the rectangle, level pixels; None when
            the rectangle is the patch, pixel for pixel.
    """

    level: int
    corner_px0: tuple[int, int]
    size: int
    box: tuple[float, float, float, float] | None


def level_for(slide: Slide, downsample: float) -> int:
    """Index of the coarsest level that is not coarser than `downsample` (1 % tolerance)."""
    fine = [i for i, down in enumerate(slide.level_downsamples) if down <= downsample * 1.01]
    return max(fine, key=lambda i: slide.level_downsamples[i], default=0)


def patch_window(
    slide: Slide, centre_px0: tuple[float, float], mpp: float, um: float, px: int
) -> PatchWindow:
    """Compute what to read for one patch; see `read_patch` for the arguments.

    A level whose pixels already have the wanted size (to within half a pixel over the patch) is
    cut on whole pixels, so that the patch stays as sharp as the scan; otherwise the window keeps
    its fractions and is resampled.
    """
    _check_scale(slide, mpp, um, px)
    level = level_for(slide, um / px / mpp)
    down = slide.level_downsamples[level]
    side = um / mpp / down
    if side > MAX_WINDOW_PX:
        raise DataError(
            f"{slide.path}: {um:g} um at {mpp:g} um per pixel are {side:.0f} pixels across; "
            f"at most {MAX_WINDOW_PX} are read; check mpp (usually 0.2 to 20) and patch_um"
        )
    centre = (centre_px0[0] / down, centre_px0[1] / down)
    if abs(side - px) <= 0.5:
        whole = [round(value - px / 2) for value in centre]
        return PatchWindow(level, (round(whole[0] * down), round(whole[1] * down)), px, None)
    margin = math.ceil(max(1.0, side / px)) + 1  # for the filter
    first = [math.floor(value - side / 2) - margin for value in centre]
    corner = (round(first[0] * down), round(first[1] * down))
    left, top = (value - side / 2 - at / down for value, at in zip(centre, corner, strict=True))
    size = math.ceil(side) + 2 * margin + 1
    return PatchWindow(level, corner, size, (left, top, left + side, top + side))


def read_patch(
    slide: Slide, centre_px0: tuple[float, float], mpp: float, um: float, px: int
) -> Pixels:
    """Read the square patch around one point.

    Args:
        slide: an open slide.
        centre_px0: (x, y) of the centre, level-0 pixels; fractions count.
        mpp: micrometres per level-0 pixel, e.g. 0.25 to 1.
        um: edge of the patch, micrometres, e.g. 112.
        px: edge of the patch, pixels, e.g. 224.

    Returns:
        uint8 (px, px, 3); what lies outside the picture is white.

    Raises:
        DataError: mpp, um or px is not positive, the window is absurdly large, or a damaged file.
    """
    return _read_window(slide, patch_window(slide, centre_px0, mpp, um, px), px)


def _read_window(slide: Slide, window: PatchWindow, px: int) -> Pixels:
    region = slide.read_region(window.corner_px0, window.level, (window.size, window.size))
    return region if window.box is None else _resized(region, window.box, px)


def _resized(region: Pixels, box: tuple[float, ...], px: int) -> Pixels:
    left, top, right, bottom = box
    patch = Image.fromarray(region).resize(
        (px, px), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
    return np.asarray(patch).copy()


def iter_patches(
    slide: Slide,
    xy_px0: NDArray[np.float64],
    mpp: float,
    um: float,
    px: int,
    barcodes: Sequence[str] | None = None,
) -> Iterator[tuple[int, Pixels]]:
    """Read the patches of many spots in an order that suits the file: square by square.

    Patches that overlap are cut from one larger region, so that no pixel is decoded for each of
    them again; the pixels are those of `read_patch`, to within the half level-0 pixel by which a
    level that is not a whole number of times smaller is rounded.

    Args:
        slide: an open slide.
        xy_px0: (S, 2) spot centres (x, y), level-0 pixels.
        mpp: micrometres per level-0 pixel.
        um: edge of a patch, micrometres.
        px: edge of a patch, pixels.
        barcodes: (S,) names for the error message; the row numbers when None.

    Returns:
        Iterator over (index into xy_px0, uint8 (px, px, 3)); every spot comes once. The spots are
        checked at the call, before the first patch is read.

    Raises:
        DataError: centres outside the picture; see also `read_patch`.
    """
    xy = np.asarray(xy_px0, dtype=np.float64)
    _check_scale(slide, mpp, um, px)
    _check_inside(slide, xy, barcodes)
    return _read_squares(slide, xy, mpp, um, px)


def _read_squares(
    slide: Slide, xy: NDArray[np.float64], mpp: float, um: float, px: int
) -> Iterator[tuple[int, Pixels]]:
    down = slide.level_downsamples[level_for(slide, um / px / mpp)]
    square = np.floor(xy / max(um / mpp, SQUARE_PX * down)) @ np.array([1.0, 2.0**24])
    _, first, which = np.unique(square, return_index=True, return_inverse=True)
    rank = first[which]  # squares by their first spot, and the spots of a square in their order
    order = np.argsort(rank, kind="stable")
    cuts = np.flatnonzero(np.diff(rank[order])) + 1
    for members in np.split(order, cuts) if len(order) else ():
        windows = [patch_window(slide, (xy[i, 0], xy[i, 1]), mpp, um, px) for i in members]
        block = _block(slide, windows)
        for i, window in zip(members, windows, strict=True):
            yield int(i), (_read_window(slide, window, px) if block is None else block(window, px))


def _block(slide: Slide, windows: list[PatchWindow]) -> Callable[[PatchWindow, int], Pixels] | None:
    """Read the rectangle around some windows -> what cuts them out; None if it is not worth it."""
    level, size = windows[0].level, windows[0].size
    down = slide.level_downsamples[level]
    places = np.array([[round(value / down) for value in w.corner_px0] for w in windows])
    first = places.min(axis=0)
    width, height = (int(value) for value in places.max(axis=0) - first + size)
    if width * height > min(len(windows) * size**2, BLOCK_PIXELS) or len(windows) == 1:
        return None
    if slide.by_window and windows[0].box is None:
        return None
    corner = (round(first[0] * down), round(first[1] * down))
    region = slide.read_region(corner, level, (width, height))

    def cut(window: PatchWindow, px: int) -> Pixels:
        x, y = (
            round(value / down) - int(at)
            for value, at in zip(window.corner_px0, first, strict=True)
        )
        part = np.ascontiguousarray(region[y : y + size, x : x + size])
        if window.box is None:
            return part
        off = [
            at / down - (begin / down + within)
            for at, begin, within in zip(window.corner_px0, corner, (x, y), strict=True)
        ]
        box = tuple(edge + move for edge, move in zip(window.box, (*off, *off), strict=True))
        return _resized(part, box, px)

    return cut


def _check_scale(slide: Slide, mpp: float, um: float, px: int) -> None:
    for name, value in (("mpp", mpp), ("patch_um", um), ("patch_px", px)):
        if not (math.isfinite(value) and value > 0):
            raise DataError(f"{slide.path}: {name} is {value}; expected a number above 0")


def _outside(xy: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Which of the places (S, 2) lie outside a picture of (width, height)."""
    return np.asarray(~((xy >= 0) & (xy <= size)).all(axis=1))


def _check_inside(slide: Slide, xy: NDArray[np.float64], barcodes: Sequence[str] | None) -> None:
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise DataError(f"{slide.path}: spot centres of shape {xy.shape}; expected (S, 2), x and y")
    width, height = slide.level_dimensions[0]
    size = (width, height)
    outside = np.flatnonzero(_outside(xy, size))
    if outside.size:
        names = [f"spot {i}" if barcodes is None else str(barcodes[i]) for i in outside[:3]]
        x, y = xy[outside[0]]
        turned = [t for t in _TURNED if not _outside(moved(xy, image_matrix(t, size)), size).any()]
        fix = (
            f"with {turned[0]!r} in the manifest column image_transform all lie inside"
            if turned
            else "set image_scale in the manifest (picture pixels per coordinate pixel)"
        )
        raise DataError(
            f"{slide.path}: {outside.size} of {len(xy)} spot centres lie outside the picture of "
            f"{width} x {height} pixels: {', '.join(names)}{', ...' * (outside.size > 3)}; the "
            f"first is at x {x:.1f}, y {y:.1f}. The coordinates belong to another picture, or "
            f"x and y are swapped or lead elsewhere: {fix}"
        )
