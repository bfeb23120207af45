"""Writing files so that a killed process never leaves half a file under the final name."""

import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ABANDONED_AFTER = 24 * 3600.0  # seconds without a change: a file of another machine's dead process
_TEMPORARY = re.compile(r"\..*\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{16}\.part(\..*)?", re.S)
_OLDER = re.compile(r"\..*\.[0-9a-f]{32}\.part(\..*)?", re.S)  # as named before the process was


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path that takes the final name only when the block succeeds.

    The temporary file lies in the folder of ``path`` (a rename across file systems is not atomic)
    and keeps its suffix, so that writers that look at the suffix work. Its name says which process
    writes it, so that `remove_abandoned` can tell. The folder is made when it is missing.

    Args:
        path: the final name. An old file of this name stays until the new one is complete.

    Yields:
        The temporary path, which does not exist yet. The block must create it and close it.

    Raises:
        FileNotFoundError: the block ended without writing the temporary file.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    owner = f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:16]}"
    temporary = final.parent / f".{final.stem[:80]}.{owner}.part{final.suffix}"
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(final)
        _fsync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(folder: Path | str) -> list[Path]:
    """Remove the temporary files of `atomic_path` whose process was killed.

    That is a file of this machine whose process is gone, or one that nothing has written to for a
    day (of another machine, or of an older version). Files that a running process writes, and all
    other files, stay.

    Args:
        folder: where to look; not below it.

    Returns:
        What was removed.
    """
    removed = []
    with suppress(FileNotFoundError):
        for path in sorted(Path(folder).iterdir()):
            with suppress(OSError):  # another run was faster, or the file is not ours to remove
                if _abandoned(path):
                    path.unlink()
                    removed.append(path)
    return removed


def _abandoned(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match is None and not _OLDER.fullmatch(path.name):
        return False
    if match is not None and match["host"] == _host() and os.name != "nt":
        return not _runs(int(match["pid"]))
    return time.time() - path.stat().st_mtime > ABANDONED_AFTER


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs, and belongs to somebody else
        return True
    return True


def _host() -> str:
    """Name of the machine and, in a container, of its own list of processes; 8 hex digits."""
    space = ""
    with suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _fsync(path: Path) -> None:
    """Force a file or folder onto the disk; Windows cannot sync folders and needs no such step."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
