"""``scores.json``: what one job measured, and the mark that it is done.

It is written last and whole, so a job that was killed has none and is done again; its training
goes on from its checkpoint. The file has the schema of every results.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.results import TaskResult, write_results
from hibio.ablation.config import BASELINES
from hibio.ablation.plan import GridJob
from hibio.config import ConfigError, to_dict
from hibio.data.fitting import GenesConfig, PathwaysConfig
from hibio.run_config import RunConfig
from hibio.schema import SchemaError, build_section
from hibio.training.checkpoint import UNSETTLED_DATA
from preprocessing.run import stores_in

NAME = "scores.json"
#: Settings that decide no number, or are compared otherwise.
UNSETTLED = {"out", "folds", "seeds", "variant", "variants", "threads", "checkpoint_every", "bank"}


@dataclass(frozen=True)
class Scores:
    """Content of a ``scores.json``.

    Attributes:
        config: the resolved configuration of the job.
        facts: row, cell, fold, seed, ``n_parameters``, ``train_s``, ``measure_s``; ``data`` and
            ``ruler``, what it was measured on and with.
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
        return Scores(dict(body["config"]), dict(body["data"]), dict(body["tasks"]))
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
    if (job.cell.cohort is None or job.cell.stores.is_dir()) and is_done(job, tasks):
        return "done"
    return "started" if job.job.started else "-"
