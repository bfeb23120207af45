"""Labels and measurements per spot from a text table, joined by barcode or array position."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.readers.joins import alike, first_names
from preprocessing.readers.tables import MISSING, number_column, read_table
from preprocessing.slide_row import SlideRow

_PLACES = re.compile(r"(new_|pixel_|warped_)?[xy]|selected|row[._]names?|unnamed: 0|", re.I)
CODED = re.compile(r"(label|cluster|domain|region|layer|annotation|class|type|group)s?$", re.I)


def read_labels(
    path: Path, barcodes: np.ndarray, array: np.ndarray | None = None, keys: Sequence[str] = ()
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Read the labels of the spots ``barcodes``.

    The key is the column "barcode"; else the columns ``keys``; else x and y rounded to the array
    position (legacy ST); else the first column. Columns of numbers become measurements (float,
    missing NaN), except whole numbers in a column named like a code (label, cluster, domain,
    region, layer, annotation, class, type, group), which stay categories; all others are
    categories (str, missing ""). Empty cells and NA are missing; columns of coordinates are not
    taken over.

    Args:
        path: CSV or TSV, gzipped or not.
        barcodes: (S,) barcodes of the slide.
        array: (S, 2) integer array positions, where the slide has them.
        keys: columns whose texts, joined by "_", make up a barcode, such as fov and cell_ID.

    Returns:
        (S, columns) table in the order of ``barcodes``, and notes on rows left out.

    Raises:
        DataError: no row belongs to a spot of the slide, or a spot has two different rows.
    """
    frame = read_table(path, ids=lambda names: _id_columns(names, array, keys))
    frame = frame.replace(dict.fromkeys(MISSING, ""))
    if frame.empty or frame.shape[1] == 0:
        raise DataError(f"labels {path} has no rows; expected one a spot")
    names, wanted, values, notes = _join_keys(path, frame, barcodes, array, keys)
    known = names != ""
    if not known.all():
        notes.append(f"labels: {int((~known).sum())} rows without a key left out")
    values, names = values[known].copy(), names[known]
    values.insert(0, "__key__", names)
    values = values.drop_duplicates()
    twice = values["__key__"].duplicated()
    if twice.any():
        raise DataError(
            f"labels {path}: {int(twice.sum())} spots have two different rows (first: "
            f"{values.loc[twice, '__key__'].iloc[0]}); keep one row a spot"
        )
    values = values.set_index("__key__")
    joined = pd.Index(wanted).isin(values.index)
    if not joined.any():
        raise DataError(
            f"labels {path}: none of its {len(values)} rows belongs to a spot (labels have "
            f"{first_names(values.index)}, spots are {first_names(wanted)}); give a column "
            "'barcode' with the barcodes of the counts, or x and y with array positions"
        )
    if not joined.all():
        notes.append(f"labels: {int((~joined).sum())} of {len(wanted)} spots have no row")
    unused = len(values) - int(pd.Index(values.index).isin(wanted).sum())
    if unused:
        notes.append(f"labels: {unused} rows belong to no spot")
    table = values.reindex(wanted, fill_value="").reset_index(drop=True)
    return pd.DataFrame({c: _typed(table, c, path) for c in table.columns}), tuple(notes)


def labels_of(
    row: SlideRow, barcodes: np.ndarray, notes: list[str], array: np.ndarray | None = None
) -> pd.DataFrame:
    """Read the labels that a manifest row names, as `read_labels` does; no columns without."""
    if row.labels is None:
        return pd.DataFrame(index=pd.RangeIndex(len(barcodes)))
    labels, found = read_labels(row.labels, barcodes, array)
    notes.extend(found)
    return labels


def _id_columns(names: list[str], array: np.ndarray | None, keys: Sequence[str]) -> list[str]:
    """The columns whose texts are the key, none of which is a number; none where x and y are."""
    by_name = {name.lower(): name for name in names}
    if "barcode" in by_name:
        return [by_name["barcode"]]
    if keys and set(keys) <= set(names):
        return list(keys)
    return [] if array is not None and {"x", "y"} <= set(by_name) else names[:1]


def _join_keys(
    path: Path,
    frame: pd.DataFrame,
    barcodes: np.ndarray,
    array: np.ndarray | None,
    keys: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, pd.DataFrame, list[str]]:
    """Return the key of each row (R,), the key of each spot (S,), the value columns, notes."""
    ids = _id_columns(list(frame.columns), array, keys)
    if not ids and array is not None:
        by_name = {str(c).lower(): c for c in frame.columns}
        x, y = (number_column(frame, by_name[c], path, empty_ok=True) for c in "xy")
        known = np.isfinite(x) & np.isfinite(y)
        places = np.full(len(frame), "", dtype=object)
        places[known] = position_names(np.column_stack([x, y])[known])
        values = frame[[c for c in frame.columns if not _PLACES.fullmatch(c)]]
        return places, position_names(array), values, []
    texts = frame[ids[0]].str.strip()
    for name in ids[1:]:
        texts = texts + "_" + frame[name].str.strip()
    names, wanted = texts.to_numpy(dtype=object), np.asarray(barcodes, dtype=object)
    names, wanted, how = alike(names, wanted)
    return names, wanted, frame.drop(columns=ids), [f"labels: {note}" for note in how]


def position_names(xy: np.ndarray) -> np.ndarray:
    """Return "XxY" of array positions rounded to whole numbers, (S, 2) -> (S,) object."""
    whole = np.rint(xy).astype(np.int64)
    return np.array([f"{x}x{y}" for x, y in whole.tolist()], dtype=object)


def _typed(table: pd.DataFrame, column: str, path: Path) -> pd.Series:
    text = table[column].astype(str).str.strip()
    filled = text[text != ""]
    numbers = pd.to_numeric(filled, errors="coerce")
    coded = CODED.search(column) is not None and bool(filled.str.fullmatch(r"[+-]?\d+").all())
    if filled.empty or coded or not np.isfinite(numbers).all():
        return text.astype(object)
    return pd.Series(number_column(table, column, path, empty_ok=True), index=table.index)
