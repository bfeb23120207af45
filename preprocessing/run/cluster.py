"""Slides on a Dask cluster: the same task a slide as in local processes."""

import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from preprocessing.errors import DataError
from preprocessing.manifest import SlideRow
from preprocessing.manifest_row import PATH_COLUMNS
from preprocessing.run.preparation import SlideTask
from preprocessing.run.result import SlideResult, attempt_slide

CONNECT_S = 30.0
WORKERS_S = 60.0


def prepare_on_cluster(
    tasks: Sequence[SlideTask],
    address: str,
    attempt: Callable[[SlideTask], SlideResult] = attempt_slide,
) -> Generator[SlideResult, None, None]:
    """Prepare slides on the workers of a Dask scheduler.

    The workers need this version of HiBio and the same paths to the sources and the stores. A task
    whose worker was lost is done again by another one, as often as the cluster allows
    (``distributed.scheduler.allowed-failures``); a slide whose worker was lost after it was
    finished is "skipped" then.

    Args:
        tasks: one a slide.
        address: of the scheduler, such as ``tcp://10.0.0.1:8786``.
        attempt: what prepares one slide; a function that the workers can import.

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
    paths: dict[str, Any] = {
        name: path.absolute()
        for name in PATH_COLUMNS
        if (path := getattr(task.row, name)) is not None
    }
    row: SlideRow = replace(task.row, **paths)
    return replace(task, row=row, store=task.store.absolute())
