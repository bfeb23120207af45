"""The cuCIM back end: slides with the levels of another reader, decoded by cuCIM.

`preprocessing.slides.vips` says where the pixels are equal; JPEG 2000 differs by one grey level in
a few pixels.
"""

import math

import numpy as np

from preprocessing.errors import DataError
from preprocessing.slides.pixels import Pixels, PlainSlide, Slide, to_rgb

_MISSING = "the slide back end cucim is not installed: pip install cucim-cu12 (or cucim-cu13)"


class CucimSlide(PlainSlide):
    """A slide whose pixels cuCIM decodes; levels and scale are those of the reader ``base``."""

    def __init__(self, base: Slide, black_is_background: bool = False) -> None:
        """Open ``base.path`` once more; ``base`` is closed.

        Raises:
            DataError: cuCIM is not installed, or finds other levels in this file.
        """
        with base:
            self._sizes = base.level_dimensions
            self._scales = base.level_downsamples
            mpp = base.mpp
        super().__init__(base.path, black_is_background)
        self.mpp = mpp

    def _open(self) -> tuple[int, int]:
        try:
            from cucim import CuImage
        except (ImportError, OSError) as error:
            raise DataError(f"{self.path}: {_MISSING} ({error})") from error
        self.level_dimensions, self.level_downsamples = self._sizes, self._scales
        try:
            self._image = CuImage(str(self.path))
            found = tuple(tuple(map(int, s)) for s in self._image.resolutions["level_dimensions"])
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"{self.path}: cuCIM does not read it ({error}); use the slide back end 'auto'"
            ) from error
        if found != self._sizes:
            raise DataError(
                f"{self.path}: cuCIM finds the levels {found}, expected {self._sizes}; use the "
                "slide back end 'auto'"
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
