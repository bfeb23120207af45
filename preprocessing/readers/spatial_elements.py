"""Shapes and points of SpatialData zarr folders: ids and centres in a common coordinate system.

Nothing is unpickled: arrays that name the codec pickle are refused. Shapes: n shapes or points.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.readers.geometry import ragged_centroids, transform_matrix, wkb_centroids
from preprocessing.readers.parquet import read_parquet

GLOBAL = "global"
_UM = ("micrometer", "micrometre", "micron", "um", "µm", "μm")
_METADATA = (".zarray", ".zmetadata", "zarr.json")
_KINDS = {"POINT": 0, "POLYGON": 3, "MULTIPOLYGON": 6}


@dataclass(frozen=True)
class Element:
    """A set of shapes or points.

    Attributes:
        ids: (n,) str.
        xy: (n, 2) centres in the coordinate system ``system``.
        radius: (n,) of circles in units of that system, or None.
        in_um: that system is in micrometres by its unit.
        system: its name.
    """

    ids: np.ndarray
    xy: np.ndarray
    radius: np.ndarray | None
    in_um: bool
    system: str


def check_codecs(folder: Path) -> None:
    """Check that no array below a zarr folder would be unpickled.

    Raises:
        DataError: one would, or its metadata are no JSON.
    """
    for place, _, names in os.walk(folder):
        for name in set(names) & set(_METADATA):
            path = Path(place) / name
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise DataError(f"{path} is damaged ({error}); copy the folder again") from error
            if any("pickle" in codec for codec in _codecs(content)):
                raise DataError(
                    f"{path} holds pickled objects, which are not read; write numbers and texts "
                    "(current versions of anndata do)"
                )


def _codecs(content: object) -> Iterator[str]:
    """Names of everything that looks like a codec."""
    if isinstance(content, Mapping):
        for key in ("id", "name"):
            if isinstance(content.get(key), str):
                yield content[key].lower()
        for value in content.values():
            yield from _codecs(value)
    elif isinstance(content, list):
        for value in content:
            yield from _codecs(value)


def read_element(root: Path, name: str) -> Element | None:
    """Read the shapes or points of this name; None where there are none (labels, nothing).

    Raises:
        DataError: damaged, another kind of shape or transformation, or pyarrow is missing.
    """
    folder = element_folder(root, name)
    if folder is None:
        return None
    check_codecs(folder)
    read = _shapes if folder.parent.name == "shapes" else _points
    with damage_named(folder):
        return _placed(folder, *read(folder))


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Turn the many kinds of errors that zarr and its codecs raise into a DataError."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{folder} asks for more memory than there is ({error})") from error
    except Exception as error:
        raise DataError(
            f"{folder} is damaged, or not as SpatialData writes it ({type(error).__name__}: "
            f"{error}); copy the folder again"
        ) from error


def element_folder(root: Path, name: str) -> Path | None:
    """The folder of the shapes or points of this name; a name is never taken for a path."""
    for kind in ("shapes", "points"):
        folders = (root / kind).iterdir() if (root / kind).is_dir() else ()
        found = next((p for p in folders if p.name == name and p.is_dir()), None)
        if found is not None:
            return found
    return None


_Raw = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # ids, centres, radii


def _shapes(folder: Path) -> _Raw:
    table = folder / "shapes.parquet"
    if not table.exists():
        return _ragged_shapes(folder)
    frame = read_parquet(table)
    if "geometry" not in frame:
        raise DataError(f"{table} has no column geometry; found {', '.join(map(str, frame))}")
    centres = wkb_centroids(frame["geometry"].tolist(), str(table))
    radius = frame["radius"].to_numpy(np.float64) if "radius" in frame else None
    return _texts(frame.index), centres, radius


def _ragged_shapes(folder: Path) -> _Raw:
    """Shapes as SpatialData wrote them before version 0.2: coords, Index, offsets."""
    import zarr

    group = zarr.open_group(str(folder), mode="r")
    attrs = _attributes(folder).get("spatialdata_attrs", {})
    if "coords" not in group or "Index" not in group:
        raise DataError(f"{folder} has neither shapes.parquet nor coords and Index")
    kind = _KINDS.get(str(attrs.get("geos", {}).get("name", "POINT")), -1)
    names = sorted(key for key in group if key.startswith("offset"))
    offsets = [np.asarray(group[key]) for key in names]
    centres = ragged_centroids(np.asarray(group["coords"]), offsets, kind, str(folder))
    radius = np.asarray(group["radius"], dtype=np.float64) if "radius" in group else None
    return _texts(pd.Index(np.asarray(group["Index"]))), centres, radius


def _attributes(folder: Path) -> dict[str, Any]:
    """Attributes of a zarr group, of either zarr format."""
    import zarr

    return dict(zarr.open_group(str(folder), mode="r").attrs)


def _points(folder: Path) -> _Raw:
    frame = read_parquet(folder / "points.parquet")
    missing = [name for name in "xy" if name not in frame]
    if missing:
        raise DataError(f"{folder}: points without the column {missing[0]}")
    return _texts(frame.index), frame[["x", "y"]].to_numpy(np.float64), None


def _texts(index: Any) -> np.ndarray:
    values = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in index.tolist()]
    return np.array([str(value) for value in values], dtype=object)


def _placed(folder: Path, ids: np.ndarray, xy: np.ndarray, radius: np.ndarray | None) -> Element:
    """Put an element into the system "global", or the only one that it has."""
    if len(ids) != len(xy):
        raise DataError(f"{folder}: {len(ids)} ids for {len(xy)} shapes; copy the folder again")
    told = _attributes(folder).get("coordinateTransformations") or [
        {"type": "identity", "output": {"name": GLOBAL}}
    ]
    outputs = {str(t.get("output", {}).get("name", GLOBAL)): t for t in told}
    name = GLOBAL if GLOBAL in outputs else next(iter(outputs))
    if name != GLOBAL and len(outputs) > 1:
        raise DataError(
            f"{folder} has the coordinate systems {', '.join(outputs)}; expected {GLOBAL!r} or "
            "one only: write it with one transformation"
        )
    try:
        matrix = transform_matrix(outputs[name])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{folder}: its transformation is not read ({error})") from error
    axes = outputs[name].get("output", {}).get("axes") or []
    units = [axis.get("unit") for axis in axes if axis.get("name") in ("x", "y")]
    scale = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    placed = xy @ matrix[:2, :2].T + matrix[:2, 2]
    in_um = bool(units) and all(unit in _UM for unit in units)
    return Element(ids, placed, None if radius is None else radius * scale, in_um, name)
