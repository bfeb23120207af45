"""Gzip files unpacked up to a bound, so that a small file cannot fill the memory or never end.

Deflate makes at most 1,032 bytes of one; tables of counts reach some 10 to 100.
"""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from preprocessing.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
MOST_RATIO = 200  # unpacked over packed bytes read so far ...
HARMLESS_BYTES = 1 << 28  # ... once more than this was unpacked (256 MiB)
MOST_BYTES = 1 << 37  # of one file, whatever its ratio (128 GiB)


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
def open_unpacked(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, gzipped or not (told by its first bytes, not by its name).

    Raises:
        DataError: while it is read, content beyond the bounds.
    """
    packed = is_gzip(path)
    with path.open("rb") as raw:
        yield io.BufferedReader(BoundedGzip(path, raw), 1 << 17) if packed else raw


def most_bytes(path: Path) -> int:
    """How many bytes the content of a file can have at most."""
    size = path.stat().st_size
    return max(HARMLESS_BYTES, min(MOST_RATIO * size, MOST_BYTES)) if is_gzip(path) else size
