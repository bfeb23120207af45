"""Other decoders for the levels of a slide: libvips and cuCIM.

At level 0, and at levels whose downsample is whole, the pixels are those of the other reader; where
it is not (2.0005), OpenSlide interpolates between pixels and libvips takes the nearest. JPEG 2000
differs by one grey level in a few pixels.
"""

import math
from typing import Any

import numpy as np

from preprocessing.errors import DataError
from preprocessing.slides.pixels import Pixels, PlainSlide, Slide, to_rgb

_OTHER = "use the slide back end 'auto'"


class _Decoded(PlainSlide):
    """A slide decoded by another library; levels and scale are those of the reader ``base``."""

    def __init__(self, base: Slide, black_is_background: bool = False) -> None:
        """Open ``base.path`` once more; ``base`` is closed.

        Raises:
            DataError: the library is not installed, or does not read all levels of this file.
        """
        with base:
            self._sizes, self._scales = base.level_dimensions, base.level_downsamples
            mpp = base.mpp
        super().__init__(base.path, black_is_background)
        self.level_dimensions, self.level_downsamples = self._sizes, self._scales
        self.mpp = mpp


class VipsSlide(_Decoded):
    """A slide whose pixels libvips decodes."""

    def _open(self) -> tuple[int, int]:
        try:
            import pyvips
        except (ImportError, OSError) as error:
            raise DataError(
                f"{self.path}: the slide back end pyvips is not installed: pip install "
                f"'pyvips[binary]' ({error})"
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
