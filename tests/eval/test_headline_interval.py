"""The interval beside a headline number: what it is drawn over, and when there is none."""

from __future__ import annotations

import numpy as np
import pytest

from eval.measures.intervals import headline_interval
from eval.measures.metrics import bootstrap_ci
from eval.report.report import headline_section
from preprocessing.pages import Section, render


def entry(keys: list[str], values: list) -> dict:
    known = [v for v in values if v is not None]
    return {"keys": keys, "values": values, "mean": float(np.mean(known)), "n": len(known)}


def test_seeds_columns_and_draws_of_a_slide_are_drawn_together() -> None:
    keys = [f"f{s}/{seed}/s{s}:a:draw{d}" for s in range(5) for seed in (0, 1) for d in (0, 1)]
    values = list(np.random.default_rng(0).random(20))
    found = headline_interval({"m": entry(keys, values)}, "m")
    units = [f"s{i // 4}" for i in range(20)]
    assert found is not None
    assert (found.low, found.high) == bootstrap_ci(values, units)
    assert found.over == "5 slides"
    alone = bootstrap_ci(values)
    assert found.high - found.low > alone[1] - alone[0]  # copies of a slide add no certainty


def test_pooled_metrics_go_by_fold_and_undefined_values_are_left_out() -> None:
    keys = [f"f{i}/0/pooled" for i in range(4)]
    found = headline_interval({"m": entry(keys, [0.1, None, 0.3, 0.5])}, "m")
    assert found is not None
    assert found.over == "3 folds"
    assert 0.1 <= found.low < found.high <= 0.5


def test_patients_are_called_patients() -> None:
    one = {
        **entry([f"f/0/p{i}:layer" for i in range(3)], [0.1, 0.2, 0.4]),
        "unit": "per test patient",
    }
    found = headline_interval({"m": one}, "m")
    assert found is not None
    assert found.over == "3 patients"


def test_a_metric_with_ends_of_its_own_keeps_them() -> None:
    metrics = {
        "auroc": entry(["pooled/0/16 patients"], [0.8]),
        "auroc_low": entry(["pooled/0/16 patients"], [0.6]),
        "auroc_high": entry(["pooled/0/16 patients"], [0.95]),
    }
    found = headline_interval(metrics, "auroc")
    assert found is not None
    assert (found.low, found.high, found.over) == (0.6, 0.95, "patients")


@pytest.mark.parametrize("keys", [["f/0/s"], ["f/0/pooled"], ["odd"]])
def test_one_unit_or_odd_keys_have_none(keys: list[str]) -> None:
    assert headline_interval({"m": entry(keys, [0.5])}, "m") is None


def test_the_headline_table_shows_it() -> None:
    keys = [f"f{i}/0/s{i}" for i in range(6)]
    models = {"hibio": {"m": entry(keys, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])}}
    section = headline_section({"tasks": {"t": {"models": models}}}, [("t", "m")])
    page = render("", [Section(section)])
    assert "(6 slides)" in page
    assert "95 % interval" in page
