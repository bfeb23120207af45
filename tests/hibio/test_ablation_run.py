"""A grid from nothing to its report on the toy stores; resumed, killed, changed, in parts."""

import csv
import dataclasses
import json
import shutil

import pandas as pd
import pytest

from eval.ablation import plan as cohorts_module
from eval.ablation import run as run_module
from eval.ablation.config import BASELINES, CohortsConfig, load_grid
from eval.ablation.plan import cohorts_of, make_cohort, plan
from eval.ablation.run import Bench, measure, run_grid
from eval.ablation.table import NAME, changed_keys, is_current, is_done, read_scores
from eval.embed import load_checkpoint
from eval.run import evaluate
from eval.settings import task_configs
from hibio.checkpoint import find_checkpoint
from hibio.config.files import ConfigError
from preprocessing.store.read import stores_in
from tests.hibio.ablation_grids import METRIC, TABLED, grid_of, write_grid

SMALL = {"n_slides": 3, "n_patients": 3, "n_spots": 60, "n_genes": 300, "n_housekeeping": 30}


@pytest.fixture(scope="module")
def done(toy_stores, tmp_path_factory):
    """A finished grid of two rows, two seeds and the baselines."""
    folder = tmp_path_factory.mktemp("ablation")
    tasks = {**TABLED, "expression": ["pearson/top50_hvg", "pearson_combined/top50_hvg"]}
    grid = grid_of(
        folder, toy_stores, settings={"seeds": [0, 1]}, tasks=tasks, baselines=True, draws=200
    )
    report = run_grid(grid)
    return grid, report


@pytest.fixture
def copy(done, tmp_path):
    """A copy of it that a test may change, and the jobs that a run of it trains."""
    grid, _ = done
    shutil.copytree(grid.out, tmp_path / "out")
    changed = grid_of(
        tmp_path,
        grid.run.parent,
        settings={"seeds": [0, 1]},
        tasks={task: list(names) for task, names in grid.tasks.items()},
        baselines=True,
        draws=200,
        run=str(grid.run),
    )
    return changed


@pytest.fixture
def ran(monkeypatch):
    """Names of the jobs that are really run."""
    names = []
    original = Bench.run

    def run(self, job):
        names.append(job.name)
        return original(self, job)

    monkeypatch.setattr(Bench, "run", run)
    return names


def test_every_file_is_there_and_holds_the_numbers(done):
    grid, report = done
    assert report == grid.out / "report.html"
    table = pd.read_csv(grid.out / "table.csv")
    metrics = [metric for names in grid.tasks.values() for metric in names]
    trained = table[table.row.isin(grid.rows)]
    assert len(trained) == 2 * len(metrics)
    assert set(table[table.group == BASELINES].row) >= {"raw_features", "ridge_to_lsa", "mean"}
    values = pd.read_csv(grid.out / "values.csv")
    for line in trained.itertuples():
        mine = values[(values.row == line.row) & (values.metric == line.metric)]
        assert sorted(mine.seed) == [0, 1]
        assert line.mean == pytest.approx(mine.value.mean())
        assert line.n_parameters > 1000
        assert line.train_s > 0
    body = json.loads((grid.out / "results.json").read_text())
    assert body["tasks"]["retrieval"]["models"]["flat"][METRIC]["n"] == 2
    assert len(body["data"]["comparisons"]) == len(table)
    assert body["data"]["n_missing"] == 0
    page = report.read_text()
    assert "data:image/png;base64" in page
    assert all(row in page for row in (*grid.rows, "raw_features"))
    assert list((grid.out / "figures").glob("*.png"))


