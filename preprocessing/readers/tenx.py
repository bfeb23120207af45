"""10x Genomics matrices: filtered_feature_bc_matrix as .h5 or as a Matrix Market folder."""

import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
from scipy.io import mmread
from scipy.sparse import csc_matrix, csr_matrix

from preprocessing.errors import DataError
from preprocessing.readers.hdf5 import open_hdf5, read_texts
from preprocessing.readers.tables import most_bytes, open_text, open_unpacked
from preprocessing.spot_table import PROTEIN, RNA, checked_counts, native_numbers

_GENES = ("Gene Expression",)  # also what a features table without types holds
_PROTEINS = ("Antibody Capture", "Protein Expression")
_BLOCK = 8_000_000  # counts of an .h5 file that are in memory at once, beside the result
_COLUMNS = 3  # of a table of features that are used: id, name, type
_HEADER_LINES = 10_000  # comments in front of the size of a Matrix Market file
_ENTRY_BYTES = 6  # "1 1 1" and the end of the line
_VALUE_BYTES = 2  # "0" and the end of the line, in the dense form
_MARKED = re.compile(r"(.*?)matrix\.mtx(\.gz)?")
_H5 = re.compile(r"(.*?)(filtered|raw)_feature_bc_matrix\.h5")
_EARLIER = {"genes", "gene_names", "barcodes", "data", "indices", "indptr"}  # Cell Ranger 2
_HEADS = {"gene", "genes", "gene_id", "gene_name", "id", "name", "symbol", "feature", "feature_id"}
_WHAT = "filtered_feature_bc_matrix.h5 with the group 'matrix', as written by Space Ranger"


def wanted_features(kinds: np.ndarray, modality: str, where: str) -> tuple[np.ndarray, list[str]]:
    """Choose the features of a modality; controls and others are left out and counted.

    Args:
        kinds: (F,) kind of each feature.
        modality: "rna" or "protein".
        where: the file, for the message.

    Returns:
        (G,) int64 positions of those that stay, and notes.

    Raises:
        DataError: none is of the kind; lists the kinds found.
    """
    wanted = _PROTEINS if modality == PROTEIN else _GENES
    kept = np.flatnonzero([kind in wanted for kind in kinds])
    found = Counter(map(str, kinds))
    if len(kept) == 0:
        raise DataError(
            f"{where}: no feature of type {' or '.join(map(repr, wanted))}; found "
            f"{', '.join(f'{n} {k}' for k, n in found.most_common(4)) or 'none'}"
        )
    others = [f"{n} {k}" for k, n in found.items() if k not in wanted]
    if not others:
        return kept, []
    note = f"{len(kinds) - len(kept)} features that are not {' or '.join(wanted)} left out"
    return kept, [f"{note} ({', '.join(others)})"]


@dataclass(frozen=True)
class TenxMatrix:
    """A 10x matrix: counts (S, G) CSR int32 (proteins float32), barcodes (S,), genes (G,)."""

    counts: csr_matrix
    barcodes: np.ndarray
    gene_ids: np.ndarray
    gene_names: np.ndarray
    notes: tuple[str, ...]


def read_tenx(path: Path, modality: str = RNA) -> TenxMatrix:
    """Read a 10x matrix; keep the features of type "Gene Expression", or the proteins.

    Args:
        path: an .h5 file, a folder with matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv),
            gzipped or not, or MARKmatrix.mtx beside MARKbarcodes.tsv and MARKfeatures.tsv.
        modality: "rna" or "protein" (features of type Antibody Capture or Protein Expression).

    Raises:
        DataError: damaged, of another layout, or not raw counts.
    """
    if not is_mex(path):
        with open_hdf5(path, _WHAT, "not a complete 10x matrix") as file:
            return _h5_matrix(path, _h5_group(path, file), modality)
    matrix, barcodes, ids, names, types = _read_mex(path)
    told = []
    if matrix.shape[0] + 1 == len(ids) and str(ids[0]).lower() in _HEADS:
        ids, names, types = ids[1:], names[1:], types[1:]
        told.append("first line of the features left out: names of columns")
    if matrix.shape == (len(barcodes), len(ids)) and len(barcodes) != len(ids):
        matrix = matrix.T
        told.append("matrix was barcodes x features; turned round")
    _check_size(path, matrix.shape, (len(ids), len(barcodes)))
    genes, notes = wanted_features(types, modality, str(path))
    notes = [*told, *notes]
    counts = checked_counts(csr_matrix(matrix.T)[:, genes], modality, barcodes, names[genes])
    return TenxMatrix(counts, barcodes, ids[genes], names[genes], tuple(notes))


