"""Decoders of a slide's tiles that are faster than OpenSlide's, with the same pixels.

OpenSlide composes every region anew, with an alpha channel. `direct_tiles` decodes the tiles of an
SVS or a tiled TIFF one by one wherever that is known to give the same pixels. libvips and cuCIM are
for those who ask for them: at level 0, and at levels whose downsample is whole, their pixels are
those of the other readers; where it is not (2.0005), OpenSlide interpolates between pixels and
libvips takes the nearest. JPEG 2000 differs by one grey level in a few pixels.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile

from preprocessing.errors import DataError
from preprocessing.slides.pixels import (
    Pixels,
    PlainSlide,
    Slide,
    damage_named,
    image_scale,
    to_rgb,
)
from preprocessing.slides.tiff import CACHE_BYTES, TiffSegments, require_inside

_VENDORS = ("aperio", "generic-tiff")
_COMPRESSIONS = (1, 5, 7, 8, 32946, 33005)  # none, LZW, JPEG, deflate (two codes), JPEG 2000 RGB
_COLOURS = (2, 6)  # RGB, YCbCr
_OTHER = "use the slide back end 'auto'"


class TiledSlide(PlainSlide):
    """A slide whose tiles are decoded one by one; levels and scale are those of OpenSlide.

    Regions lie on whole pixels of their level. (OpenSlide interpolates between pixels where a
    level is not a whole number of times smaller, which blurs.)
    """

    def __init__(self, slide: Slide, levels: list[TiffSegments], black_is_background: bool) -> None:
        """Take over an open slide, which is closed together with this one."""
        self._slide, self._levels = slide, levels
        self.path, self.black_is_background = slide.path, black_is_background
        self.mpp, self.scale = slide.mpp, slide.scale
        self.level_dimensions = slide.level_dimensions
        self.level_downsamples = slide.level_downsamples

    def _open(self) -> tuple[int, int]:
        return self.level_dimensions[0]

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        self._levels[level].paint(target, x, y)

    def tile(self, level: int) -> tuple[int, int]:
        """See `Slide.tile`."""
        return self._levels[level].tile

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


class _Decoded(PlainSlide):
    """A slide decoded by another library; levels and scale are those of the reader ``base``."""

    def __init__(self, base: Slide, black_is_background: bool = False) -> None:
        """Open ``base.path`` once more; ``base`` is closed.

        Raises:
            DataError: the library is not installed, or does not read all levels of this file.
        """
        with base:
            if base.notes:
                raise DataError(f"{base.path}: {'; '.join(base.notes)}; {_OTHER}")
            self._sizes, downsamples = base.level_dimensions, base.level_downsamples
            mpp, scale = base.mpp, base.scale
            self._tiles = [base.tile(level) for level in range(len(downsamples))]
        super().__init__(base.path, black_is_background)
        self.level_dimensions, self.level_downsamples = self._sizes, downsamples
        self.mpp, self.scale = mpp, scale

    def tile(self, level: int) -> tuple[int, int]:
        """See `Slide.tile`."""
        return self._tiles[level]


class VipsSlide(_Decoded):
    """A slide whose pixels libvips decodes."""

    def _open(self) -> tuple[int, int]:
        try:
            import pyvips
        except (ImportError, OSError) as error:
            raise DataError(
                f"{self.path}: the slide back end pyvips is not installed: pip install "
                f"'hibio[slide]' ({error})"
            ) from error
        try:
            pictures = self._pictures(pyvips)
            self._levels = [self._of_size(pictures, size) for size in self._sizes]
            self._regions = [pyvips.Region.new(picture) for picture in self._levels]
            for region in self._regions:  # a codec that was left out shows only here
                region.fetch(0, 0, 1, 1)
        except pyvips.Error as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.path}: pyvips does not read it ({reason}); {_OTHER}") from error
        return self._sizes[0]

    def _pictures(self, pyvips: Any) -> list[Any]:
        """Every picture of a TIFF: its pages and the sub-pages of the first."""
        read, name = pyvips.Image.new_from_file, str(self.path)
        first = read(name)
        if not first.get("vips-loader").startswith("tiff"):
            raise DataError(f"{self.path} is no TIFF, which is what pyvips is used for; {_OTHER}")
        known = set(first.get_fields())
        pages, subs = (
            int(first.get(field)) if field in known else 0 for field in ("n-pages", "n-subifds")
        )
        others = [read(name, page=n) for n in range(1, pages)]
        return [first, *others, *(read(name, subifd=n) for n in range(subs))]

    def _of_size(self, pictures: list[Any], size: tuple[int, int]) -> Any:
        for picture in pictures:
            if (picture.width, picture.height) == size and picture.format == "uchar":
                return picture
        found = ", ".join(f"{p.width} x {p.height} {p.format}" for p in pictures)
        raise DataError(
            f"{self.path}: pyvips finds no 8-bit picture of {size[0]} x {size[1]} pixels (found "
            f"{found}); {_OTHER}"
        )

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        height, width = target.shape[:2]
        data = self._regions[level].fetch(x, y, width, height)
        bands = self._levels[level].bands
        target[:] = to_rgb(np.frombuffer(data, dtype=np.uint8).reshape(height, width, bands))

    def close(self) -> None:
        """Release the file."""
        self._regions, self._levels = [], []


class CucimSlide(_Decoded):
    """A slide whose pixels cuCIM decodes."""

    def _open(self) -> tuple[int, int]:
        try:
            from cucim import CuImage
        except (ImportError, OSError) as error:
            raise DataError(
                f"{self.path}: the slide back end cucim is not installed: pip install cucim-cu12 "
                f"(or cucim-cu13) ({error})"
            ) from error
        try:
            self._image = CuImage(str(self.path))
            found = tuple(tuple(map(int, s)) for s in self._image.resolutions["level_dimensions"])
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{self.path}: cuCIM does not read it ({error}); {_OTHER}") from error
        if found != self._sizes:
            raise DataError(
                f"{self.path}: cuCIM finds the levels {found}, expected {self._sizes}; {_OTHER}"
            )
        return self._sizes[0]

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        height, width = target.shape[:2]
        down = self.level_downsamples[level]
        corner = (math.ceil(x * down), math.ceil(y * down))  # it rounds down
        region = self._image.read_region(corner, (width, height), level)
        target[:] = to_rgb(np.asarray(region))

    def close(self) -> None:
        """Release the file."""
        self._image.close()


class CziSlide(PlainSlide):
    """A CZI of Zeiss as pylibCZIrw reads it: all scenes in one frame, white between them."""

    def __init__(self, path: Path, black_is_background: bool, reason: DataError) -> None:
        """Open the file; ``reason`` is why OpenSlide does not.

        Raises:
            DataError: the library is not installed, or it is no single picture in RGB or grey.
        """
        self._reason = reason
        super().__init__(path, black_is_background)

    def _open(self) -> tuple[int, int]:
        try:
            from pylibCZIrw import czi
        except ImportError as error:
            raise DataError(
                f"{self._reason}. If it is whole, it is a kind of CZI that OpenSlide does not read "
                "and pylibCZIrw does (JPEG XR, several planes): pip install 'hibio[czi]' (Python "
                "up to 3.13) and run again, or export it as OME-TIFF"
            ) from error
        self._open_files = ExitStack()
        self._czi = self._open_files.enter_context(czi.open_czi(str(self.path)))
        extent = self._czi.total_bounding_box
        several = [f"{n} {axis}" for axis in "CZT" if (n := _length(extent, axis)) > 1]
        kind = self._czi.get_channel_pixel_type(0)
        if several or kind not in ("Bgr24", "Gray8"):
            self._open_files.close()
            found = f"pixels {kind}" + (f", {' and '.join(several)} planes" if several else "")
            raise DataError(
                f"{self.path}: {found}; expected one plane of Bgr24 or Gray8 (a stained section in "
                "8 bits); export that plane as OME-TIFF"
            )
        frame = self._czi.total_bounding_rectangle
        self._corner, size = (int(frame.x), int(frame.y)), (int(frame.w), int(frame.h))
        steps = max(0, int(math.log2(max(1, min(size) / 256))))
        self.level_downsamples = tuple(float(2**step) for step in range(steps + 1))
        self.mpp, self.scale = image_scale(
            self.path, {"Scaling (CZI)": _czi_um(self._czi.metadata)}
        )
        return size

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        height, width = target.shape[:2]
        down = int(self.level_downsamples[level])
        corner = (self._corner[0] + x * down, self._corner[1] + y * down)
        pixels = self._czi.read(
            roi=(*corner, width * down, height * down),
            zoom=1 / down,
            pixel_type="Bgr24",
            background_pixel=(1.0, 1.0, 1.0),
        )
        target[:] = pixels[:height, :width, ::-1]

    def close(self) -> None:
        """Release the file."""
        self._open_files.close()


def _length(extent: Mapping[str, tuple[int, int]], axis: str) -> int:
    first, last = extent.get(axis, (0, 1))
    return last - first


def _czi_um(metadata: Any) -> list[float | None]:
    """Um per pixel along x and y by the metadata of a CZI, where it says so in metres."""
    found: dict[str, float] = {}
    for key in ("ImageDocument", "Metadata", "Scaling", "Items", "Distance"):
        metadata = (metadata or {}).get(key)
    for item in metadata if isinstance(metadata, list) else ():
        found[str(item.get("@Id"))] = 1e6 * float(item.get("Value") or 0)
    return [found.get(axis) or None for axis in "XY"]
