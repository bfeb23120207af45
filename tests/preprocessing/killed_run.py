"""`python -m tests.preprocessing.killed_run MANIFEST OUT POINT NTH WORKERS`: a run that dies.

POINT is where the process kills itself, at the NTH time it comes by; "none" runs through.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py

from preprocessing import files as atomic
from preprocessing import prepare
from preprocessing.patches import PatchConfig
from preprocessing.store import write as store_write

POINTS = ("open", "patches", "written", "synced", "renamed")
PATCH = PatchConfig(200.0, 32)


def dying(action: Callable[..., Any], nth: int, before: bool) -> Callable[..., Any]:
    """The action, which kills the process before or after its nth call."""
    calls = 0

    def wrapped(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        result = action(*given, **named)
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def plant(point: str, nth: int) -> None:
    """Make the process die at a point."""
    if point == "open":  # the temporary file is there and empty
        h5py.File.__init__ = dying(h5py.File.__init__, nth, before=False)
    elif point == "patches":  # in the middle of the patches
        store_write._append = dying(store_write._append, nth, before=False)
    elif point == "written":  # complete, not yet on the disk
        atomic.fsync = dying(atomic.fsync, 2 * nth - 1, before=True)
    elif point == "synced":  # complete and on the disk, without its name
        Path.replace = dying(Path.replace, nth, before=True)  # type: ignore[method-assign]
    elif point == "renamed":  # with its name
        Path.replace = dying(Path.replace, nth, before=False)  # type: ignore[method-assign]


if __name__ == "__main__":
    manifest, out, point, nth, workers = sys.argv[1:]
    plant(point, int(nth))
    report = prepare(manifest, out, patch=PATCH, workers=int(workers))
    sys.exit(1 if report.failed else 0)