def _check_size(path: Path, found: tuple[int, ...], expected: tuple[int, int]) -> None:
    if found != expected:
        raise DataError(
            f"{path}: the matrix is {' x '.join(map(str, found))}, but there are "
            f"{expected[0]} features x {expected[1]} barcodes; download the folder again"
        )


def _h5_group(path: Path, file: h5py.File) -> h5py.Group:
    """The matrix: the group 'matrix', or before Cell Ranger 3 the one that a genome names."""
    if "matrix" in file:
        return file["matrix"]
    groups = [name for name in file if isinstance(file[name], h5py.Group)]
    genomes = [name for name in groups if set(file[name]) >= _EARLIER]
    if len(genomes) == 1:
        return file[genomes[0]]
    if genomes:
        raise DataError(
            f"{path} has a matrix for each of {len(genomes)} genomes ({', '.join(genomes)}), as "
            "Cell Ranger 2 wrote them; give the folder of one genome in place of this file "
            f"(filtered_gene_bc_matrices/{genomes[0]})"
        )
    raise DataError(f"{path} has the groups {', '.join(file) or 'none'}; expected {_WHAT}")


def _h5_features(group: h5py.Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, names and types of the features, (F,) each."""
    if "features" in group:
        features = group["features"]
        ids, names, types = (read_texts(features[key]) for key in ("id", "name", "feature_type"))
        return ids, names, types
    ids, names = read_texts(group["genes"]), read_texts(group["gene_names"])
    return ids, names, np.full(len(ids), _GENES[0], dtype=object)


def _h5_matrix(path: Path, group: h5py.Group, modality: str) -> TenxMatrix:
    """Read the barcodes in blocks, so that little more than the result is in memory."""
    shape = tuple(int(n) for n in group["shape"][:])
    ids, names, types = _h5_features(group)
    if not len(ids) == len(names) == len(types):
        raise DataError(
            f"{path}: {len(ids)} ids, {len(names)} names and {len(types)} types of features; "
            "download it again"
        )
    genes, notes = wanted_features(types, modality, str(path))
    barcodes, starts = read_texts(group["barcodes"]), group["indptr"][:].astype(np.int64)
    _check_size(path, shape, (len(ids), len(barcodes)))
    stored = min(len(group["data"]), len(group["indices"]))
    if len(starts) != shape[1] + 1 or starts[0] != 0 or starts[-1] > stored:
        raise DataError(f"{path}: damaged sparse matrix (indptr); download it again")
    if (np.diff(starts) < 0).any():
        raise DataError(f"{path}: damaged sparse matrix (indptr falls); download it again")
    kind = np.float32 if modality == PROTEIN else np.int32
    data, indices = (np.empty(int(starts[-1]), dtype=dtype) for dtype in (kind, np.int32))
    indptr, filled, last = np.zeros(shape[1] + 1, dtype=np.int64), 0, 0
    while last < shape[1]:
        first = last
        last = int(np.searchsorted(starts, starts[first] + _BLOCK, side="right")) - 1
        last = min(max(last, first + 1), shape[1])
        block = _h5_block(path, group, starts[first : last + 1], shape[0])[:, genes]
        block = checked_counts(block, modality, barcodes[first:last], names[genes])
        data[filled : filled + block.nnz] = block.data
        indices[filled : filled + block.nnz] = block.indices
        indptr[first + 1 : last + 1] = filled + block.indptr[1:]
        filled += block.nnz
    counts = csr_matrix((data[:filled], indices[:filled], indptr), (shape[1], len(genes)))
    return TenxMatrix(counts, barcodes, ids[genes], names[genes], tuple(notes))


def _h5_block(path: Path, group: h5py.Group, starts: np.ndarray, genes: int) -> csr_matrix:
    """Read some barcodes, (n, F); ``starts`` (n + 1,) say where their counts lie."""
    place = slice(int(starts[0]), int(starts[-1]))
    data, indices = (native_numbers(group[name][place]) for name in ("data", "indices"))
    parts = (data, indices, starts - starts[0])
    try:
        block = csr_matrix(parts, (len(starts) - 1, genes))
        block.check_format(full_check=True)
    except ValueError as error:
        raise DataError(f"{path}: damaged sparse matrix ({error}); download it again") from error
    return block


def is_mex(path: Path) -> bool:
    """Whether this is a folder, or the matrix itself, of the Matrix Market form."""
    return path.is_dir() or _MARKED.fullmatch(path.name) is not None


def sample_mark(matrix: Path) -> str:
    """What the name of a matrix file begins with, such as "GSM111_A1_"; "" of a folder."""
    found = (
        None if matrix.is_dir() else _MARKED.fullmatch(matrix.name) or _H5.fullmatch(matrix.name)
    )
    return "" if found is None else found[1]


def _read_mex(folder: Path) -> tuple[csc_matrix, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    files = mex_files(folder)
    matrix_path = files["matrix"]
    barcodes, features = _columns(files["barcodes"]), _columns(files["features"])
    _check_entries(matrix_path)
    try:
        with open_unpacked(matrix_path) as content:
            matrix = csc_matrix(mmread(content))
    except DataError:
        raise
    except (ValueError, OverflowError, TypeError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{matrix_path} is not a complete Matrix Market file ({error}); download it again"
        ) from error
    first = np.array([f[0] for f in features], dtype=object)
    second = np.array([f[1] if len(f) > 1 else f[0] for f in features], dtype=object)
    kind = np.array([f[2] if len(f) > 2 else _GENES[0] for f in features], dtype=object)
    return matrix, np.array([b[0] for b in barcodes], dtype=object), first, second, kind


def _check_entries(path: Path) -> None:
    """Refuse a Matrix Market file that claims more entries than it can hold."""
    with open_text(path) as text:
        lines = (line for line in islice(text, _HEADER_LINES) if not line.startswith("%"))
        size = next(lines, "").split()
    if not all(number.isdecimal() for number in size):
        return  # `mmread` says what is wrong with it
    dense = len(size) == 2
    entries = math.prod(int(number) for number in (size if dense else size[2:]))
    if entries * (_VALUE_BYTES if dense else _ENTRY_BYTES) > most_bytes(path):
        raise DataError(
            f"{path} claims {entries:,} entries, more than it can hold; download it again"
        )


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


def mex_files(place: Path) -> dict[str, Path]:
    """Return the three files of the Matrix Market form by role; ``place`` as `is_mex` takes it."""
    mark = sample_mark(place)
    folder = place if place.is_dir() else place.parent
    return {
        "matrix": place if mark else mex_file(folder, "matrix.mtx"),
        "barcodes": mex_file(folder, f"{mark}barcodes.tsv"),
        "features": mex_file(folder, f"{mark}features.tsv", f"{mark}genes.tsv"),
    }


def matrix_files(matrix: Path) -> dict[str, Path]:
    """Return the files of a matrix by role: one .h5 file, or the three of `is_mex`."""
    if not is_mex(matrix):
        return {"counts": matrix}
    return {f"counts/{role}": path for role, path in mex_files(matrix).items()}


def _columns(path: Path) -> list[list[str]]:
    with open_text(path) as text:
        lines = (line.rstrip("\r\n").split("\t", _COLUMNS) for line in text if line.strip())
        return [[_unquoted(cell) for cell in line[:_COLUMNS]] for line in lines]


def _unquoted(cell: str) -> str:
    """A cell without the quotes that R's write.table puts around it."""
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1] if quoted else cell
