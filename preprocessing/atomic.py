"""Writing files so that a killed process never leaves half a file under the final name."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path that takes the final name only when the block succeeds.

    The temporary file lies in the folder of ``path`` (a rename across file systems is not atomic)
    and keeps its suffix, so that writers that look at the suffix work. The folder is made when it
    is missing.

    Args:
        path: the final name. An old file of this name stays until the new one is complete.

    Yields:
        The temporary path, which does not exist yet. The block must create it and close it.

    Raises:
        FileNotFoundError: the block ended without writing the temporary file.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.stem[:80]}.{uuid.uuid4().hex}.part{final.suffix}"
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(final)
        _fsync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    """Force a file or folder onto the disk; Windows cannot sync folders and needs no such step."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
