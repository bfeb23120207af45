"""TIFF pictures: tiles decoded when they are first read, OME pyramids, and plain pictures."""

import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from preprocessing.errors import DataError
from preprocessing.slides.channels import (
    Channels,
    deep_note,
    full_light,
    one_of_many,
    page_channels,
    run_python,
)
from preprocessing.slides.pixels import (
    REMEDY,
    Pixels,
    PlainSlide,
    check_size,
    damage_named,
    image_scale,
    paste,
    to_rgb,
)

PLANAR = 2  # PlanarConfiguration: samples in planes
CACHE_BYTES = 256 * 2**20  # decoded strips, over all levels: a square of patches lies in many
TILE_SHARE = 4  # the part of it that decoded tiles take
RESOLUTION = "the TIFF resolution"
_MASK = 4  # NewSubfileType: a transparency mask of another page
_YCC_DECODED = (6, 7, 33003, 34712, 50001, 50002)  # codecs that give RGB: JPEG, JPEG 2000, WebP, XL
_OPENSLIDE_CODECS = (1, 5, 7, 8, 32946, 33003, 33005)  # see `decoders`
UNITS_UM = {"inch": 25_400.0, "centimeter": 10_000.0}
_DESCRIPTION = 270  # the tag ImageDescription
_PEEKED = 64  # tiles or strips that are looked at for the range of the values
LENGTHS_UM = {
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
COLOUR_NAMES = re.compile(r"(r|g|b|red|green|blue|rgb|channel[ _:-]*\d+(:\d+)*|\d+)?", re.I)
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
        tile: the same of a tile; (1, 1) where there are strips, which are kept for long.
    """

    def __init__(
        self, path: Path, pages: Sequence[Any], cache_bytes: int, channels: Channels | None = None
    ) -> None:
        """Take over what is needed of the pages; their file may be closed afterwards.

        Args:
            path: the file.
            pages: tifffile pages of the same size.
            cache_bytes: how much of the decoded strips is kept; of tiles a `TILE_SHARE` th.
            channels: what their samples are; grey or RGB in 8 bits where nothing is said.

        Raises:
            DataError: a tile or strip is too large to decode.
        """
        page = pages[0].keyframe
        self._page, self._parts = page, []
        self.channels = channels
        self.size: tuple[int, int] = (page.imagewidth, page.imagelength)
        if page.is_tiled:
            self.step: tuple[int, int] = (page.tilelength, page.tilewidth)
            cache_bytes //= TILE_SHARE
        else:
            self.step = (min(page.rowsperstrip, self.size[1]), self.size[0])
        self.tile = self.step if page.is_tiled else (1, 1)
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
            self._samples(index)

    def peak(self) -> int:
        """The largest sample of some tiles or strips, spread over the picture."""
        filled = [index for index, count in enumerate(self._parts[0][2]) if count]
        some = filled[:: max(1, len(filled) // _PEEKED)]
        colours = None if self.channels is None else self.channels.colours
        return max((int(self._samples(i)[..., :colours].max()) for i in some), default=0)

    def paint(self, target: Pixels, x: int, y: int) -> None:
        """Fill ``target`` (h, w, 3), which lies inside the picture, from its pixel (x, y) on."""
        (rows, columns), (height, width) = self.step, target.shape[:2]
        for top in range(y // rows * rows, y + height, rows):
            for left in range(x // columns * columns, x + width, columns):
                segment = self.segment(top // rows * self._per_row + left // columns)
                paste(target, segment, left - x, top - y)

    def close(self) -> None:
        """Release the file and the decoded parts."""
        self.segment.cache_clear()
        self._file.close()

    def _decode(self, index: int) -> Pixels:
        if not all(counts[index] for _, _, counts, _ in self._parts):  # it was never written
            return np.full((*self.step, 3), 255, dtype=np.uint8)
        samples = self._samples(index)
        return to_rgb(samples) if self.channels is None else self.channels.rgb(samples)

    def _samples(self, index: int) -> Any:
        """Samples of a tile or strip, (h, w, n)."""
        planes = [self._plane(part, index) for part in self._parts]
        return np.concatenate(planes, axis=2) if len(planes) > 1 else planes[0]

    def _plane(self, part: tuple[int, Any, Any, Any], index: int) -> Any:
        first, offsets, counts, tables = part
        count = counts[index]
        self._file.seek(offsets[index])
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError(f"tile or strip {index} has {len(data)} of {count} bytes")
        return self._page.decode(data, first + index, jpegtables=tables)[0][0]


def is_ome(path: Path) -> bool:
    """Tell whether a TIFF is an OME-TIFF, by the description of its first page.

    Raises:
        DataError: no TIFF, or the description is named but lies behind the end of the file.
    """
    with damage_named(path), tifffile.TiffFile(path, _multifile=False) as tiff:
        if _DESCRIPTION in _codes(tiff) and _DESCRIPTION not in tiff.pages.first.tags:
            raise EOFError("the description of the picture is not there")
        return _xml(tiff) is not None


class _Levels(PlainSlide):
    """A TIFF whose levels are decoded tile by tile, or strip by strip."""

    def _take(self, levels: Sequence[Sequence[Any]], channels: Channels) -> tuple[int, int]:
        """Take over the pages of each level -> (width, height)."""
        share = CACHE_BYTES // len(levels)
        self._levels = [TiffSegments(self.path, pages, share, channels) for pages in levels]
        for level in self._levels:
            level.touch()
        if levels[0][0].keyframe.dtype != np.uint8:
            white = full_light(self._levels[-1].peak())
            channels = replace(channels, white=white, notes=(*channels.notes, deep_note(white)))
            for level in self._levels:
                level.channels = channels
                level.segment.cache_clear()
        self.notes = channels.notes
        self.level_dimensions = tuple(level.size for level in self._levels)
        width, height = self.level_dimensions[0]
        self.level_downsamples = tuple(
            (width / w + height / h) / 2 for w, h in self.level_dimensions
        )
        return width, height

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        self._levels[level].paint(target, x, y)

    def tile(self, level: int) -> tuple[int, int]:
        """See `Slide.tile`; a picture that is mapped has none."""
        return self._levels[level].tile if self._levels else (1, 1)

    def close(self) -> None:
        """Release the file and the decoded parts."""
        for level in self._levels:
            level.close()


class OmeTiff(_Levels):
    """An OME-TIFF of a coloured or grey picture; of several pictures the largest is read."""

    def _open(self) -> tuple[int, int]:
        with tifffile.TiffFile(self.path, _multifile=False) as tiff:
            root = _root(self.path, _xml(tiff) or "")
            series = max(tiff.series, key=_area)
            levels = [_pages(self.path, root, level) for level in series.levels]
            channels = page_channels(self.path, levels[0][0].keyframe)
            if len(levels[0]) == 3:  # three grey pages, put side by side, are RGB
                channels = Channels(self.path)
            width, height = self._take(levels, channels)
            tag = _resolution(series.levels[0].keyframe)
        said = {"PhysicalSize (OME)": _scale(root, width, height), RESOLUTION: tag}
        self.mpp, self.scale = image_scale(self.path, said)
        return width, height


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
    one_page = axes in ("YX", "YXS", "SYX") and len(level.pages) == 1
    three = axes == "CYX" and shape[0] == len(level.pages) == 3
    if not (one_page or three):
        raise DataError(
            f"{path}: {page.dtype} {page.photometric.name} picture with axes {axes}, shape "
            f"{shape}; expected one picture (axes YX, YXS, SYX, or CYX of 3 channels); "
            + one_of_many(path, len(level.pages), axes.endswith("YX"))
        )
    names = [c.get("Name") or "" for c in root.iter() if _local(c.tag) == "Channel"][:3]
    if three and not all(COLOUR_NAMES.fullmatch(name) for name in names):
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
    _ = page.dataoffsets, page.databytecounts, page.jpegtables, page.keyframe.colormap
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
    factor = LENGTHS_UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
    return None if factor is None else value * factor


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


class PlainTiff(_Levels):
    """A TIFF that OpenSlide does not read, or not rightly: mapped into memory, or by its tiles."""

    def _open(self) -> tuple[int, int]:
        pages, found = tiff_pages(self.path)
        page = pages[0]
        channels = page_channels(self.path, page)
        if page.photometric.name == "YCBCR" and page.compression not in _YCC_DECODED:
            code = "(255 * skimage.color.ycbcr2rgb(16 + a * [219, 224, 224] / 255)).round()"
            code = f"{code}.clip(0, 255).astype('uint8')"
            raise DataError(
                f"{self.path}: YCbCr without JPEG; make RGB of it: "
                + run_python(self.path, code, ", skimage.color")
            )
        self.mpp, self.scale = image_scale(self.path, {RESOLUTION: found})
        self._map: Any = None
        planes = page.planarconfig == PLANAR and page.samplesperpixel > 1
        mapped = page.is_final and page.is_contiguous and not planes and page.dtype == np.uint8
        if mapped and len(pages) == 1:
            width, height = page.imagewidth, page.imagelength
            where = {"offset": page.dataoffsets[0], "shape": (height, width, page.samplesperpixel)}
            self._map = np.memmap(self.path, page.dtype, "r", **where)
            self._levels, self._channels, self.notes = [], channels, channels.notes
            return width, height
        return self._take([[page] for page in pages], channels)

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        if self._map is None:
            super()._paint(target, level, x, y)
            return
        target[:] = self._channels.rgb(self._map[y : y + target.shape[0], x : x + target.shape[1]])

    def close(self) -> None:
        """Release the file and the decoded parts."""
        self._map = None
        super().close()


def tiff_pages(path: Path) -> tuple[list[Any], list[float | None]]:
    """The largest picture of a TIFF with its reductions, finest first, and um per pixel x, y.

    Comments in the file (ImageDescription) say nothing about its pixels, and are not believed.

    Raises:
        DataError: damaged, or several pictures of one size: which is the section is not said.
    """
    with damage_named(path), tifffile.TiffFile(path, _multifile=False) as tiff:
        pages = [page.aspage() for page in tiff.pages]
        pages = [page for page in pages if not page.subfiletype & _MASK]
        main = max(pages, key=lambda page: page.imagewidth * page.imagelength)
        smaller = [page.aspage() for page in main.pages or ()] if main.subifds else []
        smaller += [page for page in pages if page is not main]
        size = (main.imagewidth, main.imagelength)
        twins = sum((page.imagewidth, page.imagelength) == size for page in smaller)
        unlisted = (tiff.imagej_metadata or {}).get("images", 1) if tiff.is_imagej else 1
        unlisted = max(unlisted, _hidden(tiff)) if len(tiff.pages) == 1 else 1
        resolution = _resolution(main)
        levels = [main, *sorted((p for p in smaller if _reduces(p, main)), key=_narrower)]
        for page in levels:  # read while the file is open
            _ = page.dataoffsets, page.databytecounts, page.jpegtables, page.decode, page.colormap
    if twins or unlisted > 1:
        number = max(twins + 1, int(unlisted))
        raise DataError(
            f"{path}: {number} pictures of {size[0]} x {size[1]} pixels, and nothing says which is "
            "the section; expected one; " + one_of_many(path, number, main.samplesperpixel == 1)
        )
    return levels, resolution


def _resolution(page: Any) -> list[float | None]:
    """Um per pixel along x and y by the tags of a page."""
    unit = {2: UNITS_UM["inch"], 3: UNITS_UM["centimeter"]}
    um = unit.get(page.tags.valueof("ResolutionUnit", 2), 0.0)
    ratios = [page.tags.valueof(name, (0, 1)) for name in ("XResolution", "YResolution")]
    return [um * below / above if above else None for above, below in ratios]


def _hidden(tiff: Any) -> int:
    """Pictures that follow the only page of a TIFF without pages of their own, and it."""
    stated: dict[str, Any] = (tiff.shaped_metadata or ({},))[0] if tiff.is_shaped else {}
    if not stated.get("truncated"):
        return 1
    page = tiff.pages.first
    return int(math.prod(stated["shape"]) // math.prod(page.shape))


def _narrower(page: Any) -> int:
    return -int(page.imagewidth)


def _reduces(page: Any, main: Any) -> bool:
    """Whether a page is a smaller version of the main one that may serve as a level."""
    down = main.imagewidth / page.imagewidth
    alike = all(
        getattr(page, name) == getattr(main, name)
        for name in ("photometric", "dtype", "samplesperpixel", "planarconfig", "extrasamples")
    )
    fits = down > 1.5 and abs(main.imagelength / down - page.imagelength) <= 1
    return bool(alike and fits and page.is_reduced)


def openslide_misreads(path: Path, vendor: str) -> str:
    """Why OpenSlide does not give the pixels of a tiled TIFF without a vendor; "": it does."""
    if vendor != "generic-tiff":
        return ""
    page = tiff_pages(path)[0][0]
    notes = page_channels(path, page).notes
    if page.dtype != np.uint8:
        return f"OpenSlide does not scale {page.dtype} pixels"
    if page.compression not in _OPENSLIDE_CODECS:
        return f"OpenSlide does not decode {page.compression.name}"
    return f"OpenSlide does not read it rightly ({notes[0]})" if notes else ""
