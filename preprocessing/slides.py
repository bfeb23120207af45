"""Regions of whole-slide images and of plain pictures, read on demand (METHOD section 0).

Coordinates are (x, y) in level-0 pixels of the file, x to the right and y down; pixel i covers
[i, i + 1). Whatever lies outside the picture, or is transparent, is white.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from preprocessing.errors import DataError

Pixels = NDArray[np.uint8]
MAX_DECODED_PIXELS = 2_000_000_000  # a picture that must be decoded as a whole: 6 GB of RGB
CACHE_BYTES = 256 * 2**20  # decoded tiles or strips of a plain TIFF
BLACK = 8  # a pixel with all channels at most this is painted-over background
JPEG = b"\xff\xd8\xff"
REMEDY = "convert it to an 8-bit pyramidal TIFF: `vips tiffsave IN OUT.tif --tile --pyramid`"


class Slide(Protocol):
    """An open slide: its levels, its scale and its pixels. Also a context manager."""

    path: Path
    level_dimensions: tuple[tuple[int, int], ...]  # (width, height), finest first
    level_downsamples: tuple[float, ...]
    mpp: float | None  # micrometres per level-0 pixel; None when the file does not say

    def read_region(self, xy_px0: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """Read a rectangle of a level.

        Args:
            xy_px0: the left upper corner in level-0 pixels; may lie outside the picture.
            level: 0 is the finest.
            size: (width, height) in pixels of that level.

        Returns: uint8 (height, width, 3), a new array. A damaged file is a DataError.
        """

    def close(self) -> None:
        """Release the file; the slide cannot be read any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_slide(path: Path | str, black_is_background: bool = False) -> Slide:
    """Open a slide with OpenSlide when it knows the format, else as a plain JPEG, PNG or TIFF.

    Args:
        path: the image file.
        black_is_background: show black pixels as white; see `tissue.has_black_background`.

    Raises:
        DataError: no such file, not an image, damaged, not 8-bit, or too large to decode.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such image file; check the path and --root")
    if openslide.OpenSlide.detect_format(path) is not None:
        return OpenSlideSlide(path, black_is_background)
    with path.open("rb") as file:
        magic = file.read(8)
    if magic[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return PlainTiff(path, black_is_background)
    if magic[:3] == JPEG or magic == b"\x89PNG\r\n\x1a\n":
        return PlainPicture(path, black_is_background)
    raise DataError(
        f"{path}: no known image (starts with {magic!r}); expected a slide, TIFF, JPEG or PNG"
    )


class OpenSlideSlide(Slide):
    """A slide in one of the formats that OpenSlide reads (SVS, NDPI, MRXS, tiled TIFF, ...)."""

    def __init__(self, path: Path, black_is_background: bool = False) -> None:
        self.path, self.black_is_background = path, black_is_background
        with _damage_named(path):
            self._slide = openslide.OpenSlide(path)
        self.level_dimensions = tuple(self._slide.level_dimensions)
        self.level_downsamples = tuple(self._slide.level_downsamples)
        known = self._slide.properties
        found: Sequence[Any] = [known.get(f"openslide.mpp-{axis}") for axis in "xy"]
        if known.get("openslide.vendor") == "generic-tiff":
            found = _eight_bit_page(path)[1]
        self.mpp = _mean_mpp(path, found)

    def read_region(self, xy_px0: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """See `Slide.read_region`."""
        with _damage_named(self.path):
            region = _rgb(np.asarray(self._slide.read_region(xy_px0, level, size)))
        return _unpainted(region) if self.black_is_background else region

    def close(self) -> None:
        """Release the file."""
        self._slide.close()


class PlainSlide(Slide):
    """A picture without a stored pyramid."""

    def __init__(self, path: Path, black_is_background: bool = False) -> None:
        self.path, self.black_is_background = path, black_is_background
        self.mpp: float | None = None
        self.level_downsamples: tuple[float, ...] = (1.0,)
        with _damage_named(path):
            width, height = self._open()
        self.level_dimensions = tuple(
            (math.ceil(width / down), math.ceil(height / down)) for down in self.level_downsamples
        )

    @abstractmethod
    def _open(self) -> tuple[int, int]:
        """Read the header -> (width, height)."""

    @abstractmethod
    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        """Fill `target` (h, w, 3), which lies inside the level, from its pixel (x, y) on."""

    def read_region(self, xy_px0: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """See `Slide.read_region`."""
        region = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
        left, top = (math.floor(value / self.level_downsamples[level]) for value in xy_px0)
        limit_x, limit_y = self.level_dimensions[level]
        x0, x1 = max(left, 0), min(left + size[0], limit_x)
        y0, y1 = max(top, 0), min(top + size[1], limit_y)
        if x0 < x1 and y0 < y1:
            with _damage_named(self.path):
                self._paint(region[y0 - top : y1 - top, x0 - left : x1 - left], level, x0, y0)
        return _unpainted(region) if self.black_is_background else region


class PlainPicture(PlainSlide):
    """A JPEG or PNG; a level is decoded as a whole when it is first read.

    A JPEG has levels 2, 4 and 8 for free, since its decoder scales down. The dpi of these formats
    says nothing about the specimen, so mpp is None.
    """

    def _open(self) -> tuple[int, int]:
        self._levels: dict[int, Pixels] = {}
        # The classes themselves, because Image.open would apply Pillow's process-wide size limit.
        with self.path.open("rb") as file:
            is_jpeg = file.read(3) == JPEG
        self._plugin: Any = JpegImageFile if is_jpeg else PngImageFile
        with self._plugin(self.path) as image:
            mode, orientation = image.mode, image.getexif().get(0x0112, 1)
            size: tuple[int, int] = image.size
        _check_size(self.path, size)
        if mode.startswith("I") or mode == "F":
            raise DataError(f"{self.path}: {mode} pixels, over 8 bits; save it as 8-bit RGB")
        if orientation != 1:
            raise DataError(
                f"{self.path}: EXIF orientation {orientation}, so x and y are ambiguous; save the "
                "picture upright, in the frame of the spots, without EXIF"
            )
        if is_jpeg and min(size) >= 64:
            self.level_downsamples = (1.0, 2.0, 4.0, 8.0)
        return size

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        if level not in self._levels:
            with self._plugin(self.path) as image:
                if level:  # it takes the strongest reduction that is not smaller than asked for
                    image.draft(None, tuple(n >> level for n in self.level_dimensions[0]))
                clear = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
                self._levels[level] = _rgb(np.asarray(image.convert("RGBA" if clear else "RGB")))
        target[:] = self._levels[level][y : y + target.shape[0], x : x + target.shape[1]]

    def close(self) -> None:
        """Release the decoded pixels."""
        self._levels.clear()


class PlainTiff(PlainSlide):
    """A TIFF that OpenSlide does not read: mapped into memory, or decoded tile by tile."""

    def _open(self) -> tuple[int, int]:
        self._page, found = _eight_bit_page(self.path)
        self.mpp = _mean_mpp(self.path, found)
        self._map: Pixels | None = None
        self._step: tuple[int, int] = self._page.chunks[:2]  # rows, columns of a tile or strip
        width, height = self._page.imagewidth, self._page.imagelength
        if self._page.is_final and self._page.is_contiguous:
            self._map = tifffile.memmap(self.path, page=0, mode="r").reshape(height, width, -1)
        else:
            _check_size(self.path, self._step)
        kept = max(1, CACHE_BYTES // (3 * self._step[0] * self._step[1]))
        self._segment = lru_cache(maxsize=kept)(self._decode)
        self._file = self.path.open("rb")
        return width, height

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        (rows, columns), (height, width) = self._step, target.shape[:2]
        if self._map is not None:
            target[:] = _rgb(self._map[y : y + height, x : x + width])
            return
        per_row = math.ceil(self._page.imagewidth / columns)
        for top in range(y // rows * rows, y + height, rows):
            for left in range(x // columns * columns, x + width, columns):
                segment = self._segment(top // rows * per_row + left // columns)
                y0, y1 = max(y, top), min(y + height, top + rows)
                x0, x1 = max(x, left), min(x + width, left + columns)
                part = segment[y0 - top : y1 - top, x0 - left : x1 - left]
                target[y0 - y : y1 - y, x0 - x : x1 - x] = part

    def _decode(self, index: int) -> Pixels:
        count = self._page.databytecounts[index]
        self._file.seek(self._page.dataoffsets[index])
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError(f"tile or strip {index} has {len(data)} of {count} bytes")
        decoded = self._page.decode(data or None, index, jpegtables=self._page.jpegtables)[0]
        if decoded is None:  # a tile that was never written
            return np.full((*self._step, 3), 255, dtype=np.uint8)
        return _rgb(decoded[0])

    def close(self) -> None:
        """Release the file and the decoded parts."""
        self._segment.cache_clear()
        self._map = None
        self._file.close()


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into a DataError that names the file."""
    try:
        yield
    except Exception as error:
        own = isinstance(error, DataError | MemoryError)
        if own or getattr(error, "errno", None) is not None:
            raise  # not about the content, but the memory, the disk or the permissions
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); the file is damaged or cut "
            "off: copy or export it again"
        ) from error


