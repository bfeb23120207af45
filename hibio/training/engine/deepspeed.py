"""DeepSpeed: optimiser state, gradients and parameters partitioned over the processes.

The only module that imports deepspeed, and only inside functions. Three things are done here and
not by DeepSpeed, so that every engine gives the same numbers:

- Parameters that a stage leaves alone get no update at all. DeepSpeed keeps flat buffers, in which
  "no gradient" is a zero (or, in ZeRO-3, the gradient of an earlier step). So parameters are put
  into groups by the stages that use them, and groups that are idle in a stage are taken out.
- The gradient norm is of this step's gradients, checked before anything is updated, and clipped to.
- Optimiser state is saved by parameter name, in fp32, as the torch engine saves it: a run can go
  on with another engine, another ZeRO stage and another number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hibio.training.engine.base import (
    Engine,
    choose_device,
    decayed_and_not,
    moments_by_name,
    shape_of,
)
from hibio.training.engine.config import OptimConfig
from hibio.training.engine.deepspeed_config import deepspeed_dict
from hibio.training.engine.zero_buffers import ZeroBuffers, as_vectors
from hibio.training.process_group import ProcessGroup

MOMENTS = ("exp_avg", "exp_avg_sq")


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
        self.scalars = as_vectors(module)
        matrices, others = decayed_and_not(self.trained)
        self.names = [*matrices, *others]
        self.group_names: list[list[str]] = []
        groups = []
        for names, decay in ((matrices, config.weight_decay), (others, 0.0)):
            for pattern in sorted({used[name] for name in names}, reverse=True):
                alike = [name for name in names if used[name] == pattern]
                self.group_names.append(alike)
                members = [self.trained[name] for name in alike]
                groups.append({"params": members, "weight_decay": decay, "used": pattern})
        self.ds, self.optimizer, _, _ = deepspeed.initialize(
            model=module, model_parameters=groups, config=settings
        )
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

    # ------------------------------------------------------------------ the step
    def begin_stage(self, stage: int) -> None:
        """Groups that the stage does not use are idle."""
        self._stage = stage

    def run(self, *arguments: Any) -> Any:
        """The module's result, through DeepSpeed."""
        return self.ds(*arguments)

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
            group["lr"] = lr
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

    # ------------------------------------------------------------------ state
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
