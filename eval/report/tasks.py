"""One section a task: models x metrics, notes, and every single value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from eval.report.headline import best_model, chance_of, mean_and_spread
from eval.report.numbers import MISSING, exact, is_number, number
from eval.results import UNDECLARED, TaskRecord, prefix_of
from preprocessing.pages import Box, Bullets, Cell, Heading, Line, Part, Table, Text

MAX_COLUMNS = 12
RANKING = re.compile(r"recall@[\d.]+%?|median_rank|mrr")

#: Role -> what it means, in the order of the tables.
ROLES = {
    "model": "The frozen model of this run.",
    "variant": "A read-out or average that builds on this run's embeddings.",
    "baseline": "Another method, fitted and scored on the same splits.",
    UNDECLARED: "An older version wrote these results; evaluate again to have roles and ranks.",
    "control": "Something is shuffled or random on purpose. A good result here is a warning.",
    "oracle": "Uses measured test values that no prediction has. A ceiling, not a rival.",
}
ARROWS = {"high": " ↑", "low": " ↓", "none": ""}
UNKNOWN_TASK = "No description of this task is known to the report; see its notes."


def task_section(task: TaskRecord) -> list[Part]:
    """Everything about one task."""
    parts: list[Part] = [Text(str(task.body.get("words") or UNKNOWN_TASK))]
    metrics = task.metrics
    if metrics:
        parts.extend(_summary_table(task, panel) for panel in panels(metrics))
        parts += [Text(_legend(task), "soft"), *_meanings(task)]
    else:
        parts.append(Text("No metric was computed for this task.", "soft"))
    if task.body.get("notes"):
        parts += [Heading("Notes", 3), Bullets(task.body["notes"])]
    if metrics:
        tables = [_value_table(task, metric) for metric in metrics]
        parts.append(Box("Every value, per fold, seed and slide", tables))
    return parts


def panels(metrics: Sequence[str]) -> list[list[str]]:
    """Split metrics into tables that a page can hold.

    A family (same first part of the name and same variant, such as pooled or csls) of four or
    more has a table of its own; smaller ones share tables of at most `MAX_COLUMNS`.
    """
    families: dict[tuple[str, str], list[str]] = {}
    for metric in metrics:
        families.setdefault(_family(metric), []).append(metric)
    found: list[list[str]] = []
    shared: list[str] | None = None
    for family in families.values():
        if len(family) >= 4:
            found.extend(
                family[start : start + MAX_COLUMNS] for start in range(0, len(family), MAX_COLUMNS)
            )
        elif shared is not None and len(shared) + len(family) <= MAX_COLUMNS:
            shared.extend(family)
        else:
            shared = list(family)
            found.append(shared)
    return found


def _family(metric: str) -> tuple[str, str]:
    """First part of a metric's name, and its variant when it is a retrieval score."""
    last = metric.rsplit("/", 1)[-1]
    variant = RANKING.sub("", last).strip("_") if RANKING.search(last) else ""
    return metric.split("/")[0] if "/" in metric else "", variant


def _summary_table(task: TaskRecord, metrics: Sequence[str]) -> Table:
    """Models as rows (by role), metrics as columns under their prefix, chance as the last row."""
    best = {metric: _best_names(task, metric) for metric in metrics}
    same_n = _shared_n(task, metrics)
    order = list(ROLES)
    names = sorted(task.models, key=lambda name: order.index(task.role(name)))
    rows = []
    for name in names:
        cells = [
            _value_cell(task.models[name].get(metric, {}), name in best[metric], same_n is None)
            for metric in metrics
        ]
        own = "self" if task.role(name) == "model" else ""
        rows.append(Line((name, Cell(task.role(name), "words"), *cells), own))
    levels = [chance_of(task.entries(metric).values()) for metric in metrics]
    rows.append(Line(("chance", "", *levels), "chance"))
    counted = f", n = {same_n} values each" if same_n is not None else " (n values)"
    caption = f"Mean ± standard deviation{counted}. Best in bold."
    head = ["model", "role", *(_metric_label(task, metric) for metric in metrics)]
    groups = [(name, len(list(items))) for name, items in groupby(metrics, key=prefix_of)]
    return Table(head, rows, caption, groups, lead=2)


