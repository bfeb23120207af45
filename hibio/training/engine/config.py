"""The optim section of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

#: Keys that say where the work is done and not what is computed; a resumed run may change them.
LAYOUT = ("engine", "zero", "offload", "deepspeed")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and how it is spread over processes.

    Attributes:
        weight_decay: on matrices; vectors and scalars have none.
        clip: largest gradient norm.
        precision: auto (bf16 autocast on CUDA devices that have it, else fp32) | fp32 | bf16
            (autocast anywhere); parameters, gradients and optimiser state stay in fp32.
        engine: auto (deepspeed where one of the keys below asks for it, else torch) | torch
            (one process, or data-parallel ones) | deepspeed.
        zero: what DeepSpeed partitions over the processes: 0 nothing | 1 optimiser state | 2 and
            gradients | 3 and parameters.
        offload: none | optimizer (its state to CPU memory; zero 1 to 3) | all (the parameters too;
            zero 3).
        deepspeed: DeepSpeed settings by its own names, merged over the generated ones.
    """

    weight_decay: float = 1e-2
    clip: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    zero: int = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}, more than 0 is needed")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero is {self.zero}, expected 0, 1, 2 or 3")
        if self.engine == "torch" and self._asks_for_deepspeed:
            raise ValueError(
                "zero, offload and deepspeed are settings of engine: deepspeed; set it, or leave "
                "them out"
            )
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero < least:
            raise ValueError(
                f"offload: {self.offload} needs zero {least} or more, and zero is {self.zero}"
            )

    @property
    def _asks_for_deepspeed(self) -> bool:
        return bool(self.zero or self.deepspeed or self.offload != "none")

    @property
    def uses_deepspeed(self) -> bool:
        """Which engine ``auto`` means."""
        return self.engine == "deepspeed" or (self.engine == "auto" and self._asks_for_deepspeed)
