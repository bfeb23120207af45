"""The demo: its steps are valid commands that follow from each other; a small one runs through."""

import dataclasses
import json
import sys
from pathlib import Path

import anndata
import pytest

from eval.view import page
from hibio import cli, keys
from hibio.checkpoint import provenance
from hibio.cli import demo
from hibio.cli.command import build_parser
from hibio.config.files import dump_config, load_config
from hibio.config.run import RunConfig
from hibio.config.training import StageConfig
from hibio.run import expand
from tests.hibio.toy import SPOT, replace_command, run_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_can_be_planned(path, toy_stores):
    settings = [f"data.stores={toy_stores}", "folds=[patient01]"]
    config = load_config(RunConfig, path, settings)
    jobs = expand(config)
    assert len(jobs) == (1 + len(config.variants)) * len(config.seeds)
    assert [job.config.variant for job in jobs[: 1 + len(config.variants)]] == [
        config.variant,
        *config.variants,
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_variant_of_a_shipped_run_has_its_steps(path, toy_stores):
    """In steps, not epochs, so that one slide is trained as long as ten; the rows are level."""
    config = load_config(RunConfig, path, [f"data.stores={toy_stores}", "folds=[patient01]"])
    lengths = [[stage.steps for stage in job.config.stages] for job in expand(config)]
    assert None not in lengths[0]
    assert len({sum(steps) for steps in lengths}) == 1


def test_the_steps_are_valid_commands_that_follow_from_each_other(tmp_path, monkeypatch):
    parser = build_parser(cli.COMMANDS)
    monkeypatch.setattr(page, "has_openseadragon", lambda: True)
    plan = demo.steps(tmp_path)
    options = [parser.parse_args(arguments) for _, arguments in plan]
    assert [arguments[0] for _, arguments in plan] == [
        "simulate",
        "prepare",
        "train",
        "embed",
        "query",
        "predict",
        "eval",
        "view",
    ]
    simulate, prepare, train, embed, query, predict, evaluate, view = options
    assert view.slides == simulate.out / "slides"
    assert (view.only, view.export) == (["unseen"], tmp_path / "viewer")
    assert predict.data == [prepare.out]
    assert prepare.manifest == simulate.out / "manifest.csv"
    assert embed.data == query.data == evaluate.data == prepare.out
    assert train.resume is None
    config = load_config(RunConfig, train.config, train.set)
    assert (config.data.stores, config.out) == (prepare.out, evaluate.checkpoint)
    assert (
        embed.checkpoint
        == query.checkpoint
        == predict.checkpoint
        == view.checkpoint
        == config.out / "hibio"
    )
    assert all(tmp_path in one.out.parents for one in options if "out" in one)
    assert len(config.folds) == 1  # one fold and one seed: one checkpoint below run/hibio
    assert len(config.seeds) == 1


def test_a_demo_that_was_stopped_goes_on(tmp_path):
    (tmp_path / "run").mkdir()
    options = build_parser(cli.COMMANDS).parse_args(demo.steps(tmp_path)[2][1])
    assert options.resume == tmp_path / "run"


def test_a_step_that_fails_ends_the_demo_with_its_code(tmp_path, monkeypatch, capsys):
    ran = []

    def fail_at_train(options):
        ran.append("train")
        return 1

    for name in ("simulate", "prepare", "embed"):
        replace_command(monkeypatch, name, lambda options, name=name: ran.append(name) or 0)
    replace_command(monkeypatch, "train", fail_at_train)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert ran == ["simulate", "prepare", "train"]
    assert "report:" not in capsys.readouterr().out


@pytest.mark.parametrize(("version", "told"), [("0.0.1", True), (None, False)])
def test_a_demo_that_an_older_hibio_began_says_two_ways_out(
    tmp_path, monkeypatch, capsys, version, told
):
    out, known = tmp_path / "demo", provenance()
    (out / "run").mkdir(parents=True)
    known["packages"]["hibio"] = version or known["packages"]["hibio"]
    (out / "run" / "provenance.json").write_text(json.dumps(known))
    replace_command(monkeypatch, "simulate", lambda options: int(options.out == out / "cohort"))
    for name in ("prepare", "train", "embed", "query", "predict", "eval", "view"):
        replace_command(monkeypatch, name, lambda options: 0)
    assert cli.main(["demo", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert ("another version of HiBio began" in said) == told
    if told:
        assert f"remove {out}" in said
        new = said.partition("--out ")[2].partition(";")[0]
        assert cli.main(["demo", "--out", new]) == 0


#: Packages of the extras, of which a slide needs none to be prepared, trained on and queried
#: (scikit-learn asks for pyarrow by its entry in sys.modules, so that one stays).
NOT_IN_THE_BASE = (
    *("timm", "torchvision", "huggingface_hub", "pyvips", "pylibCZIrw"),
    *("hdf5plugin", "tensorboard", "wandb", "mlflow", "deepspeed", "distributed"),
    *("starlette", "uvicorn", "argcomplete"),
)
SMALL = {
    "simulate": ["--slides", "3", "--patients", "3", "--spots", "70", "--genes", "400"],
    "prepare": ["--workers", "1", "--patch-px", "16"],
}


def test_a_small_demo_runs_from_nothing_to_the_report(tmp_path, monkeypatch, capsys):
    """Every step of the demo on the packages of the base; a baseline by the same code beside it."""
    stage = StageConfig("spot", 2, SPOT)
    flat = {"model": {"omics": {"name": "mlp"}}, "stages": [dataclasses.asdict(stage)]}
    config = run_config(tmp_path, tmp_path, variants={"flat_clip": flat})
    monkeypatch.chdir(tmp_path)
    for name in NOT_IN_THE_BASE:
        monkeypatch.setitem(sys.modules, name, None)  # which makes importing it fail
    dump_config(config, tmp_path / "demo")  # a file of this name goes before the shipped one
    steps = demo.steps
    monkeypatch.setattr(
        demo, "steps", lambda out: [(t, [*a, *SMALL.get(a[0], [])]) for t, a in steps(out)]
    )
    out = tmp_path / "shown"
    assert cli.main(["demo", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    report = out / "eval" / "report.html"
    assert told.splitlines()[-1] == f"report: {report}"
    n = len(steps(out))
    assert all(f"[{i}/{n}]" in told for i in range(1, n + 1))
    assert (out / "viewer" / "index.html").is_file() == page.has_openseadragon()
    assert report.stat().st_size > 10_000
    results = json.loads((out / "eval" / "results.json").read_text())
    assert {"hibio", "flat_clip"} <= set(results["tasks"]["retrieval"]["models"])
    adata = anndata.read_h5ad(out / "embeddings" / "sim003.h5ad")
    assert {keys.OBSM_IMAGE, keys.OBSM_OMICS, keys.OBSM_REGION, "spatial"} <= set(adata.obsm)
    assert {keys.OBS_REGION + name for name in config.regions.levels} <= set(adata.obs)
    assert (out / "query" / "sim003.query.csv").is_file()
    predicted = anndata.read_h5ad(out / "predictions" / "sim003.predict.h5ad")
    assert predicted.uns["hibio"]["reliability"].startswith("2 patients held out")
    assert cli.main(["check", str(out / "run")]) == 0
