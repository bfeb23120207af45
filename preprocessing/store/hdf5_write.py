"""Writing HDF5 files such that a full disk is an error of Python and no crash.

When the system refuses a write, the HDF5 library cannot close the file any more, and the process
dies of it (h5py issue 914). So HDF5 writes through a file of ours: after the first refusal it
keeps in memory what HDF5 still writes, lets it close in peace, and then the error is raised.
"""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

_LARGE, _PAGE = 1 << 17, 4096  # what is larger begins on a page: memory copies are faster then


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

    def writable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Write all of it, to the disk or, after a refusal, to memory."""
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                self._store(view)
            except BaseException as error:  # noqa: BLE001 - kept, and raised by `check`
                self.error = error
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
        if self.error is None:
            try:
                self._file.truncate(self._size)
            except BaseException as error:  # noqa: BLE001 - kept, and raised by `check`
                self.error = error
        return self._size

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


@contextmanager
def hdf5_writer(path: Path, *, change: bool = False) -> Iterator[tuple[h5py.File, Sink]]:
    """Make an HDF5 file, or change one.

    Args:
        path: where; an old file of this name is overwritten, unless it is to be changed.
        change: open the file that is there and keep what is in it.

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
