"""report.html: the run, headline metrics, figures, a section a task, costs and the config."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from eval.compare.paired import MIN_FOLDS, Comparison, compare
from eval.measures.intervals import headline_interval
from eval.report.figures.canvas import Figure, figure_parts
from eval.report.markdown import MISSING, decimals_for, exact, is_number, number, verdict_table
from eval.results import (
    UNDECLARED,
    Better,
    TaskRecord,
    headlines,
    prefix_of,
    task_record,
    task_records,
)
from hibio.keys import MAIN
from preprocessing.pages import (
    Box,
    Bullets,
    Cell,
    Heading,
    Line,
    Part,
    Section,
    Table,
    Text,
    Verbatim,
    write_page,
)

NOTE = (
    "Interval: 95 % percentile bootstrap of this checkpoint's mean over what is named in brackets "
    "(slides, patients in annotation and outcome, folds for pooled metrics), seeds together. Best "
    "baseline: the one with the best mean on these same test values, controls included, oracles "
    "not. Difference: this checkpoint minus that baseline on the same "
    "fold, seed and slide (seeds averaged where one of both has a single one), averaged within a "
    "fold, ± the standard error over folds (over slides when there is one fold); positive means "
    f"better also where lower values are better. A verdict needs at least {MIN_FOLDS} folds and "
    "two standard errors; folds share training data, so the error is rather too small."
)
#: Label and the names under which a run may have kept it; the shallowest match is shown.
FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Command", ("command", "argv")),
    ("Checkpoint", ("checkpoint", "checkpoint_dir", "checkpoints")),
    ("Config digest", ("config_digest", "config_sha256", "config_hash", "digest")),
    ("Seeds", ("seeds", "seed")),
    ("Folds", ("folds", "n_folds", "splits", "split")),
    ("Patients", ("n_patients", "patients")),
    ("Slides", ("n_slides", "slides")),
    ("Spots", ("n_spots", "spots")),
    ("Genes", ("n_genes",)),
    ("Parameters", ("n_parameters", "parameters")),
    ("Hardware", ("hardware", "machine")),
    ("Versions", ("versions", "packages")),
    ("Wall time", ("wall_time_s", "wall_s", "wall_seconds", "wall_time")),
    ("Finished", ("finished", "date", "created", "timestamp")),
    ("Seen in training", ("seen",)),
    ("Left out", ("left_out",)),
)
UNUSUAL = ("Seen in training", "Left out")  # facts of few runs
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
COSTS_NOTE = (
    "Steps of the optimiser, and wall time: mean over fits, of training alone, on the machine that "
    "ran it; checkpoints were trained in their own run, the others in this evaluation. Read-outs "
    "are not counted."
)
VERDICTS_NOTE = (
    "A rehearsal on fewer slides, as long again as the training, judged each stage on slides that "
    "its weights never saw; steps and wall time above are those of the training alone."
)
MAX_LISTED = 24
MAX_DEPTH = 2
MAX_COLUMNS = 12
RANKING = re.compile(r"recall@[\d.]+%?|median_rank|mrr")


def best_model(
    entries: Mapping[str, Mapping[str, Any]], better: Better, names: Sequence[str]
) -> str | None:
    """Name with the best finite mean among `names`; None without one, or where none is better."""
    usable = [name for name in names if name in entries and is_number(entries[name].get("mean"))]
    if not usable or better == "none":
        return None
    choose = min if better == "low" else max
    return choose(usable, key=lambda name: float(entries[name]["mean"]))


def headline_section(results: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> list[Part]:
    """The table of tasks and metrics, and how to read it; one without results has dashes."""
    tasks = [(task_record(results, task), metric) for task, metric in rows]
    mains = list(dict.fromkeys(task.label(task.main) for task, _ in tasks))
    names = (
        *("question", f"{', '.join(mains)}, 95 % interval", "best baseline", "its value"),
        *("difference", "better in", "chance", "verdict"),
    )
    body = [_headline_row(task, metric) for task, metric in tasks]
    warnings = [line for one in tasks for line in control_warnings(*one)]
    parts: list[Part] = [Table(names, body), Text(NOTE, "soft")]
    return [*parts, Bullets(warnings)] if warnings else parts


def control_warnings(task: TaskRecord, metric: str) -> list[str]:
    """One sentence for each control that this checkpoint does not beat on a headline metric."""
    entries, better = task.entries(metric), task.better(metric)
    mine: Any = entries.get(task.main, {}).get("mean")
    lines = []
    for name, entry in entries.items():
        mean = entry.get("mean")
        if task.role(name) != "control" or not is_number(mean) or not is_number(mine):
            continue
        if better != "none" and (mean == mine or (mean < mine) == (better == "low")):
            lines.append(
                f"Not beaten: the control {name} reaches {number(mean)} on {task.task}: "
                f"{metric}, this checkpoint {number(mine)}."
            )
    return lines


def _headline_row(task: TaskRecord, metric: str) -> Line:
    entries = task.entries(metric)
    rivals = [n for n in entries if task.role(n) not in ("model", "variant", "oracle")]
    best = best_model(entries, task.better(metric), rivals)
    mine = entries.get(task.main, {})
    outcome = compare(mine, entries[best], task.sign(metric)) if best and mine else None
    small = f"{task.task}: {metric}"
    if task.better(metric) != "high":
        small += f" ({task.direction(metric)})"
    verdict = _verdict(mine, best, outcome)
    if entries and task.better(metric) == "none":
        verdict = f"{task.direction(metric)}; evaluate again to compare"
    cells = (
        Cell(task.task, "words", below=(small,)),
        Cell(mean_and_spread(mine), below=_interval(task, metric)),
        Cell(task.label(best) if best else MISSING, "words"),
        mean_and_spread(entries[best]) if best else MISSING,
        _difference(outcome),
        _wins(outcome) if outcome else MISSING,
        chance_of(entries.values()),
        Cell(verdict, "words"),
    )
    return Line(cells)


def _interval(task: TaskRecord, metric: str) -> tuple[str, ...]:
    """Interval of this checkpoint's mean, with what it was drawn over."""
    own = task.models.get(task.main) or {}
    found = headline_interval(own, metric) if metric in own else None
    if found is None:
        return ()
    return (f"{number(found.low)} to {number(found.high)} ({found.over})",)


