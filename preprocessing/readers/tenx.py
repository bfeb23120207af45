"""10x Genomics matrices: filtered_feature_bc_matrix as .h5 or as a Matrix Market folder."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from scipy.io import mmread
from scipy.sparse import csc_matrix, csr_matrix

from preprocessing.errors import DataError
from preprocessing.readers.text_table import open_text
from preprocessing.spot_table import integer_counts

_GENES = "Gene Expression"


@dataclass(frozen=True)
class TenxMatrix:
    """Counts of a 10x matrix: (S, G) int32 CSR, barcodes (S,), gene ids and names (G,)."""

    counts: csr_matrix
    barcodes: np.ndarray
    gene_ids: np.ndarray
    gene_names: np.ndarray
    notes: tuple[str, ...]


def read_tenx(path: Path) -> TenxMatrix:
    """Read a 10x matrix and keep the features of type "Gene Expression".

    Args:
        path: an .h5 file or a folder with matrix.mtx, barcodes.tsv and features.tsv
            (or genes.tsv), gzipped or not.

    Raises:
        DataError: damaged, of another layout, or not raw counts.
    """
    matrix, barcodes, ids, names, types = _read_mex(path) if path.is_dir() else _read_h5(path)
    expected = (len(ids), len(barcodes))
    if matrix.shape != expected:
        raise DataError(
            f"{path}: the matrix is {matrix.shape[0]} x {matrix.shape[1]}, but there are "
            f"{expected[0]} features x {expected[1]} barcodes; download the folder again"
        )
    genes = np.flatnonzero(types == _GENES)
    notes = []
    if len(genes) < len(types):
        notes.append(f"{len(types) - len(genes)} features that are not {_GENES} left out")
    if len(genes) == 0:
        raise DataError(f"{path}: no feature of type {_GENES!r}; found {sorted(set(types))[:4]}")
    counts = integer_counts(csr_matrix(matrix.T)[:, genes])
    return TenxMatrix(counts, barcodes, ids[genes], names[genes], tuple(notes))


_Parts = tuple[csc_matrix, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _read_h5(path: Path) -> _Parts:
    if not path.is_file() or not h5py.is_hdf5(path):
        raise DataError(f"{path} is not an HDF5 file; expected filtered_feature_bc_matrix.h5")
    try:
        with h5py.File(path, "r") as file:
            return _h5_parts(path, file)
    except (OSError, KeyError, RuntimeError) as error:
        raise DataError(
            f"{path} is not a complete 10x matrix ({error}); expected the group 'matrix' as "
            "written by Space Ranger; download it again"
        ) from error


def _h5_parts(path: Path, file: h5py.File) -> _Parts:
    group = file["matrix"]
    features = group["features"]
    shape = tuple(int(n) for n in group["shape"][:])
    barcodes, ids, names, types = (
        _strings(values)
        for values in (
            group["barcodes"],
            features["id"],
            features["name"],
            features["feature_type"],
        )
    )
    try:
        matrix = csc_matrix((group["data"][:], group["indices"][:], group["indptr"][:]), shape)
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise DataError(f"{path}: damaged sparse matrix ({error}); download it again") from error
    return matrix, barcodes, ids, names, types


def _strings(dataset: h5py.Dataset) -> np.ndarray:
    return np.array(
        [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in dataset[:]],
        dtype=object,
    )


def _read_mex(folder: Path) -> _Parts:
    matrix_path = mex_file(folder, "matrix.mtx")
    barcodes = _columns(mex_file(folder, "barcodes.tsv"))
    features = _columns(mex_file(folder, "features.tsv", "genes.tsv"))
    try:
        matrix = csc_matrix(mmread(matrix_path))
    except (ValueError, OverflowError, TypeError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{matrix_path} is not a complete Matrix Market file ({error}); download it again"
        ) from error
    first = np.array([f[0] for f in features], dtype=object)
    second = np.array([f[1] if len(f) > 1 else f[0] for f in features], dtype=object)
    kind = np.array([f[2] if len(f) > 2 else _GENES for f in features], dtype=object)
    return matrix, np.array([b[0] for b in barcodes], dtype=object), first, second, kind


def mex_file(folder: Path, *names: str) -> Path:
    """Return the first of ``names`` in ``folder``, plain or with .gz.

    Raises:
        DataError: none is there.
    """
    for name in names:
        for candidate in (folder / f"{name}.gz", folder / name):
            if candidate.is_file():
                return candidate
    raise DataError(
        f"{folder} has no {' or '.join(names)} (.gz or not); expected a 10x folder "
        "with matrix.mtx, barcodes.tsv and features.tsv"
    )


def mex_files(folder: Path) -> dict[str, Path]:
    """Return the three files of a Matrix Market folder by role."""
    return {
        "matrix": mex_file(folder, "matrix.mtx"),
        "barcodes": mex_file(folder, "barcodes.tsv"),
        "features": mex_file(folder, "features.tsv", "genes.tsv"),
    }


def _columns(path: Path) -> list[list[str]]:
    with open_text(path) as text:
        rows = [line.rstrip("\r\n").split("\t") for line in text if line.strip()]
    return rows
