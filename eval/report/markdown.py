"""Numbers as text, and the headline metrics as Markdown, as ``docs/results`` holds them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from eval.measures.intervals import headline_interval
from eval.results import TaskRecord
from preprocessing.files import atomic_path

MISSING = "–"
FACTS = (
    *("command", "date", "commit", "machine", "packages", "folds", "seeds", "n_slides"),
    *("n_patients", "n_spots", "n_genes", "n_parameters", "pathways", "wall_time_s"),
    *("seen", "left_out"),
)


def is_number(value: object) -> bool:
    """Whether a value is a finite real number (no bool, None, NaN or infinity)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))


def decimals_for(value: float) -> int:
    """Digits after the point that give about three significant ones for usual metrics."""
    size = abs(value)
    return 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0


def number(value: object, decimals: int | None = None) -> str:
    """A number for a table; a dash when it is missing or not finite.

    Args:
        value: anything; numpy scalars included.
        decimals: digits after the point; by size when None. A tiny value that would read as
            zero is written with an exponent.
    """
    if not is_number(value):
        return MISSING
    if isinstance(value, Integral):
        return f"{int(value):,}"
    plain = float(value)  # type: ignore[arg-type]
    digits = decimals_for(plain) if decimals is None else decimals
    if decimals is None and plain != 0 and abs(plain) < 0.5 * 10**-digits:
        return f"{plain:.1e}"
    shown = f"{plain:,.{digits}f}"
    return shown.lstrip("-") if float(shown.replace(",", "")) == 0 else shown


def exact(value: object) -> str:
    """A number with six significant digits, for the lists of single values."""
    return f"{float(value):.6g}" if is_number(value) else MISSING  # type: ignore[arg-type]


def write_markdown(path: Path, results: Mapping[str, Any]) -> Path:
    """Write the short tables of the content of a results.json."""
    data = results["data"]
    parts = ["\n".join(f"- {name}: {plain_text(data[name])}" for name in FACTS if name in data)]
    for task, result in results["tasks"].items():
        metrics = [m for m in result.get("short") or () if _models_with(result, m)]
        if metrics:
            parts += [f"## {task}", _summary(result, metrics), _intervals(result, metrics[0])]
            parts += [_values(result, metric) for metric in metrics[:2]]
            parts += [f"- {plain_text(note)}" for note in result["notes"]]
    if data.get("models"):
        parts += ["## Models", _costs(data["models"])]
    if data.get("curriculum"):
        parts += ["## Judged stages", markdown_table(*verdict_table(data["curriculum"]))]
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, all columns to the left; a text is never markup, see `plain_text`."""
    first, *lines = ("| " + " | ".join(map(_cell_text, row)) + " |" for row in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *lines])


def plain_text(value: object) -> str:
    """A text of a user as one line of Markdown: no tag, no link and no new line comes from it."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\\[])", r"\\\1", text)


def _cell_text(value: str) -> str:
    return plain_text(value).replace("|", "\\|")


def _costs(rows: Sequence[Mapping[str, Any]]) -> str:
    """Parameters, optimiser steps and the mean wall time of a fit, a row a model."""
    shown = []
    for row in rows:
        seconds = "–" if row["seconds"] is None else f"{row['seconds']:.1f}"
        size = f"{row['n_parameters']:,}"
        steps = "–" if row.get("steps") is None else f"{row['steps']:,.0f}"
        shown.append((row["model"], row["source"], size, str(row["fits"]), steps, seconds))
    head = ("model", "source", "parameters", "fits", "steps a fit", "seconds a fit")
    return markdown_table(head, shown)


def verdict_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: what became of the judged stages of each job, and by what scores."""
    names = ["model", "fold", "seed", "stage", "outcome"]
    scores = ["before", "mixed", "after"]
    head = [*names, *(f"R@10% {score}" for score in scores), "judged on"]
    lines = [
        [*(str(row[n]) for n in names), *(number(row[s]) for s in scores), str(row["judged_on"])]
        for row in rows
    ]
    return head, lines


def _models_with(result: Mapping[str, Any], metric: str) -> list[str]:
    models = result["models"]
    return [name for name in models if models[name].get(metric, {}).get("mean") is not None]


def _summary(result: Mapping[str, Any], metrics: Sequence[str]) -> str:
    names = [m for m in result["models"] if any(m in _models_with(result, x) for x in metrics)]
    shown = TaskRecord("", result).label
    rows = [
        [shown(n), *(_cell(result["models"][n].get(metric)) for metric in metrics)] for n in names
    ]
    rows.append(["*chance*", *(_chance(result, metric) for metric in metrics)])
    return markdown_table(["model", *metrics], rows)


def _intervals(result: Mapping[str, Any], metric: str) -> str:
    """The 95 % bootstrap interval of the first metric, model by model."""
    shown, label = [], TaskRecord("", result).label
    for name in _models_with(result, metric):
        found = headline_interval(result["models"][name], metric)
        if found is not None:
            shown.append(f"{label(name)} {found.low:.3f} to {found.high:.3f} ({found.over})")
    return f"95 % bootstrap intervals of `{metric}`: {'; '.join(shown) or 'fewer than two units'}."


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["mean"] is None:
        return "–"
    spread = "" if entry["std"] is None else f" ± {entry['std']:.3f}"
    return f"{entry['mean']:.3f}{spread} (n={entry['n']})"


def _chance(result: Mapping[str, Any], metric: str) -> str:
    found = [m[metric].get("chance") for m in result["models"].values() if metric in m]
    known = [value for value in found if value is not None]
    return f"{known[0]:.3f}" if known else "–"


def _values(result: Mapping[str, Any], metric: str) -> str:
    """Every value of one metric: rows are fold/seed/unit, columns are models."""
    names = _models_with(result, metric)
    keys = sorted({key for name in names for key in result["models"][name][metric]["keys"]})
    entries = [result["models"][name][metric] for name in names]
    known = [dict(zip(entry["keys"], entry["values"], strict=True)) for entry in entries]
    rows = [[key, *(_value(at.get(key)) for at in known)] for key in keys]
    title = f"Every value of `{metric}` (fold/seed/unit):"
    heads = [TaskRecord("", result).label(name) for name in names]
    return f"{title}\n\n{markdown_table(['', *heads], rows)}"


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
