"""One step on a global batch that need not fit in memory: GradCache (Gao et al. 2021, RepL4NLP).

The loss compares every spot of the global batch with every other, so the micro-batches of a process
cannot simply be taken one after the other. Two passes give the same gradient as one: the first
embeds every micro-batch without a graph and takes the gradient of the loss with respect to the
embeddings; the second embeds each again, with the same random draws, and sends that gradient back
into the model. The last micro-batch of a process is embedded inside the loss itself, so that
parameters which the terms use (temperature, anchors) get their gradient once. With one micro-batch
a process that is all there is.

A batch-normalisation layer normalises by the micro-batch itself, so its outputs do not depend on
the layout. Its running statistics do: they move with every pass. Here each micro-batch of a step
starts from the statistics of the step before, and the step ends with the mean of what they became,
over all micro-batches of all processes. One micro-batch in one process gives what torch gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hibio.config.training import StageConfig
from hibio.training.engine import Engine, NotFiniteError
from hibio.training.objective import N_SPOTS, TEMPERATURE, TOTAL, gradient_shares
from hibio.training.process_group import ProcessGroup
from hibio.training.step_outputs import MicroBatch, Rows, leaves


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
        """End of the step: the mean over all micro-batches (of every process ``n_batches``)."""
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
        total: weighted loss of the global batch.
        terms: the unweighted terms.
        n: core spots of all processes.
        gradient_norm: before clipping.
        temperature: of the contrast, before the update.
        gradient_shares: see `gradient_shares`; None when nobody asked.
    """

    total: float
    terms: dict[str, float]
    n: int
    gradient_norm: float
    temperature: float
    gradient_shares: dict[str, float] | None = None


def take_step(
    engine: Engine,
    stage: StageConfig,
    micros: Sequence[MicroBatch],
    seed: int,
    lr: float,
    *,
    weigh: bool = False,
) -> StepResult:
    """Loss, gradient and update on the global batch.

    Args:
        engine: of a :class:`hibio.training.objective.Objective`.
        stage: whose terms are trained.
        micros: the micro-batches of this process, at least one.
        seed: of the draws made for the whole step, the same on all processes.
        lr: learning rate.
        weigh: look at each term's share of the gradient, through the last micro-batch of this
            process; not done under DeepSpeed.

    Raises:
        NotFiniteError: nothing was updated.
    """
    weigh = weigh and engine.splits_gradients
    statistics = RunningStatistics(engine.module, engine.group)
    others: list[Rows] = []
    if len(micros) > 1:
        others = _accumulate_all_but_last(engine, stage, micros, statistics, seed)
    with statistics.of_one_batch():
        result = engine.run(stage, micros[-1].to(engine.device), others, seed, weigh=weigh)
    total = result.pop(TOTAL)
    terms = {name: float(value.detach()) for name, value in result.items()}
    shares = None
    if weigh:
        shares = gradient_shares(result, stage.active, list(engine.trained.values()))
    n_spots, temperature = int(terms.pop(N_SPOTS)), terms.pop(TEMPERATURE)
    try:
        norm = engine.step(total, lr)
    except NotFiniteError as error:
        raise NotFiniteError(str(error), terms) from error
    statistics.combine(len(micros))
    return StepResult(float(total.detach()), terms, n_spots, norm, temperature, shares)


def _accumulate_all_but_last(
    engine: Engine,
    stage: StageConfig,
    micros: Sequence[MicroBatch],
    statistics: RunningStatistics,
    seed: int,
) -> list[Rows]:
    """Both passes over the micro-batches before the last one; gives their rows.

    Raises:
        NotFiniteError: the loss is not a number; nothing was updated.
    """
    parts = []
    for micro in micros:
        with torch.no_grad(), statistics.not_counted():
            parts.append(leaves(engine.module(stage, micro.to(engine.device))))
    loss = engine.module(stage, None, parts, seed)[TOTAL]
    engine.refuse_bad("loss", loss.detach())
    names = [name for name, value in parts[0].items() if value.requires_grad]
    inputs = [part[name] for part in parts for name in names]
    gradients = iter(torch.autograd.grad(loss, inputs, materialize_grads=True))
    for micro in micros[:-1]:
        with statistics.of_one_batch():
            rows = engine.run(stage, micro.to(engine.device))
        # a number whose gradient is the loss's own, through this micro-batch
        products = [
            (rows[name].float() * gradient.float()).sum()
            for name, gradient in zip(names, gradients, strict=False)
            if rows[name].requires_grad
        ]
        engine.accumulate(torch.stack(products).sum())
    return [{name: value.detach() for name, value in part.items()} for part in parts[:-1]]
