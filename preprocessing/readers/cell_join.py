"""Counts and places of cells from two text tables that share their id columns."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.readers.cells import Cells
from preprocessing.readers.coordinates import find_pair, require_pair
from preprocessing.readers.wide_table import Header, read_header, read_typed, read_wide_table

_FIRST = 8  # ids stand among the first columns of a counts table
_ID_NAMES = ("barcode", "cell_id", "cell_ID", "CellID", "cell", "Cell", "row_name", "")


def read_joined(
    counts: Path, spots: Path, keys: Sequence[str] | None = None
) -> tuple[Cells, bool, tuple[str, ...]]:
    """Read a table cells x genes and a table of cells with coordinates, and join them.

    The key are the columns among the first eight of the counts that the table of cells has too;
    else the first column of the counts and the table's column of barcodes (or its first). Counts
    that are genes x cells are turned round.

    Args:
        counts: ids, then one column a gene.
        spots: ids, coordinates, and what else is known of a cell.
        keys: the columns of the key, where the format names them.

    Returns:
        The cells that are in both, whether the coordinates are micrometres by name, and the key.

    Raises:
        DataError: no shared cell, a cell occurs twice, no coordinates, or bad numbers.
    """
    header, known = read_header(counts), read_header(spots)
    x, y, in_um = require_pair(known.names, str(spots))
    shared, n_ids = _shared(header, known, (x, y)) if keys is None else _named(header, known, keys)
    table = read_wide_table(header, n_ids)
    own = shared or (_id_column(known, (x, y)),)
    frame = read_typed(spots, own)
    cell_keys = _joined(frame, own)
    count_keys = _joined(table.ids, shared or (str(table.ids.columns[0]),))
    values, genes, notes = table.values, table.names, []
    if not shared and not set(count_keys) & set(cell_keys) and set(genes) & set(cell_keys):
        values, count_keys, genes = csr_matrix(values.T), genes, count_keys
        notes.append("counts were genes x cells; turned round")
    for path, names in ((counts, count_keys), (spots, cell_keys)):
        _check_once(path, names)
    rows, places = _match(counts, spots, count_keys, cell_keys, notes)
    xy = frame[[x, y]].iloc[places].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    columns = frame.drop(columns=[x, y, *own]).iloc[places].reset_index(drop=True)
    cells = Cells(values[rows], count_keys[rows], genes, genes, xy, columns, notes)
    return cells, in_um, shared


def _shared(header: Header, known: Header, pair: tuple[str, str]) -> tuple[tuple[str, ...], int]:
    """The shared id columns, and how many columns of the counts stand before the genes."""
    candidates = [n for n in header.names[:_FIRST] if n and n in known.names and n not in pair]
    if not candidates:
        return (), 1
    end = header.names.index(candidates[-1]) + 1
    inside = find_pair(header.names[:_FIRST])
    if inside is not None:
        end = max(end, *(header.names.index(name) + 1 for name in inside[:2]))
    return tuple(candidates), end


def _named(header: Header, known: Header, keys: Sequence[str]) -> tuple[tuple[str, ...], int]:
    for found in (header, known):
        missing = [key for key in keys if key not in found.names]
        if missing:
            raise DataError(
                f"{found.path}: column {', '.join(missing)} is missing; found "
                f"{', '.join(found.names[:8])}; expected {', '.join(keys)}"
            )
    end = max(header.names.index(key) for key in keys) + 1
    extra = [i + 1 for i, name in enumerate(header.names[:_FIRST]) if name in known.names]
    return tuple(keys), max([end, *extra])


def _id_column(known: Header, pair: tuple[str, str]) -> str:
    names = [name for name in known.names if name not in pair]
    return next((n for n in _ID_NAMES if n in names), names[0] if names else known.names[0])


def _joined(frame: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    texts = frame[list(columns)].fillna("").astype(str)
    joined = texts.iloc[:, 0].str.strip()
    for name in columns[1:]:
        joined = joined + "_" + texts[name].str.strip()
    return np.asarray(joined.to_numpy(dtype=object))


def _check_once(path: Path, names: np.ndarray) -> None:
    index = pd.Index(names)
    if not index.is_unique:
        twice = index[index.duplicated()]
        raise DataError(
            f"{path}: {len(twice)} ids occur twice (first: {twice[0]!r}); keep one row a cell, "
            "with all the columns that tell cells apart (such as fov and cell_ID)"
        )


def _match(
    counts: Path, spots: Path, count_keys: np.ndarray, cell_keys: np.ndarray, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the counts and of the cells that belong together, (S,) each."""
    found = pd.Index(cell_keys).get_indexer(pd.Index(count_keys))
    rows = np.flatnonzero(found >= 0)
    if len(rows) == 0:
        raise DataError(
            f"no cell of {counts} is in {spots} (counts: {', '.join(map(str, count_keys[:2]))}; "
            f"cells: {', '.join(map(str, cell_keys[:2]))}); both need the same id columns"
        )
    if len(rows) < len(count_keys):
        notes.append(
            f"{len(count_keys) - len(rows)} cells of {counts.name} without a place left out"
        )
    if len(rows) < len(cell_keys):
        notes.append(f"{len(cell_keys) - len(rows)} cells of {spots.name} without counts left out")
    return rows, found[rows]
