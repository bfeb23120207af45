"""Long tables of weighted gene sets: ``source, target, weight`` as TSV or CSV."""

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd

from .database import COLUMNS, PathwayDatabase
from .errors import PathwayError
from .textfile import MAX_BYTES, read_text

SEPARATORS = {".tsv": "\t", ".csv": ","}
TABLE_SUFFIXES = tuple(s + z for s in SEPARATORS for z in ("", ".gz"))


def read_table(path: str | Path, max_bytes: int = MAX_BYTES) -> PathwayDatabase:
    """Read a long table (plain or gzip).

    Columns ``source`` (pathway) and ``target`` (gene) are required, ``weight`` is optional (1);
    other columns are not read. Nothing is taken for a missing value, so a gene called NA stays one.

    Args:
        path: File ending in .tsv, .csv, .tsv.gz or .csv.gz.
        max_bytes: Most bytes accepted after decompression.

    Returns:
        The database, named after the file.

    Raises:
        PathwayError: A column is missing, or a row is wrong (file and line are named).
    """
    path = Path(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    rows = _read_rows(path, SEPARATORS[suffix], max_bytes)
    header, body = rows[0][1], rows[1:]
    missing = [c for c in COLUMNS[:2] if c not in header]
    if missing:
        raise PathwayError(
            f"{path}, line 1: column(s) {', '.join(missing)} missing, found {', '.join(header)}; "
            "expected source, target and optionally weight. Rename the header."
        )
    if not body:
        raise PathwayError(f"{path}: a header and no rows; expected one row a pathway and gene.")
    column = {name: header.index(name) for name in COLUMNS if name in header}
    table = pd.DataFrame(
        {
            "source": [fields[column["source"]].strip() for _, fields in body],
            "target": [fields[column["target"]].strip() for _, fields in body],
            "weight": _weights(path, body, column.get("weight")),
        }
    )
    _check_rows(path, table, [number for number, _ in body])
    return PathwayDatabase(name=path.name, table=table)


def _read_rows(path: Path, separator: str, max_bytes: int) -> list[tuple[int, list[str]]]:
    """Non-blank rows with their line numbers, all as long as the header."""
    reader = csv.reader(io.StringIO(read_text(path, max_bytes)), delimiter=separator)
    try:
        rows = [(reader.line_num, fields) for fields in reader if any(f.strip() for f in fields)]
    except csv.Error as error:
        raise PathwayError(
            f"{path}, line {reader.line_num}: {error}. Correct the quoting."
        ) from error
    if not rows:
        raise PathwayError(f"{path}: empty; expected a header source, target, weight and rows.")
    width = len(rows[0][1])
    for number, fields in rows:
        if len(fields) != width:
            raise PathwayError(
                f"{path}, line {number}: {len(fields)} fields, the header has {width}. Correct "
                "the row, or check that the file name says the right separator (.tsv, .csv)."
            )
    return rows


def _weights(path: Path, body: list[tuple[int, list[str]]], column: int | None) -> list[float]:
    """Weights of the rows; 1 where the table has no such column."""
    if column is None:
        return [1.0] * len(body)
    weights = []
    for number, fields in body:
        try:
            weight = float(fields[column])
        except ValueError:
            weight = float("nan")
        if not np.isfinite(weight) or weight == 0:
            raise PathwayError(
                f"{path}, line {number}: weight {fields[column]!r}; expected a finite number other "
                "than 0. Correct it, or remove the row (a weight of 0 is no member)."
            )
        weights.append(weight)
    return weights


def _check_rows(path: Path, table: pd.DataFrame, numbers: list[int]) -> None:
    """Refuse empty names and repeated pairs, naming the line."""
    empty = (table["source"] == "") | (table["target"] == "")
    if empty.any():
        line = numbers[int(np.flatnonzero(empty)[0])]
        raise PathwayError(f"{path}, line {line}: an empty source or target. Fill it or remove it.")
    twice = table.duplicated(["source", "target"])
    if twice.any():
        row = int(np.flatnonzero(twice)[0])
        source, target = table["source"].iloc[row], table["target"].iloc[row]
        same = (table["source"] == source) & (table["target"] == target)
        first = numbers[int(np.flatnonzero(same)[0])]
        raise PathwayError(
            f"{path}: {target} in {source} is on line {first} and again on line {numbers[row]}; "
            "a gene has one weight in a set. Remove one."
        )
