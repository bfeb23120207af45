"""What every engine does, whatever it is made of.

An engine holds a module whose one ``forward`` does all the work with parameters (see
:class:`hibio.training.objective.Objective`), so that an engine that keeps the parameters
somewhere else can bring them when they are needed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hibio.config.files import ConfigError
from hibio.config.training import OptimConfig
from hibio.training.process_group import ProcessGroup

#: Of one parameter: step, exp_avg, exp_avg_sq.
Moments = dict[str, Tensor]
LR_BEFORE_THE_FIRST_STEP = 0.0
GRAPH_SCALE = ".bias_scale_H"  # ends the names of the scales of the gene graph's bias


class NotFiniteError(ConfigError):
    """The loss or a gradient is NaN or infinite; nothing was updated.

    Attributes:
        terms: the loss terms of the step, where they are known.
    """

    def __init__(self, message: str, terms: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.terms = dict(terms or {})


def choose_device(device: str, group: ProcessGroup | None = None) -> torch.device:
    """The device of this process.

    Args:
        device: "auto", "cpu" or "cuda".
        group: the process among the others; on a machine with several GPUs each has its own.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and group is not None and group.size > 1:
        return torch.device("cuda", group.local_rank)
    return torch.device(device)


class Engine(ABC):
    """Runs the module, takes gradients, updates.

    Args:
        module: what is trained; all parameters are used inside its ``forward``.
        config: see :class:`OptimConfig`.
        device: of this process.
        group: the processes.
    """

    def __init__(
        self, module: nn.Module, config: OptimConfig, device: torch.device, group: ProcessGroup
    ) -> None:
        self.module = module
        #: Calls the module for a result of which one scalar goes to `accumulate` or `step` next.
        self.run: Callable[..., Any] = module
        self.config = config
        self.device = device
        self.group = group
        self.trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        matrices = [name for name, p in self.trained.items() if len(shape_of(p)) >= 2]
        others = [name for name in self.trained if name not in set(matrices)]
        scale_of = getattr(module, "lr_scale", lambda name: 1.0)

        def rate_of(name: str) -> float:
            return config.graph_rate if name.endswith(GRAPH_SCALE) else scale_of(name)

        #: Names of parameters, their weight decay, and their learning rate over that of the stage.
        self.rates: list[tuple[list[str], float, float]] = [
            ([name for name in names if rate_of(name) == rate], decay, rate)
            for names, decay in ((matrices, config.weight_decay), (others, 0.0))
            for rate in dict.fromkeys(rate_of(name) for name in names)
        ]
        self.names = [name for names, _, _ in self.rates for name in names]
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.autocast = config.precision == "bf16" or (config.precision == "auto" and has_bf16)

    def precision(self) -> torch.autocast:
        """Context of the forward pass; the module enters it (DeepSpeed ends one from outside)."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def refuse_bad(self, what: str, value: Tensor | float) -> None:
        """Stop all processes when a number is not finite on one.

        Raises:
            NotFiniteError: on every process.
        """
        number = float(value)
        if self.group.any(not math.isfinite(number)):
            self.forget_gradients()
            found = f"{number}" if not math.isfinite(number) else "not finite on another process"
            raise NotFiniteError(f"the {what} is {found}; nothing was updated")

    @property
    def holds_whole_model(self) -> bool:
        """Whether the module's own parameters are whole and in fp32 outside ``forward``."""
        return True

    @property
    def splits_gradients(self) -> bool:
        """Whether the gradient of one term alone can be asked for before the step's."""
        return True

    @abstractmethod
    def begin_stage(self, stage: int) -> None:
        """Told before the first step of a stage, and after a resume inside it."""

    @abstractmethod
    def accumulate(self, loss: Tensor) -> None:
        """Backward of a part of the step that is not the last one."""

    @abstractmethod
    def step(self, loss: Tensor, lr: float) -> float:
        """Backward of the last part, average over the processes, clip, update.

        Returns:
            The gradient norm before clipping.

        Raises:
            NotFiniteError: before anything is updated, on every process.
        """

    @abstractmethod
    def forget_gradients(self) -> None:
        """Drop what was accumulated."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """State of the module, whole and in fp32, on the CPU; all processes call it."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Optimiser state by parameter name, the same for every engine and number of processes.

        All processes call it.
        """

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Restore `weights` and `state`, of whatever engine; all processes call it."""


def moments_by_name(state: dict[str, Any], names: Collection[str]) -> dict[str, Moments]:
    """Optimiser state, as an engine's ``state`` gave it, by the names of trained parameters.

    Raises:
        ConfigError: the state is of other parameters.
    """
    kept: dict[str, Moments] = state["state"]
    unknown = sorted(kept.keys() - set(names))
    if unknown:
        raise ConfigError(
            f"the checkpoint's optimiser state names {len(unknown)} parameters that this model "
            f"does not train (first: {unknown[0]}); resume with the config.yaml of its run"
        )
    return kept


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter; DeepSpeed leaves an empty tensor where it took it away."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
