"""Format `csv`: a text table cells x genes, with a table of cells or with coordinates inside."""

from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.readers.cells import Cells, cell_format, cell_table, read_joined, without_index
from preprocessing.readers.coordinates import Scale, number_pair, require_pair
from preprocessing.readers.format import NO_BINS, NO_LAYERS, is_text
from preprocessing.readers.tables import pointed, read_header, read_wide_table
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable


def read_csv_cells(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read a text table of cells.

    With ``spots``, the two tables are joined as `read_joined` says. Without, the counts hold the
    coordinates: the columns up to the later one of them belong to the cell, those behind are genes.
    """
    if row.spots is None:
        cells, in_um = _one_table(row.counts_path)
        return cell_table(row, cells, Scale(in_um), image_mpp)
    cells, in_um, keys = read_joined(row.counts_path, row.spots)
    return cell_table(row, cells, Scale(in_um), image_mpp, keys)


def _one_table(path: Path) -> tuple[Cells, bool]:
    header = read_header(path)
    where = f"{path} (the manifest names no table of cells in the column spots)"
    x, y, in_um = require_pair(header.names, where)
    ends = [header.names.index(name) + 1 for name in (x, y)]
    if max(ends) == len(header.names):
        raise DataError(
            f"{path}: no genes behind the columns {x} and {y}; put id and coordinates before the "
            "genes, or give the coordinates as a table of cells in the column spots"
        )
    table = read_wide_table(header, max(ends))
    frame = table.ids
    notes: list[str] = []
    others = without_index(frame.drop(columns=[x, y]), notes)
    numbers = frame.columns.drop(list(others.columns[:1]))
    for name, texts in pointed(frame, numbers, header.separator, path):
        frame[name] = texts
    names = others.iloc[:, 0] if others.shape[1] else frame.index.astype(str).to_series()
    cells = Cells(
        table.values,
        np.asarray(names.to_numpy(dtype=object)),
        table.names,
        table.names,
        number_pair(frame, x, y),
        _typed(frame[others.columns[1:]]),
        notes,
    )
    return cells, in_um


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of numbers as numbers, (S, ...)."""
    numbers = frame.apply(pd.to_numeric, errors="coerce")
    whole = [name for name in frame.columns if (numbers[name].notna() | (frame[name] == "")).all()]
    return frame.assign(**{str(name): numbers[name] for name in whole})


FORMAT = cell_format(
    "csv",
    read_csv_cells,
    detect=lambda counts, spots: is_text(counts),
    forbids={**NO_BINS, **NO_LAYERS},
)
