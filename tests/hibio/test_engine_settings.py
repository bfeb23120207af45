"""Engines by their settings: what is refused, DeepSpeed's dict, processes, buckets, old states."""

import pytest
import torch
from torch import nn

from hibio.config.files import ConfigError
from hibio.training.engine import NotFiniteError, OptimConfig, TorchEngine, build_engine
from hibio.training.engine.base import choose_device
from hibio.training.engine.deepspeed import deepspeed_dict
from hibio.training.engine.torch import buckets
from hibio.training.process_group import (
    VARIABLES,
    ProcessGroup,
    end_processes,
    free_port,
    start_processes,
)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "torch", "zero": 1}, "settings of engine: deepspeed"),
        ({"engine": "torch", "deepspeed": {"a": 1}}, "settings of engine: deepspeed"),
        ({"offload": "optimizer"}, "needs zero 1 or more, and zero is 0"),
        ({"offload": "all", "zero": 2}, "needs zero 3 or more, and zero is 2"),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(ValueError, match=words):
        OptimConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "deepspeed"),
    [
        ({}, False),
        ({"engine": "torch"}, False),
        ({"engine": "deepspeed"}, True),
        ({"zero": 2}, True),
        ({"deepspeed": {"wall_clock_breakdown": True}}, True),
    ],
)
def test_which_engine_auto_means(settings, deepspeed):
    assert OptimConfig(**settings).uses_deepspeed is deepspeed


# ------------------------------------------------------------------ DeepSpeed's settings
@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


@pytest.mark.usefixtures("installed")
def test_the_generated_settings_and_what_is_merged_over_them():
    config = OptimConfig(
        weight_decay=0.3,
        zero=3,
        offload="all",
        deepspeed={"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True},
    )
    made = deepspeed_dict(config, "cpu", size=4, n_micro=2)
    assert made["train_batch_size"] == 8
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 0.0
    assert made["wall_clock_breakdown"] is True
    assert made["optimizer"]["params"]["weight_decay"] == 0.3
    assert made["optimizer"]["params"]["torch_adam"] is True
    assert made["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": False,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu", "pin_memory": False},
    }
    on_gpu = deepspeed_dict(OptimConfig(zero=1), "cuda", size=1, n_micro=1)
    assert "torch_adam" not in on_gpu["optimizer"]["params"]
    assert on_gpu["zero_optimization"] == {"stage": 1}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("zero", "given", "words"),
    [
        (1, {"train_batch_size": 8}, r"train_batch_size: this is set by sampler\.batches_per_step"),
        (1, {"gradient_clipping": 1.0}, r"gradient_clipping: this is set by optim\.clip"),
        (1, {"fp16": {"enabled": True}}, "bf16"),
        (1, {"bf16": {"enabled": True}}, r"needs optim\.zero 2 or 3, found 1"),
        (2, {"bf16": {"enabled": True}}, r"set optim\.precision: bf16"),
        (1, {"zero_optimization": {"stage": 2}}, r"stage: this is set by optim\.zero"),
        (2, {"zero_optimization": {"offload_optimizer": {}}}, r"set optim\.offload: optimizer"),
        (3, {"zero_optimization": {"offload_param": {"device": "nvme"}}}, r"optim\.offload: all"),
    ],
)
def test_deepspeed_settings_that_other_keys_decide(zero, given, words):
    with pytest.raises(ConfigError, match=words):
        deepspeed_dict(OptimConfig(zero=zero, deepspeed=given), "cpu", 1, 1)


def test_without_deepspeed_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install .hibio\[train\]"):
        deepspeed_dict(OptimConfig(zero=1), "cpu", 1, 1)


def test_gradients_that_offloading_would_lose_are_refused():
    config = OptimConfig(zero=2, offload="optimizer")
    with pytest.raises(ConfigError, match=r"cannot train stage 'pathways'.*offload: none"):
        build_engine(
            nn.Linear(2, 2),
            config,
            "cpu",
            ProcessGroup(),
            n_micro=2,
            mixed_stages=["pathways"],
            used=dict,
        )


# ------------------------------------------------------------------ processes
def test_plain_python_has_one_process(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    group = start_processes("cpu")
    assert (group.rank, group.size, group.is_first) == (0, 1, True)
    assert group.any(True) is True
    assert group.any(False) is False
    assert group.on_first(lambda: 3) == 3
    tensor = torch.ones(2)
    group.mean_([tensor])
    assert group.copy_from(0, tensor) is tensor
    group.wait()
    with pytest.raises(KeyError):
        group.on_first(lambda: {}["a"])


def test_a_launch_without_its_variables_is_refused(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        ConfigError, match=r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set.*torch"
    ):
        start_processes("cpu")


def test_every_job_of_a_launch_gets_the_same_processes(monkeypatch):
    for name, value in zip(VARIABLES, ("0", "1", "0", "127.0.0.1", str(free_port())), strict=True):
        monkeypatch.setenv(name, value)
    try:
        first = start_processes("cpu", single=True)
        assert first.waits is not None
        assert start_processes("cpu", single=True) == first  # no group more for each job
    finally:
        assert end_processes() == 0
    assert end_processes() == 0


def test_ports_are_free_and_each_process_has_its_own_gpu():
    assert 0 < free_port() < 65536
    assert choose_device("cuda", ProcessGroup(3, 4, 1)) == torch.device("cuda", 1)
    assert choose_device("cuda", ProcessGroup()) == torch.device("cuda")
    assert choose_device("cpu", ProcessGroup(3, 4, 1)) == torch.device("cpu")


# ------------------------------------------------------------------ parts of the torch engine
def test_buckets_hold_what_fits_and_one_type():
    sizes = [3, 4, 2, 9, 1, 1]
    tensors = [torch.zeros(size) for size in sizes] + [torch.zeros(1, dtype=torch.float64)]
    found = [[len(one) for one in bucket] for bucket in buckets(tensors, 7)]
    assert found == [[3, 4], [2], [9], [1, 1], [1]]
    assert list(buckets([], 7)) == []


def test_a_state_of_other_parameters_is_refused():
    engine = TorchEngine(nn.Linear(2, 3), OptimConfig(), "cpu")
    with pytest.raises(ConfigError, match=r"names 1 parameters .*first: 9\.weight"):
        engine.load({}, {"state": {"9.weight": {}}})


def test_parts_of_a_step_add_up_and_bf16_is_asked_for():
    model = nn.Linear(2, 1, bias=False)
    copy = nn.Linear(2, 1, bias=False)
    copy.load_state_dict(model.state_dict())
    in_parts, at_once = (TorchEngine(one, OptimConfig(), "cpu") for one in (model, copy))
    rows = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    in_parts.accumulate(model(rows[:2]).square().sum())
    norm = in_parts.step(model(rows[2:]).square().sum(), 1e-2)
    assert norm == pytest.approx(at_once.step(copy(rows).square().sum(), 1e-2), rel=1e-6)
    assert torch.allclose(model.weight, copy.weight, atol=1e-7)
    in_parts.accumulate(model(rows).square().sum())
    with pytest.raises(NotFiniteError):
        in_parts.step(model(rows).sum() * float("inf"), 1e-2)
    assert model.weight.grad is None  # the first part is forgotten too
    half = TorchEngine(model, OptimConfig(precision="bf16"), "cpu")
    with half.precision():
        assert model(rows).dtype == torch.bfloat16
