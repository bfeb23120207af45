"""Reading ahead: the next items are made in another thread while the current one is used.

Most of the work (HDF5, JPEG, NumPy) leaves Python's lock, so one thread is enough to hide it behind
the model, and items come in order. The thread makes at most ``depth`` items more than were taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
T = TypeVar("T")


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], T], depth: int
) -> Generator[T, None, None]:
    """``read(item)`` of every item, in order.

    Args:
        items: what to read.
        read: called in one other thread, one item at a time; what it raises is raised here when
            its item's turn comes.
        depth: items made before they are asked for; 0 reads in the calling thread.

    Yields:
        The results. Closing the iterator waits for the item in the making and drops the rest.
    """
    if depth == 0:
        yield from map(read, items)
        return
    todo = iter(items)
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        try:
            for item in todo:
                waiting.append(thread.submit(read, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
