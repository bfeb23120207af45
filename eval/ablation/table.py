"""Scores of single jobs, joined to the table of an ablation and to the gains of its terms.

The scores of a job have the schema of every results.json. They are written last and whole, so a
job that was killed has none and is done again; its training goes on from its checkpoint.

A difference is taken on the same slide of the same fold, seeds averaged first, and its interval
draws slides again (`paired_bootstrap`): it speaks of the slides, not of new cohorts, and slides of
one patient are more alike than it knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eval.ablation.config import BASELINES, GridConfig
from eval.ablation.plan import GridJob
from eval.compare.paired import unit_gains
from eval.measures.intervals import PairedInterval, holm, paired_bootstrap
from eval.results import TaskRecord, TaskResult, write_results
from hibio.config.data import GenesConfig, PathwaysConfig
from hibio.config.files import ConfigError, to_dict, without_renamed
from hibio.config.run import UNSETTLED_DATA, RunConfig
from hibio.config.schema import SchemaError, build_section
from preprocessing.errors import did_you_mean
from preprocessing.store.read import stores_in

Points = Mapping[str, Mapping[str, Any]]  # cell -> axis -> value

NAME = "scores.json"
#: Settings that decide no number, or are compared otherwise.
UNSETTLED = {"out", "folds", "seeds", "variant", "variants", "threads", "checkpoint_every", "bank"}
VALUE_COLUMNS = [
    *("cell", "row", "task", "metric", "fold", "seed", "unit", "value", "chance", "quantity"),
]
#: What the jobs declare of a value; beside `VALUE_COLUMNS` in memory, not in values.csv.
DECLARED = ["better", "role"]
COST_COLUMNS = ["cell", "row", "seed", "fold", "n_parameters", "steps", "train_s", "measure_s"]


@dataclass(frozen=True)
class Scores:
    """Content of a ``scores.json``.

    Attributes:
        config: the resolved configuration of the job.
        facts: row, cell, fold, seed, ``n_parameters``, ``steps``, ``train_s``, ``measure_s``;
            ``data`` and ``ruler``, what it was measured on and with.
        tasks: task -> {"models": {MODEL: {METRIC: {...}}}, "notes": [...]}.
    """

    config: dict[str, Any]
    facts: dict[str, Any]
    tasks: dict[str, Any]


def write_scores(job: GridJob, facts: dict[str, Any], results: Sequence[TaskResult]) -> Path:
    """Write the scores of a job; it is done from then on."""
    path = job.folder / NAME
    where = {
        "row": job.row,
        "cell": job.cell.name,
        "point": dict(job.cell.point),
        "fold": job.job.fold,
        "seed": job.job.seed,
        "data": data_digest(job),
        "ruler": _ruler(to_dict(job.reference.config)),
        **({"evaluate": dict(job.evaluate)} if job.evaluate else {}),
    }
    write_results(path, to_dict(job.job.config), {**where, **facts}, results)
    return path


def read_scores(job: GridJob) -> Scores | None:
    """The scores of a job, None where it has none yet.

    Raises:
        ConfigError: the file is damaged.
    """
    path = job.folder / NAME
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        facts = {**body["data"], "ruler": without_renamed(body["data"].get("ruler", {}))}
        return Scores(without_renamed(body["config"]), facts, dict(body["tasks"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); remove it, the job is done again") from error


def data_digest(job: GridJob) -> str:
    """Names and sizes of the stores as a hash: quick for any cohort."""
    data = [(path.name, path.stat().st_size) for path in stores_in(job.cell.stores)]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def changed_keys(job: GridJob, scores: Scores) -> list[str]:
    """Dotted keys that decide numbers and differ between the scores and the grid of now.

    A key that the scores do not know yet counts with its default.
    """
    if job.row == BASELINES:
        return []
    try:
        then = to_dict(build_section(RunConfig, scores.config))
    except SchemaError as problem:
        return [".".join(problem.key)]
    return sorted(_differing(_settled(then), _settled(to_dict(job.job.config)), ()))


def _settled(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in UNSETTLED}
    return {**kept, "data": _without(config["data"], UNSETTLED_DATA)}


def _without(section: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def _differing(one: Any, other: Any, key: tuple[str, ...]) -> set[str]:
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return set() if one == other else {".".join(key)}
    found: set[str] = set()
    for name in {*one, *other}:
        found |= _differing(one.get(name), other.get(name), (*key, name))
    return found


def _ruler(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the reference that decide what rows are measured with."""
    data = _without(config["data"], UNSETTLED_DATA)
    return {"genes": config["genes"], "pathways": config["pathways"], "data": data}


