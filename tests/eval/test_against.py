"""Comparing runs: pairs, intervals, correction, and what must not be compared."""

from __future__ import annotations

import copy
import json
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from eval import against
from eval.against import AgainstConfig, compare_runs, labels_of, read_results, run
from eval.compare.fingerprint import differences, fold_print
from eval.compare.paired import Results, compare_metric, corrected, declared
from eval.errors import FoldError
from eval.report.figures.lines import difference_plot
from hibio.config.files import ConfigError

METRIC = ("retrieval", "image_to_omics/recall@10%")


def results(label: str, gain: float = 0.0, seed: int = 0, n_folds: int = 6) -> Results:
    """Three slides a fold, two seeds; slides differ far more than runs do."""
    level = np.random.default_rng(0).standard_normal((n_folds, 3)) * 0.2 + 0.5
    noise = np.random.default_rng(seed).standard_normal((n_folds, 3, 2)) * 0.01
    keys, values = [], []
    for fold in range(n_folds):
        for slide in range(3):
            for run_seed in range(2):
                keys.append(f"f{fold}/{run_seed}/s{fold}{slide}")
                values.append(float(level[fold, slide] + noise[fold, slide, run_seed] + gain))
    rank = {"values": [1 - v for v in values], "keys": keys, "unit": "u"}
    models = {"hibio": {METRIC[1]: {"values": values, "keys": keys}, "x/median_rank": rank}}
    slides = {key.rsplit("/", 1)[-1]: "sha" for key in keys}
    folds = {f"f{fold}": fold_print(["s99"], ["A", "B"]) for fold in range(n_folds)}
    data = {"fingerprint": {"slides": slides, "folds": folds}, "folds": list(folds)}
    ways = {METRIC[1]: {"better": "high"}, "x/median_rank": {"better": "low"}}
    task = {"models": models, "metrics": ways, "short": [METRIC[1]]}
    return Results(label, {"config": {}, "data": data, "tasks": {"retrieval": task}})


def changed(body: Results, label: str = "other") -> Results:
    return Results(label, copy.deepcopy(body.body))


def test_a_small_gain_is_found_by_pairing_and_seeds_are_averaged_first() -> None:
    found = compare_metric(results("a", 0.02, 1), results("b", 0.0, 2), METRIC)
    assert found.difference == pytest.approx(0.02, abs=0.01)
    assert 0 < found.low < found.difference < found.high
    assert (found.units, found.unit, found.folds, found.wins) == (18, "slides", 6, 6)
    assert found.p < 0.01
    assert corrected([found])[0].verdict == "better"
    slow = []
    one, two = (
        r.body["tasks"]["retrieval"]["models"]["hibio"][METRIC[1]]["values"]
        for r in (results("a", 0.02, 1), results("b", 0.0, 2))
    )
    for start in range(0, len(one), 2):
        slow.append(sum(one[start : start + 2]) / 2 - sum(two[start : start + 2]) / 2)
    assert found.difference == pytest.approx(sum(slow) / len(slow))


def test_lower_is_better_turns_the_sign_and_order_turns_it_back() -> None:
    first, second = results("a", 0.02, 1), results("b", 0.0, 2)
    rank = ("retrieval", "x/median_rank")
    assert compare_metric(first, second, rank).difference == pytest.approx(0.02, abs=0.01)
    back = compare_metric(second, first, rank)
    assert corrected([back])[0].verdict == "worse"


def test_the_direction_is_taken_from_the_run_that_says_it() -> None:
    first, second = changed(results("a", 0.02, 1)), changed(results("b", 0.0, 2))
    rank = ("retrieval", "x/median_rank")
    del first.body["tasks"]["retrieval"]["metrics"]
    assert compare_metric(first, second, rank).difference == pytest.approx(0.02, abs=0.01)
    del second.body["tasks"]["retrieval"]["metrics"]
    assert compare_metric(first, second, rank).difference == pytest.approx(-0.02, abs=0.01)
    assert declared((first, second), *rank).direction(rank[1]) == "direction not recorded"


def test_noise_alone_is_no_difference_and_two_folds_are_too_few() -> None:
    same = compare_metric(results("a", 0.0, 1), results("b", 0.0, 2), METRIC)
    assert corrected([same])[0].verdict == "no clear difference"
    few = compare_metric(results("a", 0.5, 1, 2), results("b", 0.0, 2, 2), METRIC)
    assert corrected([few])[0].verdict == "2 folds: too few to tell"