def _metric_label(task: TaskRecord, metric: str) -> str:
    mark = " †" if task.transductive(metric) else ""
    return f"{metric.rsplit('/', 1)[-1]}{ARROWS[task.better(metric)]}{mark}"


def _value_cell(entry: Mapping[str, Any], best: bool, with_n: bool) -> Cell:
    shown = mean_and_spread(entry)
    n = f"({number(entry.get('n'))})" if with_n and shown != MISSING else ""
    return Cell(shown, strong="best" if best else "", beside=n)


def _best_names(task: TaskRecord, metric: str) -> set[str]:
    """Best competing model, with those whose mean reads the same in the table."""
    entries = task.entries(metric)
    competing = [name for name in entries if task.role(name) != "oracle"]
    winner = best_model(entries, task.better(metric), competing)
    if winner is None:
        return set()
    shown = number(entries[winner].get("mean"))
    return {name for name in competing if number(entries[name].get("mean")) == shown}


def _shared_n(task: TaskRecord, metrics: Sequence[str]) -> int | None:
    """Number of values when it is the same everywhere in a table."""
    entries = [entry for metric in metrics for entry in task.entries(metric).values()]
    counts = {entry.get("n") for entry in entries}
    only: Any = counts.pop() if len(counts) == 1 else None
    return int(only) if is_number(only) else None


def _legend(task: TaskRecord) -> str:
    roles = {task.role(name) for name in task.models}
    lines = [f"{role}: {meaning}" for role, meaning in ROLES.items() if role in roles]
    if "oracle" in roles:
        lines.append("Oracles are never marked as best.")
    if any(task.transductive(metric) for metric in task.metrics):
        lines.append("†: transductive, the read-out uses all spots of the test slide.")
    lines.append("↑ higher is better, ↓ lower is better, – not available.")
    return " ".join(line[0].upper() + line[1:] for line in lines)


def _meanings(task: TaskRecord) -> list[Part]:
    """What the metrics and the models are."""
    lines = dict.fromkeys(line for metric in task.metrics for line in task.meanings(metric))
    known = [(name, f": {task.words(name)}") for name in task.models if task.words(name)]
    items: list[str | tuple[str, str]] = [*lines, *known]
    return [Box("What the numbers and the models mean", [Bullets(items)])] if items else []


def _value_table(task: TaskRecord, metric: str) -> Table:
    """Rows are keys, columns are models; unit, chance and direction in the caption."""
    entries = task.entries(metric)
    columns = {name: _keyed_values(entry) for name, entry in entries.items()}
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    units = sorted({str(entry["unit"]) for entry in entries.values() if entry.get("unit")})
    facts = [metric, f"unit: {', '.join(units) or 'not stated'}"]
    facts += [f"chance: {chance_of(entries.values())}", task.direction(metric)]
    rows = [Line((key, *(exact(column.get(key)) for column in columns.values()))) for key in keys]
    return Table(("fold/seed/slide", *columns), rows, " · ".join(facts))


def _keyed_values(entry: Mapping[str, Any]) -> dict[str, object]:
    """Values by key; numbered where keys are missing, and repeated keys get a counter."""
    values = list(entry.get("values") or [])
    keys = [str(key) for key in entry.get("keys") or []]
    if len(keys) != len(values):
        keys = [f"value {position}" for position in range(1, len(values) + 1)]
    seen: dict[str, int] = {}
    keyed: dict[str, object] = {}
    for key, value in zip(keys, values, strict=True):
        seen[key] = seen.get(key, 0) + 1
        keyed[key if seen[key] == 1 else f"{key} ({seen[key]})"] = value
    return keyed
