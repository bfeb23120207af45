"""Text tables (CSV, TSV, gzipped or not) read as strings, with errors that name file and row."""

import csv
import gzip
import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.readers.unpacked import open_unpacked

MOST_COLUMNS = 4096  # of a table that is read as texts: spots, labels, sections


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file, gzipped or not (told by its first bytes, not by its name).

    Raises:
        DataError: the file is missing, is not text, or its gzip stream is damaged or unpacks
            beyond the bounds of `preprocessing.readers.unpacked`.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file; correct the path")
    with open_unpacked(path) as content:
        try:
            yield io.TextIOWrapper(content, encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error}); give a text table") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{path} is a damaged gzip file ({error}); download or compress it again"
            ) from error


def read_table(path: Path, names: list[str] | None = None) -> pd.DataFrame:
    """Read a table of strings; tab-separated when its first line has a tab, else by commas.

    A header one cell shorter than the rows, as R writes it, gets "row_name" in front.

    Args:
        path: the file.
        names: column names of a file that has no header.

    Returns:
        (rows, columns) of str, stripped; empty cells are "".

    Raises:
        DataError: not a table, or one of more than `MOST_COLUMNS` columns.
    """
    with open_text(path) as text:
        first = text.readline()
        marks = max(first.count(","), first.count("\t"))
        if marks >= MOST_COLUMNS:  # some ms a column, so that one long line would take minutes
            raise DataError(
                f"{path}: the first line has {marks + 1:,} cells; expected a table of at most "
                f"{MOST_COLUMNS:,} columns (line ends that were lost, or a table of counts, look "
                "like this)"
            )
        rest = text.read()
    sample = first if "\t" in first or "," in first else rest.split("\n", 1)[0]
    separator = "\t" if "\t" in sample else ","
    if names is None and _cells(first, separator) + 1 == _cells(rest[:100_000], separator):
        first = f"row_name{separator}{first}"  # as R writes tables: no cell above the row names
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                io.StringIO(first + rest),
                sep=separator,
                header=None if names else 0,
                names=names,
                dtype=str,
                keep_default_na=False,
                index_col=False,
                skipinitialspace=True,
            )
    except (pd.errors.ParserWarning, ValueError) as error:
        raise DataError(
            f"{path} is not a table with equally many cells in each row ({str(error).strip()})"
        ) from error
    frame.columns = [str(c).strip() for c in frame.columns]
    return frame.fillna("")


def _cells(text: str, separator: str) -> int:
    """Count the cells of the first line of ``text``."""
    return len(next(csv.reader([text.split("\n", 1)[0]], delimiter=separator), []))


def number_column(
    frame: pd.DataFrame, column: str, path: Path, *, empty_ok: bool = False
) -> np.ndarray:
    """Return a column as float64 (rows,); empty cells become NaN where allowed.

    Raises:
        DataError: a cell is not a finite number; names the file, the row (1 = first data row).
    """
    text = frame[column].astype(str).str.strip()
    values = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
    bad = ~np.isfinite(values)
    if empty_ok:
        bad &= (text != "").to_numpy()
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{path}: {int(bad.sum())} cells of column {column!r} are not numbers (first: "
            f"data row {row + 1}, {text.iloc[row]!r}); correct or remove these rows"
        )
    return values


def require_columns(frame: pd.DataFrame, columns: tuple[str, ...], path: Path) -> None:
    """Raise DataError when a column is missing, listing the columns found."""
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise DataError(
            f"{path}: column {', '.join(missing)} is missing; found "
            f"{', '.join(map(str, frame.columns[:12]))}; expected {', '.join(columns)}"
        )
