"""Attempts at a slide that go wrong, by the name of the slide; new processes can import them."""

import os
import signal
import time

from preprocessing.run.preparation import SlideResult, attempt_slide
from preprocessing.run.sifting import SlideTask


def attempt(task: SlideTask) -> SlideResult:
    """Crash, hang, be killed, leave, or prepare the slide."""
    name = task.row.slide_id
    if name.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("leave"):
        os._exit(3)
    if name.startswith("hang"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library that never returns
        time.sleep(600)
    return attempt_slide(task)
