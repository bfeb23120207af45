"""Tasks in this process, in processes of their own or on a Dask cluster: a crash costs one task.

The libraries that read images and HDF5 can crash on damaged files, and a crash cannot be caught.
So each process works on one task at a time, and is replaced when it dies or takes too long.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from tqdm import tqdm

from preprocessing.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
CONNECT_S = 30.0
WORKERS_S = 60.0
_LOOK_S = 3600.0  # between two looks at the time; the system takes no wait of months
_GRACE_S = 5.0  # to leave after a polite signal
_AGAIN_S = 0.05  # until a swallowed one is sent again
_CONTEXT = multiprocessing.get_context("spawn")
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Lost:
    """A task without a result: why, and the seconds that it took."""

    reason: str
    seconds: float = 0.0


def each(
    calls: Mapping[str, Callable[[], R]],
    workers: int,
    scheduler: str | None,
    what: str,
    unit: str = "slide",
) -> list[R]:
    """Make all calls, by `results`; one that fails does not stop the others.

    Args:
        calls: by the name that a failure is told with; functions and arguments that a new process
            can import.
        workers: processes.
        scheduler: address of a Dask scheduler, whose workers are used in place of ``workers``.
        what: is done, for the bar.
        unit: of the bar.

    Returns:
        Their results, in their order.

    Raises:
        DataError: some failed, after all others were made; or as `results` says.
    """
    found = gathered(_called, calls, what, workers, scheduler, unit=unit)
    failed = [f"{name}: {one.reason}" for name, one in found.items() if isinstance(one, Lost)]
    if failed:
        raise DataError(
            f"{len(failed)} of {len(calls)} {unit}(s) failed, and the same command does these "
            f"again: {'; '.join(failed)}"
        )
    return [one for one in found.values() if not isinstance(one, Lost)]


def _called(call: Callable[[], R]) -> R | Lost:
    begin = time.monotonic()
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - told at the end, of this task alone
        text = " ".join(str(error).split()) or type(error).__name__
        return Lost(text, time.monotonic() - begin)


def require_workers(workers: int) -> None:
    """Refuse fewer than 0 processes.

    Raises:
        DataError: that.
    """
    if workers < 0:
        raise DataError(f"workers is {workers}; expected 0 (this process) or more processes")


def gathered(
    attempt: Callable[[T], R],
    tasks: Mapping[str, T],
    what: str,
    workers: int = 0,
    scheduler: str | None = None,
    limit_s: float = math.inf,
    unit: str = "slide",
) -> dict[str, R | Lost]:
    """All of `results` in the order of the tasks, with a bar of ``what`` is done by ``unit``."""
    found: dict[str, R | Lost] = {}
    stream = results(attempt, tasks, workers, scheduler, limit_s)
    bar = tqdm(total=len(tasks), desc=what, unit=unit, disable=None)
    with interruptible(), contextlib.closing(stream), bar:
        for name, result in stream:
            found[name] = result
            bar.update()
    return {name: found[name] for name in tasks}


def results(
    attempt: Callable[[T], R],
    tasks: Mapping[str, T],
    workers: int = 0,
    scheduler: str | None = None,
    limit_s: float = math.inf,
) -> Generator[tuple[str, R | Lost], None, None]:
    """Attempt tasks by name; the name and the result of each, as they finish.

    Args:
        attempt: a function that another process can import.
        tasks: what it takes.
        workers: processes beside this one; 0: in this process.
        scheduler: address of a Dask scheduler, whose workers take the place of these.
        limit_s: after which a task in a process is given up.

    Raises:
        DataError: fewer than 0 workers; or as `on_cluster` says.
    """
    require_workers(workers)
    if scheduler is not None:
        yield from on_cluster(attempt, tasks, scheduler)
    elif workers > 0:
        yield from in_processes(attempt, tasks, min(workers, len(tasks)), limit_s)
    else:
        for name, task in tasks.items():
            yield name, attempt(task)


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: "Connection[Any, Any]"
    name: str | None = None
    began: float = 0.0

    def give(self, name: str, task: object) -> None:
        self.name, self.began = name, time.monotonic()
        self.pipe.send(task)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def stop(self, grace_s: float) -> None:
        """End the process: politely, so that it removes what it was writing, then for certain."""
        if grace_s > 0:
            self.process.terminate()
            self.process.join(grace_s)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def in_processes(
    attempt: Callable[[T], R], tasks: Mapping[str, T], workers: int, limit_s: float = math.inf
) -> Generator[tuple[str, R | Lost], None, None]:
    """`results` in processes (``workers``, at least 1); stopping early ends the processes."""
    waiting, crew = deque(tasks.items()), list[_Worker]()
    try:
        while waiting or any(worker.name is not None for worker in crew):
            _hand_out(waiting, crew, workers, attempt)
            busy = [worker for worker in crew if worker.name is not None]
            left_s = limit_s - max(worker.seconds for worker in busy)
            ready = wait([w.pipe for w in busy], min(max(0.0, left_s), _LOOK_S))
            for worker in busy:
                if worker.pipe in ready:
                    yield _answer(worker, crew)
                elif worker.seconds >= limit_s:
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
    waiting: deque[tuple[str, T]],
    crew: list[_Worker],
    workers: int,
    attempt: Callable[[T], R],
) -> None:
    while waiting:
        idle = next((worker for worker in crew if worker.name is None), None)
        if idle is None and len(crew) < workers:
            idle = _hired(attempt, workers)
            crew.append(idle)
        if idle is None:
            return
        try:
            idle.give(*waiting[0])
        except OSError:  # it died while it was idle: not the fault of this task
            crew.remove(idle)
            idle.stop(0)
            continue
        waiting.popleft()


def _hired(attempt: Callable[[T], R], workers: int) -> _Worker:
    """A new process, which computes with its share of the cores."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(theirs, attempt), daemon=True)
    said = os.environ.get(_THREADS)
    os.environ.setdefault(_THREADS, str(max(1, (os.cpu_count() or 1) // workers)))
    try:
        process.start()
    finally:
        if said is None:
            del os.environ[_THREADS]
    theirs.close()
    return _Worker(process, ours)


def _answer(worker: _Worker, crew: list[_Worker]) -> tuple[str, Any]:
    name, seconds = str(worker.name), worker.seconds
    try:
        result = worker.pipe.recv()
    except Exception:  # noqa: BLE001 - the end of the pipe, or half an answer: the process died
        crew.remove(worker)
        worker.process.join(_GRACE_S)
        code = worker.process.exitcode
        worker.stop(0)
        return name, Lost(_death(code), seconds)
    worker.name = None
    return name, result


def _given_up(worker: _Worker, crew: list[_Worker], limit_s: float) -> tuple[str, Lost]:
    name = str(worker.name)
    crew.remove(worker)
    worker.stop(_GRACE_S)
    reason = (
        f"no result after {limit_s / 60:g} minutes, so it was stopped; if the slide is very large, "
        "allow more minutes a slide; otherwise look at its files with `hibio check`"
    )
    return name, Lost(reason, worker.seconds)


def _death(code: int | None) -> str:
    if code in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
        return (
            f"its process was ended from outside (signal {abs(code) % 128}), often because the "
            "memory was full; run again with fewer workers"
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


def _serve(pipe: "Connection[R, T | None]", attempt: Callable[[T], R]) -> None:
    """What a process does: tasks, until there are none or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, _leave)
    with lost_stops_come_again(), contextlib.suppress(EOFError, OSError):
        while (task := pipe.recv()) is not None:
            pipe.send(attempt(task))


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def lost_stops_come_again() -> Iterator[None]:
    """Send SIGTERM once more where what its handler raised was lost, at the latest at the end.

    Python prints what is raised in a destructor or the callback of a weak reference, and goes on.
    In another thread than the main one, which alone handles signals, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hook, sent = sys.unraisablehook, list[threading.Timer]()

    def send(lost: "sys.UnraisableHookArgs") -> None:
        if isinstance(lost.exc_value, SystemExit | KeyboardInterrupt):
            sent.append(threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGTERM)))
            sent[-1].start()
        else:
            hook(lost)

    sys.unraisablehook = send
    try:
        yield
    finally:
        try:
            for timer in sent:  # while the handler is there: after it the signal would kill
                timer.join()
        finally:
            sys.unraisablehook = hook


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
        with lost_stops_come_again():
            yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def on_cluster(
    attempt: Callable[[T], R], tasks: Mapping[str, T], address: str
) -> Generator[tuple[str, R | Lost], None, None]:
    """`results` on the workers of a Dask scheduler, with ``address`` as tcp://10.0.0.1:8786.

    The workers need this version of HiBio and the same paths to all files; they change into the
    folder of this process, so give each one thread. A task whose worker was lost is done again by
    another one, as often as the cluster allows (``distributed.scheduler.allowed-failures``). When
    the caller stops early, what has not begun is cancelled.

    Raises:
        DataError: Dask is not installed, the scheduler does not answer, or it has no workers.
    """
    client, as_completed = _connected(address)
    run = uuid.uuid4().hex[:12]
    try:
        futures = {
            client.submit(
                _attempt_in,
                str(Path.cwd()),
                attempt,
                task,
                key=f"hibio-{name}-{run}",
                pure=False,
                retries=1,
            ): name
            for name, task in tasks.items()
        }
        try:
            for future in as_completed(list(futures), loop=client.loop):
                yield futures[future], _collected(future)
        finally:
            client.cancel(list(futures))
    finally:
        client.close(timeout=CONNECT_S)


def _attempt_in(folder: str, attempt: Callable[[T], R], task: T) -> R:
    os.chdir(folder)  # paths may be relative to where the command was given
    return attempt(task)


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


def _collected(future: Any) -> Any:
    if future.status not in ("finished", "error"):
        return Lost(f"the cluster dropped it ({future.status}); run again, what is done is kept")
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001 - whatever went wrong on the way is the reason
        return Lost(_reason(error))


def _reason(error: Exception) -> str:
    if type(error).__name__ == "KilledWorker":
        return (
            "its worker was lost, again and again (out of memory, a crash on a damaged file, or "
            "the machine went away); see the logs of the workers"
        )
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"its worker could not run it ({text}); install this version of HiBio on the workers"
