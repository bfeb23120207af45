"""OME-Zarr pictures (NGFF 0.1 to 0.5): a folder of levels, as Bio-Formats and SpatialData write it.

Shapes: levels of h x w pixels and n samples; every other axis has length 1.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.errors import DataError
from preprocessing.slides.channels import Channels, deep_note, full_light
from preprocessing.slides.pixels import Pixels, PlainSlide, check_size, image_scale, paste
from preprocessing.slides.tiff import CACHE_BYTES, COLOUR_NAMES, LENGTHS_UM
from preprocessing.zarr_bounds import check_arrays

_GROUP = (".zgroup", "zarr.json")
_LONG = {"meter": "m", "centimeter": "cm", "millimeter": "mm", "micrometer": "um"}
_LONG |= {"nanometer": "nm", "angstrom": "Å", "inch": "in"}


def is_zarr(path: Path) -> bool:
    """Whether a path is the folder of a zarr group."""
    return path.is_dir() and any((path / name).is_file() for name in _GROUP)


class OmeZarr(PlainSlide):
    """A coloured or grey OME-Zarr picture; of several in one folder the largest is read."""

    def _open(self) -> tuple[int, int]:
        try:
            import zarr
        except ImportError as error:
            raise DataError(
                f"{self.path} is an OME-Zarr picture, which needs zarr: pip install "
                "'hibio[spatialdata]'"
            ) from error
        check_arrays(self.path)
        about, self._levels = self._picture(zarr.open_group(str(self.path), mode="r"))
        self._axes = _axes(about, self._levels[0].ndim)
        self._channels = self._colours(about)
        sizes = [(self._length(level, "x"), self._length(level, "y")) for level in self._levels]
        width, height = sizes[0]
        self.level_dimensions = tuple(sizes)
        self.level_downsamples = tuple((width / w + height / h) / 2 for w, h in sizes)
        steps = [self._step(level) for level in self._levels]
        for step in steps:
            check_size(self.path, (step[1], step[0]))
        kept = max(1, CACHE_BYTES // len(steps) // (3 * max(h * w for h, w in steps)))
        self._steps, self._block = steps, lru_cache(maxsize=kept)(self._decode)
        said = {"coordinateTransformations (OME-Zarr)": self._scale(about)}
        self.mpp, self.scale = image_scale(self.path, said)
        if self._levels[0].dtype != np.uint8:
            self._find_white()
        self._block(0, 0, 0)
        return width, height

    def _picture(self, group: Any) -> tuple[Mapping[str, Any], list[Any]]:
        """What the folder says of its largest picture, and the arrays of its levels."""
        found = []
        for inside in (group, *(one for _, one in sorted(group.groups()))):
            attrs = inside.attrs.asdict()
            about = attrs.get("ome", attrs)
            for scales in about.get("multiscales", [])[:1]:
                levels = [inside[one["path"]] for one in scales["datasets"]]
                found.append(({**scales, "omero": about.get("omero", {})}, levels))
        if not found:
            raise DataError(
                f"{self.path}: a zarr folder without OME multiscales; expected an OME-Zarr "
                "picture (of SpatialData the folder images/NAME)"
            )
        return max(found, key=lambda one: math.prod(one[1][0].shape))

    def _colours(self, about: Mapping[str, Any]) -> Channels:
        """How the samples become RGB; DataError where they are no picture of a stained section."""
        first = self._levels[0]
        shape = dict(zip(self._axes, first.shape, strict=True))
        count = shape.get("c", 1)
        long = [f"{axis} {n}" for axis, n in shape.items() if axis not in "xyc" and n > 1]
        names = [str(c.get("label") or "") for c in about["omero"].get("channels", [])]
        stained = count == 1 or all(COLOUR_NAMES.fullmatch(name) for name in names)
        known = first.dtype in (np.uint8, np.uint16) and {"x", "y"} <= set(shape)
        if long or count not in (1, 3, 4) or not stained or not known:
            raise DataError(
                f"{self.path}: {first.dtype} picture with axes {shape} and channels "
                f"{', '.join(names) or 'without names'}; expected red, green and blue, or grey, of "
                "a stained section in 8 or 16 bits, one plane; export it as RGB, or give another "
                "image"
            )
        if count == 4:
            self.notes = ("a fourth channel that is not declared as opacity left out",)
        return Channels(self.path, "grey" if count == 1 else "rgb")

    def _find_white(self) -> None:
        """The white of 16 bits, by the coarsest level."""
        level = self._levels[-1]
        check_size(self.path, (self._length(level, "x"), self._length(level, "y")))
        white = full_light(int(np.asarray(level[...]).max()))
        self._channels = Channels(self.path, self._channels.kind, white=white)
        self.notes = (*self.notes, deep_note(white))

    def _length(self, level: Any, axis: str) -> int:
        return int(level.shape[self._axes.index(axis)])

    def _step(self, level: Any) -> tuple[int, int]:
        """(rows, columns) of a chunk."""
        rows, columns = (level.chunks[self._axes.index(axis)] for axis in "yx")
        return int(rows), int(columns)

    def _scale(self, about: Mapping[str, Any]) -> list[float | None]:
        """Um per pixel along x and y, of the first level."""
        units = {one["name"]: one.get("unit") for one in about.get("axes", []) if _named(one)}
        found: list[float | None] = []
        for axis in "xy":
            at, factor = self._axes.index(axis), 1.0
            for one in (about["datasets"][0], about):
                for step in one.get("coordinateTransformations", []):
                    factor *= float(step["scale"][at]) if step.get("type") == "scale" else 1.0
            unit = str(units.get(axis))
            um = LENGTHS_UM.get(_LONG.get(unit, unit))
            found.append(None if um is None else factor * um)
        return found

    def _decode(self, level: int, row: int, column: int) -> Pixels:
        """The pixels of a chunk, (h, w, 3)."""
        rows, columns = self._steps[level]
        cut = {"y": slice(row * rows, (row + 1) * rows), "c": slice(None)}
        cut["x"] = slice(column * columns, (column + 1) * columns)
        kept = [axis for axis in self._axes if axis in cut]
        values = np.asarray(self._levels[level][tuple(cut.get(axis, 0) for axis in self._axes)])
        values = values if "c" in kept else values[..., None]
        order = [*kept, *("c" * ("c" not in kept))]
        return self._channels.rgb(values.transpose([order.index(axis) for axis in "yxc"]))

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        (rows, columns), (height, width) = self._steps[level], target.shape[:2]
        for row in range(y // rows, (y + height - 1) // rows + 1):
            for column in range(x // columns, (x + width - 1) // columns + 1):
                block = self._block(level, row, column)
                paste(target, block, column * columns - x, row * rows - y)

    def tile(self, level: int) -> tuple[int, int]:
        """See `Slide.tile`."""
        return self._steps[level]

    def close(self) -> None:
        """Release the decoded parts."""
        self._block.cache_clear()


def _named(axis: object) -> bool:
    return isinstance(axis, Mapping) and "name" in axis


def _axes(about: Mapping[str, Any], dimensions: int) -> str:
    """A letter an axis; versions before 0.3 say none and have five."""
    given = about.get("axes") or "tczyx"[-dimensions:]
    return "".join(str(one["name"] if isinstance(one, Mapping) else one) for one in given).lower()