def mean_and_spread(entry: Mapping[str, Any]) -> str:
    """Mean ± standard deviation in the mean's own number of digits; a dash when missing."""
    mean, std = entry.get("mean"), entry.get("std")
    shown = number(mean)
    if shown == MISSING or not is_number(std) or entry.get("n") == 1:
        return shown
    return f"{shown} ± {number(std, decimals_for(float(mean)))}"  # type: ignore[arg-type]


def chance_of(entries: Any) -> str:
    """Chance level of a metric, a range when models differ, a dash when none is stated."""
    levels = [float(e["chance"]) for e in entries if is_number(e.get("chance"))]
    if not levels:
        return MISSING
    low, high = number(min(levels)), number(max(levels))
    return low if low == high else f"{low} to {high}"


def _wins(outcome: Comparison) -> str:
    unit = outcome.unit if outcome.units > 1 else outcome.unit.rstrip("s")
    return f"{outcome.wins} of {outcome.units} {unit}"


def _difference(outcome: Comparison | None) -> str:
    if outcome is None:
        return MISSING
    digits = decimals_for(outcome.mean)
    sign = "+" if outcome.mean >= 0 else ""
    shown = f"{sign}{number(outcome.mean, digits)}"
    return shown if np.isnan(outcome.error) else f"{shown} ± {number(outcome.error, digits)}"


def _verdict(mine: Mapping[str, Any], best: str | None, outcome: Comparison | None) -> str:
    if not is_number(mine.get("mean")):
        return "not measured"
    if best is None:
        return "no baseline to compare with"
    return "values cannot be paired" if outcome is None else outcome.verdict


def run_section(results: Mapping[str, Any]) -> list[Part]:
    """Facts table, and everything that was recorded about the data."""
    rows = []
    for label, names in FACTS:
        value = _find(results, names)
        if value is None and label in UNUSUAL:
            continue
        shown = _describe(label, value)
        if label == "Config digest" and value is None:
            shown = f"{config_digest(results.get('config'))} (sha256 of the config below)"
        rows.append(Line((label, shown)))
    everything = Box("Everything recorded about the data", [_dump(results.get("data"))])
    return [Table((), rows, kind="facts"), everything]


