"""Ctrl-C and SIGTERM while a run is set up, trains, saves and closes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REMINDER_S = 0.5  # seconds between a signal and its repetition, while it has had no effect


class _Stopped(KeyboardInterrupt):
    """Goes through every ``except OSError`` on its way, which InterruptedError would not."""


@contextmanager
def on_stop(act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` on Ctrl-C and SIGTERM in the block; a second Ctrl-C then stops at once.

    Args:
        act: called between two instructions of the main thread; it may raise.

    Yields:
        Nothing. In another thread than the main one, the caller's signals stay as they are.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        act()

    try:
        old = {number: signal.signal(number, stop) for number in SIGNALS}
    except ValueError:  # not the main thread
        old = {}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Reminder:
    """Sends SIGTERM again and again: what a handler raises is lost in a callback or destructor.

    Python would print such a loss as a traceback and go on; here it comes again, so it is not told.
    """

    def __init__(self) -> None:
        self._enough = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._remind, daemon=True)

    def begin(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()

    def end(self) -> None:
        with self._lock:
            self._enough.set()

    def _remind(self) -> None:
        while not self._enough.wait(REMINDER_S):
            with self._lock:
                if not self._enough.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def stops_at_once(told: Callable[[], str]) -> Iterator[None]:
    """Raise InterruptedError on Ctrl-C or SIGTERM: for work that a resumed run simply repeats.

    Where a block inside handles signals in another way (:func:`on_stop`), that goes first.

    Args:
        told: gives the message, with the command that goes on.

    Raises:
        InterruptedError: a signal came.
    """
    reminder = _Reminder()

    def interrupt() -> None:
        reminder.begin()
        raise _Stopped

    hook = sys.unraisablehook
    sys.unraisablehook = lambda lost: None if lost.exc_type is _Stopped else hook(lost)
    try:
        with on_stop(interrupt):
            try:
                yield
            finally:
                reminder.end()
                sys.unraisablehook = hook
    except _Stopped as stopped:
        raise InterruptedError(told()) from stopped