def test_a_run_of_a_variant_is_compared_by_its_own_row() -> None:
    other = changed(results("b", 0.0, 2))
    models = other.body["tasks"]["retrieval"]["models"]
    models["flat"] = models["mean"] = models.pop("hibio")
    with pytest.raises(FoldError, match="name one with --model"):
        compare_metric(results("a", 0.02, 1), other, METRIC)
    other.body["data"]["main_model"] = "flat"
    found = compare_metric(results("a", 0.02, 1), other, METRIC)
    assert found.difference == pytest.approx(0.02, abs=0.01)


def test_correction_grows_with_the_number_of_comparisons() -> None:
    one = compare_metric(results("a", 0.02, 1), results("b"), METRIC)
    alone, many = corrected([one]), corrected([one] * 10)
    assert many[0].corrected == pytest.approx(min(1, 10 * alone[0].corrected))


def test_pooled_values_are_paired_by_fold_and_undefined_ones_are_counted() -> None:
    bodies = [
        changed(results(name, gain, seed)) for name, gain, seed in (("a", 0.1, 1), ("b", 0.0, 2))
    ]
    for body in bodies:
        entry = body.body["tasks"]["retrieval"]["models"]["hibio"][METRIC[1]]
        entry["keys"] = [f"f{i}/0/pooled" for i in range(6)]
        entry["values"] = entry["values"][:6]
    bodies[0].body["tasks"]["retrieval"]["models"]["hibio"][METRIC[1]]["values"][2] = None
    found = compare_metric(*bodies, METRIC)
    assert (found.unit, found.units, found.left_out) == ("folds", 5, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["slides"].update(s00="changed"), r"content of 1 slides \(s00\)"),
        (lambda d: d["slides"].pop("s00"), r"slides: 1 only in the first \(s00\)"),
        (lambda d: d["folds"].update(g=fold_print([], ["A"])), "folds: 1 only in the second"),
        (lambda d: d["folds"].update(f0=fold_print(["s98"], ["A", "B"])), "training slides of 1"),
        (lambda d: d["folds"].update(f0=fold_print(["s99"], ["A"])), r"genes of 1 folds \(f0\)"),
    ],
)
def test_other_slides_folds_or_genes_are_refused_by_name(
    change, words: str, tmp_path: Path
) -> None:
    other = changed(results("b"))
    change(other.body["data"]["fingerprint"])
    with pytest.raises(FoldError, match=words):
        compare_runs([results("a"), other], tmp_path)


def test_other_settings_of_a_task_are_refused(tmp_path: Path) -> None:
    other = changed(results("b"))
    other.body["data"]["settings"] = {"retrieval": {"item": "niche"}}
    with pytest.raises(FoldError, match=r"settings of tasks .*niche"):
        compare_runs([results("a"), other], tmp_path)


def test_the_order_of_genes_is_no_difference() -> None:
    first, second = fold_print(["a", "b"], ["G", "H"]), fold_print(["b", "a"], ["H", "G"])
    assert first == second
    assert (
        differences({"slides": {}, "folds": {"f": first}}, {"slides": {}, "folds": {"f": second}})
        == []
    )


def test_other_seeds_and_old_files_are_refused(tmp_path: Path) -> None:
    other = changed(results("b"))
    entry = other.body["tasks"]["retrieval"]["models"]["hibio"][METRIC[1]]
    entry["keys"] = [key.replace("/1/", "/7/") for key in entry["keys"]]
    with pytest.raises(FoldError, match=r"seeds \(1 against 7\)"):
        compare_metric(results("a"), other, METRIC)
    del other.body["data"]["fingerprint"]
    with pytest.raises(FoldError, match="older version"):
        compare_runs([results("a"), other], tmp_path)
    with pytest.raises(FoldError, match=r"no model 'mlp' \(it has: hibio\)"):
        compare_metric(results("a"), results("b"), METRIC, "mlp")
    with pytest.raises(FoldError, match="TASK:METRIC"):
        compare_runs([results("a"), results("b")], tmp_path, AgainstConfig(("recall",)))


