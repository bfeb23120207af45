"""HDF5 files from anywhere: bounds, links and values outside the file, and a full disk as an error.

A few kilobytes can declare a dataset of terabytes, with which reading it would fill the memory.
By links and values in other files, which HiBio never writes, somebody else's file could read any
file of this machine.

When the system refuses a write, the HDF5 library cannot close the file any more, and the process
dies of it (h5py issue 914). So HDF5 writes through a file of ours: after the first refusal it
keeps in memory what HDF5 still writes, lets it close in peace, and then the error is raised.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.files import refusal

if TYPE_CHECKING:
    from anndata import AnnData

DEFLATE_MOST = 1100  # bytes that deflate makes of one, at most 1032
HARMLESS_BYTES = 1 << 28  # a dataset that was never written holds none; so much of it is read
_FILTERS = {307: "bzip2", 32001: "blosc", 32004: "LZ4", 32008: "bitshuffle", 32015: "zstd"}
Shape = tuple[int | None, ...]
_KINDS = {"whole number": "iu", "number": "iuf"}
_LARGE, _PAGE = 1 << 17, 4096  # what is larger begins on a page: memory copies are faster then


def datasets(group: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield name and dataset, by name."""
    names: list[str] = []
    group.visit(names.append)
    for name in sorted(names):
        item = group[name]
        if isinstance(item, h5py.Dataset):
            yield name, item


def oversized(group: h5py.Group, harmless_bytes: int) -> list[str]:
    """Names of the datasets that claim more than ``harmless_bytes`` beyond what their bytes hold.

    Nothing of the group, a file or a part of it, is read.
    """
    return [
        name
        for name, data in datasets(group)
        if data.shape is not None
        and data.size * data.dtype.itemsize
        > DEFLATE_MOST * data.id.get_storage_size() + harmless_bytes
    ]


def require_sound_sizes(path: Path, group: h5py.Group) -> None:
    """Refuse a file with a dataset that its bytes cannot hold, by a DataError that names it."""
    absurd = oversized(group, HARMLESS_BYTES)
    if absurd:
        first = group[absurd[0]]
        claimed = first.size * first.dtype.itemsize / 2**30
        more = f" (and {len(absurd) - 1} more)" if len(absurd) > 1 else ""
        raise DataError(
            f"{path}: {absurd[0]}{more} claims {claimed:,.1f} GiB in "
            f"{first.id.get_storage_size():,} bytes of the file, more than these can hold; "
            "download or write it again"
        )


def open_guarded(path: Path, *, ours: bool = True) -> h5py.File:
    """Open a file for reading; every HDF5 file that HiBio reads is looked at here.

    Args:
        path: the file.
        ours: as HiBio writes it, so without any link; else links inside of the file are followed.

    Raises:
        DataError: a link or values in another file, or a dataset that its bytes cannot hold.
        OSError: no HDF5 file, or damaged (so are RuntimeError and KeyError).
    """
    file = h5py.File(path, "r")
    try:
        found = outside_data(file, links=ours)
        if found is not None:
            remedy = "HiBio writes no such file, so do not use it"
            if not ours:
                remedy = "only what is in the file itself is read: copy the values into it"
            raise DataError(f"{path}: {found}; {remedy}")
        require_sound_sizes(path, file)
        if not ours:
            _require_filters(path, file)
    except BaseException:
        file.close()
        raise
    return file


def _missing_filters(file: h5py.File) -> dict[int, str]:
    """Filters of the datasets that the HDF5 library here has not: number -> name and dataset."""
    found: dict[int, str] = {}
    for name, data in datasets(file):
        packed = data.id.get_create_plist()
        for index in range(packed.get_nfilters()):
            number, _, _, label = packed.get_filter(index)
            if not h5py.h5z.filter_avail(number):
                label = _FILTERS.get(number, label.decode("utf-8", "replace") or "unknown")
                found.setdefault(number, f"{label} (HDF5 filter {number}, of {name})")
    return found


