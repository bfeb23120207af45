"""Checkpoints and stores to results.json and report.html."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from eval.compare.fingerprint import fingerprint
from eval.compare.paired import listed
from eval.embed import Checkpoint, find_checkpoints
from eval.folds.assemble import (
    JobGroup,
    assemble,
    group_checkpoints,
    seed_means,
    split_entries,
    stored_features,
)
from eval.folds.fold import Cost, Fold
from eval.peers import PEERS
from eval.peers.peer import Budget, Peer, find_peers, with_peers
from eval.report import pictures, write_report
from eval.report.markdown import write_markdown
from eval.results import (
    SEEN,
    Measure,
    Metric,
    Question,
    Row,
    Seen,
    Task,
    TaskRecord,
    TaskResult,
    marked,
    merge,
    task_record,
    write_results,
)
from eval.settings import configured_peers, find_task, task_configs
from eval.tables import open_folder
from eval.tasks import TASKS
from eval.tasks.probes import FULL
from hibio.checkpoint import (
    provenance,
    read_log,
    refuse_model_folder,
    steps_taken,
    verdicts_on,
)
from hibio.config.files import ConfigError, to_dict
from hibio.data.splits import SlideEntry, Split, read_entries, with_counts
from preprocessing.files import atomic_path, files_in, locked, refuse_others
from preprocessing.store.read import stores_in

RESULTS, TABLES, PAGE = "results.json", "results.md", "report.html"
FINISHED, MADE_OF = "finished", "made_of.json"  # of an evaluation: its tasks that are done
CODE, SETTINGS = "code", "settings of tasks"  # of what they are made of


def cost_table(checkpoints: Sequence[Checkpoint], folds: Iterable[Fold]) -> list[dict[str, Any]]:
    """Rows of the models table of the report: checkpoints, and the peers of the folds.

    Returns:
        One mapping a model with ``model``, ``source``, ``n_parameters``, ``fits`` (folds x seeds)
        ``seconds`` (mean wall time of a fit on the machine that ran it) and ``steps`` (mean number
        of optimiser steps of a fit), or None.
    """
    found: dict[str, list[Cost]] = {}
    for checkpoint in checkpoints:
        found.setdefault(checkpoint.variant, []).append(checkpoint_cost(checkpoint))
    for fold in folds:
        for model in (*fold.models, *fold.per_slide):
            if model.cost is not None:
                found.setdefault(model.name, []).append(model.cost)
    return [_cost_row(model, costs) for model, costs in found.items()]


def checkpoint_cost(checkpoint: Checkpoint) -> Cost:
    """Parameters and steps of a checkpoint, and their seconds in its training log, if kept."""
    steps = read_log(checkpoint.path.parent / "log.jsonl")
    seconds = [float(step["seconds"]) for step in steps if "seconds" in step]
    size = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    spent = sum(seconds) if seconds else None
    return Cost("this run", size, spent, steps_taken(checkpoint.path))


def budget_of(checkpoint: Checkpoint) -> Budget | None:
    """Steps and spots a step of a checkpoint, for the peers beside it; None: it does not say."""
    steps, sampler = steps_taken(checkpoint.path), checkpoint.run.sampler
    if steps is None:
        print(f"{checkpoint.path}: keeps no number of its steps; peers are trained as by default")
        return None
    return Budget(steps, sampler.batch_spots * sampler.batches_per_step)


def verdict_rows(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """What became of the judged stages of each checkpoint: ``model``, ``fold``, ``seed``, verdict.

    The verdict is `hibio.training.curriculum.Verdict`: stage, outcome, three scores, and on what.
    """
    return [
        {"model": one.variant, "fold": one.fold, "seed": one.seed, **verdict}
        for one in checkpoints
        for verdict in verdicts_on(one.path)
    ]


def _cost_row(model: str, costs: Sequence[Cost]) -> dict[str, Any]:
    timed = [cost.seconds for cost in costs if cost.seconds is not None]
    stepped = [cost.steps for cost in costs if cost.steps is not None]
    return {
        "model": model,
        "source": costs[0].source,
        "n_parameters": max(cost.n_parameters for cost in costs),
        "fits": len(costs),
        "seconds": float(np.mean(timed)) if timed else None,
        "steps": float(np.mean(stepped)) if stepped else None,
    }


def evaluate(
    checkpoint: Path,
    data: Path,
    out: Path,
    tasks: Sequence[str] | None = None,
    peers: str | Sequence[str] = "none",
    settings: Mapping[str, Any] | None = None,
    test: Sequence[str] = (),
) -> Path:
    """Measure every checkpoint below a folder on the slides it was not trained on.

    Args:
        checkpoint: a checkpoint, or a run folder with all folds, seeds and trained baselines.
        data: folder of stores, training slides included (read-outs are fitted on them).
        out: ``results.json``, ``results.md`` and ``report.html`` go there, and each task as soon
            as it is done (``finished/``): the same call goes on where one was killed.
        tasks: names of :data:`eval.tasks.TASKS`; all when None.
        peers: names of :data:`eval.peers.PEERS`, ``all`` or ``none``; fitted on each fold.
        settings: task -> its settings in place of the defaults, and ``peers`` -> peer -> its own;
            recorded in ``results.json``.
        test: ids of the slides that are measured, of trained patients too (marked); all that are
            unseen when empty.

    Returns:
        The report.

    Raises:
        ConfigError: see `group_checkpoints` and `assemble`; ``out`` holds results of other
            settings, stores or checkpoints, or such a file that HiBio did not make. All before
            anything is measured or written.
        DataError: another process is measuring into ``out``.
        OSError: ``out`` cannot be made.
    """
    for name in tasks or ():
        find_task(name)
    given = settings or {}
    configs = task_configs(given, tasks or TASKS)
    beside = configured_peers(given, find_peers(peers, PEERS))
    refuse_model_folder(out)
    with locked(out):
        started = time.perf_counter()
        entries = with_counts(read_entries(stores_in(data)), "evaluation")
        groups = group_checkpoints(find_checkpoints(checkpoint))
        splits = [split_entries(group, entries, test) for group in groups]
        finished = Finished.opened(out, made_of(groups, entries, configs, beside, test))
        results, folds = _fold_results(groups, splits, configs, beside, finished)
        for name in configs:
            if TASKS[name].pooled:
                results += _pooled_results(name, TASKS[name], configs[name], folds, finished)
        results += _seed_mean_results(configs, folds, finished)
        merged = _with_models(merge(apart(results)))
        facts = _facts(groups, entries, time.perf_counter() - started) | _marks(groups, folds)
        measured = [checkpoint for group in groups for checkpoint in group.checkpoints]
        facts["models"] = cost_table(measured, folds)
        facts["curriculum"] = verdict_rows(measured)
        facts |= {"settings": dict(given)} if given else {}
        body = write_results(out / RESULTS, to_dict(groups[0].main.run), facts, merged)
        write_markdown(out / TABLES, body)
        figures = pictures(groups, folds[0].by_seen()[0], entries, body, configs)
        return write_report(out / PAGE, body, figures)


def made_of(
    groups: Sequence[JobGroup],
    entries: Sequence[SlideEntry],
    configs: Mapping[str, Any],
    peers: Sequence[Any],
    test: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """What decides the numbers of an evaluation, as JSON has it: kind -> name -> value."""
    code = provenance()
    found = {
        CODE: {"version": code["packages"]["hibio"], "commit": code["commit"]},
        "checkpoints": {
            f"{one.variant}/{one.fold}/{one.seed}": one.sha256
            for group in groups
            for one in group.checkpoints
        },
        "stores": {entry.slide_id: entry.seal for entry in entries},
        "--test": dict.fromkeys(test, True),
        "--peers": {peer.name: dataclasses.asdict(peer) for peer in peers},
        SETTINGS: {name: dataclasses.asdict(one) for name, one in configs.items()},
    }
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(found, default=str))
    return plain


@dataclass(frozen=True)
class Finished:
    """Tasks of an evaluation that are done, a file of the form of results.json for each.

    Attributes:
        folder: where they lie, beside ``made_of.json``.
    """

    folder: Path

    @classmethod
    def opened(cls, out: Path, now: Mapping[str, dict[str, Any]]) -> Finished:
        """Those of the folder ``out``, after what they were ``made_of`` was compared with ``now``.

        Those of another version of the code are removed.

        Raises:
            ConfigError: they are of other settings, stores or checkpoints, or in the place of a
                result lies something else; nothing was changed.
        """
        folder, tasks = out / FINISHED, now[SETTINGS]
        known = _known(out)
        other = [] if known is None else _differing(known, now)
        if other:
            raise ConfigError(
                f"{out} holds results of other {' and '.join(other)}; give another --out, or "
                "remove that folder. Nothing was changed"
            )
        open_folder(out)
        open_folder(folder)
        if known is not None and known.get(CODE) == now[CODE]:
            tasks = known.get(SETTINGS, {}) | tasks
        else:
            for path in files_in(folder):
                print(f"{path}: of another version of HiBio; measured again")
                path.unlink()
        with atomic_path(folder / MADE_OF) as temporary:
            temporary.write_text(json.dumps({**now, SETTINGS: tasks}, indent=1) + "\n")
        return cls(folder)

    def run(
        self, name: str, task: Task, config: Any, folds: Sequence[Fold], unit: str
    ) -> TaskResult:
        """The result of a task on folds of one mark, measured unless it is there.

        ``unit`` says which folds and seeds; a task that is not pooled gets the only fold.

        Raises:
            ConfigError: what was kept cannot be read.
        """
        key = hashlib.sha256(json.dumps([unit, folds[0].mark]).encode()).hexdigest()[:16]
        path = self.folder / f"{name}-{key}.json"
        if path.is_file():
            return _kept(path, name)
        with threadpool_limits(1):  # many small fits: a second thread only waits (10x slower)
            result = task.run(folds if task.pooled else folds[0], config)
        result = with_seen(result, folds[0].mark)
        write_results(path, config, {"of": unit, "seen": folds[0].mark}, [result])
        return result


def _known(out: Path) -> dict[str, Any] | None:
    """What the results in a folder were made of; None where there are none."""
    path = out / FINISHED / MADE_OF
    if path.is_file():
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); remove {out}") from error
    refuse_others({out / RESULTS: '"tasks"'}, (out / TABLES, out / PAGE))
    if (out / RESULTS).is_file():
        raise ConfigError(
            f"{out} holds results of an older HiBio or of another command, which do not say what "
            "they were made of; move or remove that folder and give the same command again, or "
            "give another --out. Nothing was changed"
        )
    return None


def _differing(known: Mapping[str, Any], now: Mapping[str, dict[str, Any]]) -> list[str]:
    """Kinds and names of what decides the numbers and is another; of tasks those that both have."""
    told = []
    for kind, given in now.items():
        before = known.get(kind, {})
        names = set(given) & set(before) if kind == SETTINGS else set(given) | set(before)
        other = sorted(name for name in names if before.get(name) != given.get(name))
        if other and kind != CODE:
            told.append(f"{kind} ({listed(other)})")
    return told


def _kept(path: Path, name: str) -> TaskResult:
    """A result as `Finished.run` wrote it."""
    try:
        record = task_record(json.loads(path.read_text(encoding="utf-8")), name)
        return _read_result(record)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove it") from error


def _read_result(record: TaskRecord) -> TaskResult:
    models = {
        model: {name: _read_metric(entry) for name, entry in metrics.items()}
        for model, metrics in record.models.items()
    }
    units = {name: metric.unit for row in models.values() for name, metric in row.items()}
    measures = {
        name: Measure(name, units[name], **{**one, "words": tuple(one["words"])})
        for name, one in record.body["metrics"].items()
    }
    body = record.body
    question = Question(record.task, body["words"], tuple(body["short"]))
    rows = {name: Row(**row) for name, row in body["rows"].items()}
    return TaskResult(record.task, models, list(body["notes"]), question, measures, rows)


def _read_metric(entry: Mapping[str, Any]) -> Metric:
    values = [math.nan if value is None else float(value) for value in entry["values"]]
    return Metric(values, entry["unit"], entry.get("chance"), list(entry["keys"]))


def _fold_results(
    groups: Sequence[JobGroup],
    splits: Sequence[Split],
    configs: Mapping[str, Any],
    peers: Sequence[Peer],
    finished: Finished,
) -> tuple[list[TaskResult], list[Fold]]:
    """Results of the tasks of a single fold, and the fold of each group."""
    single = [name for name in configs if not TASKS[name].pooled]
    results: list[TaskResult] = []
    folds: list[Fold] = []
    bar = tqdm(total=len(groups) * len(single), desc="evaluate", disable=None)
    for group, split in zip(groups, splits, strict=True):
        first = all(fold.name != group.fold for fold in folds)
        fold = assemble(group, split, with_baselines=first, tasks=list(configs))
        if peers:
            image, budget = group.main.run.data.image, budget_of(group.main)
            features = stored_features((*split.train, *split.test), image)
            kept = finished.folder
            fold = with_peers(fold, peers, features, seedless=first, budget=budget, kept=kept)
        for name in single:
            bar.set_postfix_str(f"fold {group.fold}, seed {group.seed}, {name}")
            results += [
                finished.run(name, TASKS[name], configs[name], [part], fold.key("every slide"))
                for part in fold.by_seen()
            ]
            bar.update()
        # what is hidden stays with the first
        folds.append(dataclasses.replace(fold, hidden=None, raw_features=None))
    bar.close()
    return results, folds


def with_seen(result: TaskResult, seen: Seen) -> TaskResult:
    """The result, its rows marked with what was seen of their test slides."""
    rows = {name: dataclasses.replace(row, seen=seen) for name, row in result.rows.items()}
    return dataclasses.replace(result, rows=rows)


def apart(results: Iterable[TaskResult]) -> list[TaskResult]:
    """Results whose marked rows have names of their own, so that no mean is over both kinds.

    Where all rows have one mark, they keep their names: it stands in ``rows``.
    """
    listed = list(results)
    if len({row.seen for result in listed for row in result.rows.values()}) < 2:
        return listed
    return [_renamed(result) for result in listed]


def _renamed(result: TaskResult) -> TaskResult:
    names = {n: marked(n, row.seen) if row.seen else n for n, row in result.rows.items()}
    return dataclasses.replace(
        result,
        models={names[name]: metrics for name, metrics in result.models.items()},
        rows={names[name]: row for name, row in result.rows.items()},
    )


def _alike(folds: Iterable[Fold], key: Callable[[Fold], Any]) -> list[list[Fold]]:
    """Folds, their unseen and their marked test slides apart, grouped by a key and the mark."""
    found: dict[Any, list[Fold]] = {}
    for part in (part for fold in folds for part in fold.by_seen()):
        found.setdefault((key(part), part.mark), []).append(part)
    return list(found.values())


def _pooled_results(
    name: str, task: Task, config: Any, folds: Sequence[Fold], finished: Finished
) -> list[TaskResult]:
    """One result a seed of a task that scores all folds together."""
    bar = tqdm(_alike(folds, lambda fold: fold.seed), desc=f"evaluate {name}", disable=None)
    return [
        finished.run(name, task, config, members, f"every fold of seed {members[0].seed}")
        for members in bar
    ]


def _with_models(results: Mapping[str, TaskResult]) -> dict[str, TaskResult]:
    """Results of the tasks that ran; the notes of the others are printed."""
    for name, result in results.items():
        for note in () if result.models else result.notes:
            print(f"{name}: {note}")
    return {name: result for name, result in results.items() if result.models}


def _seed_mean_results(
    configs: Mapping[str, Any], folds: Sequence[Fold], finished: Finished
) -> list[TaskResult]:
    """All seeds of a fold as one model, a row of its own: always of retrieval, else in full."""
    seeds_of = _alike(folds, lambda fold: fold.name)
    means = [mean for seeds in seeds_of if (mean := seed_means(seeds)) is not None]
    run: dict[str, Any] = {}
    if "retrieval" in configs:
        run["retrieval"] = dataclasses.replace(configs["retrieval"], identity_spots=0)
    if "expression" in configs and configs["expression"].readout == FULL:
        run["expression"] = configs["expression"]
    results = []
    for name, config in run.items():
        for mean in means:
            unit = f"every seed of {mean.name}"
            results.append(_rows_of(mean, finished.run(name, TASKS[name], config, [mean], unit)))
    return results


def _rows_of(mean: Fold, result: TaskResult) -> TaskResult:
    """The models' rows alone: references of the task itself stand in every seed's result."""
    kept = {name: row for name, row in result.models.items() if mean.has_model(name)}
    return dataclasses.replace(result, models=kept)


def _marks(groups: Sequence[JobGroup], folds: Sequence[Fold]) -> dict[str, Any]:
    """What is not as usual, where it is so: test slides seen in training, variants left out."""
    seen: dict[str, list[str]] = {}
    for fold in folds:
        for slide, kind in fold.seen.items():
            names = seen.setdefault(SEEN[kind], [])
            name = f"{fold.name}/{slide}"
            names += [name] * (name not in names)
    lacking = [
        f"{name} of fold {group.fold}, seed {group.seed} (no checkpoint)"
        for group in groups
        for name in group.lacking
    ]
    for told in lacking:
        print(f"left out: {told}")
    return ({"seen": seen} if seen else {}) | ({"left_out": lacking} if lacking else {})


def _facts(
    groups: Sequence[JobGroup], entries: Sequence[SlideEntry], seconds: float
) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = groups[0].main.model
    database = model.artifacts.database
    return {
        **provenance(),
        "checkpoint": str(groups[0].main.path),
        "main_model": groups[0].main.variant,
        "folds": sorted({group.fold for group in groups}),
        "seeds": sorted({group.seed for group in groups}),
        "n_slides": len(entries),
        "n_patients": len({entry.patient_id for entry in entries}),
        "n_spots": sum(entry.n_spots for entry in entries),
        "n_genes": model.artifacts.n_genes,
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pathways": "none" if database is None else f"{database.name} {database.sha256[:12]}",
        "wall_time_s": seconds,
        "fingerprint": fingerprint(groups, entries),
    }
