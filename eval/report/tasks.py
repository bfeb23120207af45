"""One section a task: models x metrics, notes, and every single value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from eval.report.glossary import (
    Kind,
    describe_metrics,
    describe_model,
    describe_task,
    is_transductive,
    kind_of,
    lower_is_better,
)
from eval.report.headline import best_model, chance_of, mean_and_spread
from eval.report.page import (
    MISSING,
    Html,
    details,
    exact,
    heading_row,
    is_number,
    join,
    number,
    paragraph,
    table,
    tag,
    text,
)

Models = Mapping[str, Mapping[str, Mapping[str, Any]]]

MAX_COLUMNS = 12

RANKING = re.compile(r"recall@[\d.]+%?|median_rank|mrr")

KIND_ORDER = ("this checkpoint", "variant", "baseline", "control", "transductive", "oracle")


def task_section(task: str, result: Mapping[str, Any]) -> Html:
    """Everything about one task.

    Args:
        task: Name of the task.
        result: `{"models": {MODEL: {METRIC: {...}}}, "notes": [...]}`.
    """
    models: Models = result.get("models") or {}
    parts = [paragraph(describe_task(task))]
    metrics = metric_names(models)
    if metrics:
        parts.extend(_summary_table(task, models, panel) for panel in panels(metrics))
        parts.append(paragraph(_legend(models, metrics), "soft"))
        parts.append(_meanings(models, metrics))
    else:
        parts.append(paragraph("No metric was computed for this task.", "soft"))
    notes = [tag("li", text(note)) for note in result.get("notes") or []]
    if notes:
        parts.extend([tag("h3", text("Notes")), tag("ul", *notes)])
    if metrics:
        tables = [_value_table(task, models, metric) for metric in metrics]
        parts.append(details("Every value, per fold, seed and slide", *tables))
    return join(parts)


def metric_names(models: Models) -> list[str]:
    """All metrics of a task; those with the same prefix stand together, in order of appearance."""
    names = list(dict.fromkeys(name for metrics in models.values() for name in metrics))
    groups = list(dict.fromkeys(_group(name) for name in names))
    return sorted(names, key=lambda name: groups.index(_group(name)))


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


def _group(metric: str) -> str:
    return metric.rsplit("/", 1)[0] if "/" in metric else ""


def _entries(models: Models, metric: str) -> dict[str, Mapping[str, Any]]:
    return {name: metrics[metric] for name, metrics in models.items() if metric in metrics}


def _summary_table(task: str, models: Models, metrics: Sequence[str]) -> Html:
    """Models as rows (by kind), metrics as columns under their prefix, chance as the last row."""
    best = {metric: _best_names(task, _entries(models, metric), metric) for metric in metrics}
    same_n = _shared_n(models, metrics)
    names = sorted(models, key=lambda name: KIND_ORDER.index(kind_of(name).name))
    rows = []
    for name in names:
        cells = [
            _value_cell(models[name].get(metric, {}), name in best[metric], same_n is None)
            for metric in metrics
        ]
        own = "self" if kind_of(name).is_checkpoint else None
        rows.append(tag("tr", _model_heading(name), _kind_cell(name), *cells, class_=own))
    levels = [tag("td", text(chance_of(_entries(models, m).values()))) for m in metrics]
    chance = tag("th", text("chance"), scope="row")
    rows.append(tag("tr", chance, tag("td"), *levels, class_="chance"))
    counted = f", n = {same_n} values each" if same_n is not None else " (n values)"
    caption = f"Mean ± standard deviation{counted}. Best in bold."
    return table(_metric_head(task, metrics), rows, caption)


def _metric_head(task: str, metrics: Sequence[str]) -> list[Html]:
    """Two rows of headings: the shared prefix above, the metric with its direction below."""
    corner = [tag("th", text(name), scope="col", rowspan=2) for name in ("model", "kind")]
    groups = [(name, len(list(items))) for name, items in groupby(metrics, key=_group)]
    above = [
        tag("th", text(name), scope="colgroup", colspan=size, class_="group")
        for name, size in groups
    ]
    below = [tag("th", text(_metric_label(task, metric)), scope="col") for metric in metrics]
    return [tag("tr", *corner, *above), tag("tr", *below)]


def _metric_label(task: str, metric: str) -> str:
    arrow = "↓" if lower_is_better(metric, task) else "↑"
    mark = " †" if is_transductive(metric) else ""
    return f"{metric.rsplit('/', 1)[-1]} {arrow}{mark}"


def _model_heading(name: str) -> Html:
    return tag("th", text(name), scope="row")


def _kind_cell(name: str) -> Html:
    return tag("td", tag("small", text(kind_of(name).name)), class_="words")


def _value_cell(entry: Mapping[str, Any], best: bool, with_n: bool) -> Html:
    shown = text(mean_and_spread(entry))
    inner = tag("b", shown, class_="best") if best else shown
    if with_n and shown != MISSING:
        inner = Html(inner + " " + tag("small", text(f"({number(entry.get('n'))})")))
    return tag("td", inner)


def _best_names(task: str, entries: Mapping[str, Mapping[str, Any]], metric: str) -> set[str]:
    """Best competing model, with those whose mean reads the same in the table."""
    competing = [name for name in entries if kind_of(name).competes]
    winner = best_model(entries, lower_is_better(metric, task), competing)
    if winner is None:
        return set()
    shown = number(entries[winner].get("mean"))
    return {name for name in competing if number(entries[name].get("mean")) == shown}


def _shared_n(models: Models, metrics: Sequence[str]) -> int | None:
    """Number of values when it is the same everywhere in a table."""
    entries = [entry for metric in metrics for entry in _entries(models, metric).values()]
    counts = {entry.get("n") for entry in entries}
    only: Any = counts.pop() if len(counts) == 1 else None
    return int(only) if is_number(only) else None


def _legend(models: Models, metrics: Sequence[str]) -> str:
    kinds: dict[str, Kind] = {kind_of(name).name: kind_of(name) for name in models}
    lines = [f"{name}: {kinds[name].meaning}" for name in KIND_ORDER if name in kinds]
    if not all(kind.competes for kind in kinds.values()):
        lines.append("Oracles and transductive read-outs are never marked as best.")
    if any(is_transductive(metric) for metric in metrics):
        lines.append("†: transductive, the read-out uses all spots of the test slide.")
    lines.append("↑ higher is better, ↓ lower is better, – not available.")
    return " ".join(line[0].upper() + line[1:] for line in lines)


def _meanings(models: Models, metrics: Sequence[str]) -> Html:
    """What the metrics and, as far as their names tell, the models are."""
    items = [tag("li", text(line)) for line in describe_metrics(list(metrics))]
    known = [(name, describe_model(name)) for name in models]
    items += [tag("li", tag("b", text(name)), text(f": {line}")) for name, line in known if line]
    return details("What the numbers and the models mean", tag("ul", *items)) if items else Html("")


def _value_table(task: str, models: Models, metric: str) -> Html:
    """Rows are keys, columns are models; unit, chance and direction in the caption."""
    entries = _entries(models, metric)
    columns = {name: _keyed_values(entry) for name, entry in entries.items()}
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    units = sorted({str(entry["unit"]) for entry in entries.values() if entry.get("unit")})
    facts = [metric, f"unit: {', '.join(units) or 'not stated'}"]
    facts.append(f"chance: {chance_of(entries.values())}")
    facts.append("lower is better" if lower_is_better(metric, task) else "higher is better")
    body = [
        tag(
            "tr",
            tag("th", text(key), scope="row"),
            *(tag("td", text(exact(column.get(key)))) for column in columns.values()),
        )
        for key in keys
    ]
    return table([heading_row(("fold/seed/slide", *columns))], body, " · ".join(facts))


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
