"""What became of one slide: prepared, skipped or failed, always as a value and never an error."""

import errno
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from preprocessing.errors import DataError
from preprocessing.run.preparation import SlideTask, prepare_slide

Status = Literal["done", "skipped", "failed"]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class SlideResult:
    """What became of one slide.

    Attributes:
        slide_id: the slide.
        status: "done", "skipped" (the store is up to date) or "failed".
        reason: why it failed or was skipped, or what was left out.
        n_spots: spots in the store; 0 if failed.
        seconds: time spent.
    """

    slide_id: str
    status: Status
    reason: str = ""
    n_spots: int = 0
    seconds: float = 0.0


def attempt_slide(task: SlideTask) -> SlideResult:
    """Prepare one slide and turn whatever goes wrong into a result.

    Args:
        task: the slide, its store and the settings.

    Returns:
        The result; a failed slide has no new store.
    """
    begin, slide = time.monotonic(), task.row.slide_id
    try:
        done = prepare_slide(task)
        status: Status = "skipped" if done.skipped else "done"
        result = SlideResult(slide, status, done.reason, done.n_spots)
    except DataError as error:
        result = SlideResult(slide, "failed", str(error))
    except MemoryError:
        reason = "not enough memory for this slide; are its files what the manifest says?"
        result = SlideResult(slide, "failed", reason)
    except Exception as error:  # noqa: BLE001 - one bad slide must never stop the others
        result = SlideResult(slide, "failed", _reason(error, task.store.parent))
    reason = " ".join(result.reason.split())
    return replace(result, reason=reason, seconds=time.monotonic() - begin)


def _reason(error: Exception, folder: Path) -> str:
    if _disk_full(error):
        free = shutil.disk_usage(folder).free / 2**20
        return (
            f"the disk is full or the store exceeds a limit: {free:,.0f} MiB are free in {folder}; "
            "make room, or choose another --out, and run again: finished slides are kept"
        )
    if isinstance(error, OSError):
        return str(error)
    return f"unexpected {type(error).__name__}: {error}"


def _disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it, says that nothing more can be written.

    HDF5 gives the code of the system in its message only.
    """
    while error is not None:
        if getattr(error, "errno", None) in _FULL:
            return True
        if any(f"errno = {code}," in str(error) for code in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
