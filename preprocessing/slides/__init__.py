"""Opening a slide: whole-slide images and plain pictures, read on demand (docs/method.md 0).

`preprocessing.slides.pixels` says what an open slide is and which pixels it gives.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openslide

from preprocessing.errors import DataError, did_you_mean
from preprocessing.slides.decoders import CucimSlide, CziSlide, VipsSlide
from preprocessing.slides.hest import HDF5, HestPatches
from preprocessing.slides.kept import KeptSlide, kept_picture
from preprocessing.slides.ome_zarr import OmeZarr, is_zarr
from preprocessing.slides.pictures import PlainPicture, is_picture
from preprocessing.slides.pixels import (
    BLACK,
    Pixels,
    Slide,
    damage_named,
    image_scale,
    to_rgb,
    unpainted,
)
from preprocessing.slides.tiff import (
    RESOLUTION,
    UNITS_UM,
    OmeTiff,
    PlainTiff,
    is_ome,
    openslide_misreads,
    tiff_pages,
)

__all__ = [
    "BACKENDS",
    "BLACK",
    "OpenSlideSlide",
    "Pixels",
    "Slide",
    "open_slide",
    "require_backend",
]
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_slide(path: Path | str, black_is_background: bool = False, backend: str = "auto") -> Slide:
    """Open a slide: OME-TIFF, what OpenSlide knows, pictures, TIFF, patches of HEST-1k.

    Args:
        path: the image file.
        black_is_background: show black pixels as white; see `tissue.has_black_background`.
        backend: what decodes the pixels: "auto" (whatever of HiBio's own readers fits the file),
            "openslide" (OpenSlide alone), "pyvips" or "cucim" (to be installed); see `BACKENDS`.
            All give the same levels, and the same pixels.

    Raises:
        DataError: no such file, not an image, damaged, not 8-bit, too large to decode, or the back
            end is unknown, not installed or does not read this file.
    """
    path = Path(path)
    require_backend(backend)
    if not path.is_file() and not is_zarr(path):
        raise DataError(f"{path}: there is no such image file; check the path and --root")
    return BACKENDS[backend](path, black_is_background)


def require_backend(name: str) -> None:
    """Raise DataError where a slide back end is unknown; names the nearest or all of them."""
    if name not in BACKENDS:
        hint = did_you_mean(name, BACKENDS, "did you mean", f"choose {', '.join(BACKENDS)}")
        raise DataError(f"slide back end {name!r} is unknown ({hint})")


class OpenSlideSlide(Slide):
    """A slide in one of the formats that OpenSlide reads (SVS, NDPI, MRXS, tiled TIFF, ...)."""

    def __init__(self, path: Path, black_is_background: bool = False) -> None:
        self.path, self.black_is_background = path, black_is_background
        with damage_named(path):
            self._slide = openslide.OpenSlide(path)
        self.level_dimensions = tuple(self._slide.level_dimensions)
        self.level_downsamples = tuple(self._slide.level_downsamples)
        known = self._slide.properties
        said: dict[str, Sequence[Any]] = {
            "MPP": [known.get(f"openslide.mpp-{axis}") for axis in "xy"]
        }
        if known.get("openslide.vendor") == "generic-tiff":
            said = {RESOLUTION: tiff_pages(path)[1]}
        else:
            said[RESOLUTION] = _resolution(known)
        self.mpp, self.scale = image_scale(path, said)

    def read_region(self, xy_px0: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """See `Slide.read_region`."""
        with damage_named(self.path):
            region = to_rgb(np.asarray(self._slide.read_region(xy_px0, level, size)))
        return unpainted(region) if self.black_is_background else region

    def tile(self, level: int) -> tuple[int, int]:
        """See `Slide.tile`."""
        known = self._slide.properties
        rows, columns = (
            int(known.get(f"openslide.level[{level}].tile-{edge}", 1))
            for edge in ("height", "width")
        )
        return rows, columns

    def close(self) -> None:
        """Release the file."""
        self._slide.close()


def _resolution(known: Mapping[str, str]) -> list[float | None]:
    """Um per pixel along x and y by the TIFF tags that OpenSlide shows."""
    unit = UNITS_UM.get(known.get("tiff.ResolutionUnit", ""), 0.0)
    values = [float(known.get(f"tiff.{axis}Resolution", 0)) for axis in "XY"]
    return [unit / value if value > 0 else None for value in values]


def _automatic(path: Path, black_is_background: bool) -> Slide:
    if path.is_dir():
        return OmeZarr(path, black_is_background)
    with path.open("rb") as file:
        magic = file.read(12)
    tiff = magic[:4] in _TIFF
    vendor = openslide.OpenSlide.detect_format(path)
    if tiff and vendor in (None, "generic-tiff") and is_ome(path):
        return OmeTiff(path, black_is_background)
    if vendor == "zeiss":
        return _czi(path, black_is_background)
    if vendor is not None and not openslide_misreads(path, vendor):
        return OpenSlideSlide(path, black_is_background)
    if tiff:
        return PlainTiff(path, black_is_background)
    if is_picture(magic):
        return PlainPicture(path, black_is_background)
    if magic[:8] == HDF5 and kept_picture(path) is not None:
        return KeptSlide(path, black_is_background)
    if magic[:8] == HDF5:
        return HestPatches(path, black_is_background)
    raise DataError(
        f"{path}: no known image (starts with {magic!r}); expected a slide, TIFF, JPEG, PNG, WebP "
        "or JPEG 2000"
    )


def _czi(path: Path, black_is_background: bool) -> Slide:
    """OpenSlide knows CZI without JPEG XR, focus planes and times; the others need a library."""
    try:
        return OpenSlideSlide(path, black_is_background)
    except DataError as error:
        return CziSlide(path, black_is_background, reason=error)


def _openslide(path: Path, black_is_background: bool) -> Slide:
    vendor = None if path.is_dir() else openslide.OpenSlide.detect_format(path)
    why = "OpenSlide does not read it" if vendor is None else openslide_misreads(path, vendor)
    if why:
        raise DataError(f"{path}: {why}; use the slide back end 'auto'")
    return OpenSlideSlide(path, black_is_background)


BACKENDS: dict[str, Callable[[Path, bool], Slide]] = {
    "auto": _automatic,
    "openslide": _openslide,
    "pyvips": lambda path, black: VipsSlide(_automatic(path, False), black),
    "cucim": lambda path, black: CucimSlide(_automatic(path, False), black),
}
