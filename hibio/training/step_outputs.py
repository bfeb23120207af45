"""What micro-batches give to the loss: rows of core spots that can be joined and gathered.

The loss of a step is a function of the union of its micro-batches, so everything in it is made of
rows: one for each core spot, or one for each micro-batch (the sums of terms that are plain means
over spots). Slides and regions carry keys that mean the same in every micro-batch, so that the
parts of a slide, or of a region, find each other wherever they were computed.

Every process computes the whole loss on the gathered rows, the same one everywhere. A gradient that
comes back is therefore already the derivative of the whole loss, equal on all W processes, and
needs no communication: each process keeps the slice of its own rows. That slice is multiplied by W,
because the parameter gradients of the processes are AVERAGED afterwards (DDP, DeepSpeed):

    mean over r of (W * dL/d rows_r * d rows_r/d theta)  =  sum over r of ...  =  dL/d theta.

Parameters that the loss uses behind the gather (temperature, anchors) get their whole gradient on
every process; the average leaves it as it is. Both are exact only while all processes compute the
same loss: random draws behind the gather must come from one seed.

Legend: S core spots, B slides of a micro-batch, L region levels, D shared width, V spot-vector
length, M pathways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hibio.batch import SlideBatch
from hibio.data.collate import Views, collate
from hibio.data.slide import PreparedSlide

#: Name -> rows. Of a spot: ``slide`` (S,) and ``region`` (S, L) keys, ``image`` and ``omics``
#: (S, D) unit embeddings, ``has_image`` (S,), ``vector`` (S, V), ``xy_um`` (S, 2), ``target``
#: (S, M), ``view_a`` and ``view_b`` (S, D). Of a micro-batch: ``sum/<term>`` (1, 2), sum and count.
#: ``micro_of_spot`` (S,) and ``micro`` (1,) are its number in the step.
Rows = dict[str, Tensor]
DIFFERENTIABLE = ("image", "omics", "view_a", "view_b")
SUM = "sum/"
MICRO, MICRO_OF_SPOT = "micro", "micro_of_spot"
LABELS = 2**32  # region labels of one slide are below this


@dataclass(frozen=True)
class MicroBatch:
    """One batch of the sampler, on its way to the model.

    Attributes:
        batch: the spots with their halo.
        slide_key_B: number of each slide of the batch in the data set.
        first_region_LB: what was added to a slide's own region labels in this batch.
        index: number among the micro-batches of the step, 0..N-1.
        seed: of every random draw made for it.
    """

    batch: SlideBatch
    slide_key_B: Tensor
    first_region_LB: Tensor
    index: int
    seed: int

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same with every tensor on ``device``."""
        return dataclasses.replace(
            self,
            batch=self.batch.to(device),
            slide_key_B=self.slide_key_B.to(device),
            first_region_LB=self.first_region_LB.to(device),
        )

    def pinned(self) -> MicroBatch:
        """The same with its spots in page-locked memory."""
        return dataclasses.replace(self, batch=self.batch.pinned())

    def identity_rows(self) -> Rows:
        """``slide``, ``region`` and the micro-batch's number, for its core spots."""
        core = self.batch.core_S
        place_S = self.batch.slide_of_spot_S[core]
        slide_S = self.slide_key_B[place_S]
        label_LS = self.batch.region_of_spot_LS[:, core] - self.first_region_LB[:, place_S]
        number = torch.tensor([self.index], device=slide_S.device)
        return {
            "slide": slide_S,
            "region": (slide_S * LABELS + label_LS).T.contiguous(),
            MICRO_OF_SPOT: number.expand(len(slide_S)),
            MICRO: number,
        }


def read_micro_batch(
    slides: Sequence[int],
    parts: Sequence[tuple[PreparedSlide, np.ndarray, np.ndarray]],
    hops: int,
    views: Views | None,
    *,
    index: int,
    seed: int,
) -> MicroBatch:
    """Read and join the parts of a micro-batch.

    Args:
        slides: number of each part's slide in the data set.
        parts: (slide, regions (L, S), core spots) of each, see :func:`hibio.data.collate.collate`.
        hops: halo depth.
        views: what the terms need beside the spots themselves.
        index: number of the micro-batch in its step.
        seed: of its draws on the way through the model.
    """
    n_labels = [regions.max(axis=1, initial=-1) + 1 for _, regions, _ in parts]
    first_LB = np.cumsum([np.zeros_like(n_labels[0]), *n_labels[:-1]], axis=0).T
    return MicroBatch(
        collate(parts, hops, views),
        torch.tensor(list(slides)),
        torch.from_numpy(np.ascontiguousarray(first_LB, dtype=np.int64)),
        index,
        seed,
    )


def join(parts: Sequence[Rows]) -> Rows:
    """Rows of several micro-batches, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def leaves(rows: Rows) -> Rows:
    """The same values, cut off from the model; what is differentiable asks for a gradient."""
    return {
        name: value.detach().requires_grad_(name in DIFFERENTIABLE or name.startswith(SUM))
        for name, value in rows.items()
    }


def gather(rows: Rows) -> Rows:
    """The rows of all processes, in the order of the micro-batches."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    order_by = {name: MICRO if _of_micro_batch(name) else MICRO_OF_SPOT for name in sorted(rows)}
    counts = {key: row_counts(len(rows[key]), rows[key].device) for key in (MICRO_OF_SPOT, MICRO)}
    whole = {
        name: gather_rows(rows[name].contiguous(), counts[key]) for name, key in order_by.items()
    }
    order = {key: whole[key].argsort(stable=True) for key in counts}
    return {name: value[order[order_by[name]]] for name, value in whole.items()}


def _of_micro_batch(name: str) -> bool:
    return name == MICRO or name.startswith(SUM)


def gather_rows(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks.

    Args:
        rows: (n, ...) of this process; n may differ between processes, the rest may not.
        counts: n of every process, where :func:`row_counts` was asked before.

    Returns:
        (N, ...) all rows. The gradient of the own rows is W times the derivative (see above).

    Raises:
        ValueError: a scalar.
    """
    if rows.ndim == 0:
        raise ValueError("gather_rows needs rows, found a scalar; give it as [1] row")
    return _Gather.apply(rows, tuple(counts or row_counts(len(rows), rows.device)))


def row_counts(n_rows: int, device: torch.device) -> list[int]:
    """How many rows each process has, by rank."""
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
