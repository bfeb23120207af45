"""Time and memory, measured the same way in every benchmark."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def seconds(action: Callable[[], Any], times: int = 1) -> float:
    """Wall time of so many calls; what they put on a GPU must be finished by them."""
    start = time.perf_counter()
    for _ in range(times):
        action()
    return time.perf_counter() - start


def in_turn(
    actions: Mapping[str, Callable[[], Any]], rounds: int, *, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each call, A B C A B C ..., after one call of each where ``warm``."""
    if warm:
        for action in actions.values():
            action()
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            taken[name].append(seconds(action))
    return taken


def peak_megabytes() -> float:
    """Peak memory of this process, by Linux; `getrusage` would tell that of its parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM"))


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """What it returns in a fresh process, whose peak of memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