def config_section(results: Mapping[str, Any]) -> list[Part]:
    """The resolved config in a closed box."""
    config = results.get("config")
    if not config:
        return [Text("No config was recorded with these results.", "soft")]
    return [Box("Resolved config", [_dump(config)])]


def config_digest(config: object) -> str:
    """First 12 hex digits of the sha256 of the config as canonical JSON."""
    canonical = json.dumps(config, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:12]


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, for reading."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _dump(value: object) -> Verbatim:
    return Verbatim(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def _find(results: Mapping[str, Any], names: tuple[str, ...]) -> object:
    """First hit in data, then config, then beside them; each from the outside inwards."""
    beside = {
        key: value for key, value in results.items() if key not in ("tasks", "config", "data")
    }
    for root in (results.get("data"), beside, results.get("config")):
        level = [root]
        for _ in range(MAX_DEPTH):
            tables = [item for item in level if isinstance(item, Mapping)]
            for name in names:
                for item in tables:
                    if item.get(name) is not None:
                        return item[name]
            level = [value for item in tables for value in item.values()]
    return None


def _describe(label: str, value: object) -> str:
    if value is None:
        return "not recorded"
    if label == "Wall time" and is_number(value):
        return duration(float(value))  # type: ignore[arg-type]
    if label == "Command" and isinstance(value, list | tuple):
        return " ".join(str(part) for part in value)
    return _short(value)


def _short(value: object) -> str:
    """A value in one line; long lists are cut and say how many they had."""
    if isinstance(value, Mapping):
        pairs = [f"{key} {_short(item)}" for key, item in value.items()]
        return _listed(pairs) or MISSING
    if isinstance(value, list | tuple):
        return _listed([_short(item) for item in value]) or MISSING
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) and abs(value) > 9999 else exact(value)
    return MISSING if value is None else str(value)


def _listed(parts: list[str]) -> str:
    if len(parts) <= MAX_LISTED:
        return ", ".join(parts)
    return ", ".join(parts[:MAX_LISTED]) + f", ... ({len(parts)} in all)"


def models_section(results: Mapping[str, Any]) -> list[Part]:
    """A row for every model that was fitted; a sentence when none was recorded."""
    rows = (results.get("data") or {}).get("models") or []
    if not rows:
        return [Text("No cost of a model was recorded with these results.", "soft")]
    head = ("model", "source", "parameters", "fits", "steps of a fit", "wall time of a fit")
    parts: list[Part] = [Table(head, [_cost_row(row) for row in rows]), Text(COSTS_NOTE, "soft")]
    verdicts = (results.get("data") or {}).get("curriculum")
    if verdicts:
        columns, lines = verdict_table(verdicts)
        parts += [Table(columns, [Line(line) for line in lines], "Judged stages")]
        parts += [Text(VERDICTS_NOTE, "soft")]
    return parts


def _cost_row(row: Mapping[str, Any]) -> Line:
    seconds = row.get("seconds")
    cells = (
        str(row["model"]),
        Cell(str(row.get("source", MISSING)), "words"),
        number(row.get("n_parameters")),
        number(row.get("fits")),
        number(row.get("steps"), 0),
        MISSING if seconds is None else duration(float(seconds)),
    )
    return Line(cells, "self" if row["model"] == MAIN else "")


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
        rows.append(Line((task.label(name), Cell(task.role(name), "words"), *cells), own))
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
    heads = [task.label(name) for name in columns]
    return Table(("fold/seed/slide", *heads), rows, " · ".join(facts))


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


def write_report(
    path: Path,
    results: Mapping[str, Any],
    figures: Sequence[Figure] = (),
    title: str = "HiBio evaluation",
) -> Path:
    """Write report.html from the content of results.json (docs/architecture.md) in one step.

    The page needs no network and no script; the figures are inside, in their order.
    """
    rows = headlines(results)
    sections = [Section(run_section(results), "This run", "run")]
    if rows:
        sections.append(Section(headline_section(results, rows), "Headline", "headline"))
    sections.append(Section(figure_parts(figures), "Figures", "figures"))
    for index, task in enumerate(task_records(results)):
        sections.append(Section(task_section(task), f"Task: {task.task}", f"task-{index}"))
    if (results.get("data") or {}).get("models"):
        sections.append(Section(models_section(results), "Models", "models"))
    sections.append(Section(config_section(results), "Config", "config"))
    return write_page(Path(path), title, sections)