def test_settings_of_a_task_reach_the_numbers_and_stand_in_the_results(done, tmp_path):
    """Through `hibio eval --set`, and through the section `evaluate` of a grid."""
    grid, _ = done
    jobs = plan(grid)
    stores, given = jobs[0].cell.stores, {"retrieval": {"fractions": [0.3]}}
    for name, settings in (("plain", None), ("set", given)):
        folder = grid.out / "all" / "flat"
        evaluate(folder, stores, tmp_path / name, ["retrieval"], settings=settings)
    plain, ours = (
        json.loads((tmp_path / n / "results.json").read_text()) for n in ("plain", "set")
    )
    assert "settings" not in plain["data"]
    assert ours["data"]["settings"] == given
    metric = "image_to_omics/recall@30%"
    assert metric in ours["tasks"]["retrieval"]["models"]["flat"]
    assert metric not in plain["tasks"]["retrieval"]["models"]["flat"]
    other = dataclasses.replace(grid, evaluate={"retrieval.fractions": [0.3]})
    (job, *_) = plan(other)
    assert is_done(jobs[0], ["retrieval"])
    assert not is_done(job, ["retrieval"])
    checkpoint = load_checkpoint(job.folder / "checkpoint")
    configs = task_configs(job.evaluate, ["retrieval"])
    ruler = Bench(["retrieval"]).ruler(job)
    (result,), _ = measure(ruler, configs, checkpoint, checkpoint.seed)
    assert metric in result.models["flat"]
    with pytest.raises(ConfigError, match=r"did you mean 'retrieval\.fractions'"):
        plan(dataclasses.replace(grid, evaluate={"retrieval.fraction": [0.3]}))


def test_the_numbers_are_those_of_hibio_eval(done, tmp_path):
    """One row alone through `hibio eval`: same model, same slides, same ruler."""
    grid, _ = done
    stores = plan(grid)[0].cell.stores
    evaluate(grid.out / "all" / "flat", stores, tmp_path, ["retrieval", "expression"])
    theirs = json.loads((tmp_path / "results.json").read_text())["tasks"]
    ours = json.loads((grid.out / "results.json").read_text())["tasks"]
    compared = 0
    for task in ours:
        for row in ("flat", "raw_features", "lsa", "mean"):
            for metric, entry in ours[task]["models"].get(row, {}).items():
                other = theirs[task]["models"][row][metric]
                found = dict(zip(entry["keys"], entry["values"], strict=True))
                pairs = [
                    p for p in zip(other["keys"], other["values"], strict=True) if p[0] in found
                ]
                assert pairs, (task, row, metric)
                for key, value in pairs:
                    assert found[key] == pytest.approx(value, abs=1e-6), (task, row, metric)
                compared += len(pairs)
    assert compared > 40
    row = theirs["expression"]["models"]["flat"]
    seeds = {key.split("/")[1] for key in row["pearson_both/top50_hvg"]["keys"]}
    assert seeds == {"0", "1"}  # raw features stand beside the embedding of every seed


def test_what_is_done_is_not_done_again(copy, ran):
    before = {path: path.stat().st_mtime_ns for path in copy.out.rglob(NAME)}
    assert len(before) == 5
    run_grid(copy)
    assert ran == []
    assert {path: path.stat().st_mtime_ns for path in copy.out.rglob(NAME)} == before


def test_a_killed_job_is_done_again_from_its_checkpoint(copy, ran, monkeypatch):
    job = plan(copy)[2]
    scores = read_scores(job)
    (job.folder / NAME).unlink()  # killed between the training and the scores
    assert find_checkpoint(job.folder) is not None
    monkeypatch.setattr(run_module, "train_job", lambda *a, **k: pytest.fail("it was trained"))
    run_grid(copy)
    assert ran == [job.name]
    again = read_scores(job)
    assert again.tasks == scores.tasks
    assert again.facts["train_s"] > 0


def test_a_job_killed_while_training_goes_on(copy, ran):
    job = plan(copy)[0]
    scores = read_scores(job)
    shutil.rmtree(job.folder)
    run_grid(copy, index=1)
    assert ran == [job.name]
    assert read_scores(job).tasks == scores.tasks  # same seed, same numbers


def test_jobs_one_by_one_give_the_same_as_all_together(done, copy, ran):
    shutil.rmtree(copy.out)
    with pytest.raises(ConfigError, match="none of the 5 jobs"):
        run_grid(copy, report_only=True)
    assert run_grid(copy, index=2, parts=2) is None
    assert ran == [job.name for job in plan(copy)][2:]
    partial = pd.read_csv(run_grid(copy, report_only=True).parent / "table.csv")
    assert "flat" not in set(partial.row)
    assert partial.difference.isna().all()
    run_grid(copy)
    names = ["row", "metric", "mean", "std", "n", "difference", "low", "high", "p", "values"]
    tables = [pd.read_csv(g.out / "table.csv")[names] for g in (done[0], copy)]
    pd.testing.assert_frame_equal(*tables)


