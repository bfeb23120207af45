"""The table of an ablation against slow loops, its figures, and every file it is written to."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from eval.ablation.config import BASELINES, GridConfig, TermConfig
from eval.ablation.report import as_markdown, figures, numeric_axis
from eval.ablation.table import (
    COST_COLUMNS,
    DECLARED,
    VALUE_COLUMNS,
    Tables,
    gains_by_seed,
    paired_units,
    summarise,
    term_table,
)
from eval.measures.intervals import holm, paired_bootstrap, sign_flip_p

TASK, METRIC, LOWER = "retrieval", "image_to_omics/recall@10%", "image_to_omics/median_rank"
POINTS = {f"n={n},signal={s}": {"n": n, "signal": s} for n in (2, 4) for s in (0.2, 0.8)}
SEEDS, PLACES = (0, 1), [("A", "s1"), ("A", "s2"), ("B", "s3")]


def grid(**changes) -> GridConfig:
    settings = {
        "run": Path("run.yaml"),
        "out": Path("out"),
        "rows": {"flat": {}, "term": {"a": 1}, "control": {"a": 2}},
        "reference": "flat",
        "tasks": {TASK: (METRIC, LOWER)},
        "groups": {"terms": ("term", "control")},
        "terms": {"the term": TermConfig("term", "control")},
        "draws": 400,
    }
    return GridConfig(**{**settings, **changes})


def values(seed: int = 0) -> pd.DataFrame:
    """Every row, seed and slide of every cell; baselines under the first seed alone."""
    rng = np.random.default_rng(seed)
    lines = []
    for cell, metric in itertools.product(POINTS, (METRIC, LOWER)):
        for row in ("flat", "term", "control", "lsa"):
            for one in SEEDS if row != "lsa" else SEEDS[:1]:
                for fold, unit in PLACES:
                    where = (cell, row, TASK, metric, fold, one, unit)
                    better = "low" if metric == LOWER else "high"
                    lines.append((*where, rng.random(), 0.1, "share", better, "baseline"))
    return pd.DataFrame(lines, columns=VALUE_COLUMNS + DECLARED)


def costs() -> pd.DataFrame:
    lines = [
        (cell, row, seed, fold, 1000 + seed, 50 + seed, 2.0 + seed, 1.0)
        for cell in POINTS
        for row in ("flat", "term", "control")
        for seed in SEEDS
        for fold in ("A", "B")
    ]
    return pd.DataFrame(lines, columns=COST_COLUMNS)


def slow_gain(frame: pd.DataFrame, cell: str, metric: str, row: str) -> list[float]:
    """One difference a slide, by loops."""
    at = {
        (line.row, line.fold, line.seed, line.unit): line.value
        for line in frame.itertuples()
        if line.cell == cell and line.metric == metric and math.isfinite(line.value)
    }
    gains = []
    for fold, unit in PLACES:
        pairs = [
            at[row, fold, seed, unit] - at["flat", fold, seed, unit]
            for seed in SEEDS
            if (row, fold, seed, unit) in at and ("flat", fold, seed, unit) in at
        ]
        if row == "lsa":
            reference = np.mean([at["flat", fold, seed, unit] for seed in SEEDS])
            pairs = [at["lsa", fold, 0, unit] - reference]
        if pairs:
            gains.append(float(np.mean(pairs)))
    return gains


@pytest.mark.parametrize("holes", [False, True])
def test_every_number_of_the_table_against_loops(holes):
    frame = values()
    if holes:  # an undefined value, and a seed that is not done
        frame.loc[(frame.row == "term") & (frame.unit == "s2") & (frame.seed == 1), "value"] = (
            np.nan
        )
        frame = frame[~((frame.row == "control") & (frame.seed == 1) & (frame.fold == "B"))]
    table = summarise(grid(), frame, costs(), POINTS)
    assert len(table) == len(POINTS) * 2 * 4
    for line in table.itertuples():
        own = frame[(frame.cell == line.cell) & (frame.metric == line.metric)]
        numbers = own[(own.row == line.row) & own.value.notna()]
        assert line.mean == pytest.approx(sum(numbers.value) / len(numbers))
        assert line.std == pytest.approx(np.std(numbers.value, ddof=1))
        assert line.n == len(numbers)
        assert [float(v) for v in line.values.split()] == pytest.approx(
            list(numbers.value), abs=1e-4
        )
        by_seed = [numbers[numbers.seed == s].value.mean() for s in sorted(set(numbers.seed))]
        if len(by_seed) > 1:
            assert line.std_seeds == pytest.approx(np.std(by_seed, ddof=1))
        if line.row == "flat":
            assert math.isnan(line.difference)
            continue
        gain = slow_gain(frame, line.cell, line.metric, line.row)
        assert line.difference == pytest.approx(np.mean(gain))
        assert line.units == len(gain)
        sign = -1 if line.metric == LOWER else 1
        assert line.better == sum(sign * g > 0 for g in gain)
        assert line.low <= line.difference <= line.high


def test_the_interval_is_that_of_all_draws_of_the_slides():
    """27 draws of three slides, each equally likely: the percentile interval in closed form."""
    gain = np.array([0.1, 0.2, 0.6])
    means = sorted(np.mean(draw) for draw in itertools.product(gain, repeat=3))
    found = paired_bootstrap(gain, np.zeros(3), draws=40_000, level=0.8)
    exact = np.quantile(means, [0.1, 0.9])
    assert (found.low, found.high) == pytest.approx(tuple(exact), abs=0.035)
    assert found.p == sign_flip_p(gain) == 2 / 8


def test_p_values_are_corrected_within_a_cell_and_metric():
    table = summarise(grid(), values(), costs(), POINTS)
    for _, block in table.groupby(["cell", "metric"]):
        tested = block[block.row != "flat"]
        assert tested.p_holm.tolist() == pytest.approx(holm(tested.p.tolist()))


def test_groups_costs_and_the_order_of_rows():
    table = summarise(grid(), values(), costs(), POINTS)
    block = table[(table.cell == "n=2,signal=0.2") & (table.metric == METRIC)]
    assert block.row.tolist() == ["term", "control", "flat", "lsa"]
    assert block.group.tolist() == ["terms", "terms", "", BASELINES]
    assert block.n_parameters.tolist()[:3] == [1000.5] * 3
    assert block.train_s.tolist()[:3] == [2.5] * 3
    assert block.steps.tolist()[:3] == [50.5] * 3
    assert math.isnan(block.n_parameters.tolist()[3])


def test_the_same_values_give_no_difference_and_shifted_ones_the_shift():
    frame = values()
    flat = frame[frame.row == "flat"]
    for row, shift in (("term", 0.0), ("control", 0.25)):
        moved = flat.assign(row=row, value=flat.value + shift)
        frame = pd.concat([frame[frame.row != row], moved])
    table = summarise(grid(), frame, costs(), POINTS).set_index("row")
    for row, shift in (("term", 0.0), ("control", 0.25)):
        for name in ("difference", "low", "high"):
            assert table.loc[row, name].to_numpy() == pytest.approx([shift] * 8)
    assert set(table.loc["control", "p"]) == {0.25}


def test_without_the_reference_there_is_no_difference():
    frame = values()
    table = summarise(grid(), frame[frame.row != "flat"], costs(), POINTS)
    assert table.difference.isna().all()
    assert table.better.isna().all()
    assert len(table) == len(POINTS) * 2 * 3


def test_pairs_need_the_same_slide_and_seed():
    frame = values()
    one = frame[(frame.cell == "n=2,signal=0.2") & (frame.metric == METRIC)]
    term, flat = one[one.row == "term"], one[one.row == "flat"]
    assert len(paired_units(term, flat[flat.unit != "s1"], by_seed=True)) == 2
    assert len(paired_units(term[term.seed == 0], flat[flat.seed == 1], by_seed=True)) == 0
    assert len(paired_units(term[term.seed == 0], flat[flat.seed == 1], by_seed=False)) == 3


@pytest.mark.parametrize("by_seed", [True, False])
def test_columns_blocks_and_draws_of_a_slide_are_one_unit(by_seed):
    frame = values()
    one = frame[(frame.cell == "n=2,signal=0.2") & (frame.metric == METRIC)]
    drawn = pd.concat(
        [
            one.assign(unit=one.unit + f":layer:draw{draw}", value=one.value + draw)
            for draw in (0, 1)
        ]
    )
    pairs = [
        paired_units(part[part.row == "term"], part[part.row == "flat"], by_seed=by_seed)
        for part in (one, drawn)
    ]
    np.testing.assert_allclose(pairs[1], pairs[0])


# ------------------------------------------------------------------ the map
def test_gains_of_terms_against_loops():
    frame = values()
    found = term_table(grid(), frame, POINTS)
    assert len(found) == 2 * len(POINTS)
    for line in found.itertuples():
        sign = -1 if line.metric == LOWER else 1
        term, control = (
            sign * np.mean(slow_gain(frame, line.cell, line.metric, row))
            for row in ("term", "control")
        )
        assert (line.gain, line.control) == pytest.approx((term, control))
        assert line.over == pytest.approx(term - control)
        assert line.over_low <= line.over <= line.over_high
        assert (line.n, line.signal) == tuple(POINTS[line.cell].values())


def test_gains_by_seed_against_loops():
    frame = values()
    only = frame[frame.metric == LOWER]
    found = gains_by_seed(grid(), only, "term", -1.0)
    assert len(found) == len(POINTS) * len(SEEDS)
    for line in found.itertuples():
        mine = only[(only.cell == line.cell) & (only.seed == line.seed)]
        at = {(v.row, v.fold, v.unit): v.value for v in mine.itertuples()}
        gain = [at["flat", *place] - at["term", *place] for place in PLACES]
        assert line.gain == pytest.approx(np.mean(gain))


# ------------------------------------------------------------------ what is shown
def tables(frame: pd.DataFrame, points=POINTS, **changes) -> Tables:
    return Tables(frame, costs(), summarise(grid(**changes), frame, costs(), points), ("a/b",))


@pytest.mark.parametrize(
    ("points", "axis"),
    [
        (POINTS, "n"),
        ({"all": {}}, None),
        ({"a": {"kind": "tree"}, "b": {"kind": "grid"}}, None),
        ({"a": {"on": True}, "b": {"on": False}}, None),
        ({"a": {"n": 2}}, None),
        ({"a": {"kind": "x", "w": 1}, "b": {"kind": "y", "w": 2.5}}, "w"),
    ],
)
def test_curves_are_drawn_over_numbers_that_vary(points, axis):
    assert numeric_axis(points) == axis


def test_figures_of_a_sweep_and_of_a_map():
    plain = figures(grid(terms={}), tables(values(), terms={}), POINTS)
    assert [f.title for f in plain[:2]] == [f"{TASK}: {METRIC}", f"{METRIC} over n"]
    mapped = figures(grid(), tables(values()), POINTS)
    assert [f.title for f in mapped[:2]] == [f"{TASK}: {METRIC}", f"Where each term pays: {METRIC}"]
    single = {"n=2,signal=0.2": {}}
    one = values()
    one = one[one.cell == "n=2,signal=0.2"]
    assert len(figures(grid(), tables(one, single), single)) == 2
    for figure in (*plain, *mapped):
        assert figure.png.startswith(b"\x89PNG")
    assert plain[0].png != figures(grid(terms={}), tables(values(5), terms={}), POINTS)[0].png


def test_markdown_has_every_value_and_says_what_is_missing():
    gains = term_table(grid(), values(), POINTS)
    text = as_markdown(grid(), tables(values()), gains)
    assert "# Terms" not in as_markdown(grid(), tables(values()), gains.iloc[:0])
    for line in gains.itertuples():
        assert f"| the term | {line.gain:+.4f} |" in text
        assert f"| {line.control:+.4f} | {line.over:+.4f} |" in text
    assert "1 jobs are not done: a/b" in text
    assert text.count("\n## ") == 4 * len(POINTS)
    for value in values().value:
        assert f"{value:.4f}" in text
    assert "lower is better" in text
    assert json.dumps(text)  # plain text
