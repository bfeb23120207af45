"""Slides in processes of their own or on a Dask cluster: a crash costs one slide.

The libraries that read images and HDF5 can crash on damaged files, and a crash cannot be caught.
So each process works on one slide at a time, and is replaced when it dies or takes too long.
"""

import contextlib
import multiprocessing
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

from preprocessing.errors import DataError
from preprocessing.run.preparation import SlideResult, attempt_slide
from preprocessing.run.sifting import SlideTask

Attempt = Callable[[SlideTask], SlideResult]
CONNECT_S = 30.0
WORKERS_S = 60.0
_GRACE_S = 5.0  # to leave after a polite signal
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: "Connection[SlideTask | None, SlideResult]"
    task: SlideTask | None = None
    began: float = 0.0

    def give(self, task: SlideTask) -> None:
        self.task, self.began = task, time.monotonic()
        self.pipe.send(task)

    def stop(self, grace_s: float) -> None:
        """End the process: politely, so that it removes what it was writing, then for certain."""
        if grace_s > 0:
            self.process.terminate()
            self.process.join(grace_s)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def prepare_in_processes(
    tasks: Sequence[SlideTask], workers: int, limit_s: float, attempt: Attempt = attempt_slide
) -> Generator[SlideResult, None, None]:
    """Prepare slides in processes (``workers``, at least 1), each given up after ``limit_s`` s.

    ``attempt`` is what prepares one slide, a function that a new process can import.

    Yields:
        One result a slide, as they finish. When the caller stops early, the processes are ended.
    """
    waiting, crew = deque(tasks), list[_Worker]()
    try:
        while waiting or any(worker.task is not None for worker in crew):
            _hand_out(waiting, crew, workers, attempt)
            busy = [worker for worker in crew if worker.task is not None]
            first = min(worker.began for worker in busy) + limit_s
            ready = wait([w.pipe for w in busy], max(0.0, first - time.monotonic()))
            for worker in busy:
                if worker.pipe in ready:
                    yield _answer(worker, crew)
                elif time.monotonic() - worker.began >= limit_s:
                    yield _given_up(worker, crew, limit_s)
        for worker in crew:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
        for worker in crew:
            worker.process.join(_GRACE_S)
    finally:
        for worker in crew:
            if worker.process.is_alive():
                worker.process.terminate()
        for worker in crew:
            worker.stop(_GRACE_S if worker.process.is_alive() else 0)


def _hand_out(
    waiting: deque[SlideTask], crew: list[_Worker], workers: int, attempt: Attempt
) -> None:
    while waiting:
        idle = next((worker for worker in crew if worker.task is None), None)
        if idle is None and len(crew) < workers:
            idle = _hired(attempt)
            crew.append(idle)
        if idle is None:
            return
        try:
            idle.give(waiting[0])
        except OSError:  # it died while it was idle: not the fault of this slide
            crew.remove(idle)
            idle.stop(0)
            continue
        waiting.popleft()


def _hired(attempt: Attempt) -> _Worker:
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(theirs, attempt), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _answer(worker: _Worker, crew: list[_Worker]) -> SlideResult:
    task = worker.task
    assert task is not None
    try:
        result = worker.pipe.recv()
    except Exception:  # noqa: BLE001 - the end of the pipe, or half an answer: the process died
        seconds = time.monotonic() - worker.began
        crew.remove(worker)
        worker.process.join(_GRACE_S)
        code = worker.process.exitcode
        worker.stop(0)
        return SlideResult(task.row.slide_id, "failed", _death(code), seconds=seconds)
    worker.task = None
    return result


def _given_up(worker: _Worker, crew: list[_Worker], limit_s: float) -> SlideResult:
    task = worker.task
    assert task is not None
    crew.remove(worker)
    worker.stop(_GRACE_S)
    reason = (
        f"no result after {limit_s / 60:g} minutes, so it was stopped; if the slide is very large, "
        "allow more minutes a slide; otherwise look at its files with `hibio check`"
    )
    return SlideResult(task.row.slide_id, "failed", reason, seconds=time.monotonic() - worker.began)


