"""Plain pictures (JPEG, PNG) and TIFF files that OpenSlide does not read."""

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from preprocessing.errors import DataError
from preprocessing.slides.pixels import (
    REMEDY,
    Pixels,
    PlainSlide,
    check_size,
    damage_named,
    mean_mpp,
    to_rgb,
)
from preprocessing.slides.tiff import PLANAR, TiffSegments

CACHE_BYTES = 256 * 2**20  # decoded tiles or strips of a plain TIFF
JPEG = b"\xff\xd8\xff"


class PlainPicture(PlainSlide):
    """A JPEG or PNG; a level is decoded as a whole when it is first read.

    The coarsest is decoded when the file is opened, which needs all of its bytes: a picture that
    is cut off is refused then. A JPEG has levels 2, 4 and 8 for free, since its decoder scales
    down. The dpi of these formats says nothing about the specimen, so mpp is None.
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
        check_size(self.path, size)
        if mode.startswith("I") or mode == "F":
            raise DataError(f"{self.path}: {mode} pixels, over 8 bits; save it as 8-bit RGB")
        if orientation != 1:
            raise DataError(
                f"{self.path}: EXIF orientation {orientation}, so x and y are ambiguous; save the "
                "picture upright, in the frame of the spots, without EXIF"
            )
        if is_jpeg and min(size) >= 64:
            self.level_downsamples = (1.0, 2.0, 4.0, 8.0)
        self._decoded(len(self.level_downsamples) - 1)
        return size

    def _decoded(self, level: int) -> Pixels:
        """All pixels of a level, (h, w, 3)."""
        if level not in self._levels:
            with self._plugin(self.path) as image:
                if level:  # it takes the strongest reduction that is not smaller than asked for
                    image.draft(None, tuple(n >> level for n in image.size))
                clear = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
                self._levels[level] = to_rgb(np.asarray(image.convert("RGBA" if clear else "RGB")))
        return self._levels[level]

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        target[:] = self._decoded(level)[y : y + target.shape[0], x : x + target.shape[1]]

    def close(self) -> None:
        """Release the decoded pixels."""
        self._levels.clear()


class PlainTiff(PlainSlide):
    """A TIFF that OpenSlide does not read: mapped into memory, or decoded tile by tile."""

    def _open(self) -> tuple[int, int]:
        self._page, found = eight_bit_page(self.path)
        self.mpp = mean_mpp(self.path, found)
        self._map: Pixels | None = None
        width, height = self._page.imagewidth, self._page.imagelength
        self._segments: TiffSegments | None = None
        planes = self._page.planarconfig == PLANAR and self._page.samplesperpixel > 1
        if self._page.is_final and self._page.is_contiguous and not planes:
            self._map = tifffile.memmap(self.path, page=0, mode="r").reshape(height, width, -1)
        else:
            self._segments = TiffSegments(self.path, [self._page], CACHE_BYTES)
            self._segments.touch()
        return width, height

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        if self._segments is not None:
            self._segments.paint(target, x, y)
            return
        assert self._map is not None
        target[:] = to_rgb(self._map[y : y + target.shape[0], x : x + target.shape[1]])

    def close(self) -> None:
        """Release the file and the decoded parts."""
        self._map = None
        if self._segments is not None:
            self._segments.close()


def eight_bit_page(path: Path) -> tuple[Any, list[float | None]]:
    """Return a TIFF's first page, if it is an 8-bit picture, and its um per pixel along x and y."""
    with damage_named(path), tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages.first
        axes, colours = tiff.series[0].axes, page.photometric.name
        unit = {2: 25_400.0, 3: 10_000.0}.get(page.tags.valueof("ResolutionUnit", 2), 0.0)
        ratios = [page.tags.valueof(name, (0, 1)) for name in ("XResolution", "YResolution")]
        _ = page.dataoffsets, page.databytecounts, page.jpegtables  # read while the file is open
    known = axes in ("YX", "YXS", "SYX") and colours in ("RGB", "YCBCR", "MINISBLACK")
    if not known or page.dtype != np.uint8:
        found = f"{page.dtype} {colours} picture with axes {axes}"
        raise DataError(
            f"{path}: {found}; expected 8-bit RGB or grey, axes YX, YXS or SYX; {REMEDY}"
        )
    return page, [unit * below / above if above else None for above, below in ratios]
