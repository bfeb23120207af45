"""The tiles of a slide decoded directly: same pixels as OpenSlide's, several times as fast.

OpenSlide composes every region anew, with an alpha channel. The tiles of an SVS or a tiled TIFF
can as well be decoded one by one and copied, which is what happens here wherever it is known to
give the same pixels; every other slide is left to OpenSlide.
"""

import math
from typing import Any

import numpy as np
import openslide
import tifffile

from preprocessing.errors import DataError
from preprocessing.slides.pixels import Pixels, PlainSlide, Slide, damage_named
from preprocessing.slides.tiff import CACHE_BYTES, TiffSegments, require_inside

_VENDORS = ("aperio", "generic-tiff")
_COMPRESSIONS = (1, 5, 7, 8, 32946, 33005)  # none, LZW, JPEG, deflate (two codes), JPEG 2000 RGB
_COLOURS = (2, 6)  # RGB, YCbCr


class TiledSlide(PlainSlide):
    """A slide whose tiles are decoded one by one; levels and scale are those of OpenSlide.

    Regions lie on whole pixels of their level. (OpenSlide interpolates between pixels where a
    level is not a whole number of times smaller, which blurs.)
    """

    def __init__(self, slide: Slide, levels: list[TiffSegments], black_is_background: bool) -> None:
        """Take over an open slide, which is closed together with this one."""
        self._slide, self._levels = slide, levels
        self.path, self.black_is_background = slide.path, black_is_background
        self.mpp = slide.mpp
        self.level_dimensions = slide.level_dimensions
        self.level_downsamples = slide.level_downsamples

    def _open(self) -> tuple[int, int]:
        return self.level_dimensions[0]

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        self._levels[level].paint(target, x, y)

    def close(self) -> None:
        """Release the files and the decoded tiles."""
        for level in self._levels:
            level.close()
        self._slide.close()


def direct_tiles(slide: Slide, black_is_background: bool = False) -> Slide:
    """Read the tiles of ``slide`` directly where that gives the same pixels.

    Looks at the layout of the file, and compares the tile that holds most with what the slide
    itself gives.

    Args:
        slide: opened by `open_slide`, with the same ``black_is_background``.
        black_is_background: see `open_slide`.

    Returns:
        A slide to use instead, which closes the one given; or the one given.

    Raises:
        DataError: the file claims more tiles than it has; the slide given is closed.
    """
    vendor = openslide.OpenSlide.detect_format(slide.path)
    if vendor not in _VENDORS or isinstance(slide, PlainSlide):
        return slide
    pages = _level_pages(slide)
    if not pages:
        return slide
    try:
        _check_tiles(slide, pages)
    except DataError:
        slide.close()
        raise
    alike = len({(page.compression, page.photometric) for page in pages}) == 1
    tiled = _decoded(slide, pages, black_is_background) if alike else None
    return slide if tiled is None else tiled


def _check_tiles(slide: Slide, pages: list[Any]) -> None:
    for page in pages:
        if len(page.databytecounts) != _tiles(page):
            raise DataError(
                f"{slide.path}: {page.imagewidth} x {page.imagelength} pixels are {_tiles(page)} "
                f"tiles, but it has {len(page.databytecounts)}; copy or export it again"
            )
        with damage_named(slide.path):
            require_inside(page.dataoffsets, page.databytecounts, slide.path.stat().st_size)


def _decoded(slide: Slide, pages: list[Any], black_is_background: bool) -> Slide | None:
    """The slide that decodes its tiles itself; None where it would give other pixels."""
    if not all(_plain(page) for page in pages):
        return None
    share = CACHE_BYTES // len(pages)
    try:
        levels = [TiffSegments(slide.path, [page], share) for page in pages]
    except DataError:  # a tile too large to decode at once
        return None
    tiled = TiledSlide(slide, levels, black_is_background)
    if _same_pixels(slide, tiled, pages[0]):
        return tiled
    for level in levels:
        level.close()
    return None


def _level_pages(slide: Slide) -> list[Any]:
    """The page of each level; empty if one is not found."""
    try:
        with damage_named(slide.path), tifffile.TiffFile(slide.path) as tiff:
            every: list[Any] = list(tiff.pages)
            tiled = [page.aspage() for page in every if page.is_tiled]
            for page in tiled:  # read while the file is open
                _ = page.dataoffsets, page.databytecounts, page.jpegtables, page.decode
    except DataError:
        return []
    found = {(page.imagewidth, page.imagelength): page for page in reversed(tiled)}
    pages = [found.get(size) for size in slide.level_dimensions]
    return [] if any(page is None for page in pages) else pages


def _plain(page: Any) -> bool:
    return bool(
        page.dtype == np.uint8
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and page.imagedepth == 1
        and int(page.compression) in _COMPRESSIONS
        and int(page.photometric) in _COLOURS
        and min(page.databytecounts) > 0
    )


def _tiles(page: Any) -> int:
    across = math.ceil(page.imagewidth / page.tilewidth)
    return int(across * math.ceil(page.imagelength / page.tilelength))


def _same_pixels(slide: Slide, tiled: Slide, page: Any) -> bool:
    fullest = int(np.argmax(page.databytecounts))
    row, column = divmod(fullest, math.ceil(page.imagewidth / page.tilewidth))
    corner = (column * page.tilewidth, row * page.tilelength)
    size = (page.tilewidth, page.tilelength)
    try:
        return np.array_equal(
            slide.read_region(corner, 0, size), tiled.read_region(corner, 0, size)
        )
    except DataError:  # damaged: the error belongs to whoever reads it
        return False
