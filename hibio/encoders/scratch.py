"""Buffers that inference uses again and again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Scratch:
    """Large buffers that are used again: fresh memory of this size costs more than the work."""

    buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of ``shape``, the one that had this name when it is as large."""
        size = math.prod(shape)
        held = self.buffers.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self.buffers[name] = like.new_empty(size)
        return held[:size].view(shape)
