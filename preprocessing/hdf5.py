"""HDF5 files from anywhere: bounds, links and values outside the file, and a full disk as an error.

A few kilobytes can declare a dataset of terabytes, with which reading it would fill the memory.
By links and values in other files, which HiBio never writes, somebody else's file could read any
file of this machine.

When the system refuses a write, the HDF5 library cannot close the file any more, and the process
dies of it (h5py issue 914). So HDF5 writes through a file of ours: after the first refusal it
keeps in memory what HDF5 still writes, lets it close in peace, and then the error is raised.
"""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from preprocessing.errors import DataError

DEFLATE_MOST = 1100  # bytes that deflate makes of one, at most 1032
HARMLESS_BYTES = 1 << 28  # a dataset that was never written holds none; so much of it is read
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


def outside_data(file: h5py.File) -> str | None:
    """The first name that is a link, or whose values are in another file, for a message.

    None when everything is inside. Groups that contain themselves are looked into once.
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
            if type(group.get(name, getlink=True)) is not h5py.HardLink:
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
            if sink.error is not None:
                raise _told(sink.error, path.parent) from error
            raise
        if sink.error is not None:
            raise _told(sink.error, path.parent)


def _told(error: BaseException, folder: Path) -> BaseException:
    """A refusal of the system with its place and remedy; anything else as it is."""
    if not isinstance(error, OSError) or error.filename is not None:
        return error
    free = shutil.disk_usage(folder).free / 2**20
    text = f"{error.strerror or error}; {free:,.0f} MiB are free: make room and run again"
    return OSError(error.errno, text, str(folder))
