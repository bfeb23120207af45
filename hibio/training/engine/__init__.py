"""Engines: how gradients are averaged, clipped and applied, and where optimiser state lives."""

from hibio.training.engine.base import Engine, NotFiniteError
from hibio.training.engine.build import build_engine
from hibio.training.engine.config import OptimConfig
from hibio.training.engine.torch import TorchEngine

__all__ = ["Engine", "NotFiniteError", "OptimConfig", "TorchEngine", "build_engine"]
