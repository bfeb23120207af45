"""TIFF pictures: tiles decoded when they are first read, OME pyramids, and plain pictures."""

import math
import os
import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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
    image_scale,
    to_rgb,
)

JPEG = b"\xff\xd8\xff"
PLANAR = 2  # PlanarConfiguration: samples in planes
CACHE_BYTES = 256 * 2**20  # decoded tiles or strips, over all levels
RESOLUTION = "the TIFF resolution"
UNITS_UM = {"inch": 25_400.0, "centimeter": 10_000.0}
_DESCRIPTION = 270  # the tag ImageDescription
_UM = {
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "nm": 1e-3,
    "Å": 1e-4,
    "in": 25_400.0,
}
_COLOURS = re.compile(r"(r|g|b|red|green|blue|rgb|channel[ _:-]*\d+(:\d+)*|\d+)?", re.I)
_NOT_PLAIN = re.compile(r"<!(DOCTYPE|ENTITY)", re.I)


def require_inside(offsets: Sequence[int], counts: Sequence[int], end: int) -> None:
    """Raise EOFError where a tile or strip lies behind the ``end`` of its file, in bytes."""
    for index, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        if count and offset + count > end:
            raise EOFError(
                f"tile or strip {index} ends at byte {offset + count:,}, the file at {end:,}"
            )


