"""The model and its objective as one module, so that all use of parameters is in one ``forward``.

DeepSpeed's ZeRO-3 takes the parameters away between forward passes and brings them back while one
runs; what is not inside a ``forward`` finds them empty. Arguments and results are plain tensors and
dicts of tensors, which is what its hooks look into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from hibio.config.training import StageConfig
from hibio.model import HiBio
from hibio.training.objective import Objective
from hibio.training.step_outputs import MicroBatch, Rows, gather, gradient_names, join

TOTAL, N_SPOTS, TEMPERATURE = "total", "n_spots", "temperature"

#: Of the model's parameters in this module.
PREFIX = "model."


class StepModule(nn.Module):
    """Every pass of a training step.

    Args:
        model: in training.
        objective: of that model.
    """

    def __init__(self, model: HiBio, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.precision: Callable[[], AbstractContextManager[object]] = nullcontext

    def forward(self, task: str, stage: StageConfig, *arguments: object) -> dict[str, Tensor]:
        """One pass: the method that ``task`` names, in the engine's precision.

        Args:
            task: embed | loss | surrogate | last.
            stage: whose terms are trained.
            arguments: of the method.
        """
        with self.precision():
            result: dict[str, Tensor] = getattr(self, f"_{task}")(stage, *arguments)
        return result

    def _embed(self, stage: StageConfig, micro: MicroBatch) -> Rows:
        """Rows of one micro-batch; the draws made for it depend on nothing else."""
        if micro.seed is not None:
            torch.manual_seed(micro.seed)
        return self.objective.outputs(micro, stage)

    def _loss(self, stage: StageConfig, rows: Rows, seed: int) -> dict[str, Tensor]:
        """The terms and their weighted total, over the rows of all processes."""
        whole = gather(rows)
        torch.manual_seed(seed)  # the same draws on every process
        output = self.objective.terms(whole, stage)
        facts = {N_SPOTS: output.total.new_tensor(output.n), TEMPERATURE: self.model.temperature}
        return {**output.terms, **facts, TOTAL: output.total}

    def _surrogate(
        self, stage: StageConfig, micro: MicroBatch, gradients: Rows
    ) -> dict[str, Tensor]:
        """A number whose gradient is the loss's own, through this micro-batch."""
        rows = self._embed(stage, micro)
        parts = [
            (rows[name].float() * gradients[name].float()).sum()
            for name in gradient_names(rows)
            if rows[name].requires_grad
        ]
        return {TOTAL: torch.stack(parts).sum()}

    def _last(
        self, stage: StageConfig, micro: MicroBatch, others: Sequence[Rows], seed: int
    ) -> dict[str, Tensor]:
        """The loss of the step, with gradient through this micro-batch and through the terms."""
        return self._loss(stage, join([*others, self._embed(stage, micro)]), seed)
