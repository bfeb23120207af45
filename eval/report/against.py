"""The page and the Markdown of a comparison between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.figures.differences import difference_plot
from eval.glossary import lower_is_better
from eval.markdown import markdown_table
from eval.paired_results import Compared, Results
from eval.report.markup import (
    Html,
    heading_row,
    is_number,
    join,
    number,
    paragraph,
    table,
    tag,
    text,
)
from eval.report.page import figures_section, page
from preprocessing.atomic import atomic_path

HEAD = (
    "task",
    "metric",
    "against",
    "first",
    "other",
    "difference",
    "95 % interval",
    "p",
    "p (Holm)",
    "units",
    "better in",
    "verdict",
)
READING = (
    "Pairs: the same fold, seed and slide in both runs; seeds and label columns of a slide are "
    "averaged first. Difference: positive means that the first run is better, also where lower "
    "values are better. Interval: percentile bootstrap over the units. p: share of random signs of "
    "the differences that reach the mean (all of them up to 12 units), two-sided; Holm: corrected "
    "for the number of comparisons on this page. A verdict needs a corrected p below 0.05 and "
    "three folds. Slides of one fold share a training set, and nothing is trained again, so "
    "intervals are rather too narrow."
)
FACTS = (
    ("checkpoint", "checkpoint"),
    ("folds", "folds"),
    ("seeds", "seeds"),
    ("slides", "n_slides"),
    ("parameters", "n_parameters"),
    ("pathways", "pathways"),
    ("commit", "commit"),
    ("date", "date"),
)


def write_comparison(
    out: Path, runs: Sequence[Results], found: Sequence[Compared], notes: Sequence[str]
) -> Path:
    """Write against.html and against.md.

    Args:
        out: folder.
        runs: the first is compared with the others.
        found: comparisons, corrected.
        notes: what was left out.

    Returns:
        The page.
    """
    rows = [_cells(one) for one in found]
    cells = [tag("tr", *(tag("td", text(value), class_="words") for value in row)) for row in rows]
    results = join(
        [
            table([heading_row(HEAD)], cells, f"{runs[0].label} against the others"),
            paragraph(READING, "soft"),
            tag("ul", *(tag("li", text(note)) for note in notes)) if notes else Html(""),
        ]
    )
    sections = [
        ("differences", "Differences", results),
        ("figures", "Figures", figures_section([difference_plot(found)] if found else [])),
        ("runs", "Runs", _runs(runs)),
    ]
    path = out / "against.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page(f"{runs[0].label} against the others", sections), "utf-8")
    with atomic_path(out / "against.md") as temporary:
        temporary.write_text(markdown(runs, found, notes), "utf-8")
    return path


def markdown(runs: Sequence[Results], found: Sequence[Compared], notes: Sequence[str]) -> str:
    """The same table as Markdown."""
    shown = markdown_table(HEAD, [_cells(one) for one in found])
    parts = [f"# {runs[0].label} against {', '.join(run.label for run in runs[1:])}", READING]
    return "\n\n".join([*parts, shown, *(f"- {note}" for note in notes)]) + "\n"


def _cells(one: Compared) -> list[str]:
    arrow = " (lower is better)" if lower_is_better(one.metric, one.task) else ""
    interval = "–"
    if is_number(one.low):
        interval = f"{number(one.low, 4)} to {number(one.high, 4)}"
    left_out = f", {one.left_out} pairs undefined" if one.left_out else ""
    return [
        one.task,
        one.metric + arrow,
        one.second,
        number(one.value_first, 4),
        number(one.value_second, 4),
        f"{one.difference:+.4f}",
        interval,
        number(one.p),
        number(one.corrected),
        f"{one.units} {one.unit}{left_out}",
        f"{one.wins} of {one.folds} folds",
        one.verdict,
    ]


def _runs(runs: Sequence[Results]) -> Html:
    """What each run says of itself."""
    body = []
    for name, key in FACTS:
        cells = [tag("td", text(_fact(run.body.get("data") or {}, key))) for run in runs]
        body.append(tag("tr", tag("th", text(name), scope="row"), *cells))
    return table([heading_row(("", *(run.label for run in runs)))], body)


def _fact(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "not recorded" if value is None else str(value)
