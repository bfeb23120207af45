"""Centroids of shapes (WKB, ragged arrays) and coordinate transformations (OME-NGFF).

Shapes: n shapes; matrices are (3, 3) on columns (x, y, 1).
"""

import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from preprocessing.errors import DataError

_POINT, _POLYGON, _MULTIPOLYGON = 1, 3, 6
_Z, _M, _SRID = 0x80000000, 0x40000000, 0x20000000  # flags of EWKB
_XY = ("x", "y")


def polygon_centroid(rings: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """Centroid (2,) and area of a polygon; the first ring is its outline, others are holes.

    A polygon without area has the mean of its outline's points.
    """
    total, weighted = 0.0, np.zeros(2)
    origin = rings[0][0]
    for number, ring in enumerate(rings):
        shifted = np.vstack([ring, ring[:1]]) - origin
        x, y = shifted.T
        cross = x[:-1] * y[1:] - x[1:] * y[:-1]
        area = cross.sum() / 2
        moment = ((shifted[:-1] + shifted[1:]) * cross[:, None]).sum(axis=0) / 6
        sign = np.copysign(1.0, area) * (1 if number == 0 else -1)
        total += sign * area
        weighted += sign * moment
    if total <= 0:
        return np.asarray(rings[0].mean(axis=0)), 0.0
    return np.asarray(weighted / total + origin), float(total)


def multipolygon_centroid(parts: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Centroid (2,) of several polygons, weighted by their areas."""
    centres, areas = zip(*(polygon_centroid(rings) for rings in parts), strict=True)
    weights = np.array(areas) if sum(areas) > 0 else np.ones(len(areas))
    return np.asarray(np.average(np.array(centres), axis=0, weights=weights))


def wkb_centroids(values: Sequence[object], where: str) -> np.ndarray:
    """Centroids of points, polygons and multipolygons in WKB.

    Args:
        values: (n,) bytes.
        where: the file, for the message.

    Returns:
        (n, 2) float64.

    Raises:
        DataError: another kind of shape, or damaged bytes (names the row).
    """
    result = np.empty((len(values), 2))
    for row, value in enumerate(values):
        try:
            if not isinstance(value, bytes):
                raise ValueError(f"{type(value).__name__} instead of bytes")
            result[row] = _Wkb(value).centroid()
        except (ValueError, IndexError, struct.error) as error:
            raise DataError(
                f"{where}: the geometry of row {row + 1} is not a point or polygon in WKB ({error})"
            ) from error
    return result


class _Wkb:
    """A cursor in the bytes of one shape."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._order = "<"

    def centroid(self) -> np.ndarray:
        kind, width = self._head()
        if kind == _POINT:
            return np.asarray(self._points(1, width)[0])
        if kind == _POLYGON:
            return polygon_centroid(self._rings(width))[0]
        if kind == _MULTIPOLYGON:
            parts = []
            for _ in range(self._number()):
                part, width = self._head()
                if part != _POLYGON:
                    raise ValueError(f"a multipolygon with a part of kind {part}")
                parts.append(self._rings(width))
            return multipolygon_centroid(parts)
        raise ValueError(f"kind {kind}")

    def _head(self) -> tuple[int, int]:
        """Kind of shape, and numbers a point."""
        self._order = "<" if self._data[self._at] == 1 else ">"
        self._at += 1
        kind = self._number()
        if kind & _SRID:
            self._number()
        extra = (kind & _Z != 0) + (kind & _M != 0)
        kind &= 0x0FFFFFFF
        return kind % 1000, 2 + extra + {0: 0, 1: 1, 2: 1, 3: 2}.get(kind // 1000, 0)

    def _number(self) -> int:
        value = struct.unpack_from(f"{self._order}I", self._data, self._at)[0]
        self._at += 4
        return int(value)

    def _points(self, count: int, width: int) -> np.ndarray:
        if count * width * 8 > len(self._data) - self._at:
            raise ValueError("cut off")
        values = np.frombuffer(self._data, f"{self._order}f8", count * width, self._at)
        self._at += count * width * 8
        return values.reshape(count, width)[:, :2].astype(np.float64)

    def _rings(self, width: int) -> list[np.ndarray]:
        count = self._number()
        if not 1 <= count <= len(self._data):
            raise ValueError(f"{count} rings")
        rings = [self._points(self._number(), width) for _ in range(count)]
        if any(len(ring) == 0 for ring in rings):
            raise ValueError("an empty ring")
        return rings


def ragged_centroids(
    coords: np.ndarray, offsets: Sequence[np.ndarray], kind: int, where: str
) -> np.ndarray:
    """Centroids of shapes in ragged arrays: points (kind 0), polygons (3), multipolygons (6).

    Args:
        coords: (P, 2 or 3) points.
        offsets: for polygons where rings and shapes begin; multipolygons: rings, polygons, shapes.
        kind: as shapely numbers it.
        where: the element, for the message.

    Returns:
        (n, 2) float64.

    Raises:
        DataError: another kind, or offsets that do not fit.
    """
    xy = np.asarray(coords, dtype=np.float64)[:, :2]
    needed = {0: 0, _POLYGON: 2, _MULTIPOLYGON: 3}.get(kind)
    if needed is None or len(offsets) < needed:
        raise DataError(f"{where}: shapes of kind {kind} with {len(offsets)} offsets are not read")
    if needed == 0:
        return xy
    try:
        pieces: list[Any] = [xy[a:b] for a, b in _pairs(offsets[0])]
        for level in offsets[1:needed]:
            pieces = [pieces[a:b] for a, b in _pairs(level)]
        if kind == _POLYGON:
            return np.array([polygon_centroid(rings)[0] for rings in pieces])
        return np.array([multipolygon_centroid(parts) for parts in pieces])
    except (IndexError, ValueError) as error:
        raise DataError(f"{where}: the offsets of its shapes do not fit ({error})") from error


def _pairs(offsets: np.ndarray) -> list[tuple[int, int]]:
    whole = np.asarray(offsets).ravel().astype(np.int64).tolist()
    return list(pairwise(whole))


def transform_matrix(told: Mapping[str, Any], axes: Sequence[str] = _XY) -> np.ndarray:
    """Matrix (3, 3) of a transformation as OME-NGFF writes it, on x and y.

    Args:
        told: its JSON: identity, scale, translation, rotation, affine, mapAxis or sequence.
        axes: names of the input axes, where it does not name them.

    Raises:
        ValueError: another kind, or numbers that do not fit the axes.
    """
    axes = axis_names(told.get("input"), axes)
    if not set(_XY) <= set(axes):
        raise ValueError(f"axes {', '.join(axes)} without x and y")
    kind, matrix = told.get("type"), np.eye(3)
    x, y = (list(axes).index(name) for name in _XY)
    if kind in ("scale", "translation"):
        values = np.asarray(told[kind], dtype=np.float64).ravel()
        if len(values) != len(axes):
            raise ValueError(f"{kind} of {len(values)} numbers for the axes {', '.join(axes)}")
        place = ([0, 1], [0, 1]) if kind == "scale" else ([0, 1], [2, 2])
        matrix[place] = values[[x, y]]
    elif kind in ("affine", "rotation"):
        values = np.asarray(told[kind], dtype=np.float64)
        out = axis_names(told.get("output"), axes)
        rows = [list(out).index(name) for name in _XY]
        columns = [x, y] if kind == "rotation" else [x, y, len(axes)]
        matrix[:2, : len(columns)] = values[np.ix_(rows, columns)]
    elif kind == "mapAxis":
        source = {name: told[kind].get(name, name) for name in _XY}
        matrix[:2, :2] = [[source[to] == name for name in _XY] for to in _XY]
    elif kind == "sequence":
        for step in told["transformations"]:
            matrix = transform_matrix(step, axes) @ matrix
            axes = axis_names(step.get("output"), axes)
    elif kind != "identity":
        raise ValueError(f"transformation of type {kind!r}")
    if not np.isfinite(matrix).all():
        raise ValueError("a transformation that is not finite")
    return matrix


def axis_names(system: object, default: Sequence[str] = _XY) -> Sequence[str]:
    """Names of the axes of a coordinate system; ``default`` where it does not name them."""
    axes = system.get("axes") if isinstance(system, Mapping) else None
    return [str(axis["name"]) for axis in axes] if axes else default
