"""Wide text tables: a few id columns, then one column a gene, read in blocks into CSR.

Shapes: R rows, C columns of numbers.
"""

import csv
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from preprocessing.errors import DataError
from preprocessing.readers.labels import MISSING
from preprocessing.readers.text_table import open_text

_BLOCK = 4_000_000  # cells of the table in memory at once
_FIRST = 16  # rows of the first block
_PARSE_ERRORS = (pd.errors.ParserWarning, pd.errors.ParserError, ValueError)


@dataclass(frozen=True)
class Header:
    """First line of a table: the names of its columns and what separates them."""

    path: Path
    names: tuple[str, ...]
    separator: str


@dataclass(frozen=True)
class WideTable:
    """A wide table: ``ids`` (R, k) texts, ``values`` (R, C) CSR, ``names`` (C,) of its columns."""

    ids: pd.DataFrame
    values: csr_matrix
    names: np.ndarray


def read_header(path: Path) -> Header:
    """Read the names of the columns; separated by tabs where the first line has one, else commas.

    A header one cell shorter than the first row, as R writes it, gets "row_name" in front.

    Raises:
        DataError: no text table, or no second column.
    """
    with open_text(path) as text:
        first, second = text.readline(), text.readline()
    separator = "\t" if "\t" in first or ("," not in first and "\t" in second) else ","
    names = [name.strip() for name in _cells(first, separator)]
    if names and len(_cells(second, separator)) == len(names) + 1:
        names.insert(0, "row_name")
    if len(names) < 2:
        raise DataError(
            f"{path}: the first line is no header of a table ({first.strip()[:60]!r}); expected "
            "names separated by commas or tabs"
        )
    return Header(path, tuple(names), separator)


def read_wide_table(header: Header, n_ids: int) -> WideTable:
    """Read ids and numbers.

    Args:
        header: of the file.
        n_ids: how many of the first columns are ids, at least 1.

    Raises:
        DataError: a cell is no finite number (names row and column), or rows of unequal length.
    """
    ids: list[pd.DataFrame] = []
    blocks: list[csr_matrix] = []
    names = np.array(header.names[n_ids:], dtype=object)
    if (names == "").any():
        number = n_ids + int(np.flatnonzero(names == "")[0]) + 1
        raise DataError(f"{header.path}: column {number} has no name; name every gene")
    row = 0
    for frame in _blocks(header, n_ids, max(16, _BLOCK // len(header.names))):
        ids.append(_id_texts(header, frame.iloc[:, :n_ids], row))
        blocks.append(csr_matrix(_numbers(header, frame.iloc[:, n_ids:], row)))
        row += len(frame)
    if row == 0:
        raise DataError(f"empty matrix: {header.path} has no rows below the header")
    table = pd.concat(ids, ignore_index=True)
    table.columns = pd.Index(_distinct_names(header.names[:n_ids]))
    return WideTable(table, vstack(blocks, format="csr"), names)


def read_typed(path: Path, texts: tuple[str, ...] = ()) -> pd.DataFrame:
    """Read a table with the types that its columns show: numbers (missing NaN) or texts.

    Args:
        path: CSV or TSV, gzipped or not.
        texts: columns to read as texts, such as ids.

    Raises:
        DataError: no table, or a column name occurs twice.
    """
    header = read_header(path)
    names = list(header.names)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: column {min(twice)!r} occurs twice; give each its own name")
    missing = {name: ["", *MISSING] for name in names if name not in texts}
    options = {
        "names": names,
        "dtype": dict.fromkeys(set(texts) & set(names), str),
        "na_values": missing,
        "low_memory": False,
    }
    frames = list(_frames(header, options))
    if not frames or not len(frames[0]):
        raise DataError(f"{path} has no rows below the header")
    return frames[0]


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r\n")], delimiter=separator), [])
    except csv.Error:
        return line.rstrip("\r\n").split(separator)


def _distinct_names(names: tuple[str, ...]) -> list[str]:
    return [name or f"column_{i + 1}" for i, name in enumerate(names)]


def _blocks(header: Header, n_ids: int, rows: int) -> Iterator[pd.DataFrame]:
    numbers = range(len(header.names))
    options = {
        "names": list(numbers),
        "dtype": dict.fromkeys(range(n_ids), str),
        "chunksize": rows,
        "low_memory": True,
    }
    return _frames(header, options)


def _frames(header: Header, options: dict[str, object]) -> Iterator[pd.DataFrame]:
    """Yield what pandas reads below the header, one frame or several."""
    with open_text(header.path) as text, warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        warnings.simplefilter("ignore", pd.errors.DtypeWarning)
        text.readline()
        try:
            read = pd.read_csv(
                text,
                sep=header.separator,
                header=None,
                index_col=False,
                keep_default_na=False,
                skipinitialspace=True,
                **options,  # type: ignore[call-overload]
            )
            if isinstance(read, pd.DataFrame):
                yield read
                return
            yield read.get_chunk(_FIRST)  # what is no table of numbers is refused soon
            yield from read
        except (pd.errors.EmptyDataError, StopIteration):
            return
        except (UnicodeDecodeError, DataError):
            raise
        except _PARSE_ERRORS as error:
            raise DataError(
                f"{header.path} is not a table with equally many cells in each row "
                f"({' '.join(str(error).split())})"
            ) from error


def _id_texts(header: Header, frame: pd.DataFrame, first: int) -> pd.DataFrame:
    texts = frame.fillna("").astype(str).apply(lambda column: column.str.strip())
    empty = (texts == "").all(axis=1).to_numpy()
    if empty.any():
        row = first + int(np.flatnonzero(empty)[0]) + 1
        raise DataError(f"{header.path}: data row {row} has no id; give every row one")
    return pd.DataFrame(texts)


def _numbers(header: Header, frame: pd.DataFrame, first: int) -> np.ndarray:
    """Return (rows, C) float64; names the first cell that is no finite number."""
    block = np.empty(frame.shape, order="F")
    for place, name in enumerate(frame.columns):
        values = frame[name]
        if values.dtype.kind not in "iuf":
            values = pd.to_numeric(values.astype(str).str.strip(), errors="coerce")
        block[:, place] = values
    bad = np.argwhere(~np.isfinite(block))
    if len(bad):
        row, place = bad[0]
        raise DataError(
            f"{header.path}: data row {first + row + 1}, column "
            f"{header.names[frame.columns[place]]!r}: {str(frame.iloc[row, place])!r} is not a "
            "finite number; give 0 where nothing was measured, or remove the row (a file cut "
            "short ends like this too)"
        )
    return block
