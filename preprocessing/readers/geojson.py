"""Centroids of the polygons of a GeoJSON file, read feature by feature.

A section has some hundred thousand cells of some tens of points; as Python objects all at once they
would take gigabytes, so only one feature is held at a time.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from preprocessing.errors import DataError
from preprocessing.readers.geometry import multipolygon_centroid, polygon_centroid
from preprocessing.readers.text_table import open_text

_PIECE = 1 << 20  # characters read at once
_LONGEST = 1 << 26  # characters of one value, such as a feature
_BLANK = " \t\r\n"
_GOES_ON = ("", *".eE+-0123456789")  # behind these the number that was decoded may not be whole
_MISSHAPEN = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


def read_centroids(path: Path, key: str) -> tuple[list[int], np.ndarray, int]:
    """Read the number and the centroid of every polygon.

    Args:
        path: a FeatureCollection of Polygon and MultiPolygon, gzipped or not.
        key: the property with the number of a shape, such as "cell_id".

    Returns:
        The numbers, their centroids (n, 2) in units of the file, and how many shapes without
        points were left out.

    Raises:
        DataError: not such a file; names the feature.
    """
    numbers: list[int] = []
    centres: list[np.ndarray] = []
    empty = 0
    every = enumerate(read_features(path), start=1)
    for place, feature in tqdm(every, desc=path.name, unit="cell", leave=False, disable=None):
        try:
            number, centre = _number(feature, key), _centroid(feature.get("geometry"))
        except _MISSHAPEN as error:
            raise DataError(f"{path}: feature {place}: {error}") from error
        if centre is None:
            empty += 1
        else:
            numbers.append(number)
            centres.append(centre)
    return numbers, np.array(centres, dtype=np.float64).reshape(-1, 2), empty


def read_features(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the features of a GeoJSON FeatureCollection, one at a time.

    Raises:
        DataError: not JSON, cut off, or no such collection.
    """
    found = False
    with open_text(path) as text:
        cursor = _Cursor(text)
        try:
            for key in cursor.members():
                if key == "features":
                    found = True
                    yield from cursor.items()
                else:
                    cursor.value()
        except (DataError, UnicodeDecodeError):
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is not complete JSON ({error}); copy or download it again"
            ) from error
    if not found:
        raise DataError(f"{path} has no 'features'; expected a GeoJSON FeatureCollection")


def _number(feature: Mapping[str, Any], key: str) -> int:
    known = feature.get("properties")
    if not isinstance(known, dict) or key not in known:
        found = ", ".join(map(str, known)) if isinstance(known, dict) else "none"
        raise ValueError(f"no property {key!r} (found {found[:80]}); expected the cell's number")
    text = str(known[key])
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{key} is {text[:40]!r}; expected a whole number")
    return int(text)


def _centroid(geometry: object) -> np.ndarray | None:
    """Centre (2,) of a Polygon or MultiPolygon; None where it has no points."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"its geometry is {kind!r}; expected a Polygon or MultiPolygon")
    assert isinstance(geometry, dict)
    parts = geometry["coordinates"] if kind == "MultiPolygon" else [geometry["coordinates"]]
    polygons = [_rings(part) for part in parts]
    polygons = [rings for rings in polygons if rings]
    if not polygons:
        return None
    if len(polygons) == 1:
        return polygon_centroid(polygons[0])[0]
    return multipolygon_centroid(polygons)


def _rings(part: list[Any]) -> list[np.ndarray]:
    """The outline and the holes of a polygon, (points, 2) each; empty without an outline."""
    rings = [np.array([point[:2] for point in ring], dtype=np.float64) for ring in part if ring]
    if any(ring.ndim != 2 or ring.shape[1] != 2 for ring in rings):
        raise ValueError("its coordinates are no rings of points (x, y)")
    return rings if part and part[0] else []


class _Cursor:
    """A place in a JSON text that is read piece by piece; ValueError where it is no JSON."""

    def __init__(self, text: TextIO) -> None:
        self._text, self._buffer, self._at, self._ended = text, "", 0, False
        self._decoder = json.JSONDecoder()

    def members(self) -> Iterator[str]:
        """Yield the keys of an object; the caller consumes each value."""
        self._take("{")
        while self._peek() != "}":
            key = self.value()
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is no text")
            self._take(":")
            yield key
            self._next("}")
        self._take("}")

    def items(self) -> Iterator[Any]:
        """Yield the values of an array."""
        self._take("[")
        while self._peek() != "]":
            yield self.value()
            self._next("]")
        self._take("]")

    def value(self) -> Any:
        """Decode the value that begins here."""
        self._peek()
        while True:
            final = self._ended or len(self._buffer) - self._at > _LONGEST
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError:
                if final:
                    raise
            else:
                if final or self._buffer[end : end + 1] not in _GOES_ON:
                    self._at = end
                    return value
            self._more()

    def _next(self, closing: str) -> None:
        """Step over the comma in front of another value."""
        if self._peek() == ",":
            self._at += 1
            if self._peek() == closing:
                raise ValueError(f"a comma in front of {closing!r}")
        elif self._peek() != closing:
            raise ValueError(f"{self._peek()!r} where ',' or {closing!r} was expected")

    def _take(self, character: str) -> None:
        if self._peek() != character:
            raise ValueError(f"{self._peek()!r} where {character!r} was expected")
        self._at += 1

    def _peek(self) -> str:
        """The next character that is not blank."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                raise ValueError("it ends in the middle")
            self._more()

    def _more(self) -> None:
        left = self._buffer[self._at :]
        piece = self._text.read(max(_PIECE, len(left)))  # doubled, so that long values are linear
        self._buffer, self._at, self._ended = left + piece, 0, not piece