def _death(code: int | None) -> str:
    if code is not None and -code in (signal.SIGKILL, signal.SIGTERM):
        return (
            f"its process was ended from outside (signal {-code}), often because the memory was "
            "full; run again with fewer workers"
        )
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return (
            f"a library crashed ({name}) while it read or wrote this slide; one of its files is "
            "probably damaged: copy or export it again"
        )
    return (
        f"its process ended (exit code {code}); in a script, call prepare below "
        "`if __name__ == '__main__':`"
    )


def _serve(pipe: "Connection[SlideResult, SlideTask | None]", attempt: Attempt) -> None:
    """What a process does: slides, until there are none or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, _leave)
    with contextlib.suppress(EOFError, OSError):
        while (task := pipe.recv()) is not None:
            pipe.send(attempt(task))


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM (a batch system's request to stop) act like Ctrl-C inside the block."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def prepare_on_cluster(
    tasks: Sequence[SlideTask], address: str, attempt: Attempt = attempt_slide
) -> Generator[SlideResult, None, None]:
    """Prepare slides on the workers of a Dask scheduler.

    The workers need this version of HiBio and the same paths to the sources and the stores. A task
    whose worker was lost is done again by another one, as often as the cluster allows
    (``distributed.scheduler.allowed-failures``); a slide whose worker was lost after it was
    finished is "skipped" then. ``address`` is such as ``tcp://10.0.0.1:8786``; ``attempt`` is what
    prepares one slide, a function that the workers can import.

    Yields:
        One result a slide, as they finish. When the caller stops early, what has not begun is
        cancelled.

    Raises:
        DataError: Dask is not installed, the scheduler does not answer, or it has no workers.
    """
    client, as_completed = _connected(address)
    run = uuid.uuid4().hex[:12]
    try:
        futures = {
            client.submit(
                attempt,
                _absolute(task),
                key=f"hibio-prepare-{task.row.slide_id}-{run}",
                pure=False,
                retries=1,
            ): task
            for task in tasks
        }
        try:
            for future in as_completed(list(futures), loop=client.loop):
                yield _collected(future, futures[future].row.slide_id)
        finally:
            client.cancel(list(futures))
    finally:
        client.close(timeout=CONNECT_S)


def _connected(address: str) -> tuple[Any, Any]:
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise DataError(
            'a cluster needs the package distributed: pip install "hibio[cluster]" (here and on '
            "the workers)"
        ) from None
    try:
        connect: Any = Client
        client: Any = connect(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"no Dask scheduler answers at {address!r} ({error}); start one with `dask scheduler` "
            "and give the address that it prints, such as tcp://10.0.0.1:8786"
        ) from error
    try:
        client.wait_for_workers(1, timeout=WORKERS_S)
    except TimeoutError:
        client.close(timeout=CONNECT_S)
        raise DataError(
            f"the scheduler {address} has no workers after {WORKERS_S:g} s; start some with "
            f"`dask worker {address} --nthreads 1`"
        ) from None
    return client, as_completed


def _collected(future: Any, slide: str) -> SlideResult:
    if future.status not in ("finished", "error"):
        reason = f"the cluster dropped it ({future.status}); run again, finished slides are kept"
        return SlideResult(slide, "failed", reason)
    try:
        result: SlideResult = future.result()
    except Exception as error:  # noqa: BLE001 - whatever went wrong on the way is the reason
        return SlideResult(slide, "failed", _reason(error))
    return result


def _reason(error: Exception) -> str:
    if type(error).__name__ == "KilledWorker":
        return (
            "its worker was lost, again and again (out of memory, a crash on a damaged file, or "
            "the machine went away); see the logs of the workers"
        )
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"its worker could not run it ({text}); install this version of HiBio on the workers"


def _absolute(task: SlideTask) -> SlideTask:
    """The task with paths that do not depend on the folder in which a worker was started."""
    row: dict[str, Any] = vars(task.row)
    paths: dict[str, Any] = {n: p.absolute() for n, p in row.items() if isinstance(p, Path)}
    return replace(task, row=replace(task.row, **paths), store=task.store.absolute())
