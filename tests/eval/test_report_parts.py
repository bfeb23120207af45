"""Words and numbers of the report: what is declared, formats, tables that fit a page."""

import numpy as np
import pytest

from eval.report.markdown import number
from eval.report.report import config_digest, duration, panels
from eval.results import TaskRecord


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


def test_an_old_file_ranks_nothing_and_says_so() -> None:
    models = {"hibio": {"x/rank": {"mean": 1.0}}, "random_thing": {"x/rank": {"mean": 2.0}}}
    old = TaskRecord("t", {"models": models, "notes": []})
    assert (old.main, old.role("random_thing")) == ("hibio", "not recorded")
    assert (old.better("x/rank"), old.direction("x/rank")) == ("none", "direction not recorded")
    assert (old.headline, old.words("hibio"), old.meanings("x/rank")) == ("x/rank", "", [])
    new = TaskRecord(
        "t",
        {
            "models": models,
            "short": ["absent", "x/rank"],
            "metrics": {"x/rank": {"better": "low", "words": ["rank: place"]}},
            "rows": {"hibio": {"role": "baseline"}, "random_thing": {"role": "model"}},
        },
    )
    assert (new.main, new.sign("x/rank"), new.headline) == ("random_thing", -1.0, "x/rank")
    assert new.meanings("x/rank") == ["rank: place"]


def test_facts() -> None:
    assert duration(12.34) == "12.3 s"
    assert duration(125) == "2 min 5 s"
    assert config_digest({"a": 1, "b": 2}) == config_digest({"b": 2, "a": 1})
    assert config_digest({"a": 1}) != config_digest({"a": 2})
