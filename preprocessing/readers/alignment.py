"""Alignment files of Loupe and Space Ranger: from the picture of the places to the one at hand.

A section on CytAssist has two pictures, the instrument's and the microscope's, and Space Ranger
gives places in pixels of whichever it was run with. The file (``*_alignment_file.json``,
``*-fiducials-image-registration.json``) holds the transform from the microscope's pixels to the
instrument's (cytAssistInfo.transformImages), where the spots lie (oligo: row, col, imageX, imageY
in pixels of the picture with the frame) or, of Visium HD, pixels of that picture a um (transform).
It does not say whose pixels the places are, nor which picture is at hand; what is known tells.

A frame is a (3, 3) matrix from the pixels of a picture to those of the one with the frame of the
slide: the instrument's where there is one. Shapes: S spots.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from preprocessing.errors import DataError
from preprocessing.files import files_in
from preprocessing.findings import SlideWarning
from preprocessing.image_transform import Matrix, enlarges, matrix_of, moved, transform_text
from preprocessing.readers.coordinates import VISIUM_PITCH_UM
from preprocessing.readers.tables import read_json_object
from preprocessing.scale import FAR, hexagonal_spacing, spacing_um
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable

#: An image of these names is a smaller copy of the picture of the places.
SCALED = ("tissue_hires_image", "tissue_lowres_image")
_BASE = "picture with the frame of the slide"
_NAMED = re.compile(r"alignment|image-registration|^[VH]\w+-\w+-[A-D]\d?\b", re.IGNORECASE)
_PICTURE = re.compile(r"(_tissue)?_image$")
_FIELD_UM = 25_000.0  # a slide is 25 mm wide; the CytAssist instrument sees some 15 of them
_COARSE_UM = 3.0  # a pixel of the instrument's picture has 4 to 5 um, a microscope's at most 2
_MOST = 0.5  # of the spots must lie inside a picture
_SHARE = 0.05  # part of the spots by which one way is better than another
_LEAST = 10  # spots in common with a file
_FITS = 0.05  # parts of the distance of spots by which they may lie beside their places
_SAME = 0.02  # and by which two ways are the same
_BENT = 1e-3  # parts of the width by which a transform of pictures may differ from an affine one
_REMEDY = "save it again in Loupe Browser, or remove it"
_WAYS = (
    "say in the manifest column image_transform what takes the places to the image (shift:0 0 if "
    "nothing does), or in mpp how large its pixels are"
)


class NotUsable(DataError):
    """An alignment file says nothing about this slide; the message says why."""


@dataclass(frozen=True)
class Alignment:
    """What one file says.

    Attributes:
        path: the file.
        slide: serial number and area of the slide.
        to_cytassist: from pixels of the microscope's picture to the one with the frame, the
            instrument's; None: the file knows the latter only.
        mpp: um per pixel of the picture with the frame; None: it is not said.
        spots: row and col (index) of the array -> x, y in pixels of that picture; may be empty.
    """

    path: Path
    slide: str
    to_cytassist: Matrix | None
    mpp: float | None
    spots: pd.DataFrame


def read_alignment(path: Path) -> Alignment:
    """Read one file.

    Raises:
        NotUsable: not such a file, or without anything that places could be moved by.
    """
    try:
        told = read_json_object(path, "of an alignment", _REMEDY)
        images = dict(told.get("cytAssistInfo") or {}).get("transformImages")
        matrix = None if images is None else _homography(images)
        spots = _spots(told.get("oligo"))
        step = hexagonal_spacing(spots.to_numpy(np.float64))
        mpp = None if step is None else VISIUM_PITCH_UM / step
        if isinstance(told.get("oligo"), str) and "transform" in told:
            mpp = 1 / enlarges(_homography(told["transform"]))
    except NotUsable:
        raise
    except (DataError, OSError, ValueError, KeyError, TypeError) as error:
        raise NotUsable(f"{path} is no alignment of Loupe ({error}); {_REMEDY}") from error
    if matrix is None and spots.empty and mpp is None:
        raise NotUsable(
            f"{path} holds neither a transform between pictures (cytAssistInfo.transformImages) "
            f"nor places of spots (oligo); {_REMEDY}"
        )
    slide = "-".join(str(told.get(key) or "") for key in ("serialNumber", "area"))
    return Alignment(path, slide, matrix, mpp, spots)


def _homography(values: Any) -> Matrix:
    """A (3, 3) matrix, or its nine numbers in a row; ValueError for anything else."""
    matrix = np.array(values, dtype=np.float64).reshape(3, 3)
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12 or matrix[2, 2] == 0:
        raise ValueError(f"not a transform of pictures: {matrix.tolist()}")
    return np.asarray(matrix / matrix[2, 2])


def _spots(oligo: Any) -> pd.DataFrame:
    names = {"row": "row", "col": "col", "imageX": "x", "imageY": "y"}
    listed = oligo if isinstance(oligo, list) else []
    whole = [spot for spot in listed if isinstance(spot, Mapping) and names.keys() <= spot.keys()]
    frame = pd.DataFrame({to: [spot[name] for spot in whole] for name, to in names.items()})
    frame = frame.astype({"row": np.int64, "col": np.int64, "x": np.float64, "y": np.float64})
    return frame.drop_duplicates(["row", "col"]).set_index(["row", "col"])


def find_alignments(row: SlideRow) -> tuple[list[Path], bool]:
    """Files that may say how the image of a row lies to its places, and whether they are its own.

    Looked for by name beside the image, and in the folder of the sample, its ``outs`` and
    ``spatial``. Its own are those whose names begin as the image's, the sample's or the slide's,
    else those in its folder. None for a row with image_transform or image_scale, or a scaled
    picture of Space Ranger: there is nothing to be found out.
    """
    image, counts = row.image, row.counts
    if isinstance(row.image_transform, Path) and row.image_transform.suffix.lower() == ".json":
        return [row.image_transform], True
    if image is None or counts is None or row.image_transform or row.image_scale is not None:
        return [], False
    if image.stem.endswith(SCALED):
        return [], False
    base = counts if counts.is_dir() else counts.parent
    deep = base.name.startswith("square_") or base.name in ("segmented_outputs", "binned_outputs")
    bases = [base, *base.parents[:2]] if deep else [base]
    places = [one / name for one in bases for name in (".", "outs", "spatial", "outs/spatial")]
    inside = _named(places)
    found = dict.fromkeys([*_named([image.parent]), *inside])
    starts = (_PICTURE.sub("", image.name.partition(".")[0]), base.name, row.slide_id)
    begins = re.compile(f"({'|'.join(map(re.escape, filter(None, starts)))})(?![^\\W_])")
    own = [path for path in found if begins.match(path.name)] or inside
    return own or list(found), bool(own)


def _named(folders: list[Path]) -> list[Path]:
    whole = dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir())
    return [p for folder in whole for p in files_in(folder, "*.json") if _NAMED.search(p.name)]


def aligned(row: SlideRow, table: SpotTable, size: tuple[int, int], mpp: float | None) -> SpotTable:
    """The spots on the picture at hand, where an alignment file says how to get there.

    Args:
        row: its image_transform may name the file; else `find_alignments` looks for one.
        table: the spots as their reader placed them.
        size: (width, height) of the image, level-0 pixels.
        mpp: um per level-0 pixel that the image file states.

    Raises:
        DataError: more than one way is possible, or the file that the manifest names is of no use.
    """
    files, own = find_alignments(row)
    if not files:
        return table
    name = "" if row.image is None else row.image.name
    case = _Case(table, name, size, row.mpp or mpp)
    try:
        used, matrix = case.matrix(files, own)
        if row.image_transform and not used:
            raise NotUsable(f"{files[0]} is about other pictures than this one; {_WAYS}")
    except NotUsable as error:
        if row.image_transform:
            raise
        told = f"{error}: not used, the places are taken for those of the image"
        return replace(table, warnings=(*table.warnings, SlideWarning(told, _WAYS)))
    if matrix is not None:
        return table.transformed(matrix, used)
    note = f"places are those of the image already, by {used}"
    return replace(table, notes=(*table.notes, *([note] if used else [])))


@dataclass(frozen=True)
class _Case:
    """Spots, and the picture at hand: its name, (width, height) and um per pixel, if known."""

    table: SpotTable
    name: str
    size: tuple[int, int]
    mpp: float | None

    @property
    def own(self) -> float | None:
        """Um per pixel of the places, if known."""
        return next((one.mpp for one in self.table.scale if not one.of_image), None)

    def matrix(self, files: list[Path], own: bool) -> tuple[str, Matrix | None]:
        """The files that tell what takes the places to the picture, and that (None: nothing does).

        Of files that may be another slide's only those count whose spots lie at the places.
        """
        read, reasons = [], []
        for path in files:
            try:
                read.append(read_alignment(path))
            except NotUsable as error:
                reasons.append(str(error))
        if not read:
            raise NotUsable("; ".join(reasons))
        sure = [one for one in read if _is_of(one, self.table)]
        used = [one for one in read if one.slide == sure[0].slide] if sure else read
        names = ", ".join(one.path.name for one in used)
        if not sure and not own:
            if self._plain():
                return "", None
            raise NotUsable(f"{names} may be of another slide, by the name")
        if len({one.slide for one in used}) > 1:
            raise NotUsable(f"{names} are of several slides")
        return self._way(used, names)

    def _plain(self) -> bool:
        """Whether nothing speaks against the places as they are."""
        cytassist = "cytassist" in self.name.lower()
        inside = self.share(np.eye(3)) >= _MOST
        return inside and _agree(self.own, self.mpp) and not cytassist

    def share(self, matrix: Matrix) -> float:
        """Part of the places that ``matrix`` takes into the picture."""
        xy = moved(self.table.xy_px0, matrix)
        return float(((xy >= 0) & (xy <= np.asarray(self.size))).all(axis=1).mean())

    def _way(self, files: list[Alignment], names: str) -> tuple[str, Matrix | None]:
        """The files that tell what takes the places to the picture, and that.

        Whose pixels the places are is told by the spots of the files, else by um per pixel; which
        picture is at hand by its name, um per pixel and size; then by how many spots lie inside.
        """
        pictures = {f"picture of {one.path}": one.to_cytassist for one in files}
        known: dict[str, Matrix] = {n: m for n, m in pictures.items() if m is not None}
        if not known and len(files) > 1:
            raise NotUsable(f"which of {names} is of this image is not known")
        told = bool(known)
        known[_BASE] = np.eye(3)
        mpp = next((one.mpp for one in files if one.mpp is not None), None)
        mpps = {n: None if mpp is None else mpp * enlarges(m) for n, m in known.items()}
        fit = next((fit for one in files if (fit := _fit(one.spots, self.table)) is not None), None)
        cytassist = told or (mpp or 0.0) > _COARSE_UM
        ends = [m for n, m in known.items() if self._can_be(n, mpps[n], cytassist)]
        if fit is None:
            starts = [m for n, m in known.items() if _agree(self.own, mpps[n])]
            if not starts and (not told or (self.mpp is not None and self._plain())):
                return "", None  # it is about other pictures than that of the places and this one
        else:
            starts = [fit]
            if not any(_is_of(one, self.table) for one in files):
                ends.append(fit)  # places of a third picture, which may be the one at hand
        return names, self._best(starts, ends, names)

    def _best(self, starts: list[Matrix], ends: list[Matrix], names: str) -> Matrix | None:
        """What takes the places from one of the frames to another; None: nothing has to."""
        ways: list[tuple[float, Matrix]] = []
        for start, end in product(starts, ends):
            matrix = _affine(np.linalg.inv(end) @ start, self.table.xy_px0)
            if matrix is None:
                raise NotUsable(f"{names} holds a transform that is no affine one over the spots")
            implied = None if self.own is None else self.own / enlarges(matrix)
            if _agree(implied, self.mpp):
                ways.append((self.share(matrix), matrix))
        best = max((share for share, _ in ways), default=0.0)
        if best < _MOST:
            said = "" if self.own is None else f" ({self.own:.4g} um a pixel)"
            of = "" if self.mpp is None else f" of {self.mpp:.4g} um"
            raise NotUsable(
                f"{names}: no way by it leads the places{said} to this image of {self.size[0]} x "
                f"{self.size[1]} pixels{of}"
            )
        return self._only([matrix for share, matrix in ways if share >= best - _SHARE], names)

    def _can_be(self, frame: str, mpp: float | None, cytassist: bool) -> bool:
        """Whether the picture can be the one of a frame, by name, size and um per pixel."""
        if "cytassist" in self.name.lower() and cytassist:
            return frame == _BASE
        if cytassist and frame == _BASE and mpp is not None and max(self.size) * mpp > _FIELD_UM:
            return False
        return _agree(self.mpp, mpp)

    def _only(self, matrices: list[Matrix], names: str) -> Matrix | None:
        """The one of several matrices, where all do the same; DataError where they differ."""
        near = max(0.5, _SAME * (spacing_um(self.table.xy_px0) or 0.0))
        ways: list[Matrix] = []
        for matrix in matrices:
            if all(_off(matrix, way, self.table.xy_px0) > near for way in ways):
                ways.append(matrix)
        if len(ways) > 1:
            told = " or ".join(transform_text(way, self.size, near) for way in ways)
            raise DataError(
                f"{names} can lead the places to the image in {len(ways)} ways; {_WAYS}: {told}"
            )
        return None if _off(ways[0], np.eye(3), self.table.xy_px0) <= near else ways[0]


def _agree(one: float | None, other: float | None) -> bool:
    """Whether two um per pixel, where both are known, are the same but for 10 percent."""
    return one is None or other is None or max(one, other) <= (1 + FAR) * min(one, other)


def _is_of(alignment: Alignment, table: SpotTable) -> bool:
    """Whether the spots of a file lie where the table has them, in one of its pictures."""
    fit = _fit(alignment.spots, table)
    if fit is None:
        return False
    near = _FITS * (spacing_um(alignment.spots.to_numpy()) or 0.0)
    known = [one for one in (np.eye(3), alignment.to_cytassist) if one is not None]
    frames = [_affine(one, table.xy_px0) for one in known]
    return any(_off(fit, one, table.xy_px0) <= near for one in frames if one is not None)


def _fit(spots: pd.DataFrame, table: SpotTable) -> Matrix | None:
    """The affine map from the places to those of the same spots in a file, by least squares.

    None where they have no array, or fewer than three spots in common, or lie otherwise.
    """
    if table.array is None or spots.empty:
        return None
    there = spots.reindex(pd.MultiIndex.from_arrays([*table.array.T])).to_numpy()
    both = np.isfinite(there).all(axis=1)
    if both.sum() < _LEAST:
        return None
    known = np.column_stack([table.xy_px0[both], np.ones(both.sum())])
    rows = np.linalg.lstsq(known, there[both], rcond=None)[0].T
    off = np.linalg.norm(known @ rows.T - there[both], axis=1)
    step = spacing_um(there[both]) or 0.0
    return None if np.median(off) > _FITS * step else matrix_of(rows)


def _corners(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """The corners (4, 2) of the rectangle around places (S, 2)."""
    (left, top), (right, bottom) = xy.min(axis=0), xy.max(axis=0)
    return np.array([(x, y) for x in (left, right) for y in (top, bottom)])


def _off(one: Matrix, other: Matrix, xy: NDArray[np.float64]) -> float:
    """How far two affine maps lie apart, at most, over places (S, 2)."""
    corners = _corners(xy)
    return float(np.abs(moved(corners, one) - moved(corners, other)).max())


def _affine(matrix: Matrix, xy: NDArray[np.float64]) -> Matrix | None:
    """The affine map that a transform of pictures is over places (S, 2); None: it is none."""
    matrix = matrix / matrix[2, 2]
    if not matrix[2, :2].any():
        return matrix
    corners = np.column_stack([_corners(xy), np.ones(4)])
    there = corners @ matrix.T
    there = there[:, :2] / there[:, 2:]
    rows = np.asarray(np.linalg.lstsq(corners, there, rcond=None)[0].T, dtype=np.float64)
    off = float(np.abs(corners @ rows.T - there).max())
    return matrix_of(rows) if off <= _BENT * float(np.ptp(there, axis=0).max()) else None
