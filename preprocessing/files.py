"""Files: written whole or not at all, known by their hash, and safely named."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from preprocessing.errors import DataError

LOCK = "lock.json"  # of a folder that one process at a time may write into
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says of a full disk
_LONGEST = 128
_PLAIN = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{_LONGEST - 1}}}")
_NOT_IN_A_PART = re.compile(r"[/\\\x00-\x1f\x7f]")
ABANDONED_AFTER = 24 * 3600.0  # seconds without a change: a file of another machine's dead process
_TEMPORARY = re.compile(r"\..*\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{16}\.part(\..*)?", re.S)
_OLDER = re.compile(r"\..*\.[0-9a-f]{32}\.part(\..*)?", re.S)  # as named before the process was


def plain_name(text: str) -> str:
    """Turn any text into a name that a slide may have."""
    return (re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip(".-") or "slide")[:_LONGEST]


def require_plain_name(what: str, name: str) -> str:
    """Return a name that names a file on any system: of a slide, or of a feature set.

    Raises:
        DataError: empty, over 128 characters, or with others than letters, digits, ".", "_", "-"
            (so without separators, NUL and "..").
    """
    if not _PLAIN.fullmatch(name):
        raise DataError(
            f"{what} {_shown(name)} is not a plain name; use letters, digits, '.', '_', '-' only "
            f"(at most {_LONGEST}, not beginning with '.' or '-')"
        )
    return name


def folder_part(text: str) -> str:
    """Turn a text that is not empty into one that `require_folder_part` accepts."""
    return re.sub(r"^[.\s]+", "", _NOT_IN_A_PART.sub("_", text))[:_LONGEST].strip() or "_"


def require_folder_part(what: str, name: str) -> str:
    r"""Return a free text that becomes part of a folder's name: a patient, a fold, a variant.

    Blanks and any script are allowed.

    Raises:
        DataError: empty, over 128 characters, begins with ".", or holds a separator ("/", "\") or
            a control character.
    """
    if not name or len(name) > _LONGEST or name.startswith(".") or _NOT_IN_A_PART.search(name):
        raise DataError(
            f"{what} {_shown(name)} cannot name a folder; use 1 to {_LONGEST} characters, no '/', "
            "'\\' or control characters, not beginning with '.'"
        )
    return name


def _shown(name: str) -> str:
    return repr(name) if len(name) <= _LONGEST else f"{name[:40]!r}... ({len(name)} characters)"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal; of a folder, of the names and bytes below it."""
    if path.is_dir():
        return _folder_sha256(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_sha256(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def files_in(folder: Path, pattern: str = "*") -> list[Path]:
    """The files of a folder that fit a pattern, by name, hidden ones left out.

    Hidden are those that begin with "."; macOS puts ``._NAME`` beside every NAME in archives and on
    disks of others.
    """
    found = (p for p in folder.glob(pattern) if not p.name.startswith(".") and p.is_file())
    return sorted(found)


def spreadsheet_text(text: str) -> str:
    """A cell of a CSV file that a spreadsheet shows and does not run.

    One that begins with ``=``, ``+``, ``-``, ``@``, a tab or a return gets a quote before it.
    """
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text


def not_ours(path: Path) -> DataError:
    """What is said of a file in the place of a result that this command did not make."""
    return DataError(
        f"{path} is there and was not made by this command, or does not say from what; move it, or "
        "give another --out"
    )


def refuse_others(signs: Mapping[Path, str], also: Iterable[Path] = ()) -> None:
    """Refuse to write over files that another command, another program or a user made.

    Args:
        signs: files that a command writes first -> a text that only those of its own hold. One that
            is there and holds it speaks for all the others.
        also: what else it writes.

    Raises:
        DataError: a file is in the place, and none of the first ones is its own.
    """
    for path, sign in signs.items():
        if path.is_file() and sign in path.read_text(encoding="utf-8", errors="replace"):
            return
    for path in (*signs, *also):
        if path.exists() or path.is_symlink():
            raise not_ours(path)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path that takes the final name only when the block succeeds.

    The temporary file lies in the folder of ``path`` (a rename across file systems is not atomic)
    and keeps its suffix, so that writers that look at the suffix work. Its name says which process
    writes it, so that `remove_abandoned` can tell. The folder is made when it is missing. The block
    must create the file and close it; an old one of the final name stays until then. It may make a
    folder instead (zarr): an old one is put aside before the new one has its name, so that a kill
    between the two leaves none under that name, and never a mixture on disk.

    Raises:
        FileNotFoundError: the block ended without writing the temporary file.
        OSError: the disk is full (see `refusal`).
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(final)
    try:
        yield temporary
        for path in temporary.rglob("*") if temporary.is_dir() else ():
            fsync(path)
        fsync(temporary)
        _take_place(temporary, final)
    except OSError as error:
        told = refusal(error, final.parent)
        if told is error:  # an error that is its own cause has no end
            raise
        raise told from error
    finally:
        _remove(temporary)


def refusal(error: BaseException, folder: Path) -> BaseException:
    """That the system takes no more of a file, with its place and remedy; other errors as they are.

    Such are a full disk, a quota and a limit of the size of files.
    """
    if not isinstance(error, OSError) or error.errno not in FULL or error.filename is not None:
        return error
    free = shutil.disk_usage(folder).free / 2**20
    text = f"{error.strerror}; {free:,.0f} MiB are free: make room and run again"
    return OSError(error.errno, text, str(folder))


def _take_place(temporary: Path, final: Path) -> None:
    """Give what is whole its name; the folder that has it goes afterwards, or gets it back."""
    aside = temporary.with_name(f"{temporary.name}.old")
    try:
        if temporary.is_dir() and final.is_dir():
            final.replace(aside)
        temporary.replace(final)
    except BaseException:
        if aside.exists() and not final.exists():
            aside.replace(final)
        raise
    fsync(final.parent)
    _remove(aside)


def _remove(path: Path) -> None:
    """Remove a file or folder that may be missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def temporary_path(final: Path) -> Path:
    """A new name beside ``final`` that says which process writes there; nothing is made."""
    owner = f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:16]}"
    return final.parent / f".{final.stem[:80]}.{owner}.part{final.suffix}"


def remove_abandoned(folder: Path | str) -> list[Path]:
    """Remove from a folder what has a `temporary_path` and whose process was killed.

    That is a file or folder of this machine whose process is gone, or one that nothing has written
    to for a day (of another machine, or of an older version). Files that a running process writes,
    and all other files, stay.

    Returns:
        What was removed.
    """
    removed = []
    with suppress(FileNotFoundError):
        for path in sorted(Path(folder).iterdir()):
            with suppress(OSError):  # another run was faster, or the file is not ours to remove
                if _abandoned(path):
                    _remove(path)
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


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold a folder, made when missing, for the block: one process at a time writes there.

    ``lock.json`` says who does: host, process, since when. One that a killed process of this
    machine left is told and taken over.

    Raises:
        DataError: another process holds it; says which, and what to do where it is gone.
    """
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while not _locks(path):
        _take_over(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # nothing was written: nothing stays
            for place in made:
                place.rmdir()


def _locks(path: Path) -> bool:
    """Make the lock; False where there is one."""
    owner = {
        "host": socket.gethostname(),
        "machine": _host(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(json.dumps(owner) + "\n")
                file.flush()
            except OSError:  # a full disk: no lock without a name stays behind
                path.unlink(missing_ok=True)
                raise
    except FileExistsError:
        return False
    return True


def holder(folder: Path | str) -> str | None:
    """Which process holds a folder (`locked`); None for nobody, or one that is gone."""
    try:
        text = (Path(folder) / LOCK).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    told, gone, _ = _owner(text)
    return None if gone else told


def _owner(text: str) -> tuple[str, bool, bool]:
    """Of a lock: who, whether that process is gone, whether it is one of this machine."""
    try:
        owner = json.loads(text)
        pid, here = int(owner["pid"]), owner["machine"] == _host()
        told = f"process {pid} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that wrote no name", False, False
    return told, here and not (_runs(pid) and owner["started"] == _started(pid)), here


def _take_over(path: Path) -> None:
    """Remove the lock of a process of this machine that is gone; refuse any other."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    told, gone, here = _owner(text)
    if not gone:
        more = f"; if it is gone, remove {path}" * (not here)
        raise DataError(
            f"{path.parent} is in use: {told} is running there, and two would write over each "
            f"other; wait until it ends, stop it, or give another folder{more}. Nothing was changed"
        )
    aside = path.with_name(f".{LOCK}.{os.getpid()}")
    with suppress(FileNotFoundError):  # another process was faster
        path.rename(aside)
        if aside.read_text(encoding="utf-8") != text:  # and holds it already
            aside.rename(path)
            return
        aside.unlink()
        print(f"{path}: left by {told}, which is gone; taken over", file=sys.stderr)


def _started(process: int) -> str:
    """When a process began, as the system counts, since numbers return; "" where it is not told."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _host() -> str:
    """Name of the machine and, in a container, of its own list of processes; 8 hex digits."""
    space = ""
    with suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def fsync(path: Path) -> None:
    """Force a file or folder onto the disk; Windows cannot sync folders and needs no such step."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
