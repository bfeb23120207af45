"""Results keep every value with its key, and are written as strict JSON in one step."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from eval.errors import FoldError
from eval.results import (
    Measure,
    Metric,
    Question,
    ResultTable,
    Row,
    TaskResult,
    merge,
    to_json,
    write_results,
)

QUESTION = Question("retrieval", "Find the partner.", ("image_to_omics/recall@10%",))
RECALL = Measure("image_to_omics/recall@10%", "share", words=("recall: found",))


def result(fold: str, value: float, chance: float | None = 0.1) -> TaskResult:
    table = ResultTable(QUESTION)
    table.row("hibio", "model", "under test")
    table.add("hibio", RECALL, f"{fold}/0/s1", value, chance)
    table.note("item: spot")
    table.note("item: spot")
    return table.result()


def test_metric_statistics_leave_undefined_values_out():
    metric = Metric([1.0, 2.0, math.nan, 6.0], "r", None, ["a", "b", "c", "d"])
    assert (metric.mean, metric.n) == (3.0, 3)
    assert metric.std == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert math.isnan(Metric([1.0], "r", None, ["a"]).std)
    assert math.isnan(Metric([math.nan], "r", None, ["a"]).mean)
    with pytest.raises(FoldError, match="one key a value"):
        Metric([1.0, 2.0], "r", None, ["a"])


def test_merge_keeps_all_values_and_weighs_chance():
    merged = merge([result("A", 0.2, 0.1), result("B", 0.4, 0.3)])["retrieval"]
    metric = merged.models["hibio"]["image_to_omics/recall@10%"]
    assert metric.values == [0.2, 0.4]
    assert metric.keys == ["A/0/s1", "B/0/s1"]
    assert metric.chance == pytest.approx(0.2)
    assert merged.notes == ["item: spot"]


def test_merge_does_not_depend_on_grouping():
    parts = [result(name, value) for name, value in zip("ABC", (0.1, 0.2, 0.3), strict=True)]
    at_once = merge(parts)
    stepwise = merge([*merge(parts[:2]).values(), parts[2]])
    assert at_once == stepwise
    assert parts[0].models["hibio"]["image_to_omics/recall@10%"].values == [0.1]


def test_models_of_single_folds_and_other_tasks_stay():
    other = ResultTable(Question("domains"))
    other.row("lsa", "baseline")
    other.add("lsa", Measure("omics_ari/kmeans", "ARI"), "A/0/s1", 0.5)
    merged = merge([result("A", 0.2), other.result()])
    assert list(merged) == ["retrieval", "domains"]
    assert merged["domains"].models["lsa"]["omics_ari/kmeans"].chance is None


def test_the_same_unit_twice_or_another_unit_is_refused():
    with pytest.raises(FoldError, match="two values under the key 'A/0/s1'"):
        merge([result("A", 0.2), result("A", 0.3)])
    other = ResultTable(QUESTION)
    other.row("hibio", "model")
    other.add("hibio", Measure("image_to_omics/recall@10%", "percent"), "B/0/s1", 1.0)
    with pytest.raises(FoldError, match="units"):
        merge([result("A", 0.2), other.result()])


def test_a_row_that_nobody_declared_is_refused():
    table = ResultTable(QUESTION)
    table.add("mean", RECALL, "A/0/s1", 0.5)
    with pytest.raises(FoldError, match="nobody says what the row 'mean' is"):
        table.result()
    table.row("mean", "baseline", "predicts the mean")
    assert table.result().rows == {"mean": Row("baseline", "predicts the mean")}


def test_declarations_are_written_beside_the_values():
    rank = Measure("image_to_omics/median_rank_csls", "rank", "low", ("a", "b"), transductive=True)
    table = ResultTable(QUESTION)
    table.row("hibio", "model", "under test")
    table.row("absent", "oracle")
    table.add("hibio", rank, "B/0/s1", 4.0)
    task = to_json({}, {}, [result("A", 0.5), table.result()])["tasks"]["retrieval"]
    assert task["words"] == "Find the partner."
    assert task["short"] == ["image_to_omics/recall@10%"]
    assert task["rows"] == {"hibio": {"role": "model", "words": "under test"}}
    assert task["metrics"] == {
        RECALL.name: {"better": "high", "words": ["recall: found"], "transductive": False},
        rank.name: {"better": "low", "words": ["a", "b"], "transductive": True},
    }


@dataclass(frozen=True)
class Settings:
    """Part of a configuration."""

    where: Path
    rate: float


def test_file_is_strict_json_in_the_fixed_schema(tmp_path):
    path = tmp_path / "new" / "results.json"
    config = {"settings": Settings(Path("a/b"), math.inf), "sizes": np.arange(2)}
    tasks = {"retrieval": merge([result("A", math.nan), result("B", 0.5)])["retrieval"]}
    write_results(path, config, {"n_slides": np.int64(2)}, tasks)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    body = json.loads(path.read_text(), parse_constant=refuse)
    assert body["config"] == {"settings": {"where": "a/b", "rate": None}, "sizes": [0, 1]}
    assert body["data"] == {"n_slides": 2}
    metric = body["tasks"]["retrieval"]["models"]["hibio"]["image_to_omics/recall@10%"]
    assert metric == {
        "mean": 0.5,
        "std": None,
        "n": 1,
        "values": [None, 0.5],
        "unit": "share",
        "keys": ["A/0/s1", "B/0/s1"],
        "chance": pytest.approx(0.1),
    }
    assert (
        "chance"
        not in to_json({}, {}, [result("A", 0.5, None)])["tasks"]["retrieval"]["models"]["hibio"][
            "image_to_omics/recall@10%"
        ]
    )


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(FoldError, match=r"config\.model: object cannot be written"):
        write_results(path, {"model": object()}, {}, {})
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
