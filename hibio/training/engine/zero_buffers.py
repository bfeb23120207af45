"""Where DeepSpeed's ZeRO optimisers keep what they update; the attributes are DeepSpeed's own.

Seen with DeepSpeed 0.19.8. ZeRO flattens the parameters of a group into buffers in fp32, of which
each process holds a part; what is private to it is read here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ZeroBuffers:
    """Gradients and updated tensors of one process.

    Args:
        optimizer: DeepSpeed's; the plain one itself for ZeRO 0.
        adam: the plain optimiser inside it.
        zero: 0 to 3.
        offloaded: whether optimiser state lies in CPU memory.
    """

    def __init__(
        self, optimizer: Any, adam: torch.optim.Optimizer, zero: int, *, offloaded: bool
    ) -> None:
        self.optimizer = optimizer
        self.adam = adam
        self.zero = zero
        self.offloaded = offloaded

    def updated(self) -> list[tuple[int, Tensor]]:
        """Group number and every tensor that the optimiser updates."""
        if self.zero == 0:
            groups = enumerate(self.adam.param_groups)
            return [(number, one) for number, group in groups for one in group["params"]]
        if self.zero == 3:
            numbers = self.optimizer.sub_group_to_group_id
            buffers = self.optimizer.fp32_partitioned_groups_flat
            return [(numbers[place], flat) for place, flat in enumerate(buffers)]
        return list(enumerate(self.optimizer.single_partition_of_fp32_groups))

    def gradients(self, is_idle: Callable[[Mapping[str, Any]], bool]) -> Iterator[Tensor]:
        """Averaged gradients of this step that this process holds, after the last backward.

        Args:
            is_idle: tells a parameter group whose gradients do not count.
        """
        for place, (number, one) in enumerate(self.updated()):
            if is_idle(self.adam.param_groups[number]):
                continue
            if self.zero and not self.offloaded:
                yield from self.optimizer.averaged_gradients[place]
            elif one.grad is not None:
                yield one.grad

    def forget_gradients(self) -> None:
        """Zero the buffers that outlive a step: what gets no gradient in the next one is not there.

        DeepSpeed writes only what a backward pass reached, so the rest would be of an older step.
        """
        if self.zero == 0:
            return
        for _, flat in self.updated():
            if flat.grad is not None:
                flat.grad.zero_()
        if self.zero == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        elif self.offloaded:
            for kept in self.optimizer.accumulated_grads_in_cpu.values():
                kept.zero_()

    def write(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Put a whole tensor into this process's part of what ZeRO 1 to 3 updates.

        Args:
            parameter: of the module.
            value: fp32, of its shape.
            key: of a moment; None for the fp32 parameter itself.
        """
        if self.zero < 3:
            linked: Any = parameter
            linked.set_full_hp_param(value, key)
            return
        # DeepSpeed's own function wants sizes that the number of processes divides
        place, start, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        flat = self.optimizer.fp32_partitioned_groups_flat[place]
        whole = flat if key is None else self.adam.state[flat][key]
        size, rank = dist.get_world_size(), dist.get_rank()
        padded = value.new_zeros(size * length)
        padded[: value.numel()] = value.flatten()
        whole.data.narrow(0, start, length).copy_(padded[rank * length : (rank + 1) * length])

    def link_moments(self) -> None:
        """Tell ZeRO 1 and 2 where the moments of each parameter are, before the first step."""
        if self.zero in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()


def as_vectors(module: nn.Module) -> set[str]:
    """Give scalar parameters one axis, which DeepSpeed wants; names of those."""
    scalars = {name for name, value in module.named_parameters() if value.ndim == 0}
    for name in scalars:
        parameter = module.get_parameter(name)
        parameter.data = parameter.data.reshape(1)
    return scalars
