"""One step on a global batch that need not fit in memory: GradCache (Gao et al. 2021, RepL4NLP).

In training a layer normalises by the micro-batch itself, so its outputs do not depend on the
layout. Its running statistics do: they move with every pass. Here each micro-batch of a step starts
from the statistics of the step before, and the step ends with the mean of what they became, over
all micro-batches of all processes. One micro-batch in one process gives what torch gives.

The loss compares every spot of the global batch with every other, so the micro-batches of a process
cannot simply be taken one after the other. Two passes give the same gradient as one: the first
embeds every micro-batch without a graph and takes the gradient of the loss with respect to the
embeddings; the second embeds each again, with the same random draws, and sends that gradient back
into the model. The last micro-batch of a process is embedded inside the loss itself, so that
parameters which the terms use (temperature, anchors) get their gradient once. With one micro-batch
a process that is all there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hibio.batch import LossOutput
from hibio.config.training import StageConfig
from hibio.training.engine import Engine, NotFiniteError
from hibio.training.process_group import ProcessGroup
from hibio.training.step_module import N_SPOTS, TEMPERATURE, TOTAL
from hibio.training.step_outputs import MicroBatch, Rows, gradient_names, join, leaves


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


@dataclass(frozen=True)
class StepResult:
    """What a step tells.

    Attributes:
        loss: of the global batch, detached; its ``n`` is the number of core spots of all processes.
        gradient_norm: before clipping.
        temperature: of the contrast, before the update.
    """

    loss: LossOutput
    gradient_norm: float
    temperature: float


def take_step(
    engine: Engine, stage: StageConfig, micros: Sequence[MicroBatch], seed: int, lr: float
) -> StepResult:
    """Loss, gradient and update on the global batch.

    Args:
        engine: of a :class:`hibio.training.step_module.StepModule`.
        stage: whose terms are trained.
        micros: the micro-batches of this process, at least one.
        seed: of the draws made for the whole step, the same on all processes.
        lr: learning rate.

    Raises:
        NotFiniteError: nothing was updated.
    """
    statistics = RunningStatistics(engine.module, engine.group)
    others: list[Rows] = []
    if len(micros) > 1:
        others = _embedded(engine, stage, micros, statistics)
        gradients = _gradients(engine, stage, others, seed)
        for micro, gradient in zip(micros[:-1], gradients, strict=False):
            with statistics.of_one_batch():
                result = engine.run("surrogate", stage, micro.to(engine.device), gradient)
            engine.accumulate(result[TOTAL])
    with statistics.of_one_batch():
        result = engine.run("last", stage, micros[-1].to(engine.device), others[:-1], seed)
    total = result.pop(TOTAL)
    told = {name: float(value.detach()) for name, value in result.items()}
    n_spots, temperature = int(told.pop(N_SPOTS)), told.pop(TEMPERATURE)
    try:
        norm = engine.step(total, lr)
    except NotFiniteError as error:
        raise NotFiniteError(str(error), told) from error
    statistics.combine(len(micros))
    terms = {name: result[name].detach() for name in told}
    return StepResult(LossOutput(total.detach(), terms, n_spots), norm, temperature)


def _embedded(
    engine: Engine,
    stage: StageConfig,
    micros: Sequence[MicroBatch],
    statistics: RunningStatistics,
) -> list[Rows]:
    """Rows of every micro-batch, without a graph."""
    rows = []
    for micro in micros:
        with torch.no_grad(), statistics.not_counted():
            rows.append(engine.look("embed", stage, micro.to(engine.device)))
    return rows


def _gradients(engine: Engine, stage: StageConfig, parts: Sequence[Rows], seed: int) -> list[Rows]:
    """Gradient of the loss with respect to the rows of each micro-batch.

    Raises:
        NotFiniteError: the loss is not a number; nothing was updated.
    """
    cut = [leaves(part) for part in parts]
    result = engine.look("loss", stage, join(cut), seed)
    engine.refuse_bad("loss", result[TOTAL].detach())
    names = gradient_names(cut[0])
    inputs = [part[name] for part in cut for name in names]
    found = torch.autograd.grad(result[TOTAL], inputs, allow_unused=True)
    filled = iter(
        torch.zeros_like(value) if gradient is None else gradient
        for value, gradient in zip(inputs, found, strict=True)
    )
    return [{name: next(filled) for name in names} for _ in cut]
