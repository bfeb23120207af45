"""Text files of gene sets: bounded reading (plain or gzip) and atomic writing."""

import gzip
import os
import secrets
import zlib
from pathlib import Path

from .errors import PathwayError

MAX_BYTES = 512 * 1024**2
GZIP_MAGIC = b"\x1f\x8b"


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    r"""Read a UTF-8 text file, plain or gzip (told by its first bytes), with ``\n`` line ends.

    A byte-order mark is dropped; CRLF and CR become LF.

    Args:
        path: File to read.
        max_bytes: Most bytes accepted after decompression; protects against gzip bombs.

    Returns:
        The whole text.

    Raises:
        PathwayError: No such file, a folder, too large, a damaged gzip, or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise PathwayError(f"{path}: {found}; expected a gene-set file. Check the path.")
    data = _read_bytes(path, max_bytes)
    if len(data) > max_bytes:
        raise PathwayError(
            f"{path}: more than {max_bytes:,} bytes of text (after decompression); no gene-set "
            "file is that large. Check that it is the right file, or split it."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PathwayError(
            f"{path}: byte {error.start} is not UTF-8; expected a text file. "
            "Save it as UTF-8 (for example: iconv -f latin1 -t utf-8)."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    """At most ``max_bytes + 1`` bytes, decompressed where the file is gzip."""
    with path.open("rb") as raw:
        zipped = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        if not zipped:
            return raw.read(max_bytes + 1)
        try:
            with gzip.GzipFile(fileobj=raw) as stream:
                return stream.read(max_bytes + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise PathwayError(
                f"{path}: the gzip data are damaged or cut short ({error}). Copy the file again."
            ) from error


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically (gzip where the name ends in ``.gz``).

    The bytes go to a temporary name in the same folder, are flushed to disk and then renamed, so a
    reader sees the old file or the new one. Gzip output carries no time stamp: same text, same
    bytes.

    Args:
        path: File to write; its folder must exist.
        text: Content.

    Raises:
        PathwayError: The text holds characters that UTF-8 cannot carry.
        OSError: The folder is missing or not writable.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PathwayError(
            f"{path}: the text holds {text[error.start]!r}, which UTF-8 cannot store; remove it."
        ) from error
    write_bytes(path, gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes atomically: temporary name in the same folder, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
