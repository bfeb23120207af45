"""HDF5 tables and matrices as AnnData and loom write them, read with h5py; nothing is unpickled.

Values that are neither numbers, truth values nor texts are refused or left out by name.
"""

import glob
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy.sparse import csc_matrix, csr_matrix, vstack

from preprocessing.errors import DataError
from preprocessing.files import files_in
from preprocessing.hdf5 import open_guarded
from preprocessing.readers.format import SLIDE_IMAGES, image_named
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import native_numbers

_BLOCK = 4_000_000  # values of a dense matrix that are in memory at once
_PEEK = 20_000
_DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, IndexError, AttributeError)
_PLUGIN = "hdf5plugin"
_NO_FILTER = ("plugin", "required filter", "filter returned failure")
_MASKED = ("nullable-integer", "nullable-boolean", "nullable-string-array")
Node = Any  # h5py.Group or h5py.Dataset


@contextmanager
def open_hdf5(path: Path, what: str, damage: str = "truncated or damaged") -> Iterator[h5py.File]:
    """Open an HDF5 file for reading.

    Args:
        path: the file.
        what: what is expected, such as "an AnnData file (.h5ad)".
        damage: what a file is that cannot be read to the end.

    Raises:
        DataError: missing, not HDF5, truncated, damaged inside, or not as `open_guarded` asks.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected {what}")
    if importlib.util.find_spec(_PLUGIN):
        importlib.import_module(_PLUGIN)  # registers the filters of Blosc, Zstandard, LZ4, ...
    if not h5py.is_hdf5(path):
        raise DataError(f"{path} is not an HDF5 file; expected {what}")
    try:
        with open_guarded(path, ours=False) as file:
            yield file
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            f"{path} asks for more memory than there is ({error}); use a larger machine, or write "
            "the file again if it is damaged"
        ) from error
    except _DAMAGE as error:
        if any(word in str(error) for word in _NO_FILTER):
            raise DataError(
                f"{path} is compressed by a filter that this HDF5 lacks ({_PLUGIN} has most of "
                "them): pip install 'hibio[hdf5]' and run again, or write the file with gzip"
            ) from error
        raise DataError(
            f"{path} is {damage} ({error}); expected {what}; download or write it again"
        ) from error


def files_with_cells(folder: Path, form: str, has_cells: Callable[[Path], bool]) -> list[SlideRow]:
    """Rows of the files ``*.<form>`` of a folder that ``has_cells`` accepts, or that are damaged.

    A slide image of the same name beside a file is its image; a PNG or JPEG may be a plot of it.
    A damaged file is drafted, so that `prepare` says what is wrong with it.
    """
    rows = []
    for path in files_in(folder, f"*.{form}"):
        with suppress(DataError):
            if not has_cells(path):
                continue
        image = image_named(folder, glob.escape(path.stem), SLIDE_IMAGES)
        rows.append(drafted_row(path.stem, path, form, image=image))
    return rows


def column_names(table: Node) -> list[str]:
    """Names of the columns of an AnnData table or of a loom attribute group, index excluded."""
    if isinstance(table, h5py.Dataset):  # as AnnData wrote tables before version 0.7
        return [name for name in table.dtype.names or () if name not in ("index", "_index")]
    order = [_text(name) for name in np.ravel(table.attrs.get("column-order", []))]
    names = order or [name for name in table if not name.startswith("__")]
    return [name for name in names if name != _index_name(table) and name in table]


def index_values(table: Node) -> np.ndarray | None:
    """The index of an AnnData table, (rows,) str; None: it has none."""
    if isinstance(table, h5py.Dataset):
        name = next((n for n in ("index", "_index") if n in (table.dtype.names or ())), None)
        return None if name is None else _array(table[name])
    name = _index_name(table)
    return read_texts(table[name]) if name in table else None


def read_texts(node: Node) -> np.ndarray:
    """Read a column as texts, (rows,) object.

    Raises:
        DataError: it holds something that is no text, number or truth value.
    """
    values = read_column(node)
    if values is None:
        raise DataError(f"{node.name} holds {_kind(node)}, not texts; it is not unpickled")
    return np.array([str(v) for v in values.tolist()], dtype=object)


def read_column(node: Node | np.ndarray) -> np.ndarray | None:
    """Read one column of a table.

    Returns:
        (rows,) numbers, or object array of str with "" where missing; None for anything else.
    """
    if isinstance(node, np.ndarray):
        return _array(node)
    if isinstance(node, h5py.Group):
        return _group_column(node)
    codes = _array(node[:]) if node.ndim == 1 else None
    if codes is None or "categories" not in node.attrs:
        return codes
    categories = _array(node.file[node.attrs["categories"]][:])  # AnnData before 0.8
    return None if categories is None else _decoded(codes, categories)


def read_frame(table: Node) -> tuple[pd.DataFrame, list[str]]:
    """Read the columns of a table of one value a row.

    Returns:
        (rows, columns) of numbers and texts, and the names of columns of anything else.
    """
    kept: dict[str, np.ndarray] = {}
    left_out = []
    for name in column_names(table):
        values = read_column(table[name])
        if values is None or values.ndim != 1:
            left_out.append(name)
        else:
            kept[name] = values
    return pd.DataFrame(kept), left_out


def _index_name(table: h5py.Group) -> str:
    return _text(table.attrs.get("_index", "_index"))


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _kind(node: Node) -> str:
    if isinstance(node, h5py.Group):
        return f"a group of encoding {_text(node.attrs.get('encoding-type', 'unknown'))!r}"
    return f"values of type {node.dtype} {node.shape}"


def _array(values: np.ndarray) -> np.ndarray | None:
    """Decode texts; None for values that are neither texts nor numbers."""
    if values.dtype.kind in "iufb":
        return native_numbers(values)
    if values.dtype.kind in "SU":
        return np.array([_text(v) for v in values.tolist()], dtype=object)
    if values.dtype.kind != "O":
        return None
    items = values.tolist()
    if not all(isinstance(v, bytes | str) for v in items):
        return None
    return np.array([_text(v) for v in items], dtype=object)


def _group_column(group: h5py.Group) -> np.ndarray | None:
    kind = _text(group.attrs.get("encoding-type", ""))
    if kind == "categorical":
        categories = read_column(group["categories"])
        return None if categories is None else _decoded(group["codes"][:], categories)
    if kind in _MASKED:
        values, missing = _array(group["values"][:]), group["mask"][:].astype(bool)
        if values is None:
            return None
        if values.dtype.kind == "O":
            return np.where(missing, "", values)
        return np.where(missing, np.nan, values.astype(np.float64))
    return None


def _decoded(codes: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """Categories of the codes as texts; code -1 is missing."""
    if codes.dtype.kind not in "iu":
        raise DataError(f"category codes of type {codes.dtype}; expected whole numbers")
    names = np.array([*map(str, categories.tolist()), ""], dtype=object)
    if codes.size and (codes.min() < -1 or codes.max() >= len(categories)):
        raise DataError(f"category codes {codes.min()}..{codes.max()} of {len(categories)} names")
    return np.asarray(names[codes])


def first_values(node: Node) -> np.ndarray:
    """Some values of a matrix, to tell counts from other numbers without reading all of it."""
    data = node.get("data") if isinstance(node, h5py.Group) else node
    if data is None or data.dtype.kind not in "iufb" or not data.size:
        return np.empty(0)
    rows = _PEEK if data.ndim == 1 else max(1, _PEEK // max(1, data.shape[1]))
    return native_numbers(np.ravel(data[:rows]))


def read_matrix(node: Node, *, turned: bool = False) -> csr_matrix:
    """Read a matrix, sparse (csr, csc) or dense in blocks; never all of a dense one at once.

    Args:
        node: dataset (R, C), or group with data, indices and indptr.
        turned: return it with rows and columns exchanged.

    Returns:
        CSR of the number type of the file.

    Raises:
        DataError: not numbers, or the parts do not make a matrix.
    """
    if isinstance(node, h5py.Group):
        matrix = _read_sparse(node)
        return csr_matrix(matrix.T if turned else matrix)
    if node.ndim != 2 or node.dtype.kind not in "iufb":
        raise DataError(
            f"{node.name} holds {_kind(node)}; expected a matrix of numbers (objects are not "
            "unpickled)"
        )
    rows, columns = node.shape[::-1] if turned else node.shape
    step = max(1, _BLOCK // max(1, columns))
    pieces = [slice(first, first + step) for first in range(0, rows, step)]
    blocks = [
        csr_matrix(native_numbers(node[:, piece].T if turned else node[piece])) for piece in pieces
    ]
    return vstack(blocks, format="csr") if blocks else csr_matrix((rows, columns), dtype=node.dtype)


def _read_sparse(group: h5py.Group) -> csr_matrix | csc_matrix:
    kind = _text(group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "")))
    size = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    layout = {"csr": csr_matrix, "csc": csc_matrix}.get(kind.removesuffix("_matrix"))
    if layout is None or size is None or any(n not in group for n in ("data", "indices", "indptr")):
        raise DataError(
            f"{group.name} holds {_kind(group)}; expected csr_matrix, csc_matrix or a dense matrix"
        )
    if group["data"].dtype.kind not in "iufb":
        raise DataError(f"{group.name}/data holds {_kind(group['data'])}; expected numbers")
    try:
        names = ("data", "indices", "indptr")
        parts = tuple(native_numbers(group[name][:]) for name in names)
        matrix = layout(parts, tuple(int(n) for n in size))
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise DataError(f"{group.name} is a damaged sparse matrix ({error})") from error
    return matrix
