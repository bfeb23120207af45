"""Tiles and strips of one picture in a TIFF, decoded when they are first read."""

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.slides.pixels import Pixels, check_size, to_rgb

PLANAR = 2  # PlanarConfiguration: samples in planes


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
                self._parts.append(
                    (
                        plane * per_plane,
                        one.dataoffsets[where],
                        one.databytecounts[where],
                        one.jpegtables,
                    )
                )
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
