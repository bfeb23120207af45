"""Attempts at a slide that go wrong, by the name of the slide; new processes can import them."""

import os
import signal
import time
import weakref

from preprocessing.run.preparation import SlideResult, attempt_slide
from preprocessing.run.sifting import SlideTask


class Thing:
    """What a weak reference can be of."""


def stop_in_finaliser() -> None:
    """Send this process SIGTERM while a weak reference is told that its object is gone."""
    thing = Thing()
    seen = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    del thing
    assert seen() is None


def attempt(task: SlideTask) -> SlideResult:
    """Crash, hang, be killed, leave, or prepare the slide."""
    name = task.row.slide_id
    if name.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("leave"):
        os._exit(3)
    if name.startswith("finaliser"):  # what is raised in one is swallowed, so it goes on
        stop_in_finaliser()
        time.sleep(600)
    if name.startswith("hang"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library that never returns
        time.sleep(600)
    return attempt_slide(task)