def _same_ruler(job: GridJob, scores: Scores) -> bool:
    then, now = scores.facts["ruler"], job.reference.config
    try:
        genes = build_section(GenesConfig, then["genes"])
        pathways = build_section(PathwaysConfig, then["pathways"])
    except SchemaError:
        return False
    if scores.facts.get("evaluate", {}) != job.evaluate:
        return False
    known = _ruler(to_dict(now))["data"]
    same_data = all(then["data"].get(key, known[key]) == known[key] for key in known)
    return (genes, pathways) == (now.genes, now.pathways) and same_data


def is_current(job: GridJob, scores: Scores | None) -> bool:
    """Whether scores are of the settings, the data and the ruler of now."""
    if scores is None or scores.facts["data"] != data_digest(job):
        return False
    return not changed_keys(job, scores) and _same_ruler(job, scores)


def is_done(job: GridJob, tasks: Sequence[str]) -> bool:
    """Whether a job has scores of all tasks, measured as the grid says now.

    Raises:
        ConfigError: it was trained with other settings or on other data than the grid says now.
    """
    scores = read_scores(job)
    if scores is None:
        return False
    keys = changed_keys(job, scores)
    other = f"other settings ({', '.join(keys[:5])})" if keys else "other stores"
    if keys or scores.facts["data"] != data_digest(job):
        raise ConfigError(
            f"{job.folder} holds scores of {other} than job {job.number} has now; give another "
            "--out, or remove that folder"
        )
    return _same_ruler(job, scores) and set(tasks) <= set(scores.tasks)


def state(job: GridJob, tasks: Sequence[str]) -> str:
    """``done``, ``started`` or ``-``, for the list of jobs."""
    if _has_stores(job) and is_done(job, tasks):
        return "done"
    return "started" if job.job.started else "-"


def _has_stores(job: GridJob) -> bool:
    """Whether the cohort of a job, if it has one, is simulated."""
    return job.cell.cohort is None or job.cell.stores.is_dir()


@dataclass(frozen=True)
class Tables:
    """What the jobs that are done say.

    Attributes:
        values: one line a value: `VALUE_COLUMNS` and `DECLARED`; ``unit`` is the slide (or
            patient) that it is of, ``quantity`` what was measured there.
        costs: one line a trained job: `COST_COLUMNS`.
        summary: one line a cell, row, task and metric; see `summarise`.
        missing: names of the jobs that are not done.
    """

    values: pd.DataFrame
    costs: pd.DataFrame
    summary: pd.DataFrame
    missing: tuple[str, ...]


def make_tables(grid: GridConfig, jobs: Sequence[GridJob]) -> Tables:
    """Join the scores of all jobs that are done.

    Raises:
        ConfigError: no job is done, or a metric of the grid is in none of them.
    """
    values: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    missing = []
    for job in jobs:
        scores = read_scores(job)
        if scores is None or not (_has_stores(job) and is_current(job, scores)):
            missing.append(job.name)
            continue
        values += _values(job, scores)
        if job.row != BASELINES:
            costs.append({name: scores.facts.get(name) for name in COST_COLUMNS})
    if not values:
        raise ConfigError(
            f"none of the {len(jobs)} jobs of {grid.out} is done; run `hibio ablate` without "
            "--report-only first"
        )
    frame = pd.DataFrame(values, columns=VALUE_COLUMNS + DECLARED)
    _check_metrics(grid, frame)
    cost = pd.DataFrame(costs, columns=COST_COLUMNS)
    summary = summarise(grid, frame, cost, points_of(jobs))
    return Tables(frame, cost, summary, tuple(missing))


def points_of(jobs: Sequence[GridJob]) -> dict[str, dict[str, Any]]:
    """Cell -> axis -> value, in the order of the jobs."""
    return {job.cell.name: dict(job.cell.point) for job in jobs}


