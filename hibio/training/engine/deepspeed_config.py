"""DeepSpeed's own settings, generated from ours."""

from __future__ import annotations

import importlib.util
from typing import Any

from hibio.config import ConfigError, merge
from hibio.training.engine.base import LR_BEFORE_THE_FIRST_STEP
from hibio.training.engine.config import OptimConfig

#: DeepSpeed's names of what is set elsewhere.
OURS = {
    "train_batch_size": "sampler.batches_per_step",
    "train_micro_batch_size_per_gpu": "sampler.batch_spots",
    "gradient_accumulation_steps": "sampler.batches_per_step",
    "gradient_clipping": "optim.clip",
    "scheduler": "the lr of the stages",
    "fp16": "optim.precision (fp16 with its loss scale is not supported; take bf16)",
}


def deepspeed_dict(config: OptimConfig, device: str, size: int, n_micro: int) -> dict[str, Any]:
    """Settings for ``deepspeed.initialize``.

    Clipping is off: the engine clips to the norm of what the stage uses. The optimiser's rate is 0
    until the first step, because DeepSpeed may step once while it starts.

    Args:
        config: ours; its ``deepspeed`` mapping is merged over what is generated.
        device: "cpu" or "cuda".
        size: number of processes.
        n_micro: micro-batches of a process in a step.

    Raises:
        ConfigError: deepspeed is not installed, or the mapping holds what another key decides.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            'optim asks for deepspeed, which is not installed: pip install "hibio[train]", or set '
            "optim.engine: torch and optim.zero: 0"
        )
    for name in config.deepspeed:
        if name in OURS:
            raise ConfigError(f"optim.deepspeed.{name}: this is set by {OURS[name]}; take it out")
    _refuse_layout(dict(config.deepspeed.get("zero_optimization", {})), config.offload)
    has_bf16 = bool(dict(config.deepspeed.get("bf16", {})).get("enabled", False))
    if has_bf16 and config.zero < 2:
        raise ConfigError(
            f"optim.deepspeed.bf16 (parameters in bf16) needs optim.zero 2 or 3, found "
            f"{config.zero}; for bf16 arithmetic on fp32 parameters set optim.precision: bf16"
        )
    if has_bf16 and (config.precision == "fp32" or (config.precision, device) == ("auto", "cpu")):
        raise ConfigError(
            "optim.deepspeed.bf16 (parameters in bf16) needs arithmetic in bf16; set "
            "optim.precision: bf16"
        )
    adam: dict[str, Any] = {
        "lr": LR_BEFORE_THE_FIRST_STEP,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
    }
    if device == "cpu":
        adam["torch_adam"] = True  # the others are compiled when they are first used
    zero: dict[str, Any] = {"stage": config.zero}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": device == "cuda"}
    generated: dict[str, Any] = {
        "train_batch_size": size * n_micro,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": n_micro,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": zero,
    }
    return merge(generated, config.deepspeed)


def _refuse_layout(zero: dict[str, Any], offload: str) -> None:
    """The stage, and what lies where, are keys of ours: the engine has to know them."""
    if "stage" in zero:
        raise ConfigError(
            "optim.deepspeed.zero_optimization.stage: this is set by optim.zero; take it out"
        )
    for name, needs in (("offload_optimizer", ("optimizer", "all")), ("offload_param", ("all",))):
        if name in zero and (offload not in needs or "device" in zero[name]):
            raise ConfigError(
                f"optim.deepspeed.zero_optimization.{name}: set optim.offload: {needs[0]} and take "
                "the device out (CPU memory is the only one)"
            )
