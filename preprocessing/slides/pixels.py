"""An open slide: what every reader gives, and what the readers share (docs/method.md 0).

Coordinates are (x, y) in level-0 pixels of the file, x to the right and y down; pixel i covers
[i, i + 1). Whatever lies outside the picture, or is transparent, is white.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from preprocessing.errors import DataError
from preprocessing.scale import Statement, stated

Pixels = NDArray[np.uint8]
MAX_DECODED_PIXELS = 2_000_000_000  # a picture that must be decoded as a whole: 6 GB of RGB
BLACK = 8  # a pixel with all channels at most this is painted-over background
REMEDY = "convert it to an 8-bit pyramidal TIFF: `vips tiffsave IN OUT.tif --tile --pyramid`"


class Slide(Protocol):
    """An open slide: its levels, its scale and its pixels. Also a context manager."""

    path: Path
    level_dimensions: tuple[tuple[int, int], ...]  # (width, height), finest first
    level_downsamples: tuple[float, ...]
    mpp: float | None  # micrometres per level-0 pixel; None when the file does not say
    scale: tuple[Statement, ...] = ()  # all that the file says of mpp, the one taken first
    notes: tuple[str, ...] = ()  # what was read otherwise than an ordinary picture
    by_window: bool = False  # a patch is stored as such: read alone, it comes back bit for bit

    def read_region(self, xy_px0: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """Read a rectangle of a level.

        Args:
            xy_px0: the left upper corner in level-0 pixels; may lie outside the picture.
            level: 0 is the finest.
            size: (width, height) in pixels of that level.

        Returns: uint8 (height, width, 3), a new array. A damaged file is a DataError.
        """

    def tile(self, level: int) -> tuple[int, int]:
        """(rows, columns) of the tiles that a level is stored in; (1, 1) where it has none."""
        return 1, 1

    def close(self) -> None:
        """Release the file; the slide cannot be read any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class PlainSlide(Slide):
    """A picture that is painted level by level; its own levels, or those of its decoder."""

    def __init__(self, path: Path, black_is_background: bool = False) -> None:
        self.path, self.black_is_background = path, black_is_background
        self.mpp: float | None = None
        self.scale: tuple[Statement, ...] = ()
        self.level_downsamples: tuple[float, ...] = (1.0,)
        self.level_dimensions: tuple[tuple[int, int], ...] = ()
        with damage_named(path):
            width, height = self._open()
        self.level_dimensions = self.level_dimensions or tuple(
            (math.ceil(width / down), math.ceil(height / down)) for down in self.level_downsamples
        )

    @abstractmethod
    def _open(self) -> tuple[int, int]:
        """Read the header -> (width, height); may set the levels and mpp."""

    @abstractmethod
    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        """Fill `target` (h, w, 3), which lies inside the level, from its pixel (x, y) on."""

    def read_region(self, xy_px0: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """See `Slide.read_region`."""
        region = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
        down = self.level_downsamples[level]  # half a pixel forgives a corner that was rounded
        left, top = (math.floor((value + 0.5) / down) for value in xy_px0)
        limit_x, limit_y = self.level_dimensions[level]
        x0, x1 = max(left, 0), min(left + size[0], limit_x)
        y0, y1 = max(top, 0), min(top + size[1], limit_y)
        if x0 < x1 and y0 < y1:
            with damage_named(self.path):
                self._paint(region[y0 - top : y1 - top, x0 - left : x1 - left], level, x0, y0)
        return unpainted(region) if self.black_is_background else region


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into a DataError that names the file."""
    try:
        yield
    except Exception as error:
        own = isinstance(error, DataError | MemoryError)
        if own or getattr(error, "errno", None) is not None:
            raise  # not about the content, but the memory, the disk or the permissions
        if "imagecodecs" in str(error):
            raise DataError(
                f"{path}: packed in a way that needs imagecodecs (JPEG, JPEG 2000, LZW, ... of "
                f"TIFF, 16 bits of PNG): pip install imagecodecs ({error})"
            ) from error
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); the file is damaged or cut "
            "off: copy or export it again"
        ) from error


def mean_mpp(path: Path, found: Sequence[Any]) -> float | None:
    """Mean of the two um per pixel; None when missing or, like a print dpi, no microscope's."""
    values = [float(value) for value in found if value is not None]
    if len(values) < 2 or not all(0.02 <= value <= 20.0 for value in values):
        return None
    if abs(values[0] - values[1]) > 0.02 * min(values):
        raise DataError(
            f"{path}: {values[0]:g} and {values[1]:g} um per pixel along x and y; resample to equal"
        )
    return (values[0] + values[1]) / 2


def image_scale(
    path: Path, said: Mapping[str, Sequence[Any]]
) -> tuple[float | None, tuple[Statement, ...]]:
    """Um per pixel that a file states, and all statements of it.

    Args:
        path: the file.
        said: where it is said -> um per pixel along x and y as `mean_mpp` takes them, best first.

    Raises:
        DataError: x and y differ.
    """
    found = [
        one
        for source, pair in said.items()
        for one in stated(mean_mpp(path, pair), f"{source} of the image file", of_image=True)
    ]
    return found[0].mpp if found else None, tuple(found)


def check_size(path: Path, size: tuple[int, int]) -> None:
    """Refuse a part of a picture that cannot be decoded in memory; ``size`` is (width, height)."""
    if size[0] * size[1] > MAX_DECODED_PIXELS:
        raise DataError(
            f"{path}: {size[0]} x {size[1]} pixels in one part, over {MAX_DECODED_PIXELS}; {REMEDY}"
        )


def to_rgb(pixels: Pixels) -> Pixels:
    """Grey, grey + alpha, RGB or RGBA (h, w, 1..4) -> RGB, transparent parts white."""
    if pixels.shape[2] in (1, 3):
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    colour, alpha = pixels[..., :-1], pixels[..., -1:]
    if alpha.min() < 255:
        colour = np.rint(255 - (255 - colour) * (alpha / np.float32(255))).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colour, (*pixels.shape[:2], 3)))


def paste(target: Pixels, part: Pixels, x: int, y: int) -> None:
    """Put what of a part (h, w, 3) lies inside into a picture; (x, y) is its left upper corner."""
    rows, columns = part.shape[:2]
    y0, y1 = max(y, 0), min(y + rows, target.shape[0])
    x0, x1 = max(x, 0), min(x + columns, target.shape[1])
    if x0 < x1 and y0 < y1:
        target[y0:y1, x0:x1] = part[y0 - y : y1 - y, x0 - x : x1 - x]


def unpainted(region: Pixels) -> Pixels:
    """White instead of the black that was painted over the background."""
    return np.where((region > BLACK).any(axis=2, keepdims=True), region, np.uint8(255))