def _values(job: GridJob, scores: Scores) -> Iterator[dict[str, Any]]:
    for task, result in scores.tasks.items():
        declared = TaskRecord(task, result)
        for model, metrics in result["models"].items():
            for metric, entry in metrics.items():
                for key, value in zip(entry["keys"], entry["values"], strict=True):
                    fold, seed, unit = key.split("/", 2)
                    yield {
                        "cell": job.cell.name,
                        "row": model,
                        "task": task,
                        "metric": metric,
                        "fold": fold,
                        "seed": int(seed),
                        "unit": unit,
                        "value": np.nan if value is None else float(value),
                        "chance": entry.get("chance"),
                        "quantity": entry["unit"],
                        "better": declared.better(metric),
                        "role": declared.role(model),
                    }


def _check_metrics(grid: GridConfig, values: pd.DataFrame) -> None:
    for task, metrics in grid.tasks.items():
        known = sorted(values.loc[values.task == task, "metric"].unique())
        for metric in metrics:
            if metric not in known:
                hint = did_you_mean(metric, known, cutoff=0.5)
                raise ConfigError(
                    f"tasks.{task}: no done job has the metric {metric!r}{hint} (metrics: "
                    f"{', '.join(known) or 'none'})"
                )


def summarise(
    grid: GridConfig, values: pd.DataFrame, costs: pd.DataFrame, points: Points
) -> pd.DataFrame:
    """One line a cell, row, task and metric, from the values and costs of `Tables`.

    Returns:
        The axes; ``group``, ``row``, ``task``, ``metric``; ``mean``, ``std`` and ``n`` of all
        defined values, ``std_seeds`` of the seeds' means; ``values``; ``difference``, ``low``,
        ``high``, ``p``, ``p_holm`` (over the rows of a cell and metric), ``units`` and ``better``
        (units where the row is better) against the reference; ``n_parameters``, ``steps`` and
        ``train_s`` (mean of the row's jobs).
    """
    lines: list[dict[str, Any]] = []
    for cell, point in points.items():
        for task, metrics in grid.tasks.items():
            for metric in metrics:
                mine = values.task.eq(task) & values.metric.eq(metric) & values.cell.eq(cell)
                found = values[mine & values.value.notna()]
                block = _block(grid, found, task, metric) if len(found) else ()
                lines += [{"cell": cell, **point, **line} for line in block]
    summary = pd.DataFrame(lines)
    if summary.empty:
        return summary
    spent = ["n_parameters", "steps", "train_s"]
    numbers = costs.astype(dict.fromkeys(spent, float))
    per_row = numbers.groupby(["cell", "row"], as_index=False)[spent].mean()
    return summary.merge(per_row, on=["cell", "row"], how="left")


def _block(
    grid: GridConfig, found: pd.DataFrame, task: str, metric: str
) -> Iterator[dict[str, Any]]:
    """The lines of one cell and metric."""
    present = list(dict.fromkeys(found.row))
    order = [row for row in grid.ordered_rows if row in present]
    order += [row for row in present if row not in grid.rows]
    reference = found[found.row == grid.reference]
    gains = {
        row: paired_units(found[found.row == row], reference, by_seed=row in grid.rows)
        for row in order
        if row != grid.reference
    }
    tests = {
        row: paired_bootstrap(gain, np.zeros(len(gain)), draws=grid.draws, level=grid.level)
        for row, gain in gains.items()
        if len(gain)
    }
    corrected = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    sign = sign_of(found)
    for row in order:
        own = found[found.row == row]
        by_seed = own.groupby("seed").value.mean()
        line = {
            "group": grid.group_of(row) if row in grid.rows else BASELINES,
            "row": row,
            "task": task,
            "metric": metric,
            "mean": own.value.mean(),
            "std": own.value.std(ddof=1),
            "n": len(own),
            "std_seeds": by_seed.std(ddof=1),
            "values": " ".join(f"{value:.4f}" for value in own.value),
        }
        test = tests.get(row)
        better = np.nan if test is None else int((sign * gains[row] > 0).sum())
        yield {**line, **_difference(test), "p_holm": corrected.get(row), "better": better}