def _require_filters(path: Path, file: h5py.File) -> None:
    """See that all datasets can be unpacked, with the filters of hdf5plugin where it is there.

    Raises:
        DataError: a filter is missing; names it, the dataset and the package that has it.
    """
    if not _missing_filters(file):
        return
    with suppress(ImportError):
        import_module("hdf5plugin")  # which registers its filters
    missing = _missing_filters(file)
    if missing:
        raise DataError(
            f"{path} is packed with {', '.join(missing.values())}, which the HDF5 library here "
            "cannot unpack and hdf5plugin can: pip install 'hibio[hdf5]' and run again, or write "
            "it anew with gzip"
        )


def require_arrays(group: h5py.Group, expected: Mapping[str, tuple[str, Shape]]) -> None:
    """Compare datasets with their schema before anything of them is read.

    Args:
        group: that holds them.
        expected: name -> kind (text, whole or number) and shape, None for any length.

    Raises:
        DataError: one is missing or another; names it, without the file.
    """
    for name, (kind, shape) in expected.items():
        item = group.get(name)
        if not isinstance(item, h5py.Dataset) or item.shape is None:
            raise DataError(f"{name} is missing, or holds no array")
        text = h5py.check_string_dtype(item.dtype) is not None
        if not text if kind == "text" else item.dtype.kind not in _KINDS[kind]:
            raise DataError(f"{name} holds values of type {item.dtype}, expected {kind}s")
        fits = zip(item.shape, shape, strict=False)
        if len(item.shape) != len(shape) or any(n is not None and m != n for m, n in fits):
            wanted = str(shape).replace("None", "any")
            raise DataError(f"{name} has shape {item.shape}, expected {wanted}")


def require_csr(group: h5py.Group, name: str, shape: tuple[int, int]) -> None:
    """Compare the parts of a sparse matrix (data, indices, indptr below ``name``) with its shape.

    Raises:
        DataError: see `require_arrays`.
    """
    data = group.get(f"{name}/data")
    length = data.shape[0] if isinstance(data, h5py.Dataset) and data.shape else None
    require_arrays(
        group,
        {
            f"{name}/data": ("number", (None,)),
            f"{name}/indices": ("whole number", (length,)),
            f"{name}/indptr": ("whole number", (shape[0] + 1,)),
        },
    )


def checked_csr(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, shape: tuple[int, int]
) -> csr_matrix:
    """A CSR matrix whose every index was looked at: a wrong one would read or write memory.

    Raises:
        ValueError: an index outside the matrix, or parts that do not fit together.
    """
    matrix = csr_matrix((data, indices, indptr), shape)
    matrix.check_format(full_check=True)
    return matrix


def outside_data(file: h5py.File, *, links: bool = True) -> str | None:
    """The first name that is a link, or whose values are in another file, for a message.

    None when everything is inside; without ``links``, a link inside of the file is. Groups that
    contain themselves are looked into once.
    """
    pending, seen = [file["/"]], set()
    while pending:
        group = pending.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            continue
        seen.add(address)
        for name in group:
            place = f"{group.name.rstrip('/')}/{name}"
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.SoftLink) and not links:
                continue  # what it leads to is looked at where it lies
            if type(link) is not h5py.HardLink:
                return f"{place} is a link"
            item = group[name]
            if isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
                return f"{place} has its values in another file"
            if isinstance(item, h5py.Group):
                pending.append(item)
    return None


