"""SpatialData zarr folders: a table, and the shapes or points that it annotates.

Read with zarr and anndata; the package spatialdata is not needed.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.manifest import SlideRow
from preprocessing.modality import PROTEIN
from preprocessing.readers.cells import Cells, cell_table
from preprocessing.readers.coordinates import Scale
from preprocessing.readers.features import wanted_features
from preprocessing.readers.spatial_elements import (
    Element,
    check_codecs,
    damage_named,
    element_folder,
    read_element,
)
from preprocessing.spot_table import SpotTable, whole_counts

_TABLES = ("tables", "table")
_ROOT = (".zgroup", ".zattrs", ".zmetadata", "zarr.json")
_OBSM = "spatial"
_HINT = (
    "; a section that spatialdata-io read from Xenium is in pixels of 0.2125 um (mpp 0.2125), one "
    "from Visium in pixels of its image"
)


def is_spatialdata(folder: Path) -> bool:
    """Tell whether a folder is a zarr group with tables."""
    return any((folder / name).is_file() for name in _ROOT) and bool(_tables(folder))


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


def source_files(row: SlideRow) -> dict[str, Path]:
    """Return the folders that `read_spatialdata` reads (image and labels excluded), by role."""
    root, table = _find(row.counts_path)
    _require_zarr(row)
    import anndata
    import zarr

    check_codecs(table)
    with damage_named(table):
        stored = zarr.open_group(str(table), mode="r").get("uns/spatialdata_attrs")
        attrs = {} if stored is None else anndata.io.read_elem(stored)
    regions = np.atleast_1d(attrs["region"]).tolist() if "region" in attrs else []
    places = (element_folder(root, str(region)) for region in regions)
    return {"counts": table} | {f"shapes/{p.name}": p for p in places if p is not None}


def _require_zarr(row: SlideRow) -> None:
    if importlib.util.find_spec("zarr") is None:
        raise DataError(
            f"{row.counts} is a zarr folder, which needs zarr: pip install zarr (or hibio with "
            "its extra 'spatialdata')"
        )


def read_spatialdata(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one table of a SpatialData folder.

    The places are the centres of the shapes (or the points) that the table annotates, in the
    coordinate system "global"; without them obsm['spatial']. They are micrometres where the unit
    of that system says so, else the manifest's mpp is needed.

    Args:
        row: the manifest row; ``counts`` is the zarr folder, or tables/<name> in it.
        image_mpp: mpp that the image file states, um per level-0 px.

    Raises:
        DataError: not such a folder, several sections, no raw counts, no places or no scale.
    """
    _require_zarr(row)
    root, table = _find(row.counts_path)
    data = _read_table(table)
    notes: list[str] = []
    counts, source = _counts(data, row.modality, table)
    notes.append(f"counts are {source}")
    ids = data.var.get("gene_ids", data.var_names)
    names, ids = _strings(data.var_names), _strings(ids)
    if "feature_types" in data.var:
        kinds = _strings(data.var["feature_types"])
        kept, left_out = wanted_features(kinds, row.modality, str(table))
        counts, ids, names = counts[:, kept], ids[kept], names[kept]
        notes += left_out
    attrs = data.uns.get("spatialdata_attrs", {})
    element = _element(root, table, attrs)
    keys = [str(attrs[key]) for key in ("region_key", "instance_key") if key in attrs]
    columns = data.obs.drop(columns=[k for k in keys if k in data.obs]).reset_index(drop=True)
    barcodes = _strings(data.obs_names)
    rows, xy, in_um = _places(data, element, attrs, table, notes)
    cells = Cells(counts, barcodes, ids, names, xy, columns, notes)
    cells = cells if len(rows) == len(barcodes) else replace(cells, xy=_spread(xy, rows, barcodes))
    cells = cells if len(rows) == len(barcodes) else cells.take(rows)
    result = cell_table(row, cells, Scale(in_um, hint=_HINT), image_mpp)
    if element is None or element.radius is None or row.pitch_um is not None:
        return result
    unit_um = 1.0 if in_um else result.mpp * (row.image_scale or 1.0)
    return replace(result, diameter_um=float(2 * np.median(element.radius) * unit_um))


def _spread(xy: np.ndarray, rows: np.ndarray, barcodes: np.ndarray) -> np.ndarray:
    """Places of all cells, (S, 2), NaN for those without; ``xy`` belongs to ``rows``."""
    result = np.full((len(barcodes), 2), np.nan)
    result[rows] = xy
    return result


def _read_table(table: Path) -> Any:
    import anndata

    check_codecs(table)
    with damage_named(table):
        return anndata.io.read_zarr(table)


def _counts(data: Any, modality: str, table: Path) -> tuple[csr_matrix, str]:
    """The first matrix that holds what the modality asks for; else X, to be refused by value."""
    raw = data.raw
    sources = {
        "X": data.X,
        "layers['counts']": data.layers.get("counts"),
        "raw.X": raw.X if raw is not None and raw.shape == data.shape else None,
    }
    found = {name: csr_matrix(m) for name, m in sources.items() if m is not None}
    if not found:
        raise DataError(f"{table} has neither X nor layers['counts']; expected raw counts")
    for name, matrix in found.items():
        values = matrix.data
        fits = (values >= 0).all() if modality == PROTEIN else whole_counts(values).all()
        if fits:
            return matrix, name
    return next(iter(found.items()))[::-1]


def _element(root: Path, table: Path, attrs: Any) -> Element | None:
    regions = np.atleast_1d(attrs["region"]).tolist() if "region" in attrs else []
    if len(regions) > 1:
        raise DataError(
            f"{table} annotates {len(regions)} sections ({', '.join(map(str, regions[:4]))}); "
            "write one folder a section"
        )
    return read_element(root, str(regions[0])) if regions else None


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
    found = index.get_indexer(pd.Index(_strings(data.obs[key])))
    rows = np.flatnonzero(found >= 0)
    if len(rows) == 0:
        raise DataError(
            f"no row of {table} has a shape (column {key}: {', '.join(map(str, data.obs[key][:2]))}"
            f"; shapes: {', '.join(element.ids[:2])})"
        )
    if len(rows) < len(found):
        notes.append(f"{len(found) - len(rows)} cells without a shape left out")
    notes.append(f"places are centres in the coordinate system {element.system!r}")
    return rows, element.xy[found[rows]], element.in_um


def _strings(values: Any) -> np.ndarray:
    return np.array([str(value) for value in list(values)], dtype=object)