def _difference(test: PairedInterval | None) -> dict[str, Any]:
    names = ("low", "high", "p", "units")
    if test is None:
        return {"difference": np.nan, **dict.fromkeys(names, np.nan)}
    return {"difference": test.mean, **{name: getattr(test, name) for name in names}}


def paired_units(own: pd.DataFrame, reference: pd.DataFrame, *, by_seed: bool) -> np.ndarray:
    """`unit_gains` (U,) of one row over the reference, in one cell and metric."""
    return unit_gains(_by_key(own), _by_key(reference), by_seed=by_seed)


def _by_key(values: pd.DataFrame) -> dict[str, float]:
    """Value under ``fold/seed/unit``."""
    keys = (f"{f}/{s}/{u}" for f, s, u in zip(values.fold, values.seed, values.unit, strict=True))
    return dict(zip(keys, values.value.tolist(), strict=True))


def sign_of(values: pd.DataFrame) -> float:
    """-1 where lower values of a metric are better, else 1."""
    return -1.0 if "low" in set(values.better) else 1.0


def direction_of(values: pd.DataFrame) -> str:
    """Words for which values of a metric are better."""
    better = {*values.better} - {"none"}
    return f"{'lower' if 'low' in better else 'higher'} is better" if better else "no direction"


def gains_by_seed(grid: GridConfig, values: pd.DataFrame, row: str, sign: float) -> pd.DataFrame:
    """Gain of a row over the reference, one number a cell and seed.

    The ``values`` are of one metric, all cells and rows; ``sign`` is its `sign_of`.

    Returns:
        Columns ``cell``, ``seed``, ``gain``: the mean over the slides that both have.
    """
    keys = ["cell", "fold", "unit", "seed"]
    known = values[values.value.notna()]
    own, reference = known[known.row == row], known[known.row == grid.reference]
    both = own.merge(reference, on=keys, suffixes=("", "_reference"))
    both["gain"] = sign * (both.value - both.value_reference)
    means = both.groupby(["cell", "seed"], sort=False).gain.mean()
    return means.reset_index()


def term_table(grid: GridConfig, values: pd.DataFrame, points: Points) -> pd.DataFrame:
    """One line a term, cell and metric: gain, gain of the control, and term against control.

    Returns:
        ``term``, ``task``, ``metric``, ``cell`` and the axes; ``gain``, ``gain_low``,
        ``gain_high`` and ``gain_p`` against the reference; the same as ``control_*`` of the
        control, and as ``over_*`` of the term against its control. Positive is better.
    """
    lines = [
        {"term": title, "task": task, "metric": metric, "cell": cell, **points[cell], **numbers}
        for title in grid.terms
        for task, metrics in grid.tasks.items()
        for metric in metrics
        for cell, numbers in _lines(grid, values, title, task, metric)
    ]
    return pd.DataFrame(lines)


def _lines(
    grid: GridConfig, values: pd.DataFrame, title: str, task: str, metric: str
) -> Iterator[tuple[str, dict[str, float]]]:
    term = grid.terms[title]
    known = values[values.task.eq(task) & values.metric.eq(metric) & values.value.notna()]
    sign = sign_of(known)
    for cell, part in known.groupby("cell", sort=False):
        frames = {row: part[part.row == row] for row in (term.row, term.control, grid.reference)}
        pairs = {
            "gain": (term.row, grid.reference),
            "control": (term.control, grid.reference),
            "over": (term.row, term.control),
        }
        line: dict[str, float] = {}
        for name, (first, second) in pairs.items():
            gain = sign * paired_units(frames[first], frames[second], by_seed=True)
            line |= _test(name, gain, grid)
        yield str(cell), line


def _test(name: str, gain: np.ndarray, grid: GridConfig) -> dict[str, float]:
    ends = [f"{name}_{part}" for part in ("low", "high", "p", "units")]
    if not len(gain):
        return {name: np.nan, **dict.fromkeys(ends, np.nan)}
    found = paired_bootstrap(gain, np.zeros(len(gain)), draws=grid.draws, level=grid.level)
    numbers = (found.low, found.high, found.p, found.units)
    return {name: found.mean, **dict(zip(ends, numbers, strict=True))}
