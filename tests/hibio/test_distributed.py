"""Two processes on a CPU give what one gives on the same global batch, with every engine.

One launch runs all cases. Every term is on, dropout too; a step has 4 micro-batches, so each
process accumulates 2; every run is stopped after 2 of its 4 steps and resumed.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hibio import keys
from hibio.checkpoint import NAME, load_trainer_state, read_log
from hibio.config.files import dump_config
from hibio.config.run import RunConfig
from hibio.config.training import ObjectiveConfig, SamplerConfig, StageConfig
from hibio.run import build, expand
from hibio.training.engine import OptimConfig
from hibio.training.process_group import free_port
from tests.hibio.toy import MASKED, REGION, run_config

ROOT = Path(__file__).resolve().parents[2]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not HAS_DEEPSPEED, reason="deepspeed is not installed: pip install 'hibio[train]'"
)
OMICS = {**MASKED, keys.TERM_SPATIAL: 1.0, keys.TERM_DECORRELATION: 0.1}
#: The second stage leaves the image tower alone, the third the decoder.
STAGES = (
    StageConfig("all", 1, dict.fromkeys(keys.TERMS, 0.5)),
    StageConfig("omics", 1, OMICS),
    StageConfig("region", 2, REGION, rebuild_every=1),
)
SETTINGS = {
    "stages": STAGES,
    "sampler": SamplerConfig(batch_spots=35, batches_per_step=4),
    "objective": ObjectiveConfig(negatives="mixed", anchors_per_step=8, query_genes=4),
    "threads": 1,
    "bank": False,
}
CUT, N_STEPS = 2, 4
#: Without persistent parameters, so that ZeRO-3 takes the small ones of this model away too.
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ENGINES = {
    "ddp": OptimConfig(),
    "zero0": OptimConfig(engine="deepspeed"),
    "zero1": OptimConfig(zero=1),
    "zero2": OptimConfig(zero=2, offload="optimizer"),
    "zero3": OptimConfig(zero=3, deepspeed=SHARDED),
}
#: Weights without effect on the loss (a softmax does not see them): their gradient is rounding,
#: which AdamW brings to the size of the learning rate.
WITHOUT_EFFECT = ("key_value.bias", "query_key_value.bias", "pool.score.2.bias")
LOSS, WEIGHT = 1e-6, 2e-6  # relative, absolute; measured: below 1e-7 and 1.5e-7


def config(stores: Path, out: Path, **changes) -> RunConfig:
    return run_config(stores, out, **{**SETTINGS, **changes})


def folder(out: Path) -> Path:
    return out / "hibio" / "fold-patient03" / "seed-0"


def case(out: Path, one: RunConfig, until: int | None, resume: bool = False, event=None) -> dict:
    path = out / f"{one.out.name}-{one.optim.zero}.yaml"
    dump_config(one, path)
    return {"config": str(path), "resume": resume, "until": until, "event": event}


def train(one: RunConfig, until: int | None = None, resume: bool = False) -> Path:
    """In this process alone."""
    (job,) = expand(one)
    build(job, resume=resume).fit(until_step=until)
    return job.folder


def launch(cases: Path, n_processes: int = 2) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(cases.parent / "extensions"),
    }
    start = ["torch.distributed.run", "--nproc_per_node", str(n_processes)]
    start += ["--master_port", str(free_port())]
    worker = str(Path(__file__).with_name("distributed_runs.py"))
    done = subprocess.run(
        [sys.executable, "-m", *start, worker, str(cases)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def runs(toy_stores, tmp_path_factory) -> Path:
    """The folder of all runs: ``one`` of one process, and those of two."""
    out = tmp_path_factory.mktemp("runs")
    train(config(toy_stores, out / "one"))
    train(config(toy_stores, out / "grown"), until=CUT)
    engines = {name: e for name, e in ENGINES.items() if HAS_DEEPSPEED or name == "ddp"}
    cases = []
    for name, optim in engines.items():
        one = config(toy_stores, out / name, optim=optim)
        cases += [case(out, one, CUT), case(out, one, None, resume=True)]
    for kind, place in (("signal", 1), ("nan", 1)):
        one = config(toy_stores, out / kind)
        cases.append(case(out, one, None, event={"kind": kind, "rank": 1, "step": place}))
    cases.append(case(out, config(toy_stores, out / "shrunk-ddp"), CUT))
    if HAS_DEEPSPEED:
        cases.append(
            case(out, config(toy_stores, out / "shrunk-zero", optim=ENGINES["zero3"]), CUT)
        )
        grown = config(toy_stores, out / "grown", optim=OptimConfig(zero=2))
        cases.append(case(out, grown, None, resume=True))
        half = OptimConfig(zero=2, precision="bf16", deepspeed={"bf16": {"enabled": True}})
        cases.append(case(out, config(toy_stores, out / "half", optim=half), None))
    (out / "cases.json").write_text(json.dumps(cases))
    launch(out / "cases.json")
    return out


def outcomes(runs: Path, name: str) -> list[dict]:
    """What the two processes say of the last case of a run."""
    cases = json.loads((runs / "cases.json").read_text())
    number = max(i for i, c in enumerate(cases) if Path(c["config"]).stem[:-2] == name)
    return [json.loads((runs / f"outcome-{number}-{rank}.json").read_text()) for rank in (0, 1)]


def assert_same_run(runs: Path, name: str) -> None:
    """Loss curve and final weights are those of one process."""
    expected, found = read_log(folder(runs / "one") / "log.jsonl"), None
    found = read_log(folder(runs / name) / "log.jsonl")
    assert [record["step"] for record in found] == list(range(N_STEPS))
    for one, other in zip(expected, found, strict=True):
        assert other["total"] == pytest.approx(one["total"], rel=LOSS)
        assert other["terms"] == pytest.approx(one["terms"], rel=LOSS, abs=1e-6)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=2e-6)
        assert (other["n"], other["lr"]) == (one["n"], one["lr"])
    expected, found = (
        load_file(folder(runs / run) / NAME / "model.safetensors") for run in ("one", name)
    )
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if not key.endswith(WITHOUT_EFFECT):
            assert value.dtype == found[key].dtype
            assert torch.allclose(value, found[key], rtol=0, atol=WEIGHT), key


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [name if name == "ddp" else pytest.param(name, marks=needs_deepspeed) for name in ENGINES],
)
def test_two_processes_give_what_one_gives_and_resume(runs, name):
    first, second = outcomes(runs, name)
    assert (first["began"], first["step"], first["finished"]) == (CUT, N_STEPS, True)
    assert second == first  # the weights too
    assert_same_run(runs, name)


@pytest.mark.parametrize("name", ["ddp", pytest.param("zero3", marks=needs_deepspeed)])
def test_the_optimiser_state_has_one_form(runs, name):
    """By parameter name, whole, in fp32: what a resume on another layout reads."""
    one, other = (
        load_trainer_state(folder(runs / run) / NAME)["optimizer"]["state"] for run in ("one", name)
    )
    assert one.keys() == other.keys()
    for key, moments in one.items():
        assert moments.keys() == other[key].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert float(moments["step"]) == float(other[key]["step"])
        for part in ("exp_avg", "exp_avg_sq"):
            assert other[key][part].dtype == torch.float32
            assert torch.allclose(moments[part], other[key][part], atol=1e-6), (key, part)
    steps = {key: float(moments["step"]) for key, moments in one.items()}
    assert steps["model.expression_head.weight"] == 3  # not in the omics stage
    assert steps["model.decoder.0.weight"] == 2  # not in the region stage


@pytest.mark.parametrize("name", ["shrunk-ddp", pytest.param("shrunk-zero", marks=needs_deepspeed)])
def test_a_run_of_two_processes_goes_on_in_one(runs, toy_stores, name):
    train(config(toy_stores, runs / name), resume=True)
    assert_same_run(runs, name)


@needs_deepspeed
def test_a_run_of_one_process_goes_on_in_two_with_another_engine(runs):
    assert outcomes(runs, "grown")[0]["began"] == CUT
    assert_same_run(runs, "grown")


@needs_deepspeed
def test_parameters_in_bf16_train_alike_and_are_saved_in_fp32(runs):
    expected = read_log(folder(runs / "one") / "log.jsonl")
    for one, other in zip(expected, read_log(folder(runs / "half") / "log.jsonl"), strict=True):
        assert other["total"] == pytest.approx(one["total"], rel=0.02)
        assert other["total"] != one["total"]
    saved = load_file(folder(runs / "half") / NAME / "model.safetensors")
    weight = saved["omics_head.0.weight"]
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert not torch.equal(weight, weight.bfloat16().float())  # the copy that is updated


def test_a_signal_to_one_process_stops_both_after_the_same_step(runs):
    first, second = outcomes(runs, "signal")
    assert first == second
    assert (first["finished"], first["step"], first["error"]) == (False, 2, None)
    assert load_trainer_state(folder(runs / "signal") / NAME)["step"] == 2


def test_a_loss_that_is_not_finite_on_one_process_stops_both_before_the_update(runs):
    first, second = outcomes(runs, "nan")
    assert first["step"] == second["step"] == 1
    assert first["weight"] == second["weight"]
    for one in (first, second):
        assert "the loss is" in one["error"]
        assert "nothing was updated" in one["error"]
        assert "stage 'omics'" in one["error"]
    assert (folder(runs / "nan") / "not_finite.json").is_file()


def test_only_the_first_process_writes_the_log(runs):
    log = read_log(folder(runs / "ddp") / "log.jsonl")
    assert len(log) == N_STEPS
    assert not list((runs / "ddp").rglob("artifacts-of-the-first-process.h5"))


def test_gathered_rows_and_their_gradient(runs):
    """3 rows and 1: the mean over processes of the gradients is the gradient of the sum."""
    told = [json.loads((runs / f"gather-{rank}.json").read_text()) for rank in (0, 1)]
    rows = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [10.0, 11.0]], requires_grad=True)
    (rows[:, 0] * torch.arange(1.0, 5.0)).square().sum().backward()
    for one in told:
        assert one["rows"] == rows.tolist()
        assert one["bools"] == [True, False, True, True]
        assert one["numbers"] == [2**40, 2**40 + 1, 2**40 + 2, 2**40]
        assert one["empty"] == [2, 3]
        assert one["any"] == [True, False]
    own = told[0]["gradient"] + told[1]["gradient"]
    assert (torch.tensor(own) / 2).tolist() == rows.grad.tolist()
    assert told[0]["told"] == "ValueError: no room"
    assert told[1]["told"] == "ConfigError: the first process failed: no room"


def test_settings_of_the_layout_may_change_and_others_not(toy_stores, tmp_path):
    from hibio.config.files import ConfigError

    one = config(toy_stores, tmp_path / "run")
    train(one, until=1)
    moved = dataclasses.replace(one, optim=OptimConfig(engine="torch"))
    (job,) = expand(moved)
    assert build(job, resume=True).step == 1
    (job,) = expand(dataclasses.replace(one, optim=OptimConfig(clip=2.0)))
    with pytest.raises(ConfigError, match="other settings in: optim"):
        build(job, resume=True)
