"""DeepSpeed: optimiser state, gradients and parameters partitioned over the processes.

The only module that imports deepspeed, and only inside functions. ZeRO flattens the parameters of a
group into buffers in fp32, of which each process holds a part; what is private to it is read here
(seen with 0.19.8). Three things are done here and not by DeepSpeed, so that every engine gives the
same numbers:

- Parameters that a stage leaves alone get no update at all. DeepSpeed keeps flat buffers, in which
  "no gradient" is a zero (or, in ZeRO-3, the gradient of an earlier step). So parameters are put
  into groups by the stages that use them, and groups that are idle in a stage are taken out.
- The gradient norm is of this step's gradients, checked before anything is updated, and clipped to.
- Optimiser state is saved by parameter name, in fp32, as the torch engine saves it: a run can go
  on with another engine, another ZeRO stage and another number of processes.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hibio.config.files import ConfigError, merge
from hibio.config.training import OptimConfig
from hibio.training.engine.base import (
    LR_BEFORE_THE_FIRST_STEP,
    Engine,
    choose_device,
    moments_by_name,
    shape_of,
)
from hibio.training.process_group import ProcessGroup

MOMENTS = ("exp_avg", "exp_avg_sq")

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


def refuse_lost_gradients(config: OptimConfig, n_micro: int, mixed_stages: Sequence[str]) -> None:
    """Refuse what DeepSpeed would do without telling.

    Args:
        config: see :class:`OptimConfig`.
        n_micro: micro-batches of this process in a step.
        mixed_stages: names of stages that read images where there are any, and have slides with
            and without.

    Raises:
        ConfigError: gradients of such a stage would be lost.
    """
    if config.offload != "none" and n_micro > 1 and mixed_stages:
        raise ConfigError(
            f"optim.offload: {config.offload} with more than one batch a process and step cannot "
            f"train stage {mixed_stages[0]!r}, in which some slides have images and some have "
            "not: DeepSpeed keeps only gradients of what the last batch used. Set optim.offload: "
            "none, start as many processes as sampler.batches_per_step, or take the image-less "
            "slides out"
        )


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


class ZeroBuffers:
    """Gradients and updated tensors of one process.

    Args:
        optimizer: DeepSpeed's; the plain one itself for ZeRO 0.
        adam: the plain optimiser inside it.
        zero: 0 to 3.
        offloaded: whether optimiser state lies in CPU memory.
    """

    def __init__(
        self, optimizer: Any, adam: torch.optim.Optimizer, zero: int, *, offloaded: bool
    ) -> None:
        self.optimizer = optimizer
        self.adam = adam
        self.zero = zero
        self.offloaded = offloaded

    def updated(self) -> list[tuple[int, Tensor]]:
        """Group number and every tensor that the optimiser updates."""
        if self.zero == 0:
            groups = enumerate(self.adam.param_groups)
            return [(number, one) for number, group in groups for one in group["params"]]
        if self.zero == 3:
            numbers = self.optimizer.sub_group_to_group_id
            buffers = self.optimizer.fp32_partitioned_groups_flat
            return [(numbers[place], flat) for place, flat in enumerate(buffers)]
        return list(enumerate(self.optimizer.single_partition_of_fp32_groups))

    def gradients(self, is_idle: Callable[[Mapping[str, Any]], bool]) -> Iterator[Tensor]:
        """Averaged gradients that this process holds after the last backward, of busy groups."""
        for place, (number, one) in enumerate(self.updated()):
            if is_idle(self.adam.param_groups[number]):
                continue
            if self.zero and not self.offloaded:
                yield from self.optimizer.averaged_gradients[place]
            elif one.grad is not None:
                yield one.grad

    def forget_gradients(self) -> None:
        """Zero the buffers that outlive a step: what gets no gradient in the next one is not there.

        DeepSpeed writes only what a backward pass reached, so the rest would be of an older step.
        """
        if self.zero == 0:
            return
        for _, flat in self.updated():
            if flat.grad is not None:
                flat.grad.zero_()
        if self.zero == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        elif self.offloaded:
            for kept in self.optimizer.accumulated_grads_in_cpu.values():
                kept.zero_()

    def write(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Put a whole fp32 tensor into this process's part of what ZeRO 1 to 3 updates.

        ``key`` names a moment of the parameter; None is the fp32 parameter itself.
        """
        if self.zero < 3:
            linked: Any = parameter
            linked.set_full_hp_param(value, key)
            return
        # DeepSpeed's own function wants sizes that the number of processes divides
        place, start, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        flat = self.optimizer.fp32_partitioned_groups_flat[place]
        whole = flat if key is None else self.adam.state[flat][key]
        size, rank = dist.get_world_size(), dist.get_rank()
        padded = value.new_zeros(size * length)
        padded[: value.numel()] = value.flatten()
        whole.data.narrow(0, start, length).copy_(padded[rank * length : (rank + 1) * length])

    def link_moments(self) -> None:
        """Tell ZeRO 1 and 2 where the moments of each parameter are, before the first step."""
        if self.zero in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()


