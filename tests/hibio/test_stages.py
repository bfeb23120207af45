"""Stages as data, the learning rate in closed form, and the engine: clip, decay, refuse NaN."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from hibio import keys
from hibio.config.training import StageConfig, stage_lr
from hibio.training.engine import NotFiniteError, OptimConfig, TorchEngine


def stage(**changes) -> StageConfig:
    return dataclasses.replace(StageConfig("s", 2, {keys.TERM_SPOT: 1.0}), **changes)


def test_lr_closed_form():
    """100 steps: 5 of warm-up, then half a cosine from the peak to a hundredth of it."""
    one = stage(lr=2e-3)
    got = [stage_lr(one, step, 100) for step in range(100)]
    assert got[:5] == pytest.approx([2e-3 * (i + 1) / 5 for i in range(5)])
    for step in range(5, 100):
        wave = (1 + math.cos(math.pi * (step - 5) / 95)) / 2
        assert got[step] == pytest.approx(2e-3 * (0.01 + 0.99 * wave))
    assert max(got) == pytest.approx(2e-3)
    assert stage_lr(one, 100, 100) == pytest.approx(2e-5)


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_lr_of_very_short_stages_is_positive(n_steps):
    got = [stage_lr(stage(lr=1.0), step, n_steps) for step in range(n_steps)]
    assert got[0] == pytest.approx(1.0)
    assert all(0 < value <= 1.0 for value in got)


@pytest.mark.parametrize(
    ("weights", "image", "mask"),
    [
        ({keys.TERM_SPOT: 1.0}, True, False),
        ({keys.TERM_MASKED: 1.0, keys.TERM_SPOT: 0.0}, False, True),
        ({keys.TERM_REGION: 0.5}, True, False),
        ({keys.TERM_MEMBER: 0.5, keys.TERM_PROFILE: 1.0}, True, True),
        ({keys.TERM_DECORRELATION: 0.1}, False, False),
    ],
)
def test_needs_follow_from_the_weights_above_zero(weights, image, mask):
    one = stage(weights=weights)
    assert (one.needs_image, one.needs_mask) == (image, mask)
    assert one.active == {term: w for term, w in weights.items() if w > 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 5}, "steps is 5 and epochs is 2; give one"),
        ({"epochs": None}, "steps is None and epochs is None; give one"),
        ({"weights": {"spot/contrastiv": 1.0}}, r"did you mean 'spot/contrastive'\?"),
        ({"weights": {}}, "no loss term has a weight above 0"),
        ({"weights": {keys.TERM_SPOT: 0.0}}, "no loss term has a weight above 0"),
    ],
)
def test_stages_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        stage(**change)


# ------------------------------------------------------------------ the engine
class Line(nn.Module):
    """y = x w + b, with a frozen part beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))
        self.bias = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)

    def loss(self, scale: float = 1.0) -> torch.Tensor:
        return scale * ((torch.ones(5, 3) @ self.weight + self.bias - 1.0) ** 2).sum()


def engine(**changes) -> tuple[Line, TorchEngine]:
    model = Line()
    return model, TorchEngine(model, OptimConfig(**changes), "cpu")


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_step_is_adamw_on_the_clipped_gradient():
    model, one = engine(clip=0.5, weight_decay=0.1)
    reference = Line()
    groups = [
        {"params": [reference.weight], "weight_decay": 0.1},
        {"params": [reference.bias], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-2)
    for scale in (1.0, 3.0, 1e-3):  # the last is below the clip
        norm = one.step(model.loss(scale), 1e-2)
        adam.zero_grad()
        reference.loss(scale).backward()
        total = math.sqrt(
            sum(float(p.grad.square().sum()) for p in (reference.weight, reference.bias))
        )
        assert norm == pytest.approx(total, rel=1e-5)
        for p in (reference.weight, reference.bias):
            p.grad *= min(1.0, 0.5 / (total + 1e-6))
        adam.step()
        assert torch.allclose(model.weight, reference.weight, atol=1e-7)
        assert torch.allclose(model.bias, reference.bias, atol=1e-7)


def test_only_matrices_decay_and_the_frozen_part_is_left_out():
    model, one = engine(weight_decay=0.3)
    decay = {id(p): g["weight_decay"] for g in one.optimizer.param_groups for p in g["params"]}
    assert decay == {id(model.weight): 0.3, id(model.bias): 0.0}
    one.step(model.loss(), 1e-2)
    assert torch.equal(model.frozen, torch.ones(4, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_updates_nothing(bad):
    model, one = engine()
    one.step(model.loss(), 1e-2)
    before, moments = state(model), one.state()["state"]
    count = {key: float(value["step"]) for key, value in moments.items()}
    with pytest.raises(NotFiniteError, match=f"the loss is {bad}; nothing was updated"):
        one.step(model.loss() * bad, 1e-2)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert {key: float(v["step"]) for key, v in one.state()["state"].items()} == count


def test_a_gradient_that_is_not_finite_updates_nothing():
    model, one = engine()
    before = state(model)
    loss = model.loss() + torch.sqrt((model.bias * 0).sum())  # finite, with an infinite slope
    assert torch.isfinite(loss)
    with pytest.raises(NotFiniteError, match="the gradient norm is nan"):
        one.step(loss, 1e-2)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    one.step(model.loss(), 1e-2)  # and the next step is a clean one
    assert torch.isfinite(model.weight).all()


def test_state_round_trip_goes_on_to_the_bit():
    model, one = engine()
    for _ in range(3):
        one.step(model.loss(), 1e-2)
    copy, other = engine()
    copy.load_state_dict(model.state_dict())
    other.load({}, one.state())
    for _ in range(3):
        one.step(model.loss(), 5e-3)
        other.step(copy.loss(), 5e-3)
    assert torch.equal(model.weight, copy.weight)
    assert torch.equal(model.bias, copy.bias)


def test_cpu_runs_stay_in_full_precision():
    _, one = engine(precision="auto")
    with one.precision():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
