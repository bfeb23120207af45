"""The report holds every model and value, escapes what comes from outside, and claims no more."""

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.compare.paired import compare
from eval.report import write_report
from eval.report.figures.canvas import Figure
from eval.report.markdown import exact
from eval.report.report import headline_section
from eval.results import headlines
from preprocessing import pages

VOID = {"img", "meta", "br"}
PNG = b"\x89PNG\r\n\x1a\n" + b"rest of the picture"


class Page(HTMLParser):
    """Checks nesting; collects tags with attributes, the rows of cells, and all text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.bold: list[str] = []
        self.words = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words += data
        if self.rows and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data
        if "b" in self.open and "td" in self.open:
            self.bold.append(data)

    def row(self, start: str, cells: int) -> list[str]:
        """The row with this first cell and this number of cells."""
        return next(r for r in self.rows if r and r[0] == start and len(r) == cells)


KEYS = [f"P{fold}/{seed}/slide{fold}" for fold in "ABC" for seed in (0, 1)]


def metric(
    values: list[float | None], keys: list[str] | None = None, **more: Any
) -> dict[str, Any]:
    good = [v for v in values if v is not None and math.isfinite(v)]
    return {
        "mean": float(np.mean(good)) if good else None,
        "std": float(np.std(good, ddof=1)) if len(good) > 1 else None,
        "n": len(good),
        "values": values,
        "keys": KEYS[: len(values)] if keys is None else keys,
        "unit": "share per slide",
        **more,
    }


def spread(mean: float) -> list[float | None]:
    return [round(mean + 0.0011 * i, 5) for i in range(6)]


def sample() -> dict[str, Any]:
    recall, rank = "image_to_omics/recall@10%", "image_to_omics/median_rank"
    models = {
        "neighbour_oracle": {recall: metric(spread(0.9), chance=0.1)},
        "hibio": {
            recall: metric(spread(0.5), chance=0.1),
            rank: metric([41.5, 40.25, 44.125, 43.0, 42.0, 41.0]),
        },
        "bleep_retrieval": {
            recall: metric(spread(0.3), chance=0.1),
            rank: metric([90.5, 91.0, 92.0, 93.0, 94.0, 95.0]),
        },
        "hibio_average": {recall: metric(spread(0.4), chance=0.1)},
        "pca": {},
    }
    outcome = {"hibio": {"auroc": metric([float("nan"), None], keys=["A0", "B0"])}}
    return {
        "config": {"seed": 3, "model": {"dim": 192}},
        "data": {"command": ["hibio", "eval", "--out", "x"], "wall_time_s": 3725, "n_slides": 6},
        "tasks": {
            "retrieval": {
                "models": models,
                "notes": ["Pools are fixed."],
                "short": [recall],
                "metrics": {
                    recall: {"better": "high", "words": ["recall@k: share"], "transductive": True},
                    rank: {"better": "low", "words": ["median_rank: place"]},
                },
                "rows": {
                    "neighbour_oracle": {"role": "oracle", "words": "sees the neighbours"},
                    "hibio": {"role": "model", "words": ""},
                    "bleep_retrieval": {"role": "baseline", "words": "nearest spots"},
                    "hibio_average": {"role": "variant", "words": ""},
                    "pca": {"role": "baseline", "words": ""},
                },
            },
            "outcome": {"models": outcome, "notes": [], "metrics": {"auroc": {"better": "high"}}},
            "empty": {"models": {}, "notes": []},
        },
    }


def render(tmp_path: Path, results: dict[str, Any], **more: Any) -> tuple[Page, str]:
    path = write_report(tmp_path / "report.html", results, **more)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    source = path.read_text(encoding="utf-8")
    return Page(source), source


def test_every_model_and_value_is_shown(tmp_path: Path) -> None:
    results = sample()
    page, _ = render(tmp_path, results)
    cells = {cell for row in page.rows for cell in row}
    for task in results["tasks"].values():
        for model, metrics in task["models"].items():
            assert model in cells
            for entry in metrics.values():
                assert {exact(value) for value in entry["values"]} <= cells
                assert set(entry["keys"]) <= cells
    assert "Pools are fixed." in page.words
    assert "hibio eval --out x" in cells
    assert "1 h 2 min" in cells
    assert '"dim": 192' in page.words
    assert "not recorded" in cells


def test_best_is_bold_by_direction_and_oracles_do_not_compete(tmp_path: Path) -> None:
    page, _ = render(tmp_path, sample())
    hibio = page.row("hibio", 4)
    assert hibio == ["hibio", "model", "0.503 ± 0.002", "41.98 ± 1.40"]
    assert page.bold == hibio[2:]
    assert "recall@k: share" in page.words
    assert "bleep_retrieval: nearest spots" in page.words
    assert "n = 6 values each" in page.words
    assert page.row("neighbour_oracle", 4)[1] == "oracle"
    assert page.row("hibio_average", 4)[1] == "variant"
    assert "†: transductive" in page.words
    assert page.row("pca", 4)[2:] == ["–", "–"]
    assert page.row("chance", 4)[2:] == ["0.100", "–"]
    assert "median_rank ↓" in {cell for row in page.rows for cell in row}


def test_missing_values_are_dashes(tmp_path: Path) -> None:
    page, _ = render(tmp_path, sample())
    assert page.row("hibio", 3)[2].startswith("–")
    assert re.search(r"\b(nan|inf|None)\b", page.words) is None
    assert page.row("A0", 2) == ["A0", "–"]


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    entry = {evil: metric([0.5], keys=[evil], unit=evil, chance=0.1)}
    declared = {
        "words": evil,
        "short": [evil],
        "metrics": {evil: {"better": "high", "words": [evil]}},
        "rows": {evil: {"role": "control", "words": evil}, "hibio": {"role": "model", "words": ""}},
    }
    results = {
        "config": {evil: evil},
        "data": {"command": evil, "versions": {evil: evil}},
        "tasks": {evil: {"models": {evil: entry, "hibio": entry}, "notes": [evil], **declared}},
    }
    figures = [Figure(evil, evil, PNG)]
    page, source = render(tmp_path, results, figures=figures, title=evil)
    assert "<script" not in source.lower()
    assert not [name for name, _ in page.tags if name == "script"]
    assert page.words.count("alert(") >= 12
    alt = next(attributes["alt"] for name, attributes in page.tags if name == "img")
    assert alt == evil


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page, source = render(tmp_path, sample(), figures=[Figure("A", "what it shows", PNG)] * 2)
    pictures = [attributes for name, attributes in page.tags if name == "img"]
    assert len(pictures) == 2
    for picture in pictures:
        head, data = str(picture["src"]).split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == PNG
    assert "http" not in source
    assert "url(" not in source
    assert {name for name, _ in page.tags}.isdisjoint({"script", "link", "iframe"})
    anchors = {a.get("id") for _, a in page.tags}
    links = {str(a["href"])[1:] for name, a in page.tags if name == "a"}
    assert links
    assert links <= anchors
    assert page.words.count("what it shows") == 2


@pytest.mark.parametrize("results", [{}, {"config": {}, "data": {}, "tasks": {}}])
def test_an_empty_run_still_makes_a_page(tmp_path: Path, results: dict[str, Any]) -> None:
    page, _ = render(tmp_path, results)
    assert "This run has no figures." in page.words
    assert "No config was recorded" in page.words


def test_an_old_report_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    page, source = render(tmp_path, sample(), title="New one")
    assert source != "old"
    assert "New one" in page.words


def test_headline_names_best_baseline_difference_and_verdict(tmp_path: Path) -> None:
    rows = [
        ("retrieval", "image_to_omics/recall@10%"),
        ("retrieval", "image_to_omics/median_rank"),
        ("nowhere", "none"),
        ("outcome", "auroc"),
    ]
    page = Page(pages.render("", [pages.Section(headline_section(sample(), rows))]))
    found = {row[0]: row[1:] for row in page.rows if len(row) == 8}
    recall = next(cells for name, cells in found.items() if name.endswith("recall@10%"))
    assert recall[0].endswith("slides)")
    assert recall[1] == "bleep_retrieval"
    assert recall[3] == "+0.200 ± 0.000"
    assert recall[4:] == ["3 of 3 folds", "0.100", "better"]
    rank = next(cells for name, cells in found.items() if "median_rank" in name)
    assert rank[3].startswith("+50.")
    nothing = next(cells for name, cells in found.items() if name.startswith("nowhere"))
    assert nothing == ["–"] * 6 + ["not measured"]


def test_comparison_is_paired_and_its_error_is_over_folds() -> None:
    mine = metric([0.5, 0.7, 0.4, 0.6, 0.9, 0.9])
    other = metric([0.4, 0.4, 0.4, 0.4, 0.5, 0.5])
    outcome = compare(mine, other)
    assert outcome is not None
    folds = np.array([0.2, 0.1, 0.4])
    assert outcome.mean == pytest.approx(folds.mean())
    assert outcome.error == pytest.approx(folds.std(ddof=1) / math.sqrt(3))
    assert (outcome.folds, outcome.wins, outcome.verdict) == (3, 3, "better")
    turned = compare(mine, other, sign=-1.0)
    assert turned is not None
    assert turned.mean == pytest.approx(-outcome.mean)
    assert turned.verdict == "worse"
    shuffled = metric(other["values"][::-1], keys=other["keys"][::-1])
    assert compare(mine, shuffled) == outcome


def test_every_seed_is_compared_with_a_baseline_that_has_none() -> None:
    mine = metric([0.5, 0.9, 0.4, 0.8], keys=["A/0/x", "A/1/x", "B/0/y", "B/1/y"])
    other = metric([0.2, 0.3], keys=["A/0/x", "B/0/y"])
    outcome = compare(mine, other)
    assert outcome is not None
    assert outcome.mean == pytest.approx(((0.7 - 0.2) + (0.6 - 0.3)) / 2)
    assert (outcome.folds, outcome.wins) == (2, 2)
    uneven = metric([0.5, 0.9, 0.8], keys=["A/0/x", "A/1/x", "B/1/y"])
    single = compare(uneven, metric([0.2, 0.3], keys=["A/0/x", "B/1/y"]))
    assert single is not None
    assert single.mean == pytest.approx(((0.7 - 0.2) + (0.8 - 0.3)) / 2)
    three = metric([0.5, 0.9, 0.1], keys=["A/0/x", "A/1/x", "A/2/x"])
    shared = compare(three, metric([0.4, 0.7], keys=["A/0/x", "A/1/x"]))
    assert shared is not None
    assert shared.mean == pytest.approx((0.1 + 0.2) / 2)


def test_no_verdict_without_enough_folds_or_shared_keys() -> None:
    one = compare(metric([0.9, 0.8]), metric([0.1, 0.2]))
    assert one is not None
    assert one.verdict == "1 fold: too few to tell"
    assert math.isnan(one.error)
    slides = compare(
        metric([0.9, 0.8, 0.7, 0.2], keys=["A/0/x", "A/1/x", "A/0/y", "A/0/z"]),
        metric([0.5, 0.5, 0.5, 0.5], keys=["A/0/x", "A/1/x", "A/0/y", "A/0/z"]),
    )
    assert slides is not None
    assert (slides.unit, slides.units, slides.wins) == ("slides", 3, 2)
    assert slides.mean == pytest.approx((0.4 + 0.3 + 0.2 - 0.3) / 4)
    assert slides.error == pytest.approx(np.std([0.35, 0.2, -0.3], ddof=1) / math.sqrt(3))
    assert slides.verdict == "1 fold: too few to tell"
    assert compare(metric([0.9]), metric([0.1], keys=["other/0/x"])) is None
    assert compare({"values": [1.0], "mean": 1.0}, metric([0.1])) is None
    parts = ["none/0/x:type:block0", "none/0/x:type:block1"]  # of one slide: no error
    one_slide = compare(metric([0.9, 0.7], keys=parts), metric([0.5, 0.5], keys=parts))
    assert one_slide is not None
    assert (one_slide.unit, one_slide.units, one_slide.wins) == ("slides", 1, 1)
    assert math.isnan(one_slide.error)
    same = compare(metric(spread(0.3)), metric(spread(0.3)))
    assert same is not None
    assert same.verdict == "no clear difference"


def test_a_control_that_is_not_beaten_is_named(tmp_path: Path) -> None:
    entry = {"hibio": 0.3, "matched_random": 0.35, "shuffled_pairs": 0.1, "pca": 0.9}
    models = {name: {"spearman/x": metric(spread(mean))} for name, mean in entry.items()}
    controls = {name: {"role": "control"} for name in ("matched_random", "shuffled_pairs")}
    task = {"models": models, "rows": controls, "metrics": {"spearman/x": {"better": "high"}}}
    results = {"tasks": {"pathway_query": task}}
    page, _ = render(tmp_path, results)
    assert "Not beaten: the control matched_random reaches 0.353" in page.words
    assert "the control shuffled_pairs" not in page.words


def test_the_headline_is_the_first_declared_metric_that_the_model_has() -> None:
    found = sample()
    assert headlines(found) == [("retrieval", "image_to_omics/recall@10%"), ("outcome", "auroc")]
    found["tasks"]["retrieval"]["short"] = ["absent", "image_to_omics/median_rank"]
    assert headlines(found)[0] == ("retrieval", "image_to_omics/median_rank")


def test_an_old_file_is_shown_without_ranks(tmp_path: Path) -> None:
    found = sample()
    for name in ("short", "metrics", "rows"):
        del found["tasks"]["retrieval"][name]
    page, _ = render(tmp_path, found)
    assert page.bold == []
    assert "direction not recorded; evaluate again to compare" in page.words
    assert page.row("pca", 4)[1] == "not recorded"
