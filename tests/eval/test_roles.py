"""What a row is, is declared: by the settings of a run and by the task that makes the row."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from eval.embed import Checkpoint, is_control
from eval.folds.fold import Fold
from eval.results import Row
from eval.tasks import TASKS
from hibio.config.files import changed, to_dict
from hibio.config.run import RunConfig
from hibio.config.schema import build_section
from tests.hibio.toy import run_config


def settings_of(**changes: Any) -> RunConfig:
    return build_section(RunConfig, changed(to_dict(run_config(Path(), Path())), changes, "test"))


def checkpoint(variant: str, run: RunConfig) -> Checkpoint:
    nothing: Any = None
    return Checkpoint(Path(), nothing, dataclasses.replace(run, variant=variant))


@pytest.mark.parametrize(
    ("settings", "control"),
    [
        ({"data": {"shuffle_pairs": True}}, True),
        ({"data": {"shuffle_pairs": False}}, False),
        ({"pathways": {"source": "matched_random:default"}}, True),
        ({"pathways": {"source": "none"}}, False),
        ({"genes": {"graph": "random"}}, True),
        ({"genes": {"selector": "random"}}, True),
        ({"genes": {"graph": "knn", "selector": "tfidf"}}, False),
        ({"regions": {"kind": "shuffled"}}, True),
        ({"regions": {"kind": "tree"}}, False),
        ({}, False),
    ],
)
def test_a_control_is_one_by_its_settings(settings: dict[str, Any], control: bool) -> None:
    run = settings_of(**settings)
    assert is_control(run) is control
    role = "control" if control else "baseline"
    assert checkpoint("random_crop", run).role == role
    assert checkpoint("shuffled", run).role == role
    assert checkpoint("hibio_big", run).role == role
    assert checkpoint("hibio", run).role == "model"


def test_tasks_declare_the_rows_that_they_make(toy_fold: Fold) -> None:
    expected = {
        "expression": {"mean": "baseline", "neighbour_oracle": "oracle"},
        "retrieval": {"ridge_to_lsa": "baseline", "raw_features": "baseline"},
        "pathway_query": {"measured_oracle": "oracle", "matched_random": "control"},
    }
    for name, roles in expected.items():
        task = TASKS[name]
        result = task.run(toy_fold, task.config())
        assert set(result.rows) == set(result.models)
        assert {row: result.rows[row].role for row in roles} == roles
        assert result.rows["coordinates"] == Row(
            "baseline", "positions only, standardised per slide"
        )
        names = {metric for metrics in result.models.values() for metric in metrics}
        assert set(result.measures) == names
        assert result.question is not None
        assert result.question.short[0] in result.models["hibio"]


def test_directions_and_transductive_metrics_are_declared(toy_fold: Fold) -> None:
    task = TASKS["retrieval"]
    found = task.run(toy_fold, task.config()).measures
    low = {name.split("/")[-1] for name, one in found.items() if one.better == "low"}
    assert {"median_rank", "pooled_median_rank", "patient_balanced_accuracy"} <= low
    assert all("rank" in name or "balanced" in name for name in low)
    whole = {name for name, one in found.items() if one.transductive}
    assert whole == {name for name in found if name.endswith(("_csls", "_sinkhorn"))}
