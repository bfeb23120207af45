"""One optimisation step: autocast where the device has it, clip, refuse what is not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hibio.config import ConfigError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its surroundings.

    Attributes:
        weight_decay: on matrices; vectors and scalars have none.
        clip: largest gradient norm.
        amp: bf16 autocast on CUDA devices that have it (CPU runs stay in fp32).
    """

    weight_decay: float = 1e-2
    clip: float = 1.0
    amp: bool = True


class NotFiniteError(ConfigError):
    """The loss or a gradient is NaN or infinite; nothing was updated."""


class TorchEngine:
    """Single-process engine.

    Args:
        model: moved to ``device``.
        config: see :class:`OptimConfig`.
        device: "cpu", "cuda" or "auto".
    """

    def __init__(self, model: nn.Module, config: OptimConfig, device: str = "auto") -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.config = config
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)
        self.trained = trained
        self.autocast = config.amp and self.device.type == "cuda" and torch.cuda.is_bf16_supported()

    def precision(self) -> torch.autocast:
        """Context of the forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def step(self, loss: Tensor, lr: float) -> float:
        """Backward and update; returns the gradient norm before clipping.

        Raises:
            NotFiniteError: before anything is updated.
        """
        if not torch.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss.item()}; nothing was updated")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip)
        if not torch.isfinite(norm):
            raise NotFiniteError(f"the gradient norm is {norm.item()}; nothing was updated")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float(norm)

    def state(self) -> dict[str, Any]:
        """Optimizer state for the checkpoint."""
        return self.optimizer.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.optimizer.load_state_dict(state)
