"""SpatialData zarr folders: a table, and the shapes or points that it annotates.

Read with zarr and anndata; the package spatialdata is not needed. Nothing is unpickled: arrays that
name the codec pickle are refused. Shapes: n shapes or points.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError, did_you_mean
from preprocessing.image_transform import enlarges, moved
from preprocessing.readers.cells import OWN_PLACES, Cells, cell_format, cell_table
from preprocessing.readers.coordinates import Scale
from preprocessing.readers.format import NO_BINS
from preprocessing.readers.geometry import ragged_centroids, transform_matrix, wkb_centroids
from preprocessing.readers.joins import first_names, match_rows
from preprocessing.readers.parquet import read_parquet
from preprocessing.readers.tenx import wanted_features
from preprocessing.sections import Several
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable, allowed_values
from preprocessing.zarr_bounds import check_arrays

GLOBAL = "global"
_UM = ("micrometer", "micrometre", "micron", "um", "µm", "μm")
_KINDS = {"POINT": 0, "POLYGON": 3, "MULTIPOLYGON": 6}
_TABLES = ("tables", "table")
_ROOT = (".zgroup", ".zattrs", ".zmetadata", "zarr.json")
_OBSM = "spatial"
_SAME = 1e-9
_HINT = (
    "; a section that spatialdata-io read from Xenium is in pixels of 0.2125 um (mpp 0.2125), one "
    "from Visium in pixels of its image"
)
_Raw = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # ids, centres, radii


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


def read_element(
    root: Path, name: str, shared: Mapping[str, np.ndarray] | None = None
) -> Element | None:
    """Read the shapes or points of this name; None where there are none (labels, nothing).

    ``shared``: the coordinate systems of the image, if there is one; the element is put into one
    that both have.

    Raises:
        DataError: damaged, another kind of shape or transformation, or pyarrow is missing.
    """
    folder = element_folder(root, name)
    if folder is None:
        return None
    check_arrays(folder)
    read = _shapes if folder.parent.name == "shapes" else _points
    with damage_named(folder):
        return _placed(folder, shared, *read(folder))


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
    attrs: Any = group.attrs.get("spatialdata_attrs", {})
    if "coords" not in group or "Index" not in group:
        raise DataError(f"{folder} has neither shapes.parquet nor coords and Index")
    kind = _KINDS.get(str(attrs.get("geos", {}).get("name", "POINT")), -1)
    names = sorted(key for key in group if key.startswith("offset"))
    offsets = [np.asarray(group[key]) for key in names]
    centres = ragged_centroids(np.asarray(group["coords"]), offsets, kind, str(folder))
    radius = np.asarray(group["radius"], dtype=np.float64) if "radius" in group else None
    return _texts(pd.Index(np.asarray(group["Index"]))), centres, radius


def _points(folder: Path) -> _Raw:
    frame = read_parquet(folder / "points.parquet")
    missing = [name for name in "xy" if name not in frame]
    if missing:
        raise DataError(f"{folder}: points without the column {missing[0]}")
    return _texts(frame.index), frame[["x", "y"]].to_numpy(np.float64), None


def _texts(values: Any) -> np.ndarray:
    decoded = (v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in list(values))
    return np.array([str(value) for value in decoded], dtype=object)


def _placed(
    folder: Path,
    shared: Mapping[str, np.ndarray] | None,
    ids: np.ndarray,
    xy: np.ndarray,
    radius: np.ndarray | None,
) -> Element:
    """Put an element into the system "global", another of the image's, or the only one it has."""
    import zarr

    if len(ids) != len(xy):
        raise DataError(f"{folder}: {len(ids)} ids for {len(xy)} shapes; copy the folder again")
    stored: Any = zarr.open_group(str(folder), mode="r").attrs.get("coordinateTransformations")
    outputs = _by_system(stored)
    usable = [name for name in outputs if shared is None or name in shared]
    if not usable:
        several = len(outputs) > 1 and GLOBAL not in outputs
        raise DataError(
            f"{folder} has the coordinate systems {', '.join(outputs)}, the image "
            f"{', '.join(shared or ())}: none in common; "
            + "write it with one transformation, and "
            * several
            + "say in the manifest column image_transform what takes the places to the image "
            "(shift:0 0 if nothing does)"
        )
    name = GLOBAL if GLOBAL in usable else usable[0]
    if name != GLOBAL and shared is None and len(outputs) > 1:
        raise DataError(
            f"{folder} has the coordinate systems {', '.join(outputs)}; expected {GLOBAL!r} or "
            "one only: write it with one transformation"
        )
    matrix = _matrix(folder, outputs[name])
    axes = outputs[name].get("output", {}).get("axes") or []
    units = [axis.get("unit") for axis in axes if axis.get("name") in ("x", "y")]
    in_um = bool(units) and all(unit in _UM for unit in units)
    placed = moved(xy, matrix)
    return Element(ids, placed, None if radius is None else radius * enlarges(matrix), in_um, name)