class TiffSegments:
    """One picture: a page with its samples side by side or in planes, or three grey pages.

    Attributes:
        size: (width, height) in pixels.
        step: (rows, columns) of a tile or strip.
    """

    def __init__(self, path: Path, pages: Sequence[Any], cache_bytes: int) -> None:
        """Take over what is needed of the pages; their file may be closed afterwards.

        Args:
            path: the file.
            pages: tifffile pages of the same size, 8 bits a sample.
            cache_bytes: how much of the decoded segments is kept.

        Raises:
            DataError: a tile or strip is too large to decode.
        """
        page = pages[0].keyframe
        self._page, self._parts = page, []
        self.size: tuple[int, int] = (page.imagewidth, page.imagelength)
        if page.is_tiled:
            self.step: tuple[int, int] = (page.tilelength, page.tilewidth)
        else:
            self.step = (min(page.rowsperstrip, self.size[1]), self.size[0])
        check_size(path, self.step)
        self._per_row = math.ceil(self.size[0] / self.step[1])
        planes = page.samplesperpixel if page.planarconfig == PLANAR else 1
        self._per_plane = per_plane = self._per_row * math.ceil(self.size[1] / self.step[0])
        for one in pages:
            for plane in range(planes):
                where = slice(plane * per_plane, (plane + 1) * per_plane)
                places = (one.dataoffsets[where], one.databytecounts[where])
                self._parts.append((plane * per_plane, *places, one.jpegtables))
        kept = max(1, cache_bytes // (3 * self.step[0] * self.step[1]))
        self.segment = lru_cache(maxsize=kept)(self._decode)
        self._file = path.open("rb")

    def touch(self) -> None:
        """See that the file holds every tile or strip, and decode the fullest and the last.

        Raises:
            EOFError: some are missing, or lie behind the end of the file.
            Exception: whatever the decoder raises of damaged bytes.
        """
        end = os.fstat(self._file.fileno()).st_size
        for _, offsets, counts, _ in self._parts:
            if not len(offsets) == len(counts) == self._per_plane:
                raise EOFError(f"{len(counts)} of {self._per_plane} tiles or strips are there")
            require_inside(offsets, counts, end)
        counts = self._parts[0][2]
        filled = [index for index, count in enumerate(counts) if count]
        for index in {max(filled, key=counts.__getitem__), filled[-1]} if filled else ():
            self.segment(index)

    def paint(self, target: Pixels, x: int, y: int) -> None:
        """Fill ``target`` (h, w, 3), which lies inside the picture, from its pixel (x, y) on."""
        (rows, columns), (height, width) = self.step, target.shape[:2]
        for top in range(y // rows * rows, y + height, rows):
            for left in range(x // columns * columns, x + width, columns):
                segment = self.segment(top // rows * self._per_row + left // columns)
                y0, y1 = max(y, top), min(y + height, top + rows)
                x0, x1 = max(x, left), min(x + width, left + columns)
                part = segment[y0 - top : y1 - top, x0 - left : x1 - left]
                target[y0 - y : y1 - y, x0 - x : x1 - x] = part

    def close(self) -> None:
        """Release the file and the decoded parts."""
        self.segment.cache_clear()
        self._file.close()

    def _decode(self, index: int) -> Pixels:
        planes = [self._plane(part, index) for part in self._parts]
        if any(plane is None for plane in planes):  # a tile that was never written
            return np.full((*self.step, 3), 255, dtype=np.uint8)
        return to_rgb(np.concatenate(planes, axis=2) if len(planes) > 1 else planes[0])

    def _plane(self, part: tuple[int, Any, Any, Any], index: int) -> Any:
        first, offsets, counts, tables = part
        count = counts[index]
        self._file.seek(offsets[index])
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError(f"tile or strip {index} has {len(data)} of {count} bytes")
        decoded = self._page.decode(data or None, first + index, jpegtables=tables)[0]
        return None if decoded is None else decoded[0]


def is_ome(path: Path) -> bool:
    """Tell whether a TIFF is an OME-TIFF, by the description of its first page.

    Raises:
        DataError: no TIFF, or the description is named but lies behind the end of the file.
    """
    with damage_named(path), tifffile.TiffFile(path, _multifile=False) as tiff:
        if _DESCRIPTION in _codes(tiff) and _DESCRIPTION not in tiff.pages.first.tags:
            raise EOFError("the description of the picture is not there")
        return _xml(tiff) is not None


class OmeTiff(PlainSlide):
    """An OME-TIFF with an 8-bit RGB picture; of several pictures the largest is read."""

    def _open(self) -> tuple[int, int]:
        with tifffile.TiffFile(self.path, _multifile=False) as tiff:
            root = _root(self.path, _xml(tiff) or "")
            series = max(tiff.series, key=_area)
            sizes, levels = [], []
            for level in series.levels:
                pages = _pages(self.path, root, level)
                share = CACHE_BYTES // len(series.levels)
                levels.append(TiffSegments(self.path, pages, share))
                levels[-1].touch()
                sizes.append(levels[-1].size)
            tag = _resolution(series.levels[0].keyframe)
        self._levels = levels
        self.level_dimensions = tuple(sizes)
        width, height = sizes[0]
        self.level_downsamples = tuple((width / w + height / h) / 2 for w, h in sizes)
        said = {"PhysicalSize (OME)": _scale(root, width, height), RESOLUTION: tag}
        self.mpp, self.scale = image_scale(self.path, said)
        return width, height

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        self._levels[level].paint(target, x, y)

    def close(self) -> None:
        """Release the file and the decoded parts."""
        for level in self._levels:
            level.close()


def _codes(tiff: Any) -> list[int]:
    """Numbers of the tags that the first page has, whether they can be read or not."""
    file, form = tiff.filehandle, tiff.tiff
    file.seek(tiff.pages.first.offset)
    count = struct.unpack(form.tagnoformat, file.read(form.tagnosize))[0]
    entries = file.read(count * form.tagsize)
    return [
        struct.unpack_from(f"{form.byteorder}H", entries, at)[0]
        for at in range(0, len(entries) - 1, form.tagsize)
    ]


def _xml(tiff: Any) -> str | None:
    description = tiff.pages.first.description
    start = description[:2000].lstrip("\ufeff \r\n")
    return description if start.startswith("<") and "<OME" in start else None


def _root(path: Path, text: str) -> ElementTree.Element:
    if _NOT_PLAIN.search(text):
        raise DataError(f"{path}: its OME-XML declares entities, which is not done; {REMEDY}")
    return ElementTree.fromstring(text.lstrip("\ufeff \r\n").encode())


def _area(series: Any) -> int:
    found = dict(zip(series.axes, series.shape, strict=True))
    return int(found.get("X", 0) * found.get("Y", 0))


def _pages(path: Path, root: ElementTree.Element, level: Any) -> list[Any]:
    """Pages that make up one level: one page of RGB or grey, or three grey pages."""
    axes, shape = _without_single(level.axes, level.shape)
    page = level.keyframe
    known = page.photometric.name in ("RGB", "YCBCR", "MINISBLACK")
    one_page = axes in ("YX", "YXS", "SYX") and len(level.pages) == 1
    three = axes == "CYX" and shape[0] == len(level.pages) == 3
    if page.dtype != np.uint8 or not known or not (one_page or three):
        raise DataError(
            f"{path}: {page.dtype} {page.photometric.name} picture with axes {axes}, shape "
            f"{shape}; expected 8-bit RGB or grey (axes YX, YXS, SYX, or CYX of 3 channels); "
            f"{REMEDY}"
        )
    names = [c.get("Name") or "" for c in root.iter() if _local(c.tag) == "Channel"][:3]
    if three and not all(_COLOURS.fullmatch(name) for name in names):
        raise DataError(
            f"{path}: three channels {', '.join(names)}; expected red, green and blue of a stained "
            "section; export it as RGB, or give another image"
        )
    return [_located(path, one) for one in level.pages]


def _without_single(axes: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Leave out axes of length 1, other than Y and X."""
    kept = [(a, n) for a, n in zip(axes, shape, strict=True) if n > 1 or a in "YX"]
    return "".join(a for a, _ in kept), tuple(n for _, n in kept)


def _located(path: Path, page: Any) -> Any:
    """The page, with the places of its data read while the file is open."""
    if page is None:
        raise DataError(f"{path}: a part of it lies in another file; {REMEDY}")
    _ = page.dataoffsets, page.databytecounts, page.jpegtables
    return page


def _scale(root: ElementTree.Element, width: int, height: int) -> list[float | None]:
    """Um per pixel along x and y, from the element Pixels of this size."""
    for pixels in (e for e in root.iter() if _local(e.tag) == "Pixels"):
        if (pixels.get("SizeX"), pixels.get("SizeY")) == (str(width), str(height)):
            return [_um(pixels, axis) for axis in "XY"]
    return [None, None]


def _um(pixels: ElementTree.Element, axis: str) -> float | None:
    try:
        value = float(pixels.get(f"PhysicalSize{axis}", ""))
    except ValueError:
        return None
    factor = _UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
    return None if factor is None else value * factor


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


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
        self.mpp, self.scale = image_scale(self.path, {RESOLUTION: found})
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
        found_um = _resolution(page)
        _ = page.dataoffsets, page.databytecounts, page.jpegtables  # read while the file is open
    known = axes in ("YX", "YXS", "SYX") and colours in ("RGB", "YCBCR", "MINISBLACK")
    if not known or page.dtype != np.uint8:
        found = f"{page.dtype} {colours} picture with axes {axes}"
        raise DataError(
            f"{path}: {found}; expected 8-bit RGB or grey, axes YX, YXS or SYX; {REMEDY}"
        )
    return page, found_um


def _resolution(page: Any) -> list[float | None]:
    """Um per pixel along x and y by the tags of a page."""
    unit = {2: UNITS_UM["inch"], 3: UNITS_UM["centimeter"]}
    um = unit.get(page.tags.valueof("ResolutionUnit", 2), 0.0)
    ratios = [page.tags.valueof(name, (0, 1)) for name in ("XResolution", "YResolution")]
    return [um * below / above if above else None for above, below in ratios]