def test_other_settings_do_not_pass_for_the_old_ones(copy, tmp_path, toy_stores):
    settings = {"seeds": [0, 1], "optim.weight_decay": 0.123}
    other = grid_of(tmp_path, toy_stores, settings=settings, run=str(copy.run))
    with pytest.raises(ConfigError, match=r"other settings \(optim\.weight_decay\) than job 1"):
        run_grid(other)
    fresh = load_grid(write_grid(tmp_path, toy_stores), out=tmp_path / "fresh")
    assert not is_done(plan(fresh)[0], ["retrieval"])


def test_another_task_is_measured_without_training_again(copy, tmp_path, monkeypatch, ran):
    job = plan(copy)[0]
    trained = (job.folder / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(run_module, "train_job", lambda *a, **k: pytest.fail("it was trained"))
    Bench([*copy.tasks, "domains"]).run(job)
    assert set(read_scores(job).tasks) == {*copy.tasks, "domains"}
    assert is_done(job, ["domains"])
    assert (job.folder / "checkpoint" / "model.safetensors").stat().st_mtime_ns == trained
    assert ran == [job.name]


@pytest.mark.parametrize(
    ("settings", "keys", "current"),
    [
        ({}, [], True),
        ({"threads": 1, "bank": True, "data.prefetch": 0}, [], True),
        ({"model.embed_dim": 24}, ["model.embed_dim"], False),
        ({"stages.0.lr": 0.5, "optim.weight_decay": 0.5}, ["optim.weight_decay", "stages"], False),
        ({"genes.tfidf": "raw"}, ["genes.tfidf"], False),
    ],
)
def test_scores_know_which_settings_have_changed(
    copy, tmp_path, toy_stores, settings, keys, current
):
    grid = grid_of(tmp_path, toy_stores, settings={"seeds": [0, 1], **settings}, run=str(copy.run))
    job = plan(grid)[0]
    scores = read_scores(job)
    assert changed_keys(job, scores) == keys
    assert is_current(job, scores) == current


def test_scores_of_an_older_version_lack_keys_and_stay_good(copy):
    job = plan(copy)[0]
    body = json.loads((job.folder / NAME).read_text())
    for section in (body["config"], body["data"]["ruler"]):
        section["genes"]["graph_smoothing"] = 0  # and have some that are gone
    (job.folder / NAME).write_text(json.dumps(body))
    scores = read_scores(job)
    for section in (scores.config["data"], scores.facts["ruler"]["data"]):
        del section["train_patients"]
    del scores.facts["ruler"]["genes"]["graph"]
    del scores.config["optim"]
    assert is_current(job, scores)
    body["config"]["genes"]["graph_spots"] = 50  # then the gene graph is another
    (job.folder / NAME).write_text(json.dumps(body))
    assert changed_keys(job, read_scores(job)) == ["genes.graph_spots"]
    scores.config["gone"] = 1
    assert changed_keys(job, scores) == ["gone"]


def test_another_ruler_measures_again_without_training(
    copy, tmp_path, toy_stores, monkeypatch, ran
):
    """The row stays what it was; the reference has other target genes."""
    rows = {"flat": {}, "pathways": {"stages.0.weights.pathway/kl": 0.25}}
    rows["wide"] = {"genes.min_spots": 10}
    settings = {"seeds": [0]}
    changes = {"rows": rows, "reference": "wide", "settings": settings, "run": str(copy.run)}
    grid = grid_of(tmp_path, toy_stores, **changes)
    job = plan(grid)[0]
    scores = read_scores(job)
    assert changed_keys(job, scores) == []
    assert not is_current(job, scores)
    assert not is_done(job, ["retrieval"])
    monkeypatch.setattr(run_module, "train_job", lambda *a, **k: pytest.fail("it was trained"))
    run_grid(grid, index=job.number)
    assert ran == [job.name]
    assert is_done(job, ["retrieval"])


def test_other_stores_are_told_from_the_old_ones(copy, toy_stores, tmp_path):
    (tmp_path / "stores").mkdir()
    for path in stores_in(toy_stores):
        shutil.copy2(path, tmp_path / "stores")
    (tmp_path / "stores" / "sim002.h5").unlink()
    with pytest.raises(ConfigError, match="holds scores of other stores than job 1"):
        run_grid(copy, tmp_path / "stores")


def test_damaged_scores_are_named(copy):
    job = plan(copy)[0]
    (job.folder / NAME).write_text("{")
    with pytest.raises(ConfigError, match=r"scores\.json: damaged .* remove it"):
        run_grid(copy)


def test_a_metric_that_no_job_has_names_the_nearest(copy, tmp_path, toy_stores):
    tasks = {"retrieval": ["image_to_omics/recal@10%"]}
    settings = {"seeds": [0, 1]}
    wrong = grid_of(tmp_path, toy_stores, tasks=tasks, settings=settings, run=str(copy.run))
    with pytest.raises(ConfigError, match=r"did you mean 'image_to_omics/recall@10%'"):
        run_grid(wrong)


def test_a_row_without_a_value_is_a_mistake(toy_stores, tmp_path):
    """Retrieval of a model that reads no image."""
    stages = [{"name": "omics", "epochs": 1, "weights": {"omics/decorrelation": 1.0}}]
    settings = {"data.image": None, "stages": stages, "model.omics.name": "mlp"}
    rows = {"flat": {}, "wide": {"model.embed_dim": 24}}
    grid = grid_of(tmp_path, toy_stores, settings=settings, rows=rows)
    with pytest.raises(ConfigError, match=r"all/flat/.*no task gave a value"):
        run_grid(grid)


# ------------------------------------------------------------------ simulated cohorts
def test_a_cohort_is_made_once_and_whole_or_not_at_all(tmp_path, monkeypatch):
    config = CohortsConfig({**SMALL, "mpp": 4.0}, patch_px=16)
    (cohort,) = cohorts_of(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cohorts_module, "prepare", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_cohort(cohort)
    assert list((tmp_path / "cohorts").iterdir()) == []
    make_cohort(cohort)
    assert [path.name for path in stores_in(cohort.stores)] == [
        "sim001.h5",
        "sim002.h5",
        "sim003.h5",
    ]
    assert (cohort.stores / "truth.json").is_file()
    monkeypatch.setattr(cohorts_module, "simulate_cohort", lambda *a, **k: pytest.fail("again"))
    make_cohort(cohort)


def test_another_process_that_was_faster_is_no_error(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "a.h5").touch()
    cohorts_module._take_name(tmp_path / "mine", tmp_path / "final")
    assert (tmp_path / "final" / "a.h5").exists()
    with pytest.raises(OSError, match="No such file"):
        cohorts_module._take_name(tmp_path / "mine", tmp_path / "no" / "final")


def test_the_command_runs_a_grid_on_a_simulated_cohort(run, toy_stores, tmp_path):
    cohorts = {"simulate": {**SMALL, "mpp": 4.0}, "sweep": {"signal": [0.8]}, "patch_px": 16}
    terms = {"anchors": {"row": "pathways", "control": "flat"}}
    settings = {"genes.min_spots": 3, "folds": ["patient01"]}
    sweep = {"data.train_patients": [1, 2]}
    path = write_grid(
        tmp_path, toy_stores, cohorts=cohorts, settings=settings, sweep=sweep, terms=terms
    )
    code, told, _ = run("ablate", "--config", path, "--list")
    assert (code, len(told.splitlines())) == (0, 4)
    code, told, error = run("ablate", "--config", path, "--index", "1")
    assert code == 0, error
    assert told.splitlines()[-1].endswith("--report-only")
    code, told, error = run("ablate", "--config", path)
    assert code == 0, error
    assert "[1/4]" not in told
    assert told.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    with (tmp_path / "out" / "gains.csv").open() as stream:
        gains = list(csv.DictReader(stream))
    assert [line["train_patients"] for line in gains] == ["1", "2"]
    assert {line["signal"] for line in gains} == {"0.8"}
    code, _, error = run("ablate", "--config", path, "--data", toy_stores)
    assert code == 1
    assert "--data cannot be used" in error
    assert run("ablate", "--config", path, "--index", "9")[0] == 1
