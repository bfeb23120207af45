"""OME-TIFF: pyramids in SubIFDs, samples side by side or in planes, scale from the OME-XML."""

import re
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from preprocessing.errors import DataError
from preprocessing.slides.pixels import REMEDY, Pixels, PlainSlide, damage_named, mean_mpp
from preprocessing.slides.tiff import TiffSegments

CACHE_BYTES = 256 * 2**20  # decoded tiles or strips, over all levels
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
        self._levels = levels
        self.level_dimensions = tuple(sizes)
        width, height = sizes[0]
        self.level_downsamples = tuple((width / w + height / h) / 2 for w, h in sizes)
        self.mpp = mean_mpp(self.path, _scale(root, width, height))
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
