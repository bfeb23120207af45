"""Plain torch: one process, or several that each hold everything (data parallel).

Gradients are averaged by an all-reduce of flat buckets after the whole step, not by torch's
DistributedDataParallel: that one wants one backward a step and every parameter in it, while a step
here may have several (GradCache) and a stage leaves parts of the model alone. The price is that
communication does not overlap with the backward pass. A parameter that no process has a gradient
for is left alone by AdamW, as in a single process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hibio.config.training import OptimConfig
from hibio.training.engine.base import (
    LR_BEFORE_THE_FIRST_STEP,
    Engine,
    choose_device,
    moments_by_name,
)
from hibio.training.process_group import ProcessGroup

BUCKET_NUMBERS = 32_000_000  # gradients sent together


class TorchEngine(Engine):
    """Every process holds weights, gradients and optimiser state.

    Args:
        module: moved to ``device``; all processes start from the first one's weights.
        config: see :class:`OptimConfig`.
        device: "cpu", "cuda" or "auto".
        group: the processes; one when left out.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimConfig,
        device: str = "auto",
        group: ProcessGroup | None = None,
    ) -> None:
        group = group or ProcessGroup()
        place = choose_device(device, group)
        super().__init__(module.to(place), config, place, group)
        groups = [
            {
                "params": [self.trained[name] for name in names],
                "weight_decay": decay,
                "rate": rate,
            }
            for names, decay, rate in self.rates
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR_BEFORE_THE_FIRST_STEP)
        for value in (*module.parameters(), *module.buffers()):
            group.copy_from(0, value.data)

    def begin_stage(self, stage: int) -> None:
        """Nothing to prepare: what a stage leaves alone has no gradient."""

    def accumulate(self, loss: Tensor) -> None:
        """Backward of a part of the step."""
        loss.backward()

    def step(self, loss: Tensor, lr: float) -> float:
        """See :meth:`Engine.step`."""
        self.refuse_bad("loss", loss.detach())
        loss.backward()
        if self.group.size > 1:
            self._average()
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.config.clip)
        self.refuse_bad("gradient norm", norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        self.optimizer.step()
        self.forget_gradients()
        return float(norm)

    def forget_gradients(self) -> None:
        """Drop what was accumulated."""
        self.optimizer.zero_grad(set_to_none=True)

    def _average(self) -> None:
        """Mean over the processes of the gradients that any process has."""
        parameters = list(self.trained.values())
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        has = has.to(self.device)
        dist.all_reduce(has, op=dist.ReduceOp.MAX)
        gradients = []
        for parameter, used in zip(parameters, has.tolist(), strict=True):
            if used and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        for bucket in buckets(gradients, BUCKET_NUMBERS):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            self.group.mean_([flat])
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def weights(self) -> dict[str, Tensor]:
        """See :meth:`Engine.weights`."""
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """See :meth:`Engine.state`."""
        kept = {
            name: dict(self.optimizer.state[self.trained[name]])
            for name in self.names
            if self.optimizer.state.get(self.trained[name])
        }
        return {"state": kept}

    def load(self, weights: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """See :meth:`Engine.load`."""
        if weights:
            self.module.load_state_dict(weights)
        self.optimizer.state.clear()
        for name, moments in moments_by_name(state, self.names).items():
            parameter = self.trained[name]
            self.optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter, copy=True)
                for key, value in moments.items()
            }


def buckets(tensors: Iterable[Tensor], numbers: int) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type with at most so many numbers together (a larger one alone)."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        other = bool(bucket) and bucket[0].dtype != tensor.dtype
        if bucket and (held + tensor.numel() > numbers or other):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket
