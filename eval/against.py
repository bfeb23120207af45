"""`hibio eval`: measure checkpoints, and compare several runs in one report (`--against`)."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.compare.fingerprint import check_same_data
from eval.compare.paired import Compared, Results, compare_metric, corrected, declared, find_entry
from eval.embed import find_checkpoints
from eval.errors import FoldError
from eval.report.figures.canvas import figure_parts
from eval.report.figures.lines import difference_plot
from eval.report.markdown import is_number, markdown_table, number
from eval.results import headlines, task_records
from eval.run import evaluate
from eval.tasks.probes import PLAIN
from hibio.config.files import ConfigError, apply_overrides
from preprocessing.files import atomic_path, refuse_others
from preprocessing.pages import Bullets, Cell, Line, Part, Section, Table, Text, write_page

RESULTS = "results.json"
WITH_READOUT = ("retrieval", "expression")
HEAD = (
    *("task", "metric", "against", "first", "other", "difference", "95 % interval"),
    *("p", "p (Holm)", "units", "better in", "verdict"),
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
    """Write against.html and against.md of corrected comparisons; returns the page."""
    title = f"{runs[0].label} against the others"
    rows = [Line([Cell(value, "words") for value in _cells(one, runs)]) for one in found]
    results: list[Part] = [Table(HEAD, rows, title), Text(READING, "soft")]
    results += [Bullets(notes)] if notes else []
    figures = figure_parts([difference_plot(found)] if found else [])
    sections = [
        Section(results, "Differences", "differences"),
        Section(figures, "Figures", "figures"),
        Section([_runs(runs)], "Runs", "runs"),
    ]
    path = write_page(out / "against.html", title, sections)
    with atomic_path(out / "against.md") as temporary:
        temporary.write_text(markdown(runs, found, notes), "utf-8")
    return path


def markdown(runs: Sequence[Results], found: Sequence[Compared], notes: Sequence[str]) -> str:
    """The same table as Markdown."""
    shown = markdown_table(HEAD, [_cells(one, runs) for one in found])
    parts = [f"# {runs[0].label} against {', '.join(run.label for run in runs[1:])}", READING]
    return "\n\n".join([*parts, shown, *(f"- {note}" for note in notes)]) + "\n"


def _cells(one: Compared, runs: Sequence[Results]) -> list[str]:
    way = declared(runs, one.task, one.metric).direction(one.metric)
    arrow = "" if way == "higher is better" else f" ({way})"
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


def _runs(runs: Sequence[Results]) -> Table:
    """What each run says of itself."""
    rows = [
        Line((name, *(_fact(run.body.get("data") or {}, key) for run in runs)))
        for name, key in FACTS
    ]
    return Table(("", *(run.label for run in runs)), rows)


def _fact(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "not recorded" if value is None else str(value)


@dataclass(frozen=True)
class AgainstConfig:
    """How runs are compared.

    Args:
        metrics: ``TASK:METRIC``; the headline metric of every task when empty.
        model: row of the results files; None: the run's own model (of variants: ``hibio``).
        seed: of the draws.
        draws: of bootstrap and signs.
    """

    metrics: tuple[str, ...] = ()
    model: str | None = None
    seed: int = 0
    draws: int = 2000


def run(options: argparse.Namespace) -> str:
    """``hibio eval``: evaluate, compare, or both.

    Returns:
        What was written, to be printed.

    Raises:
        ConfigError: neither a checkpoint nor runs to compare, or no data to measure on.
    """
    given = () if options.checkpoint is None else (options.checkpoint,)
    others = tuple(options.against or ())
    if not given and not others:
        raise ConfigError("give --checkpoint DIR, or --against DIR DIR, or both")
    if not others:
        if options.metrics or options.model:
            raise ConfigError("--metrics and --model say what --against compares; give it too")
        report = _measured(options.checkpoint, options.out, options)
        return f"wrote {options.out / RESULTS}\nreport: {report}"
    if len(given) + len(others) < 2:
        raise ConfigError("--against needs two runs; give another one, or --checkpoint")
    paths = [*given, *others]
    labels = labels_of(paths)
    _refuse_unused(given, others, options)
    _refuse_others(options.out)
    for path in paths:
        if _results_folder(path) is None:
            find_checkpoints(path)  # before hours of measuring the others
    runs = []
    for path, label in zip(paths, labels, strict=True):
        folder = _results_folder(path)
        if folder is None or path in given:
            folder = options.out if path in given else options.out / label.replace("/", "_")
            _measured(path, folder, options)
        runs.append(read_results(folder / RESULTS, label))
    config = AgainstConfig(tuple(options.metrics or ()), options.model)
    report = compare_runs(runs, options.out, config)
    return f"wrote {options.out / 'against.json'}\nreport: {report}"


def compare_runs(runs: Sequence[Results], out: Path, config: AgainstConfig | None = None) -> Path:
    """Compare the first run with each of the others and write against.json, .md and .html.

    Returns:
        The page.

    Raises:
        FoldError: different slides, folds, genes, seeds or keys, or a metric that is missing.
    """
    config = config or AgainstConfig()
    _refuse_others(out)
    if len(runs) < 2:
        raise FoldError(f"{len(runs)} run to compare; give at least two")
    first, others = runs[0], runs[1:]
    for other in others:
        check_same_data(first, other)
    metrics, notes = _metrics(runs, config)
    found = [
        compare_metric(first, other, metric, config.model, config.seed, config.draws)
        for metric in metrics
        for other in others
    ]
    found = corrected(found)
    body = {
        "runs": [run.label for run in runs],
        "config": asdict(config),
        "comparisons": [_plain(one) for one in found],
        "notes": notes,
    }
    with atomic_path(out / "against.json") as temporary:
        text = json.dumps(body, indent=1, allow_nan=False, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return write_comparison(out, runs, found, notes)


def read_results(path: Path, label: str) -> Results:
    """A results file under a short name.

    Raises:
        FoldError: missing, not JSON, or not a results file.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FoldError(f"{path}: cannot be read as results ({error})") from error
    if not isinstance(body, dict) or not isinstance(body.get("tasks"), dict) or not body["tasks"]:
        raise FoldError(f"{path}: no tasks; expected the results.json that `hibio eval` wrote")
    return Results(label, body)


def labels_of(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart.

    Raises:
        ConfigError: one path is given twice.
    """
    parts = [p.parent.parts if p.name == RESULTS else p.parts for p in map(Path.resolve, paths)]
    if len(set(parts)) < len(parts):
        raise ConfigError("--against: a run is given twice; a run equals itself")
    for depth in range(1, max(len(p) for p in parts) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return ["/".join(p) for p in parts]


def _refuse_unused(
    given: Sequence[Path], others: Sequence[Path], options: argparse.Namespace
) -> None:
    """What would not be read, and a results file that would be written over."""
    folders = [_results_folder(path) for path in others]
    measured = options.tasks or options.set or options.test or options.peers != "none"
    measured = measured or options.readout != PLAIN
    if not given and None not in folders and measured:
        raise ConfigError(
            "--tasks, --test, --peers, --readout and --set say what is measured, but every run has "
            "its results.json already; leave them out (--metrics chooses what is compared)"
        )
    out = options.out.resolve()
    if given and any(folder is not None and folder.resolve() == out for folder in folders):
        raise ConfigError(
            f"{options.out} holds the results of a run of --against, which those of --checkpoint "
            "would take the place of; give another --out"
        )


def _refuse_others(out: Path) -> None:
    """Refuse files in the place of the comparison that no comparison wrote."""
    names = ("against.md", "against.html")
    refuse_others({out / "against.json": '"comparisons"'}, [out / name for name in names])


def _results_folder(path: Path) -> Path | None:
    """The folder of a results file, or None for a checkpoint or run that is not measured yet."""
    if path.name == RESULTS:
        return path.parent
    return path if (path / RESULTS).is_file() else None


def _measured(path: Path, out: Path, options: argparse.Namespace) -> Path:
    if options.data is None:
        raise ConfigError(
            f"{path} has no {RESULTS}, so it has to be measured; give the stores with --data DIR"
        )
    settings = apply_overrides({}, [*_preset(options), *options.set])
    test = options.test or ()
    return evaluate(path, options.data, out, options.tasks, options.peers, settings, test)


def _preset(options: argparse.Namespace) -> list[str]:
    """Settings that --readout stands for."""
    if options.readout == PLAIN:
        return []
    tasks = [task for task in WITH_READOUT if not options.tasks or task in options.tasks]
    if not tasks:
        raise ConfigError(
            f"--readout {options.readout} is of {' and '.join(WITH_READOUT)}, which are not run; "
            "add one to --tasks, or leave it out"
        )
    return [f"{task}.readout={options.readout}" for task in tasks]


def _metrics(
    runs: Sequence[Results], config: AgainstConfig
) -> tuple[list[tuple[str, str]], list[str]]:
    """What is compared, and notes on what is not."""
    if config.metrics:
        wanted = []
        for text in config.metrics:
            task, colon, name = text.partition(":")
            if not colon:
                raise FoldError(f"metric {text!r}; expected TASK:METRIC, such as retrieval:...")
            wanted.append((task, name))
        return wanted, []
    kept, notes = [], []
    for task, name in headlines(runs[0].body):
        lacking = [run.label for run in runs if find_entry(run, task, name, config.model) is None]
        if lacking:
            notes.append(f"{task}: {name} is not in {', '.join(lacking)}; not compared")
        else:
            kept.append((task, name))
    if not kept:
        every = {task.task: task.metrics[:3] for task in task_records(runs[0].body)}
        raise FoldError(
            f"the runs share no headline metric; name one with --metrics (the first has {every})"
        )
    return kept, notes


def _plain(one: Compared) -> Mapping[str, Any]:
    """A comparison as JSON holds it; NaN is null."""
    record = {**asdict(one), "verdict": one.verdict}
    broken = {k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return {key: None if key in broken else value for key, value in record.items()}
