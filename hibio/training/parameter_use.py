"""Which parameters a stage trains: found by one backward pass on a few spots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hibio.training.plan import Plan
from hibio.training.stages import StageConfig
from hibio.training.step_module import StepModule
from hibio.training.step_outputs import MicroBatch, read_micro_batch

SPOTS = 32  # of one slide; only what is connected matters, not the values


def parameter_use(module: StepModule, plan: Plan) -> Mapping[str, tuple[bool, ...]]:
    """Name of each trained parameter -> whether each stage gives it a gradient.

    The module is as it was afterwards. Every process finds the same.

    Args:
        module: of model and objective, whole.
        plan: of the run.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    device = next(module.parameters()).device
    before = {name: value.clone() for name, value in module.named_buffers()}
    was_training = module.training
    module.eval()
    used: dict[str, list[bool]] = {name: [] for name in trained}
    for stage in plan.stages:
        total = module.objective.terms(
            module.objective.outputs(_few_spots(plan, stage).to(device), stage), stage
        ).total
        found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, found, strict=True):
            used[name].append(gradient is not None)
    module.train(was_training)
    for name, value in module.named_buffers():
        value.copy_(before[name])
    return {name: tuple(stages) for name, stages in used.items()}


def _few_spots(plan: Plan, stage: StageConfig) -> MicroBatch:
    """Neighbouring spots of the first slide, of one with an image where there is one."""
    slides: Sequence[int] = plan.slides(stage)
    entries = plan.dataset.entries
    index = next((i for i in slides if entries[i].has_image), slides[0])
    slide = plan.dataset[index]
    core = np.arange(min(SPOTS, slide.n_spots))
    views = plan.objective.views(stage, np.random.default_rng(0))
    part = (slide, plan.regions.current(index), core)
    return read_micro_batch([index], [part], plan.config.halo, views, index=0, seed=0)