def _eight_bit_page(path: Path) -> tuple[Any, list[float | None]]:
    """Return a TIFF's first page, if it is an 8-bit picture, and its um per pixel along x and y."""
    with _damage_named(path), tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages.first
        axes, colours = tiff.series[0].axes, page.photometric.name
        unit = {2: 25_400.0, 3: 10_000.0}.get(page.tags.valueof("ResolutionUnit", 2), 0.0)
        ratios = [page.tags.valueof(name, (0, 1)) for name in ("XResolution", "YResolution")]
        _ = page.dataoffsets, page.databytecounts, page.jpegtables  # read while the file is open
    known = axes in ("YX", "YXS") and colours in ("RGB", "YCBCR", "MINISBLACK")
    if not known or page.dtype != np.uint8:
        found = f"{page.dtype} {colours} picture with axes {axes}"
        raise DataError(f"{path}: {found}; expected 8-bit RGB or grey, axes YX or YXS; {REMEDY}")
    return page, [unit * below / above if above else None for above, below in ratios]


def _mean_mpp(path: Path, found: Sequence[Any]) -> float | None:
    """Mean of the two um per pixel; None when missing or, like a print dpi, no microscope's."""
    values = [float(value) for value in found if value is not None]
    if len(values) < 2 or not all(0.02 <= value <= 20.0 for value in values):
        return None
    if abs(values[0] - values[1]) > 0.02 * min(values):
        raise DataError(
            f"{path}: {values[0]:g} and {values[1]:g} um per pixel along x and y; resample to equal"
        )
    return (values[0] + values[1]) / 2


def _check_size(path: Path, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_DECODED_PIXELS:
        raise DataError(
            f"{path}: {size[0]} x {size[1]} pixels in one part, over {MAX_DECODED_PIXELS}; {REMEDY}"
        )


def _rgb(pixels: Pixels) -> Pixels:
    """Grey, grey + alpha, RGB or RGBA (h, w, 1..4) -> RGB, transparent parts white."""
    if pixels.shape[2] in (1, 3):
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    colour, alpha = pixels[..., :-1], pixels[..., -1:]
    if alpha.min() < 255:
        colour = np.rint(255 - (255 - colour) * (alpha / np.float32(255))).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colour, (*pixels.shape[:2], 3)))


def _unpainted(region: Pixels) -> Pixels:
    """White instead of the black that was painted over the background."""
    return np.where((region > BLACK).any(axis=2, keepdims=True), region, np.uint8(255))
