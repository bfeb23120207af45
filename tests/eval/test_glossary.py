"""Words and numbers of the report: directions, kinds of models, formats, tables that fit a page."""

import numpy as np
import pytest

from eval.report.facts import config_digest, duration
from eval.report.glossary import (
    describe_metrics,
    describe_model,
    describe_task,
    kind_of,
    lower_is_better,
)
from eval.report.page import number, tag, text
from eval.report.tasks import panels


def test_descriptions_are_honest_about_unknown_names() -> None:
    assert "ridge" in describe_task("expression")
    assert "No description" in describe_task("new_task")
    assert describe_model("lab.module:Thing") == ""
    found = describe_metrics(["image_to_omics/recall@10%", "omics_ari/gmm_smooth", "x/unknown"])
    assert [line.split(":")[0] for line in found] == ["recall@k", "ari", "smooth"]
    found = describe_metrics(["pearson_median/hidden_genes", "omics_ami/gmm"])
    assert [line.split(":")[0] for line in found] == ["pearson", "hidden_genes", "median", "ami"]
    found = describe_metrics(["omics_ari/kmeans_graph", "omics_ari/gmm_graph_smooth"])
    assert [line.split(":")[0] for line in found] == ["ari", "smooth", "graph"]
    found = describe_metrics(["omics/random_graph"])
    assert [line.split(":")[0] for line in found] == ["random_graph"]
    assert "other spatial blocks" in describe_task("imputation")
    assert "no read-out is fitted" in describe_model("hibio_decoder")
    assert describe_model("gene_mean") == "predicts the training mean"
    assert "nearest training cells" in describe_model("knn")


def test_many_metrics_are_split_into_tables_without_loss() -> None:
    scores = ("recall@1", "recall@1%", "median_rank", "mrr")
    names = [f"image_to_omics/{s}{v}" for v in ("", "_csls") for s in scores]
    names += [f"image_to_omics/pooled_{s}" for s in scores]
    names += [f"pearson{v}/top50_hvg" for v in ("", "_a", "_b")]
    found = panels(names)
    assert [len(panel) for panel in found] == [4, 4, 4, 3]
    assert [name for panel in found for name in panel] == names
    many = [f"x/{i}" for i in range(30)]
    assert [len(panel) for panel in panels(many)] == [12, 12, 6]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.51249, "0.512"),
        (12.345, "12.35"),
        (1234.5, "1,234"),
        (-0.00001, "-1.0e-05"),
        (0, "0"),
        (np.float32(0.25), "0.250"),
        (np.int64(12345), "12,345"),
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "–"),
        (True, "–"),
        ("0.3", "–"),
    ],
)
def test_numbers(value: object, shown: str) -> None:
    assert number(value) == shown
    assert number(-0.0001, 2) == "0.00"


@pytest.mark.parametrize(
    ("metric_name", "task", "lower"),
    [
        ("image_to_omics/median_rank", "retrieval", True),
        ("slide/balanced_accuracy", "identity", True),
        ("patient_identity", "annotation", True),
        ("rmse/all", "expression", True),
        ("pearson/top50_hvg", "expression", False),
        ("rmse/hidden_genes", "imputation", True),
        ("closest/recall", "retrieval", False),
    ],
)
def test_direction(metric_name: str, task: str, lower: bool) -> None:
    assert lower_is_better(metric_name, task) is lower


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("hibio", "this checkpoint"),
        ("hibio_average", "variant"),
        ("hibio_decoder", "variant"),
        ("lsa_decoder", "baseline"),
        ("hibio+sinkhorn", "transductive"),
        ("ridge_shuffled_pairs", "control"),
        ("random_forest", "baseline"),
        ("neighbour_oracle", "oracle"),
        ("whatever", "baseline"),
    ],
)
def test_kinds(model: str, kind: str) -> None:
    assert kind_of(model).name == kind


def test_facts_and_markup() -> None:
    assert duration(12.34) == "12.3 s"
    assert duration(125) == "2 min 5 s"
    assert config_digest({"a": 1, "b": 2}) == config_digest({"b": 2, "a": 1})
    assert config_digest({"a": 1}) != config_digest({"a": 2})
    assert tag("a", text("<&>"), href='"', hidden=True, id=None) == (
        '<a href="&quot;" hidden>&lt;&amp;&gt;</a>'
    )
