"""The processes of one run: what they agree on, and how they stop.

Under ``torchrun`` or the ``deepspeed`` launcher every process finds its rank in the environment
(RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); under plain ``python`` there is one
process and no group, unless DeepSpeed needs one. Tensors of the training step go over NCCL on CUDA
and over gloo on CPU; flags, waits and messages always go over gloo.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hibio.config.files import ConfigError
from preprocessing.workers import lost_stops_come_again

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEP_TIMEOUT = timedelta(minutes=30)  # a rank that takes longer over one step is taken for dead
WAIT_TIMEOUT = timedelta(days=2)  # the others wait while the first fits the artifacts


@dataclass(frozen=True)
class ProcessGroup:
    """One process among ``size``.

    Attributes:
        rank: 0 to ``size`` - 1; rank 0 writes files, prints and shows the progress bar.
        size: number of processes W.
        local_rank: number among the processes of this machine, which is also its GPU.
        waits: gloo group of flags and waits; None without a process group.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    waits: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints and shows bars."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; the same answer on all."""
        if self.size == 1:
            return flag
        told = torch.tensor([int(flag)])
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.waits)
        return bool(told.item())

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier(group=self.waits)

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over all processes."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor.div_(self.size)

    def copy_from(self, source: int, tensor: Tensor) -> Tensor:
        """The tensor of process ``source``; elsewhere one of its shape is overwritten."""
        if self.size > 1:
            dist.broadcast(tensor, src=source, group=self.waits if tensor.is_cpu else None)
        return tensor

    def on_first(self, function: Callable[[], T]) -> T | None:
        """Run a function on the first process while the others wait for it.

        Returns:
            Its result on the first process, None on the others.

        Raises:
            ConfigError: on the others, when it failed on the first (which raises its own error).
        """
        if self.size == 1:
            return function()
        if self.is_first:
            try:
                result = function()
            except BaseException as failure:
                self._text_of_first(str(failure) or repr(failure))
                raise
            self._text_of_first("")
            return result
        told = self._text_of_first("")
        if told:
            raise ConfigError(f"the first process failed: {told}")
        return None

    def _text_of_first(self, text: str) -> str:
        """A text that the first process sends to all."""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = self.copy_from(0, torch.tensor([len(data)]))
        if not self.is_first:
            data = torch.zeros(int(length.item()), dtype=torch.uint8)
        return bytes(self.copy_from(0, data).tolist()).decode() if len(data) else ""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_processes(device: str, *, single: bool = False) -> ProcessGroup:
    """Join the process group that a launcher has announced; a second call gives the same one.

    Args:
        device: "auto", "cpu" or "cuda".
        single: make a group of one process too (DeepSpeed needs one).

    Raises:
        ConfigError: the launcher's variables are incomplete or name a GPU that is not there.
    """
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if announced == 1 and not single:
        return ProcessGroup()
    if announced == 1 and not all(name in os.environ for name in VARIABLES):
        values = ("0", "1", "0", "127.0.0.1", str(free_port()))
        os.environ.update(dict(zip(VARIABLES, values, strict=True)))
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {announced}, but {', '.join(missing)} is not set; start with "
            "`torchrun --nproc_per_node N train.py ...` or `deepspeed train.py ...`"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU ({torch.cuda.device_count()} "
                "found); start as many processes as there are GPUs, or set device: cpu"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=STEP_TIMEOUT)
    waits = _waiting_group(dist.group.WORLD)
    return ProcessGroup(dist.get_rank(), dist.get_world_size(), local_rank, waits)


@functools.lru_cache(maxsize=1)
def _waiting_group(world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The gloo group of flags and waits beside ``world``: one, however many jobs ask for it."""
    waits: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    return waits


def end_processes() -> int:
    """Leave the process group, if there is one; gives the rank that this process had."""
    if not dist.is_initialized():
        return 0
    rank = dist.get_rank()
    _waiting_group.cache_clear()
    dist.destroy_process_group()
    return rank


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


@contextmanager
def stops_at_once(told: Callable[[], str]) -> Iterator[None]:
    """Raise InterruptedError on Ctrl-C or SIGTERM: for work that a resumed run simply repeats.

    Where a block inside handles signals in another way (:func:`on_stop`), that goes first.

    Raises:
        InterruptedError: a signal came; ``told`` gives the message, with the command that goes on.
    """

    def interrupt() -> None:
        raise _Stopped

    try:
        with on_stop(interrupt), lost_stops_come_again():
            yield
    except _Stopped as stopped:
        raise InterruptedError(told()) from stopped