def _by_system(told: Any) -> dict[str, Mapping[str, Any]]:
    """Transformations by the name of the system that they lead to; without any, to "global"."""
    told = told or [{"type": "identity", "output": {"name": GLOBAL}}]
    return {str((one.get("output") or {}).get("name", GLOBAL)): one for one in told}


def _matrix(folder: Path, told: Mapping[str, Any], axes: Sequence[str] = ("x", "y")) -> np.ndarray:
    try:
        return transform_matrix(told, axes)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{folder}: its transformation is not read ({error})") from error


def image_frames(root: Path, image: Path | None) -> dict[str, np.ndarray] | None:
    """Of an image of a folder: coordinate system -> (3, 3) from pixels of its level 0; else None.

    Raises:
        DataError: several images, of which none is named, or a transformation that is not read.
    """
    import zarr

    images = (root / "images").resolve()
    if image is None or not image.resolve().is_relative_to(root.resolve()):
        return None
    known = sorted(p for p in images.iterdir() if p.is_dir()) if images.is_dir() else []
    inside = [p for p in known if p == image.resolve() or p.is_relative_to(image.resolve())]
    if len(inside) != 1:
        listed = ", ".join(f"images/{path.name}" for path in known) or "no images"
        raise DataError(f"{image} is not one image; {root} has {listed}: name one of them")
    folder = inside[0]
    check_arrays(folder)
    with damage_named(folder):
        attrs: Any = zarr.open_group(str(folder), mode="r").attrs.asdict()
        scales = attrs.get("ome", attrs)["multiscales"][0]
        axes = [str(one["name"]) for one in scales["axes"]]
        level = scales["datasets"][0].get("coordinateTransformations") or []
        first = _matrix(folder, {"type": "sequence", "transformations": level}, axes)
        told = _by_system(scales.get("coordinateTransformations"))
        return {name: _matrix(folder, one, axes) @ first for name, one in told.items()}


def _tables(root: Path) -> dict[str, Path]:
    for name in _TABLES:
        if (root / name).is_dir():
            return {p.name: p for p in sorted((root / name).iterdir()) if (p / "X").exists()}
    return {}


def _find(counts: Path) -> tuple[Path, Path]:
    """The root and the table; ``counts`` is one of them."""
    if counts.parent.name in _TABLES and (counts / "X").exists():
        return counts.parent.parent, counts
    found = _tables(counts)
    if not found:
        raise DataError(f"{counts} holds no tables; expected a SpatialData zarr folder")
    if len(found) > 1 and "table" not in found:
        raise DataError(
            f"{counts} holds the tables {', '.join(found)}; give one of them as counts, such as "
            f"{next(iter(found.values()))}"
        )
    return counts, found.get("table", next(iter(found.values())))


def _sources(row: SlideRow) -> dict[str, Path]:
    root, table = _find(row.counts_path)
    _require_zarr(row)
    attrs = _attrs(table)
    places = (element_folder(root, region) for region in _regions(attrs))
    return {"counts": table} | {f"shapes/{p.name}": p for p in places if p is not None}


