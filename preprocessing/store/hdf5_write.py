"""Writing HDF5 files such that a full disk is an error of Python and no crash.

When the system refuses a write, the HDF5 library cannot close the file any more, and the process
dies of it (h5py issue 914). So HDF5 writes through a file of ours: after the first refusal it
keeps in memory what HDF5 still writes, lets it close in peace, and then the error is raised.
"""

import io
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

    def __init__(self, path: Path) -> None:
        """Make the file."""
        super().__init__()
        self.error: BaseException | None = None
        self._file = path.open("w+b", buffering=0)
        self._at = 0
        self._size = 0
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
def hdf5_writer(path: Path) -> Iterator[tuple[h5py.File, Sink]]:
    """Make an HDF5 file.

    Args:
        path: where; an old file of this name is overwritten.

    Yields:
        The open file, and what it is written through: call its ``check`` between large writes.

    Raises:
        OSError: the disk is full, or a limit is reached; the file is of no use then.
    """
    with Sink(path) as sink:
        try:
            with h5py.File(sink, "w", alignment_threshold=_LARGE, alignment_interval=_PAGE) as file:
                yield file, sink
        except (OSError, RuntimeError, ValueError) as error:
            if sink.error is not None and error is not sink.error:
                raise sink.error from error
            raise
        sink.check()
