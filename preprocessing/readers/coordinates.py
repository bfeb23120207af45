"""Where spots and cells lie: coordinate columns and their scale, and the scale of an array.

Shapes: S spots; ``array`` is (S, 2) integer array positions, ``xy_px`` (S, 2) pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.image_transform import enlarges, moved
from preprocessing.scale import IMAGE_FILE, Statement, require_scale, stated
from preprocessing.slide_row import SlideRow

_PAIRS = (
    ("x_um", "y_um"),
    ("x_centroid", "y_centroid"),
    ("CenterX_global_px", "CenterY_global_px"),
    ("x_global_px", "y_global_px"),
    ("X_centroid", "Y_centroid"),
    ("center_x", "center_y"),
    ("spatial_x", "spatial_y"),
    ("x_location", "y_location"),
    ("xcoord", "ycoord"),
    ("imagecol", "imagerow"),
    ("pxl_col_in_fullres", "pxl_row_in_fullres"),
    ("x_pixel", "y_pixel"),
    ("pixel_x", "pixel_y"),
    ("x", "y"),
    ("X", "Y"),
)
_WAYS = (
    "the manifest column mpp (um per coordinate unit; 1 where they are micrometres), or "
    "coordinates that are in micrometres by name (columns x_um and y_um; obsm['spatial_um'])"
)
_SAME = 0.01
VISIUM_PITCH_UM = 100.0
VISIUM_LATTICE = "100 um between neighbours of the Visium lattice of spots"
_HEX_STEPS = ((0, 2), (1, 1), (1, -1))
_MIN_PAIRS = 3
_HEX_TOLERANCE = 1.05


@dataclass(frozen=True)
class Scale:
    """What a file says of its coordinates.

    Attributes:
        in_um: they are micrometres by the definition of the format or by their name.
        said: what the file says of um per coordinate unit, the best first.
        before_image: this goes before what the image file says.
        hint: more ways to know the scale of this format, for the error.
        to_image: (3, 3) from coordinate units to level-0 pixels of the image, where a file beside
            it says so; the manifest column image_transform takes its place.
        to_image_from: the name of that file.
    """

    in_um: bool = False
    said: tuple[Statement, ...] = ()
    before_image: bool = False
    hint: str = ""
    to_image: np.ndarray | None = None
    to_image_from: str = ""


@dataclass(frozen=True)
class Places:
    """Coordinates (S, 2) in level-0 pixels and in um, what is said of mpp, and what moved them."""

    xy_px0: np.ndarray
    xy_um: np.ndarray
    mpp: float
    scale: tuple[Statement, ...]
    image_transform: np.ndarray | None = None


def find_pair(names: Iterable[str]) -> tuple[str, str, bool] | None:
    """Return the columns of x and y, and whether they are micrometres by name; None: none."""
    known = set(names)
    pair = next((pair for pair in _PAIRS if known.issuperset(pair)), None)
    return None if pair is None else (*pair, pair[0].endswith("_um"))


def frame_xy(frame: pd.DataFrame) -> np.ndarray:
    """Coordinates (S, 2) of a table that holds nothing else: x and y by name, else in order."""
    named = frame.set_axis([str(name) for name in frame.columns], axis=1)
    pair = find_pair(named.columns)
    names = list(named.columns[:2]) if pair is None else list(pair[:2])
    return named[names].to_numpy(dtype=np.float64)


def require_pair(names: Iterable[str], where: str) -> tuple[str, str, bool]:
    """Return what `find_pair` finds.

    Raises:
        DataError: no pair of coordinate columns; lists the columns found.
    """
    known = list(map(str, names))
    pair = find_pair(known)
    if pair is None:
        raise DataError(
            f"{where} has no columns of coordinates; found {', '.join(known[:12]) or 'none'}; "
            f"expected one of these pairs: {'; '.join(f'{x}, {y}' for x, y in _PAIRS)}"
        )
    return pair


def number_pair(frame: pd.DataFrame, x: str, y: str) -> np.ndarray:
    """Return two columns as numbers, (S, 2) float64; NaN where a cell holds none."""
    return np.asarray(frame[[x, y]].apply(pd.to_numeric, errors="coerce"), dtype=np.float64)


def row_mpp(row: SlideRow) -> tuple[Statement, ...]:
    """What the manifest column mpp says."""
    return stated(row.mpp, "the manifest column mpp", of_image=True, decides=True)


def check_coordinates(xy: np.ndarray, barcodes: np.ndarray, where: str) -> None:
    """Check that every cell has its place.

    Raises:
        DataError: a coordinate is not finite (names the cells), or all are equal.
    """
    bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if len(bad):
        names = ", ".join(repr(str(name)) for name in barcodes[bad[:3]])
        raise DataError(
            f"{where}: {len(bad)} cells have no finite coordinates (first: {names}); "
            "remove these cells or give their coordinates"
        )
    if (xy == xy[:1]).all():
        x, y = xy[0]
        raise DataError(
            f"{where}: all {len(xy)} cells have the same coordinates ({x:g}, {y:g}); "
            "expected the place of each cell; look whether the right columns were read"
        )


def place(row: SlideRow, xy: np.ndarray, scale: Scale, image_mpp: float | None) -> Places:
    """Turn the coordinates of a file into level-0 pixels and micrometres.

    Without image ``xy_px0`` are the coordinates of the file and mpp is um per coordinate unit.
    With one, mpp is um per pixel of the image and ``image_scale`` (None: 1; coordinates in
    micrometres: 1 / mpp) pixels of the image per coordinate unit.

    Args:
        row: the manifest row.
        xy: (S, 2) coordinates of the file.
        scale: what the file says of them.
        image_mpp: mpp that the image file states.

    Raises:
        DataError: the scale is unknown, or contradicts micrometres.
    """
    if row.image is not None:
        return _place_on_image(row, xy, scale, image_mpp)
    if scale.in_um:
        if row.mpp is not None and abs(row.mpp - 1) > _SAME:
            raise DataError(
                f"the coordinates are in micrometres, but the manifest says mpp {row.mpp:g} "
                "(um per coordinate unit); leave mpp empty"
            )
        return Places(xy, xy, 1.0, row_mpp(row))
    unknown = f"the coordinates have no scale; give {_WAYS}{scale.hint}"
    said = require_scale((*row_mpp(row), *scale.said), unknown)
    return Places(xy, xy * said[0].mpp, said[0].mpp, said)


def _place_on_image(row: SlideRow, xy: np.ndarray, scale: Scale, image_mpp: float | None) -> Places:
    if scale.to_image is not None and not row.image_transform:
        return _place_by_matrix(row, xy, scale, image_mpp)
    own = [replace(one, mpp=one.mpp / (row.image_scale or 1.0)) for one in scale.said]
    image = stated(image_mpp, IMAGE_FILE, of_image=True)
    said = require_scale(
        (*row_mpp(row), *((*own, *image) if scale.before_image else (*image, *own))), _unknown(row)
    )
    mpp, per_unit = said[0].mpp, row.image_scale
    if scale.in_um:
        per_unit = 1 / mpp if per_unit is None else per_unit
        if abs(per_unit * mpp - 1) > _SAME:
            raise DataError(
                f"the coordinates are in micrometres: image_scale {per_unit:g} x mpp {mpp:g} "
                "must be 1; leave image_scale empty"
            )
    xy_px0 = xy if per_unit is None else xy * per_unit
    return Places(xy_px0, xy_px0 * mpp, mpp, said)


def _unknown(row: SlideRow) -> str:
    return (
        f"neither the image {row.image} nor the cells state it; give the manifest column mpp (um "
        "per pixel of the image)"
    )


def _place_by_matrix(
    row: SlideRow, xy: np.ndarray, scale: Scale, image_mpp: float | None
) -> Places:
    """Places where a file says how the image lies to the coordinates."""
    matrix, source = np.asarray(scale.to_image), scale.to_image_from
    if row.image_scale is not None:
        raise DataError(
            f"{source} says how the image lies to the coordinates, and image_scale is "
            f"{row.image_scale:g}; leave image_scale empty, or fill image_transform, which takes "
            f"the place of {source}"
        )
    units = (Statement(1.0, "coordinates in micrometres"),) if scale.in_um else scale.said
    per_unit = enlarges(matrix)
    implied = [
        replace(one, mpp=one.mpp / per_unit, source=f"{one.source} and {source}") for one in units
    ]
    image = stated(image_mpp, IMAGE_FILE, of_image=True)
    said = require_scale((*row_mpp(row), *image, *implied), _unknown(row))
    mpp = said[0].mpp
    before = np.diag([mpp, mpp, 1.0]) if scale.in_um else np.eye(3)
    xy_px0 = moved(xy, matrix)
    return Places(xy_px0, xy_px0 * mpp, mpp, said, matrix @ before)


def step_lengths(array: np.ndarray, xy_px: np.ndarray, step: tuple[int, int]) -> np.ndarray:
    """Distances in px of all spot pairs whose array positions differ by ``step``.

    Args:
        array: (S, 2) integer array positions, unique.
        xy_px: (S, 2) pixel positions.
        step: difference in array units, such as (0, 1).

    Returns:
        (P,) float64 lengths, one a pair.
    """
    low = array.min(axis=0) - 2
    width = int(array[:, 1].max() - low[1]) + 3
    key = (array[:, 0] - low[0]) * width + (array[:, 1] - low[1])
    order = np.argsort(key)
    wanted = key + step[0] * width + step[1]
    place = np.minimum(np.searchsorted(key[order], wanted), len(key) - 1)
    found = key[order][place] == wanted
    partner = order[place[found]]
    return np.asarray(np.linalg.norm(xy_px[partner] - xy_px[found], axis=1))


def step_px(array: np.ndarray, xy_px: np.ndarray) -> float | None:
    """Median pixels per array unit of a square grid or a checkerboard.

    Neighbours one unit apart are used; where an array has none (a checkerboard), neighbours two
    units apart count half.

    Returns:
        px per array unit, or None with fewer than three neighbouring pairs.
    """
    unit = row_step(array)
    lengths = _along_axes(array, xy_px, unit)
    return float(np.median(lengths)) / unit if len(lengths) >= _MIN_PAIRS else None


def row_step(array: np.ndarray) -> int:
    """Array units between neighbouring spots of a row or column: 2 on a checkerboard, else 1."""
    return 1 if len(_along_axes(array, array.astype(np.float64), 1)) >= _MIN_PAIRS else 2


def _along_axes(array: np.ndarray, xy_px: np.ndarray, unit: int) -> np.ndarray:
    steps = ((0, unit), (unit, 0))
    return np.concatenate([step_lengths(array, xy_px, step) for step in steps])


def hex_pitch_px(array: np.ndarray, xy_px: np.ndarray) -> float | None:
    """Centre-to-centre px of a hexagonal Visium lattice, or None when it is not one.

    On Visium arrays row + column is even, and the neighbours at (0, 2), (1, 1) and (1, -1) are
    equally far (within 5 %).
    """
    if ((array.sum(axis=1) % 2) != 0).any():
        return None
    lengths = [step_lengths(array, xy_px, step) for step in _HEX_STEPS]
    if min(map(len, lengths)) < _MIN_PAIRS:
        return None
    medians = [float(np.median(values)) for values in lengths]
    if max(medians) > _HEX_TOLERANCE * min(medians):
        return None
    return float(np.median(np.concatenate(lengths)))
