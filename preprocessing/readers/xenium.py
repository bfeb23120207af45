"""Xenium output folders: cell-feature matrix and cells, in micrometres by definition."""

from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.readers.cells import Cells, cell_format, cell_table
from preprocessing.readers.coordinates import Scale
from preprocessing.readers.tables import (
    first_names,
    match_rows,
    read_parquet,
    read_typed,
    require_columns,
)
from preprocessing.readers.tenx import matrix_files, read_tenx
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable

_MATRIX = "cell_feature_matrix"
_CELLS = ("cells.csv.gz", "cells.csv", "cells.parquet")
_PLACE = ["x_centroid", "y_centroid"]


def find_xenium_files(folder: Path) -> tuple[Path, Path]:
    """Return the matrix (file or folder) and the table of cells.

    Raises:
        DataError: one is not there; names what was looked for.
    """
    matrices = [folder / f"{_MATRIX}.h5", folder / _MATRIX]
    matrix = next((m for m in matrices if m.exists()), None)
    if matrix is None:
        raise DataError(
            f"{folder} holds no {_MATRIX}.h5 and no folder {_MATRIX}; give the output folder of "
            f"Xenium (a packed {_MATRIX}.tar.gz must be unpacked)"
        )
    cells = next((p for name in _CELLS if (p := folder / name).is_file()), None)
    if cells is None:
        raise DataError(f"{folder} holds none of {', '.join(_CELLS)}; copy it from the output")
    return matrix, cells


def read_xenium(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one Xenium folder; only genes stay (modality protein: only proteins)."""
    matrix_path, cells_path = find_xenium_files(row.counts_path)
    matrix = read_tenx(matrix_path, row.modality)
    frame = _read_cells(cells_path)
    notes = list(matrix.notes)
    rows, places = match_rows(
        matrix.barcodes,
        frame["cell_id"],
        f"no cell of {matrix_path} is in {cells_path} (matrix: {first_names(matrix.barcodes)}; "
        f"cells: {first_names(frame['cell_id'])}); they belong to different slides",
        notes,
        "cells without a place left out",
    )
    columns = frame.drop(columns=["cell_id", *_PLACE]).iloc[places].reset_index(drop=True)
    xy = frame[_PLACE].iloc[places].to_numpy(dtype=np.float64)
    cells = Cells.of_matrix(matrix, rows, xy, columns, notes)
    return cell_table(row, cells, Scale(in_um=True), image_mpp)


def _read_cells(path: Path) -> pd.DataFrame:
    frame = read_parquet(path) if path.suffix == ".parquet" else read_typed(path, ("cell_id",))
    require_columns(frame, ("cell_id", *_PLACE), path)
    ids = [v.decode() if isinstance(v, bytes) else str(v) for v in frame["cell_id"].tolist()]
    places = {name: pd.to_numeric(frame[name], errors="coerce") for name in _PLACE}
    frame = frame.assign(cell_id=ids, **places)
    if frame["cell_id"].duplicated().any():
        twice = frame.loc[frame["cell_id"].duplicated(), "cell_id"].iloc[0]
        raise DataError(f"{path}: cell {twice!r} occurs twice; keep one row a cell")
    return frame


def _sources(row: SlideRow) -> dict[str, Path]:
    matrix, cells = find_xenium_files(row.counts_path)
    return {**matrix_files(matrix), "spots": cells}


def _discover(folder: Path) -> list[SlideRow]:
    try:
        find_xenium_files(folder)
    except DataError:
        return []
    return [drafted_row(folder.resolve().name, folder, "xenium", technology="Xenium")]


FORMAT = cell_format(
    "xenium",
    read_xenium,
    sources=_sources,
    detect=lambda counts, spots: any(counts.glob(f"{_MATRIX}*")) and any(counts.glob("cells.*")),
    discover=_discover,
    layout="Xenium folders",
)
