"""Text tables, gzipped or not, read within bounds; errors name file and row.

Shapes: R rows, C columns of numbers.
"""

import csv
import gzip
import io
import json
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from preprocessing.errors import DataError
from preprocessing.findings import doubt

MISSING = ("NA", "NaN", "nan", "N/A")  # as R and pandas write an empty cell
_TRUE = ("1", "1.0", "true", "t", "yes", "y")
_FALSE = ("0", "0.0", "false", "f", "no", "n")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
GZIP_MAGIC = b"\x1f\x8b"
MOST_RATIO = 200  # unpacked over packed bytes (tables of counts: 10 to 100, deflate: 1,032) ...
HARMLESS_BYTES = 1 << 28  # ... once more than this was unpacked (256 MiB)
MOST_BYTES = 1 << 37  # of one file, whatever its ratio (128 GiB)
MOST_COLUMNS = 4096  # of a table that is read as texts: spots, labels, sections
_HEAD = 4096  # bytes that tell the format of a text
_Ids = Callable[[list[str]], Collection[str]]
_BLOCK = 4_000_000  # cells of the table in memory at once
_FIRST = 16  # rows of the first block


class BoundedGzip(io.RawIOBase):
    """The content of a gzip file, until it exceeds `MOST_RATIO` or `MOST_BYTES`."""

    def __init__(self, path: Path, packed: BinaryIO) -> None:
        """Read from ``packed``, open at its beginning; ``path`` is for the message."""
        super().__init__()
        self._path, self._packed = path, packed
        self._stream = gzip.GzipFile(fileobj=packed)
        self._unpacked = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer.

        Raises:
            DataError: the content exceeds the bounds.
        """
        count = self._stream.readinto(buffer)
        self._unpacked += count
        if self._unpacked > HARMLESS_BYTES:
            self._check()
        return count

    def _check(self) -> None:
        packed = max(1, self._packed.tell())
        if self._unpacked > min(MOST_RATIO * packed, MOST_BYTES):
            raise DataError(
                f"{self._path}: {self._unpacked / 2**20:,.0f} MiB of content from "
                f"{packed / 2**20:,.2f} MiB of gzip, and more to come; expected at most "
                f"{MOST_RATIO} times its size, and {MOST_BYTES >> 30} GiB: it is damaged, or made "
                "to fill the memory; if it is right, unpack it with gunzip and give that file"
            )


def is_gzip(path: Path) -> bool:
    """Whether the first two bytes of a file say so."""
    with path.open("rb") as file:
        return file.read(2) == GZIP_MAGIC


@contextmanager
def open_unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading bytes, gzipped or not (told by its first bytes, not by its name).

    Reading raises DataError where the content is beyond the bounds.
    """
    packed = is_gzip(path)
    with path.open("rb") as raw:
        yield io.BufferedReader(BoundedGzip(path, raw), 1 << 17) if packed else raw


def most_unpacked(size: int) -> int:
    """How many bytes may come out of so many packed ones."""
    return max(HARMLESS_BYTES, min(MOST_RATIO * size, MOST_BYTES))


def most_bytes(path: Path) -> int:
    """How many bytes the content of a file can have at most."""
    size = path.stat().st_size
    return most_unpacked(size) if is_gzip(path) else size


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file, gzipped or not (told by its first bytes, not by its name).

    UTF-16 with its mark in front, which spreadsheets call Unicode text, is read too.

    Raises:
        DataError: the file is missing, is not text, or its gzip stream is damaged or unpacks
            beyond the bounds of this module.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file; correct the path")
    with open_unpacked(path) as content:
        try:
            wide = content.peek(2)[:2] in _UTF_16
            yield io.TextIOWrapper(content, encoding="utf-16" if wide else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 text ({error}); give a text table, saved as UTF-8"
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{path} is a damaged gzip file ({error}); download or compress it again"
            ) from error


def text_head(path: Path) -> str:
    """Return the beginning of a text, gzipped or not; "" where it cannot be read."""
    try:
        with open_unpacked(path) as content:
            return content.read(_HEAD).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error):
        return ""


