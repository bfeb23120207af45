"""Counts in a slide store: AnnData's csr_matrix group, whole or some rows. Shapes: S, G, n rows."""

import h5py
import numpy as np
from scipy.sparse import csr_matrix, vstack

from preprocessing.errors import DataError
from preprocessing.store.layout import COMPRESSION, COUNTS

_GAP = 16_384  # stored values between two runs of rows that are read along rather than skipped

_PIECE = 8_000_000  # stored values that are in memory at once for scattered rows

Rows = slice | np.ndarray


def write_counts(file: h5py.File, counts: csr_matrix) -> None:
    """Write counts (S, G) as an AnnData csr_matrix group: int32, intensities float32."""
    group = file.create_group(COUNTS)
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    group.attrs["shape"] = np.array(counts.shape, dtype=np.int64)
    parts = (
        ("data", counts.data, np.float32 if counts.dtype.kind == "f" else np.int32),
        ("indices", counts.indices, np.int32),
        ("indptr", counts.indptr, np.int64),
    )
    for name, values, dtype in parts:
        narrow = values.astype(dtype, copy=False)
        group.create_dataset(name, data=narrow, chunks=True, **COMPRESSION)


def counts_shape(file: h5py.File) -> tuple[int, int]:
    """Return (S, G) as the store states them."""
    spots, genes = (int(n) for n in file[COUNTS].attrs["shape"])
    return spots, genes


def read_counts(file: h5py.File) -> csr_matrix:
    """Read counts, (S, G) CSR, int32 or float32.

    Raises:
        ValueError: the three arrays do not make a CSR matrix.
    """
    group = file[COUNTS]
    shape = counts_shape(file)
    matrix = csr_matrix((group["data"][:], group["indices"][:], group["indptr"][:]), shape)
    matrix.check_format(full_check=True)
    return matrix


def read_count_rows(file: h5py.File, rows: Rows, indptr: np.ndarray | None = None) -> csr_matrix:
    """Read some rows of the counts.

    Args:
        file: the store.
        rows: a slice, or (n,) row numbers in any order, repeats allowed, or an (S,) mask.
        indptr: (S + 1,) row starts, if they are at hand (a slice does without them).

    Returns:
        (n, G) CSR in the order of ``rows``.

    Raises:
        DataError: a row number outside 0..S-1, or a mask of another length.
        ValueError: what was read does not make a CSR matrix.
    """
    spots = counts_shape(file)[0]
    if isinstance(rows, slice):
        start, stop, step = rows.indices(spots)
        if step == 1:
            return _run(file, start, max(start, stop), indptr)
        rows = np.arange(start, stop, step)
    index = _row_numbers(rows, spots)
    if len(index) == 0:
        return _run(file, 0, 0, indptr)
    if indptr is None:
        indptr = file[COUNTS]["indptr"][:]
    wanted = np.unique(index)
    skipped = indptr[wanted[1:]] - indptr[wanted[:-1] + 1]
    piece = indptr[wanted] // _PIECE
    runs = np.split(wanted, np.flatnonzero((skipped > _GAP) | (np.diff(piece) > 0)) + 1)
    blocks = [_run(file, int(r[0]), int(r[-1]) + 1, indptr)[r - r[0]] for r in runs]
    found = blocks[0] if len(blocks) == 1 else vstack(blocks, format="csr")
    if len(wanted) == len(index) and (wanted == index).all():
        return found
    return found[np.searchsorted(wanted, index)]


def _row_numbers(rows: np.ndarray, spots: int) -> np.ndarray:
    array = np.asarray(rows)
    if array.dtype == bool:
        if array.shape != (spots,):
            raise DataError(f"mask of shape {array.shape} for {spots} spots; expected one a spot")
        return np.flatnonzero(array)
    index = array.astype(np.int64).ravel()
    if index.size and (index.min() < 0 or index.max() >= spots):
        raise DataError(
            f"row {int(index.min())}..{int(index.max())} asked, there are 0..{spots - 1}"
        )
    return index


def _run(file: h5py.File, start: int, stop: int, indptr: np.ndarray | None) -> csr_matrix:
    """Read the rows start..stop-1 in one piece."""
    group = file[COUNTS]
    source = group["indptr"] if indptr is None else indptr
    place = np.asarray(source[start : stop + 1], dtype=np.int64)
    low, high = int(place[0]), int(place[-1])
    parts = (group["data"][low:high], group["indices"][low:high], place - low)
    matrix = csr_matrix(parts, (stop - start, counts_shape(file)[1]))
    matrix.check_format(full_check=True)
    return matrix
