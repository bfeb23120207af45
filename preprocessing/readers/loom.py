"""Loom files, read with h5py: genes x cells, attributes of the columns. Shapes: S cells."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from preprocessing.errors import DataError, did_you_mean
from preprocessing.readers.cells import OWN_PLACES, Cells, cell_format, cell_table
from preprocessing.readers.coordinates import Scale, find_pair, number_pair, require_pair
from preprocessing.readers.format import NO_BINS, file_name
from preprocessing.readers.hdf5 import (
    Node,
    column_names,
    files_with_cells,
    open_hdf5,
    read_frame,
    read_matrix,
    read_texts,
)
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable

_WHAT = "a loom file (groups matrix, row_attrs, col_attrs)"
_GENES = ("Gene", "gene", "gene_names", "GeneName", "var_names", "Name")
_IDS = ("Accession", "gene_ids", "EnsemblID")
_CELLS = ("CellID", "obs_names", "cell_id", "barcode")
_VALID = "Valid"


def read_loom(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one loom file.

    Cells whose column attribute Valid is 0 are left out. Coordinates are a pair of column
    attributes such as X and Y; mpp comes from the manifest unless they are named x_um and y_um.
    """
    path = row.counts_path
    with open_hdf5(path, _WHAT) as file:
        missing = [name for name in ("matrix", "row_attrs", "col_attrs") if name not in file]
        if missing:
            raise DataError(f"{path} has no {', '.join(missing)}; expected {_WHAT}")
        notes: list[str] = []
        columns, odd = read_frame(file["col_attrs"])
        if odd:
            notes.append(f"column attributes of several values a cell left out: {', '.join(odd)}")
        genes, spots = file["matrix"].shape
        names = _names(file["row_attrs"], _GENES)
        if names is None:
            found = ", ".join(file["row_attrs"]) or "none"
            raise DataError(
                f"{path}: no row attribute of gene names; found {found}; expected "
                f"{' or '.join(_GENES)}"
            )
        ids = _names(file["row_attrs"], _IDS)
        x, y, in_um = require_pair(columns.columns, f"{path}: col_attrs")
        if len(names) != genes or len(columns) != spots:
            raise DataError(
                f"{path}: matrix {genes} x {spots}, but {len(names)} gene names and "
                f"{len(columns)} cells; write it again"
            )
        counts = read_matrix(_matrix(file, row.layer, path), turned=True)
    name = next((n for n in _CELLS if n in columns.columns), None)
    used = [n for n in (x, y, name, _VALID) if n in columns.columns]
    cells = Cells(
        counts,
        _barcodes(columns, name),
        names if ids is None else ids,
        names,
        number_pair(columns, x, y),
        columns.drop(columns=used),
        notes,
    )
    return cell_table(row, _valid(cells, columns), Scale(in_um), image_mpp)


def _matrix(file: h5py.File, layer: str, path: Path) -> Node:
    """The layer that the manifest names, else the matrix."""
    if not layer:
        return file["matrix"]
    layers = file.get("layers", {})
    if layer not in layers:
        listed = f"found {', '.join(layers) or 'none'}"
        hint = did_you_mean(layer, list(layers), "did you mean", listed)
        raise DataError(f"{path} has no layer {layer!r} ({hint}); correct the column layer")
    return layers[layer]


def has_cells(path: Path) -> bool:
    """Tell whether a file is a loom file with coordinates."""
    if not h5py.is_hdf5(path):
        return False
    with open_hdf5(path, _WHAT) as file:
        attributes = file.get("col_attrs")
        if "matrix" not in file or attributes is None:
            return False
        return find_pair(column_names(attributes)) is not None


def _names(group: h5py.Group, choices: tuple[str, ...]) -> np.ndarray | None:
    name = next((n for n in choices if n in group), None)
    return None if name is None else read_texts(group[name])


def _barcodes(columns: pd.DataFrame, name: str | None) -> np.ndarray:
    texts = columns.index if name is None else columns[name]
    return np.array([str(v) for v in texts.tolist()], dtype=object)


def _valid(cells: Cells, columns: pd.DataFrame) -> Cells:
    if _VALID not in columns or columns[_VALID].dtype.kind not in "iufb":
        return cells
    good = (columns[_VALID] != 0).to_numpy()
    if good.all():
        return cells
    cells.notes.append(f"{int((~good).sum())} cells with {_VALID} 0 left out")
    return cells.take(np.flatnonzero(good))


FORMAT = cell_format(
    "loom",
    read_loom,
    detect=lambda counts, spots: file_name(counts).endswith(".loom"),
    discover=lambda folder: files_with_cells(folder, "loom", has_cells),
    forbids={**OWN_PLACES, **NO_BINS},
    layout=".loom files with coordinates",
)
