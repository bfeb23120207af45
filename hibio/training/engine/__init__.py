"""The engine that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hibio.config.files import ConfigError
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
    """Torch or DeepSpeed.

    Args:
        module: what is trained.
        config: see :class:`OptimConfig`.
        device: "cpu", "cuda" or "auto".
        group: the processes.
        n_micro: micro-batches of this process in a step.
        mixed_stages: names of stages that read images where there are any, and have slides with
            and without.
        used: gives, by name of each parameter, whether each stage uses it; asked by DeepSpeed.

    Raises:
        ConfigError: DeepSpeed would lose gradients of such a stage.
    """
    if config.offload != "none" and n_micro > 1 and mixed_stages:
        raise ConfigError(
            f"optim.offload: {config.offload} with more than one batch a process and step cannot "
            f"train stage {mixed_stages[0]!r}, in which some slides have images and some have "
            "not: DeepSpeed keeps only gradients of what the last batch used. Set optim.offload: "
            "none, start as many processes as sampler.batches_per_step, or take the image-less "
            "slides out"
        )
    engine: Engine
    if config.uses_deepspeed:
        from hibio.training.engine.deepspeed import DeepSpeedEngine

        engine = DeepSpeedEngine(module, config, device, group, n_micro=n_micro, used=used())
    else:
        engine = TorchEngine(module, config, device, group)
    module.precision = engine.precision
    return engine
