"""A function over many inputs by several threads, results in the order of the inputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from preprocessing.errors import DataError

I = TypeVar("I")  # noqa: E741  an input
R = TypeVar("R")


def ordered_map(function: Callable[[I], R], inputs: Iterable[I], threads: int = 1) -> Iterator[R]:
    """Like `map`, a few inputs ahead: what is summed in this order is the same to the last bit.

    At most threads + 1 results are computed or waiting at a time, so memory does not grow with the
    number of inputs. The first error is raised where its result would have come; what has not begun
    by then is not begun.

    Args:
        function: called in any thread; sparse products, numpy and HDF5 let the others run.
        inputs: read as they are needed.
        threads: 1 calls the function here, with nothing computed ahead.

    Yields:
        The results.

    Raises:
        DataError: threads below 1.
    """
    if threads < 1:
        raise DataError(f"threads is {threads}, expected at least 1")
    if threads == 1:
        yield from map(function, inputs)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="slide")
    waiting: deque[Future[R]] = deque()
    try:
        for one in inputs:
            waiting.append(pool.submit(function, one))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
