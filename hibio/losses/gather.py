"""Rows of all processes in one tensor, with gradient: the one cross-process part of the losses.

Every process computes the whole loss on the gathered rows, the same one everywhere. A gradient that
comes back is therefore already the derivative of the whole loss, equal on all W processes, and
needs no communication: each process keeps the slice of its own rows. That slice is multiplied by W,
because the parameter gradients of the processes are AVERAGED afterwards (DDP, DeepSpeed):

    mean over r of (W * dL/d rows_r * d rows_r/d theta)  =  sum over r of ...  =  dL/d theta.

Parameters that the loss uses behind the gather (temperature, anchors) get their whole gradient on
every process; the average leaves it as it is. Both are exact only while all processes compute the
same loss: random draws behind the gather must come from one seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks.

    Args:
        rows: (n, ...) of this process; n may differ between processes, the rest may not.
        counts: n of every process, where :func:`row_counts` was asked before.

    Returns:
        (N, ...) all rows; ``rows`` itself without a process group. The gradient of the own rows
        is W times the derivative (see above).

    Raises:
        ValueError: a scalar.
    """
    if rows.ndim == 0:
        raise ValueError("gather_rows needs rows, found a scalar; give it as [1] row")
    if not has_processes():
        return rows
    if counts is None:
        counts = row_counts(len(rows), rows.device)
    return _Gather.apply(rows, tuple(counts))


def has_processes() -> bool:
    """Whether there is more than one process, so that rows have to be gathered."""
    return dist.is_initialized() and dist.get_world_size() > 1


def row_counts(n_rows: int, device: torch.device) -> list[int]:
    """How many rows each process has, by rank."""
    if not has_processes():
        return [n_rows]
    own = torch.tensor([n_rows], device=device)
    counts = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return [int(count.item()) for count in counts]


def _gathered(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """All rows; shorter parts are padded for the way, since all_gather wants one shape."""
    longest = max(counts)
    sent = rows.new_zeros(longest, *rows.shape[1:])
    sent[: len(rows)] = rows
    as_bytes = sent.dtype == torch.bool  # not a type of every backend
    sent = sent.to(torch.uint8) if as_bytes else sent
    parts = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(parts, sent)
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return whole.bool() if as_bytes else whole


class _Gather(torch.autograd.Function):
    """Forward: all rows. Backward: the own slice, times the number of processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        rank = dist.get_rank()
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        ctx.size = len(counts)
        whole = _gathered(rows, counts)
        if not rows.is_floating_point():
            ctx.mark_non_differentiable(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.own] * ctx.size, None