def _attrs(table: Path) -> Mapping[str, Any]:
    """What a table says of the elements that it annotates."""
    import anndata
    import zarr

    check_arrays(table)
    with damage_named(table):
        stored = zarr.open_group(str(table), mode="r").get("uns/spatialdata_attrs")
        found: Mapping[str, Any] = {} if stored is None else anndata.io.read_elem(stored)
    return found


def _regions(attrs: Mapping[str, Any]) -> list[str]:
    """Names of the elements that a table annotates."""
    return [str(name) for name in np.atleast_1d(attrs["region"])] if "region" in attrs else []


def _require_zarr(row: SlideRow) -> None:
    if importlib.util.find_spec("zarr") is None:
        raise DataError(
            f"{row.counts} is a zarr folder, which needs zarr: pip install 'hibio[spatialdata]'"
        )


def read_spatialdata(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one table of a SpatialData folder.

    The places are the centres of the shapes (or the points) that the table annotates, in the
    coordinate system "global"; without them obsm['spatial']. They are micrometres where the unit
    of that system says so, else the manifest's mpp is needed. An image of the folder is laid under
    them by its own transformation to that system, or another that both have.
    """
    _require_zarr(row)
    import anndata

    root, table = _find(row.counts_path)
    check_arrays(table)
    with damage_named(table):
        data: Any = anndata.io.read_zarr(table)
    data, region, row = _one_region(data, row, table)
    notes: list[str] = []
    counts, source = _counts(data, row, table)
    notes.append(f"counts are {source}")
    ids = data.var.get("gene_ids", data.var_names)
    names, ids = _texts(data.var_names), _texts(ids)
    if "feature_types" in data.var:
        kinds = _texts(data.var["feature_types"])
        kept, left_out = wanted_features(kinds, row.modality, str(table))
        counts, ids, names = counts[:, kept], ids[kept], names[kept]
        notes += left_out
    attrs = data.uns.get("spatialdata_attrs", {})
    frames = None if row.image_transform else image_frames(root, row.image)
    element = None if region is None else read_element(root, region, frames)
    keys = [str(attrs[key]) for key in ("region_key", "instance_key") if key in attrs]
    columns = data.obs.drop(columns=[k for k in keys if k in data.obs]).reset_index(drop=True)
    barcodes = _texts(data.obs_names)
    rows, xy, in_um = _places(data, element, attrs, table, notes)
    if len(rows) < len(barcodes):
        counts, barcodes = counts[rows], barcodes[rows]
        columns = columns.iloc[rows].reset_index(drop=True)
    cells = Cells(counts, barcodes, ids, names, xy, columns, notes)
    scale = Scale(in_um, hint=_HINT)
    per_unit = row.image_scale or 1.0
    if element is not None and frames is not None and row.image is not None:
        to_image = np.linalg.inv(frames[element.system])
        if np.abs(to_image - np.eye(3)).max() > _SAME:
            name = f"the transformations of {row.image.name} and its shapes to {element.system!r}"
            scale = replace(scale, to_image=to_image, to_image_from=name)
            per_unit = enlarges(to_image)
    result = cell_table(row, cells, scale, image_mpp)
    if element is None or element.radius is None or row.pitch_um is not None:
        return result
    unit_um = 1.0 if in_um else result.mpp * per_unit
    return replace(result, diameter_um=float(2 * np.median(element.radius) * unit_um))


def _counts(data: Any, row: SlideRow, table: Path) -> tuple[csr_matrix, str]:
    """The layer of the row, else the first matrix of its modality; else X, refused by value."""
    if row.layer and row.layer not in ("X", "raw.X"):
        if row.layer not in data.layers:
            names = [name for name in data.layers if name]  # None is X: anndata 0.13
            listed = f"found {', '.join(names) or 'none'}"
            hint = did_you_mean(row.layer, names, "did you mean", listed)
            raise DataError(f"{table} has no layer {row.layer!r} ({hint}); correct it")
        return csr_matrix(data.layers[row.layer]), f"layers['{row.layer}']"
    raw = data.raw
    sources = {
        "X": data.X,
        "layers['counts']": data.layers.get("counts"),
        "raw.X": raw.X if raw is not None and raw.shape == data.shape else None,
    }
    asked = {row.layer} if row.layer else set(sources)
    found = {k: csr_matrix(m) for k, m in sources.items() if m is not None and k in asked}
    if not found:
        raise DataError(f"{table} has neither X nor layers['counts']; expected raw counts")
    for name, matrix in found.items():
        if allowed_values(matrix.data, row.modality):
            return matrix, name
    return next(iter(found.items()))[::-1]


def _one_region(data: Any, row: SlideRow, table: Path) -> tuple[Any, str | None, SlideRow]:
    """The rows of a table that annotate one element, its name, and the row without a section.

    Raises:
        DataError: it annotates several, and the manifest's section names none of them.
    """
    attrs = data.uns.get("spatialdata_attrs", {})
    regions = _regions(attrs)
    if len(regions) < 2:
        return data, next(iter(regions), None), row
    key = str(attrs.get("region_key", "region"))
    values = _texts(data.obs[key]) if key in data.obs else np.full(len(data.obs), "")
    name, _, value = row.section.partition("=")
    if name == key and value in regions:
        return data[values == value], value, replace(row, section="")
    told = f"the table annotates {', '.join(regions[:6])}"
    raise Several(told, key, {one: int((values == one).sum()) for one in regions}).error(table)


def _places(
    data: Any, element: Element | None, attrs: Any, table: Path, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Rows of the table that have a place, their places (S, 2), and whether they are um."""
    if element is None:
        if _OBSM not in data.obsm:
            raise DataError(
                f"{table} annotates no shapes or points of its folder and has no obsm['spatial']; "
                "expected the places of the cells"
            )
        notes.append("places are obsm['spatial']")
        xy = np.asarray(data.obsm[_OBSM], dtype=np.float64)
        return np.arange(len(xy)), xy[:, :2], False
    key = str(attrs.get("instance_key", ""))
    if key not in data.obs:
        raise DataError(f"{table}: the column {key!r} that names the shapes is not in obs")
    index = pd.Index(element.ids)
    if not index.is_unique:
        raise DataError(f"{table}: {index[index.duplicated()][0]!r} names two shapes; name each")
    keys = _texts(data.obs[key])
    rows, places = match_rows(
        keys,
        index,
        f"no row of {table} has a shape (column {key}: {first_names(keys)}; shapes: "
        f"{first_names(element.ids)})",
        notes,
        "cells without a shape left out",
    )
    notes.append(f"places are centres in the coordinate system {element.system!r}")
    return rows, element.xy[places], element.in_um


def _detect(counts: Path, spots: Path | None) -> bool:
    root = counts.parent.parent if counts.parent.name in _TABLES else counts
    return counts.is_dir() and any((root / name).is_dir() for name in _TABLES)


def _discover(folder: Path) -> list[SlideRow]:
    """A zarr group with tables."""
    if not any((folder / name).is_file() for name in _ROOT) or not _tables(folder):
        return []
    name, regions, key = folder.resolve().name.removesuffix(".zarr"), [], ""
    with suppress(DataError, ImportError):  # `prepare` says what is wrong
        attrs = _attrs(_find(folder)[1])
        regions, key = _regions(attrs), str(attrs.get("region_key", "region"))
    if len(regions) < 2:
        return [drafted_row(name, folder, "spatialdata")]
    return [
        drafted_row(f"{name}_{one}", folder, "spatialdata", section=f"{key}={one}")
        for one in regions
    ]


FORMAT = cell_format(
    "spatialdata",
    read_spatialdata,
    sources=_sources,
    detect=_detect,
    discover=_discover,
    forbids={**OWN_PLACES, **NO_BINS},
    layout="SpatialData zarr",
    whole=True,
)