class DeepSpeedEngine(Engine):
    """ZeRO 0 to 3.

    Args:
        module: what is trained.
        config: see :class:`OptimConfig`.
        device: "cpu", "cuda" or "auto".
        group: the processes, of a process group (also when there is one).
        n_micro: micro-batches of this process in a step.
        used: name of each parameter -> whether each stage uses it.

    Raises:
        ConfigError: deepspeed is not installed, or a setting of it does not go with ours.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimConfig,
        device: str,
        group: ProcessGroup,
        *,
        n_micro: int,
        used: Mapping[str, tuple[bool, ...]],
    ) -> None:
        place = choose_device(device, group)
        super().__init__(module.to(place), config, place, group)
        settings = deepspeed_dict(config, place.type, group.size, n_micro)
        import deepspeed

        without_compiler(place.type)
        deepspeed.utils.logger.setLevel(logging.WARNING)
        backend = "nccl" if place.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        self.scalars = {name for name, one in module.named_parameters() if one.ndim == 0}
        for name in self.scalars:  # DeepSpeed wants one axis
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.reshape(1)
        self.group_names: list[list[str]] = []
        groups = []
        for names, decay, rate in self.rates:
            for pattern in sorted({used[name] for name in names}, reverse=True):
                alike = [name for name in names if used[name] == pattern]
                self.group_names.append(alike)
                members = [self.trained[name] for name in alike]
                told = {"weight_decay": decay, "rate": rate, "used": pattern}
                groups.append({"params": members, **told})
        self.ds, self.optimizer, _, _ = deepspeed.initialize(
            model=module, model_parameters=groups, config=settings
        )
        self.run = self.ds
        self.adam: torch.optim.Optimizer = self.ds.basic_optimizer
        self.in_bf16 = bool(self.ds.bfloat16_enabled())
        self.buffers = ZeroBuffers(
            self.optimizer, self.adam, config.zero, offloaded=config.offload != "none"
        )
        self._stage = 0
        self._scale = 1.0
        self._hidden: list[tuple[dict[str, Any], list[Tensor]]] = []
        self.adam.register_step_pre_hook(self._before_update)
        self.adam.register_step_post_hook(self._after_update)
        self._start_moments()

    def begin_stage(self, stage: int) -> None:
        """Groups that the stage does not use are idle."""
        self._stage = stage

    def accumulate(self, loss: Tensor) -> None:
        """Backward of a part of the step."""
        self._backward(loss)
        self.ds.step()  # counts micro-batches; no update before the last one

    def step(self, loss: Tensor, lr: float) -> float:
        """See :meth:`Engine.step`."""
        self.refuse_bad("loss", loss.detach())
        self._backward(loss)
        norm = self._norm()
        self.refuse_bad("gradient norm", norm)
        self._scale = min(1.0, self.config.clip / (norm + 1e-6))
        for group in self.adam.param_groups:
            group["lr"] = lr * group["rate"]
        self.ds.step()
        self.buffers.forget_gradients()
        return norm

    def _backward(self, loss: Tensor) -> None:
        """Backward as it is: the loss is of the whole step already.

        DeepSpeed would divide by the number of micro-batches, and it does so in spite of
        ``scale_wrt_gas`` where the loss is the very tensor that its forward gave (seen with
        0.19.8 and ZeRO 0), hence the product.
        """
        self.ds.backward(loss * 1.0, scale_wrt_gas=False)

    def forget_gradients(self) -> None:
        """Drop what was accumulated; the run ends after this."""
        self.ds.zero_grad()
        self.buffers.forget_gradients()

    def _is_idle(self, group: Mapping[str, Any]) -> bool:
        return not group["used"][self._stage]

    def _before_update(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        """Idle groups out, the gradients of the others clipped."""
        self._hidden = [(g, g["params"]) for g in optimizer.param_groups if self._is_idle(g)]
        for group, _ in self._hidden:
            group["params"] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self._scale)

    def _after_update(self, *unused: Any) -> None:
        for group, hidden in self._hidden:
            group["params"] = hidden
        self._hidden = []

    def _norm(self) -> float:
        """Norm of the gradients of this step, of the groups in use."""
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradient in self.buffers.gradients(self._is_idle):
            square += gradient.detach().float().square().sum().double().to(self.device)
        if self.config.zero:
            dist.all_reduce(square)
        return float(square.sqrt())

    @property
    def splits_gradients(self) -> bool:
        """Its hooks take every backward pass for the step's."""
        return False

    @property
    def holds_whole_model(self) -> bool:
        """ZeRO-3 takes parameters away, and bf16 ones are rounded."""
        return self.config.zero < 3 and not self.in_bf16

    def _start_moments(self) -> None:
        """Moments of 0 for everything, which DeepSpeed itself makes at a buffer's first step."""
        for _, flat in self.buffers.updated():
            self.adam.state[flat] = {
                "step": self._as_step(0),
                **{key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS},
            }
        self.buffers.link_moments()

    def _as_step(self, number: int) -> Tensor | int:
        """A step counter as the optimiser keeps it: a tensor in torch, a number in DeepSpeed."""
        is_torch = type(self.adam).__module__.startswith("torch.")
        return torch.tensor(float(number)) if is_torch else number

    def _steps(self) -> dict[str, float]:
        """Updates of each parameter so far."""
        of_group = {n: float(self.adam.state[flat]["step"]) for n, flat in self.buffers.updated()}
        return {name: of_group[n] for n, names in enumerate(self.group_names) for name in names}

    def weights(self) -> dict[str, Tensor]:
        """See :meth:`Engine.weights`."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = list(self.module.parameters()) if self.config.zero == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
            state = self.module.state_dict()
            whole = {name: value.detach().cpu().clone() for name, value in state.items()}
        if self.in_bf16:
            for name, parameter in self.trained.items():
                whole[name] = safe_get_full_fp32_param(parameter).cpu()
        return {n: one.reshape(()) if n in self.scalars else one for n, one in whole.items()}

    def state(self) -> dict[str, Any]:
        """See :meth:`Engine.state`."""
        steps = self._steps()
        kept: dict[str, dict[str, Tensor]] = {}
        for name in self.names:
            if steps[name] == 0:
                continue
            moments = {key: self._whole_moment(name, key) for key in MOMENTS}
            kept[name] = {"step": torch.tensor(steps[name]), **moments}
        return {"state": kept}

    def _whole_moment(self, name: str, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        parameter = self.trained[name]
        if not self.config.zero:
            value = self.adam.state[parameter][key]
        else:
            value = safe_get_full_optimizer_state(parameter, key)
        value = value.detach().float().cpu().clone()
        return value.reshape(()) if name in self.scalars else value

    def load(self, weights: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """See :meth:`Engine.load`."""
        if weights:
            self._load_weights(weights)
        kept = moments_by_name(state, self.names)
        for number, tensor in self.buffers.updated():
            steps = [float(kept[n]["step"]) for n in self.group_names[number] if n in kept]
            self.adam.state[tensor]["step"] = self._as_step(int(max(steps, default=0.0)))
        for name in self.names:
            for key in MOMENTS:
                self._set_moment(name, key, kept.get(name))

    def _set_moment(self, name: str, key: str, moments: Mapping[str, Tensor] | None) -> None:
        parameter = self.trained[name]
        shape = shape_of(parameter)
        value = torch.zeros(shape) if moments is None else moments[key]
        value = value.to(self.device, torch.float32).reshape(shape)
        if not self.config.zero:
            self.adam.state[parameter][key].copy_(value)
        else:
            self.buffers.write(parameter, value, key)

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Into the parameters, and into the fp32 copies that are updated."""
        import deepspeed

        parameters = list(self.module.parameters()) if self.config.zero == 3 else []
        gathered = deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0, enabled=bool(parameters)
        )
        with gathered:
            self.module.load_state_dict(
                {n: v.reshape(1) if n in self.scalars else v for n, v in weights.items()}
            )
        if self.config.zero:
            for name, parameter in self.trained.items():
                value = weights[name].to(self.device, torch.float32).reshape(shape_of(parameter))
                self.buffers.write(parameter, value, None)


def without_compiler(device: str) -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives, which gloo does without.

    It builds them on a CPU whenever processes start, for a minute, and stops where there is no
    C++ compiler. Its list of operators is private, so a version without it is left alone.
    """
    import deepspeed.ops

    operators = getattr(deepspeed.ops, "__compatible_ops__", None)
    if device == "cpu" and isinstance(operators, dict) and "deepspeed_shm_comm" in operators:
        operators["deepspeed_shm_comm"] = False