def read_json_object(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Read a JSON object, gzipped or not.

    Args:
        path: the file.
        what: what the object holds, such as "of scale factors".
        remedy: what to do where it is damaged.

    Raises:
        DataError: not a JSON object.
    """
    try:
        with open_text(path) as text:
            content = json.load(text)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object {what}")
    return content


_DECIMAL_COMMA = r"-?(\d+(,\d*)?|,\d+)([eE][-+]?\d+)?"
_THOUSANDS = r"-?[1-9]\d{0,2},\d{3}"  # or a decimal of three digits: nobody can tell


def read_table(path: Path, names: list[str] | None = None, ids: _Ids = list) -> pd.DataFrame:
    """Read a table of strings, separated by tabs, commas or semicolons (see `_separator`).

    A header one cell shorter than the rows, as R writes it, gets "row_name" in front.

    Args:
        path: the file.
        names: column names of a file that has no header.
        ids: the names of the columns -> those that hold no numbers (see `pointed`).

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
    second = rest[:100_000].split("\n", 1)[0]
    separator = _separator(first, second)
    if names is None and len(_cells(first, separator)) + 1 == len(_cells(second, separator)):
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
    frame = frame.fillna("")
    others = frame.columns.drop([*ids(list(frame.columns))])
    for name, numbers in pointed(frame, others, separator, path):
        frame[name] = numbers
    return frame


def pointed(
    frame: pd.DataFrame, names: Iterable[Any], separator: str, path: Path
) -> Iterator[tuple[Any, pd.Series]]:
    """Columns of numbers that have a comma in front of their decimals, as texts with a point.

    Only where semicolons separate the cells: so spreadsheets of many countries write both.

    Args:
        frame: the table, or some rows of it.
        names: columns that may be numbers; not the ids.
        separator: of the cells.
        path: for the `doubt` where the commas may be of thousands.
    """
    for name in [n for n in names if separator == ";" and frame[n].dtype.kind == "O"]:
        text = frame[name].astype(str).str.strip()
        commas = text[text.str.contains(",", regex=False)]
        missing = text.isin(("", *MISSING))
        if commas.empty or not (missing | text.str.fullmatch(_DECIMAL_COMMA)).all():
            continue
        if commas.str.fullmatch(_THOUSANDS).all():
            told = f"{commas.iloc[0]!r} is read as {commas.iloc[0].replace(',', '.')}"
            doubt(path, told, "if its comma separates thousands, take the commas out")
        yield name, text.str.replace(",", ".", regex=False)


def _comma_hint(text: str) -> str:
    """What to do about a cell that would be a number with a point."""
    if "," not in text or not re.fullmatch(r"-?[\d.,]*\d([eE][-+]?\d+)?", text):
        return ""
    return "; for decimals write a point, or a comma in the whole column and semicolons between"


def _cells(line: str, separator: str) -> list[str]:
    """The cells of one line."""
    line = line.rstrip("\r\n")
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return line.split(separator)


def _separator(first: str, second: str) -> str:
    """A tab where the first line has one, else a comma; where neither, the second's tab, or ";".

    Also ";" where it cuts both lines alike, and commas do not or the first has no more of them.
    """
    if "\t" in first or ("," not in first and "\t" in second):
        return "\t"
    heads, cells = ([len(_cells(line, mark)) for mark in ",;"] for line in (first, second))
    commas, semicolons = (h > 1 and c in (h, h + 1) for h, c in zip(heads, cells, strict=True))
    fewer = not commas or first.count(";") >= first.count(",")
    return ";" if ";" in first and ("," not in first or (semicolons and fewer)) else ","


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
            f"{_comma_hint(text.iloc[row])}"
        )
    return values


def truth_column(frame: pd.DataFrame, column: str, where: Path | str) -> np.ndarray:
    """Return a column of truth values as bool (rows,): 1 and 0, TRUE and FALSE, T, F, yes, no.

    Raises:
        DataError: a cell is none of them; names the file, the row (1 = first data row).
    """
    values = frame[column]
    if values.dtype.kind in "iufb" and values.isin((0, 1)).all():  # fast: bins are millions
        return np.asarray(values == 1)
    text = values.astype(str).str.strip().str.lower()
    inside = text.isin(_TRUE).to_numpy()
    bad = np.flatnonzero(~(inside | text.isin(_FALSE).to_numpy()))
    if len(bad):
        raise DataError(
            f"{where}: {len(bad)} cells of column {column!r} are neither 1 nor 0, TRUE nor FALSE "
            f"(first: data row {bad[0] + 1}, {str(values.iloc[bad[0]])!r}); correct them"
        )
    return np.asarray(inside)


def require_columns(frame: pd.DataFrame, columns: tuple[str, ...], path: Path) -> None:
    """Raise DataError when a column is missing, listing the columns found."""
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise DataError(
            f"{path}: column {', '.join(missing)} is missing; found "
            f"{', '.join(map(str, frame.columns[:12]))}; expected {', '.join(columns)}"
        )


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
    separator = _separator(first, second)
    names = [name.strip() for name in _cells(first, separator)]
    if names and len(_cells(second, separator)) == len(names) + 1:
        names.insert(0, "row_name")
    if len(names) < 2:
        raise DataError(
            f"{path}: the first line is no header of a table ({first.strip()[:60]!r}); expected "
            "names separated by commas, tabs or semicolons"
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
    options = {
        "names": list(range(len(header.names))),
        "dtype": dict.fromkeys(range(n_ids), str),
        "chunksize": max(16, _BLOCK // len(header.names)),
        "low_memory": True,
    }
    for frame in _frames(header, options):
        for name, texts in pointed(frame, frame.columns[n_ids:], header.separator, header.path):
            frame[name] = texts
        ids.append(_id_texts(header, frame.iloc[:, :n_ids], row))
        blocks.append(csr_matrix(_numbers(header, frame.iloc[:, n_ids:], row)))
        row += len(frame)
    if row == 0:
        raise DataError(f"empty matrix: {header.path} has no rows below the header")
    table = pd.concat(ids, ignore_index=True)
    named = enumerate(header.names[:n_ids], start=1)
    table.columns = pd.Index([name or f"column_{number}" for number, name in named])
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
    (frame,) = frames
    others = [name for name in names if name not in texts]
    for name, numbers in pointed(frame, others, header.separator, path):
        frame[name] = pd.to_numeric(numbers, errors="coerce")  # what is left is missing
    return frame


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
        except (pd.errors.ParserWarning, ValueError) as error:
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
        text = str(frame.iloc[row, place])
        raise DataError(
            f"{header.path}: data row {first + row + 1}, column "
            f"{header.names[frame.columns[place]]!r}: {text!r} is not a finite number; give 0 "
            "where nothing was measured, or remove the row (a file cut short ends like this too)"
            f"{_comma_hint(text.strip())}"
        )
    return block
