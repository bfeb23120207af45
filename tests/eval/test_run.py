"""Pooled tasks see all folds of a seed at once; tasks that could not run say so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from eval.folds.fold import Fold
from eval.results import Metric, Task, TaskResult, merge
from eval.run import TASKS, Finished, _pooled_results, _seed_mean_results, _with_models
from eval.tasks.expression import ExpressionConfig


def fold(name: str, seed: int) -> Fold:
    return Fold(name, seed, np.array(["G"]), (), ())


def test_a_pooled_task_runs_once_a_seed_on_its_folds(tmp_path) -> None:
    seen: list[list[tuple[str, int]]] = []

    def run(folds: list[Fold], config: int) -> TaskResult:
        assert config == 0
        seen.append([(one.name, one.seed) for one in folds])
        return TaskResult("t", {})

    folds = [fold(name, seed) for name in ("A", "B") for seed in (0, 1)]
    task = Task(int, run, pooled=True)
    for _ in range(2):  # the second time it is there
        results = _pooled_results("t", task, 0, folds, Finished(tmp_path))
        assert seen == [[("A", 0), ("B", 0)], [("A", 1), ("B", 1)]]
        assert len(results) == 2


def test_notes_of_a_task_without_models_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    metric = Metric([1.0], "u", None, ["f/0/s"])
    results = {
        "ran": TaskResult("ran", {"m": {"x": metric}}, ["kept in the report"]),
        "not": TaskResult("not", {}, ["no outcome; not run"]),
    }
    assert list(_with_models(results)) == ["ran"]
    assert capsys.readouterr().out == "not: no outcome; not run\n"


def test_in_full_the_seeds_as_one_are_a_row_beside_every_seed(toy_fold: Fold, tmp_path) -> None:
    config = ExpressionConfig(n_genes=(4,), readout="full", bleep_k=5)
    folds = [dataclasses.replace(toy_fold, seed=seed) for seed in (0, 1)]
    kept = Finished(tmp_path)
    task = TASKS["expression"]
    each = [kept.run("expression", task, config, [one], one.name + str(one.seed)) for one in folds]
    together = _seed_mean_results({"expression": config}, folds, kept)
    found = merge([*each, *together])["expression"].models
    assert len(found["mean"]["pearson/top4_hvg"].values) == 2 * len(toy_fold.test)
    wanted = found["hibio"]["pearson/top4_hvg"].values[: len(toy_fold.test)]  # twice the same seed
    own = found["hibio_seed_mean"]["pearson/top4_hvg"].values
    np.testing.assert_allclose(own, wanted, atol=0.02)