def test_the_report_holds_table_figure_and_json(tmp_path: Path) -> None:
    runs = [results("a <x>", 0.02, 1), results("b", 0.0, 2), results("c", 0.05, 3)]
    page = compare_runs(runs, tmp_path).read_text()
    assert page.count("data:image/png") == 1
    assert "a &lt;x&gt;" in page
    body = json.loads((tmp_path / "against.json").read_text())
    assert [one["second"] for one in body["comparisons"]] == ["b", "c"]
    assert [one["verdict"] for one in body["comparisons"]] == ["better", "worse"]
    assert body["comparisons"][0]["corrected"] >= 2 * body["comparisons"][0]["p"] - 1e-12
    assert "| better |" in (tmp_path / "against.md").read_text()


def test_one_unit_has_a_point_and_no_interval(tmp_path: Path) -> None:
    found = compare_metric(results("a", 0.1, 1), results("b"), METRIC)
    bare = [corrected([found])[0]]
    assert difference_plot(bare).png[:4] == b"\x89PNG"
    runs = []
    for label in "ab":
        one = changed(results(label), label)
        entry = one.body["tasks"]["retrieval"]["models"]["hibio"][METRIC[1]]
        entry["keys"], entry["values"] = ["f0/0/pooled"], [0.5]
        runs.append(one)
    compare_runs(runs, tmp_path)
    (only,) = json.loads((tmp_path / "against.json").read_text())["comparisons"]
    assert (only["low"], only["p"], only["corrected"]) == (None, None, None)


def test_runs_that_are_not_measured_yet_are_measured_first(tmp_path: Path, monkeypatch) -> None:
    done, set_to = [], []

    def evaluate(checkpoint: Path, data, out: Path, tasks, peers, settings=None, test=()) -> Path:
        done.append((checkpoint.name, out))
        set_to.append(settings)
        out.mkdir(parents=True, exist_ok=True)
        body = results(checkpoint.name, 0.02 if checkpoint.name == "x" else 0.0).body
        (out / "results.json").write_text(json.dumps(body))
        return out / "report.html"

    monkeypatch.setattr(against, "evaluate", evaluate)
    for name in "xy":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    finished = tmp_path / "finished"
    evaluate(finished, Path(), finished, None, None)
    done.clear()
    options = Namespace(
        checkpoint=tmp_path / "x",
        against=[finished, tmp_path / "y"],
        data=tmp_path,
        tasks=None,
        test=None,
        out=tmp_path / "out",
        metrics=None,
        model=None,
        peers="none",
        readout="plain",
        set=[],
    )
    assert "against.html" in run(options)
    assert done == [("x", tmp_path / "out"), ("y", tmp_path / "out" / "y")]
    done.clear()
    with pytest.raises(ConfigError, match="no checkpoint there"):
        run(Namespace(**{**vars(options), "against": [tmp_path / "none"]}))
    assert done == []
    with pytest.raises(ConfigError, match="would take the place of"):
        run(Namespace(**{**vars(options), "out": finished}))
    both = {**vars(options), "checkpoint": None, "against": [finished, tmp_path / "out"]}
    with pytest.raises(
        ConfigError, match="--tasks, --test, --peers, --readout and --set say what is measured"
    ):
        run(Namespace(**{**both, "peers": "all"}))
    assert done == []
    full = {**vars(options), "readout": "full"}
    with pytest.raises(ConfigError, match="--readout full is of retrieval and expression"):
        run(Namespace(**{**full, "tasks": ["domains"]}))
    run(Namespace(**{**full, "tasks": ["retrieval"]}))
    assert set_to[-1] == {"retrieval": {"readout": "full"}}
    options.data = None
    with pytest.raises(ConfigError, match="--data DIR"):
        run(options)
    options.checkpoint = None
    options.against = [finished]
    with pytest.raises(ConfigError, match="needs two runs"):
        run(options)
    options.against = None
    with pytest.raises(ConfigError, match="give --checkpoint"):
        run(options)


def test_labels_are_the_shortest_ends_that_differ(tmp_path: Path) -> None:
    paths = [Path("/a/x/eval"), Path("/b/y/eval/results.json")]
    assert labels_of(paths) == ["x/eval", "y/eval"]
    assert labels_of([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    with pytest.raises(ConfigError, match="given twice"):
        labels_of([Path("/a/x"), Path("/a/x/results.json")])
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(FoldError, match="no tasks"):
        read_results(tmp_path / "results.json", "a")
    assert math.isnan(compare_metric(results("a"), results("b"), METRIC).corrected)
