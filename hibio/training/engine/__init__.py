"""Engines: how gradients are averaged, clipped and applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hibio.config.training import OptimConfig
from hibio.training.engine.base import Engine, NotFiniteError
from hibio.training.engine.torch import TorchEngine
from hibio.training.objective import Objective
from hibio.training.process_group import ProcessGroup

__all__ = ["Engine", "NotFiniteError", "OptimConfig", "TorchEngine", "build_engine"]


def build_engine(
    module: Objective,
    config: OptimConfig,
    device: str,
    group: ProcessGroup,
    *,
    n_micro: int,
    mixed_stages: Sequence[str],
    used: Callable[[], Mapping[str, tuple[bool, ...]]],
) -> Engine:
    """The engine that a configuration asks for; the arguments are those of `DeepSpeedEngine`."""
    engine: Engine
    if config.uses_deepspeed:
        from hibio.training.engine.deepspeed import DeepSpeedEngine, refuse_lost_gradients

        refuse_lost_gradients(config, n_micro, mixed_stages)
        engine = DeepSpeedEngine(module, config, device, group, n_micro=n_micro, used=used())
    else:
        engine = TorchEngine(module, config, device, group)
    module.precision = engine.precision
    return engine
