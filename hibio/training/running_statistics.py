"""Running means and variances of batch normalisation, independent of who ran which micro-batch.

In training a layer normalises by the micro-batch itself, so its outputs do not depend on the
layout. Its running statistics do: they move with every pass. Here each micro-batch of a step starts
from the statistics of the step before, and the step ends with the mean of what they became, over
all micro-batches of all processes. One micro-batch in one process gives what torch gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hibio.training.process_group import ProcessGroup


class RunningStatistics:
    """The statistics of one step.

    The backward pass of a micro-batch still reads the statistics of its forward pass, so each
    pass gets tensors of its own.

    Args:
        module: its batch-normalisation layers in training mode are followed.
        group: the processes.
    """

    def __init__(self, module: nn.Module, group: ProcessGroup) -> None:
        self.group = group
        self.start = {
            (layer, name): value
            for layer in module.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
            and layer.training
            and layer.track_running_stats
            for name, value in layer.named_buffers()
        }
        self.sums = {
            place: torch.zeros_like(value)
            for place, value in self.start.items()
            if value.is_floating_point()  # the rest are counters
        }

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """A pass that leaves the statistics as they were."""
        self._begin()
        yield
        for (layer, name), value in self.start.items():
            setattr(layer, name, value)

    @contextmanager
    def of_one_batch(self) -> Iterator[None]:
        """A pass whose statistics count."""
        self._begin()
        yield
        for (layer, name), total in self.sums.items():
            total.add_(getattr(layer, name))

    def combine(self, n_batches: int) -> None:
        """End of the step: the mean over all micro-batches, one step counted.

        Args:
            n_batches: micro-batches of this process.
        """
        self.group.mean_(list(self.sums.values()))
        for (layer, name), value in self.start.items():
            total = self.sums.get((layer, name))
            setattr(layer, name, value + 1 if total is None else total / n_batches)

    def _begin(self) -> None:
        for (layer, name), value in self.start.items():
            setattr(layer, name, value.clone())
