"""Cells that Space Ranger 4 segments on a Visium HD slide: folder `segmented_outputs`.

The layout is that of the page "Segmented Outputs" of Space Ranger's documentation: the matrix of
cells, whose barcodes are cellid_000000001-1, and their outlines in pixels of the microscope image.
A section has some hundred thousand outlines of some tens of points; as Python objects they would
take gigabytes, so one is read at a time.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
from tqdm import tqdm

from preprocessing.errors import DataError
from preprocessing.readers.cells import Cells, cell_format, cell_table
from preprocessing.readers.coordinates import Scale
from preprocessing.readers.geometry import multipolygon_centroid, polygon_centroid
from preprocessing.readers.joins import first_names, match_rows
from preprocessing.readers.tables import open_text
from preprocessing.readers.tenx import matrix_files, read_tenx
from preprocessing.readers.visium import (
    CELL_MATRIX,
    SCALE_FACTORS,
    SEGMENTED,
    factor_scale,
    image_scale,
    is_cell_matrix,
    read_scale_factors,
    scaled_image,
)
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable

OUTLINES = ("cell_segmentations.geojson", "graphclust_annotated_cell_segmentations.geojson")
_KEY = "cell_id"
_BARCODE = re.compile(r"cellid_0*(\d+)-\d+")
_HINT = "; scalefactors_json.json in the folder 'spatial' states it"
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


@dataclass(frozen=True)
class CellFiles:
    """The files of one `segmented_outputs`; ``scale_factors`` may be absent."""

    matrix: Path
    outlines: Path
    scale_factors: Path | None


def find_cell_files(counts: Path) -> CellFiles:
    """Find the files of the segmented cells.

    Args:
        counts: the sample's root, its ``outs``, ``segmented_outputs``, or the .h5 file in it.

    Raises:
        DataError: the matrix or the outlines are not there; names what was looked for.
    """
    start = counts.parent if counts.is_file() else counts
    matrices = [
        place / name for place in _places(start) for name in (f"{CELL_MATRIX}.h5", CELL_MATRIX)
    ]
    matrix = next((path for path in matrices if path.exists()), None)
    if matrix is None:
        raise DataError(
            f"{counts} holds no {CELL_MATRIX}.h5 and no folder {CELL_MATRIX} (nor does its folder "
            f"{SEGMENTED}); give the output of Space Ranger 4, run with cell segmentation"
        )
    folder = matrix.parent
    outlines = next((path for name in OUTLINES if (path := folder / name).is_file()), None)
    if outlines is None:
        raise DataError(f"{folder} holds none of {', '.join(OUTLINES)}; copy it from the output")
    spatial = (folder / "spatial" / SCALE_FACTORS, folder.parent / "spatial" / SCALE_FACTORS)
    return CellFiles(matrix, outlines, next((path for path in spatial if path.is_file()), None))


def _places(folder: Path) -> tuple[Path, ...]:
    return folder, folder / SEGMENTED, folder / "outs" / SEGMENTED


def _sources(row: SlideRow) -> dict[str, Path]:
    found = find_cell_files(row.counts_path)
    factors = {} if found.scale_factors is None else {"scale_factors": found.scale_factors}
    return {**matrix_files(found.matrix), "outlines": found.outlines, **factors}


def read_hd_cells(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read the segmented cells of one slide; the place of a cell is the centroid of its outline.

    mpp: the manifest, the image file, microns_per_pixel of the scale factors.
    """
    files = find_cell_files(row.counts_path)
    matrix = read_tenx(files.matrix, row.modality)
    notes = list(matrix.notes)
    told = files.scale_factors
    factors = {} if told is None else read_scale_factors(told, notes)
    numbers, centres, empty = read_centroids(files.outlines, _KEY)
    if empty:
        notes.append(f"{empty} outlines without points left out")
    index = pd.Index(np.array(numbers, dtype=object))
    if not index.is_unique:
        twice = index[index.duplicated()][0]
        raise DataError(f"{files.outlines}: cell {twice} has two outlines; keep one a cell")
    found = [_BARCODE.fullmatch(str(barcode)) for barcode in matrix.barcodes]
    rows, places = match_rows(
        np.array([-1 if match is None else int(match[1]) for match in found], dtype=object),
        index,
        f"no cell of {files.matrix} has an outline in {files.outlines} (barcodes: "
        f"{first_names(matrix.barcodes)}; {_KEY}: {first_names(numbers)}); expected barcodes like "
        "cellid_000000001-1",
        notes,
        "cells without an outline left out",
        "outlines without counts left out",
    )
    columns = pd.DataFrame(index=pd.RangeIndex(len(rows)))
    cells = Cells.of_matrix(matrix, rows, centres[places], columns, notes)
    scale = Scale(said=factor_scale(factors, 1.0), hint=_HINT)
    if row.image is not None:
        row = replace(row, image_scale=image_scale(row, factors))
    return cell_table(row, cells, scale, image_mpp)


def _detect(counts: Path, spots: Path | None) -> bool:
    return is_cell_matrix(counts) or any(
        any(place.glob(f"{CELL_MATRIX}*")) and any(place.glob("*cell_segmentations.geojson*"))
        for place in _places(counts)
    )


def _discover(folder: Path) -> list[SlideRow]:
    """The cells of a sample that has no bins beside them."""
    try:
        files = find_cell_files(folder)
    except DataError:
        return []
    image = scaled_image(files.matrix.parent / "spatial")
    name = folder.resolve().name
    return [drafted_row(name, folder, FORMAT.name, image=image, technology="Visium HD")]


FORMAT = cell_format(
    "visium_hd_cells",
    read_hd_cells,
    sources=_sources,
    detect=_detect,
    discover=_discover,
    layout="segmented_outputs/",
    whole=True,
    loupe=True,
)