class Sink(io.RawIOBase):
    """A file for HDF5 that never refuses; see the module.

    Attributes:
        error: the first refusal of the system (or a Ctrl-C in the middle of a write), or None.
    """

    def __init__(self, path: Path, *, change: bool = False) -> None:
        """Make the file; ``change``: open the one that is there."""
        super().__init__()
        self.error: BaseException | None = None
        self._file = path.open("r+b" if change else "w+b", buffering=0)
        self._at = 0
        self._size = path.stat().st_size
        self._kept: list[tuple[int, bytes]] = []  # (place, bytes) in order of writing

    def check(self) -> None:
        """Raise the refusal, if there was one; to be called between large writes."""
        if self.error is not None:
            raise self.error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def readable(self) -> bool:
        """HDF5 reads what it wrote."""
        return True

    writable = seekable = readable

    def _attempt(self, change: Callable[[], object]) -> None:
        """Make a change of the file, unless one was refused before."""
        if self.error is None:
            try:
                change()
            except BaseException as error:  # noqa: BLE001 - kept, and raised by `check`
                self.error = error

    def write(self, data: Any) -> int:
        """Write all of it, to the disk or, after a refusal, to memory."""
        view = memoryview(data).cast("B")
        self._attempt(lambda: self._store(view))
        if self.error is not None:
            self._kept.append((self._at, bytes(view)))
        self._at += len(view)
        self._size = max(self._size, self._at)
        return len(view)

    def _store(self, view: memoryview) -> None:
        self._file.seek(self._at)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:]) or 0

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what was written; what never was is zero."""
        view = memoryview(buffer).cast("B")
        self._file.seek(self._at)
        data = self._file.read(len(view)) or b""
        view[: len(data)] = data
        view[len(data) :] = bytes(len(view) - len(data))
        for place, kept in self._kept:
            first, last = max(place, self._at), min(place + len(kept), self._at + len(view))
            if first < last:
                view[first - self._at : last - self._at] = kept[first - place : last - place]
        self._at += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size."""
        self._size = self._at if size is None else size
        self._attempt(lambda: self._file.truncate(self._size))
        return self._size

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


@contextmanager
def hdf5_writer(path: Path, *, change: bool = False) -> Iterator[tuple[h5py.File, Sink]]:
    """Make an HDF5 file in place of any old one, or ``change`` the one that is there.

    Yields:
        The open file, and what it is written through: call its ``check`` between large writes.

    Raises:
        OSError: the disk is full, or a limit is reached (says how much is free, and where); the
            file is of no use then.
    """
    options = {"alignment_threshold": _LARGE, "alignment_interval": _PAGE}
    with Sink(path, change=change) as sink:
        try:
            with h5py.File(sink, "r+" if change else "w", **options) as file:
                yield file, sink
        except (OSError, RuntimeError, ValueError) as error:
            told = error if sink.error is None else refusal(sink.error, path.parent)
            if told is error:  # an error that is its own cause has no end
                raise
            raise told from error
        if sink.error is not None:
            raise refusal(sink.error, path.parent)


def write_h5ad(
    path: Path,
    adata: "AnnData",
    rows: Callable[[slice], Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Write an AnnData file through `hdf5_writer`, so that a full disk is an error.

    Args:
        path: the file.
        adata: what is in memory; without ``X`` where ``rows`` gives it.
        rows: see `write_rows`.

    Raises:
        OSError: see `hdf5_writer`.
    """
    from anndata.io import write_elem

    adata.strings_to_categoricals()
    with hdf5_writer(path) as (file, sink):
        write_elem(file, "/", adata)
        if rows is not None:
            write_rows(file, adata.shape, rows, check=sink.check)


def write_rows(
    group: Any,
    shape: tuple[int, int],
    rows: Callable[[slice], Mapping[str, np.ndarray]],
    block: int = 2048,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write matrices of an AnnData that are never whole in memory.

    Args:
        group: of the AnnData, in HDF5 or zarr.
        shape: (S, G).
        rows: some rows of "X" and of "layers/NAME", float32 (n, G); asked for block by block.
        block: rows in memory at once.
        check: called after each block.
    """
    for start in range(0, shape[0], block):
        part = slice(start, min(start + block, shape[0]))
        for name, values in rows(part).items():
            if start == 0:
                _matrix(group, name, shape, block)
            group[name][part] = values
        check()


def _matrix(group: Any, name: str, shape: tuple[int, int], block: int) -> None:
    """An empty float32 matrix of an AnnData, in the place of any that is there."""
    if name in group:
        del group[name]
    chunks = (min(block, shape[0]), min(64, shape[1]))
    made: dict[str, Any] = {"shape": shape, "dtype": np.float32, "chunks": chunks}
    if isinstance(group, h5py.Group):
        data = group.create_dataset(name, compression="lzf", **made)
    else:  # zarr 3, and 2
        create = getattr(group, "create_array", None) or group.create_dataset
        data = create(name, **made)
    data.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
