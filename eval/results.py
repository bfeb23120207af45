"""Results of tasks: values per (fold, seed, slide), merged over folds, written as strict JSON.

The schema is that of docs/architecture.md:
``{"config", "data", "tasks": {TASK: {"models": {MODEL: {METRIC: {...}}}, "notes": [...]}}}`` and a
metric is ``{"mean", "std", "n", "values", "unit", "keys", "chance"?}``. NaN becomes null.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.errors import FoldError
from eval.folds.fold import Representation
from preprocessing.files import atomic_path

MAIN = "hibio"

RAW = "raw_features"

TOWER_SUFFIX = "_tower"

DECODER_SUFFIX = "_decoder"

SEED_MEAN = "_seed_mean"

NO_FOLD = "none"  # trained on every slide


@dataclass(frozen=True)
class Metric:
    """One number per unit (usually per test slide), never only their mean.

    Args:
        values: one value per unit; NaN where it is undefined there.
        unit: what a value is and of what, such as ``Pearson r per slide``.
        chance: what a guess reaches (mean over the units), or None where it has no meaning.
        keys: ``fold/seed/slide`` of each value.
    """

    values: list[float]
    unit: str
    chance: float | None
    keys: list[str]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.keys):
            raise FoldError(f"{len(self.values)} values but {len(self.keys)} keys; one key a value")

    @property
    def n(self) -> int:
        """Number of values that are defined."""
        return int(np.isfinite(self.values).sum())

    @property
    def mean(self) -> float:
        """Mean of the defined values; NaN when there is none."""
        return math.fsum(self._defined()) / self.n if self.n else math.nan

    @property
    def std(self) -> float:
        """Sample standard deviation (n - 1) of the defined values; NaN below two values."""
        return float(np.std(self._defined(), ddof=1)) if self.n > 1 else math.nan

    def to_json(self) -> dict[str, Any]:
        """The metric as the results file holds it."""
        record: dict[str, Any] = {
            "mean": self.mean,
            "std": self.std,
            "n": self.n,
            "values": list(self.values),
            "unit": self.unit,
            "keys": list(self.keys),
        }
        return record if self.chance is None else {**record, "chance": self.chance}

    def _defined(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]


@dataclass(frozen=True)
class TaskResult:
    """All values of one task: ``models[MODEL][METRIC]`` and notes that a report must print."""

    task: str
    models: dict[str, dict[str, Metric]]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The task as the results file holds it."""
        models = {
            model: {name: metric.to_json() for name, metric in metrics.items()}
            for model, metrics in self.models.items()
        }
        return {"models": models, "notes": list(self.notes)}


class ResultTable:
    """Collects single values while a task runs; `result` freezes them."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._cells: dict[tuple[str, str], list[tuple[str, float, float | None]]] = {}
        self._units: dict[tuple[str, str], str] = {}
        self._notes: list[str] = []

    def add(
        self,
        model: str,
        metric: str,
        key: str,
        value: float,
        unit: str,
        chance: float | None = None,
    ) -> None:
        """Add one value of one metric of one model, under its ``fold/seed/slide`` key."""
        self._cells.setdefault((model, metric), []).append((key, float(value), chance))
        self._units[model, metric] = unit

    def add_model(self, model: str) -> None:
        """List a model even when no metric of it can be computed."""
        self._cells.setdefault((model, ""), [])

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self._notes:
            self._notes.append(text)

    def result(self, described: Iterable[Representation] = ()) -> TaskResult:
        """Everything that was added, with the notes of those described models that have values."""
        present = {model for model, _ in self._cells}
        for one in described:
            for text in one.notes if one.name in present else ():
                self.note(f"{one.name}: {text}")
        models: dict[str, dict[str, Metric]] = {}
        for (model, name), cell in self._cells.items():
            metrics = models.setdefault(model, {})
            if name:
                chances = [chance for _, _, chance in cell if chance is not None]
                metrics[name] = Metric(
                    values=[value for _, value, _ in cell],
                    unit=self._units[model, name],
                    chance=math.fsum(chances) / len(chances) if chances else None,
                    keys=[key for key, _, _ in cell],
                )
        return TaskResult(self._task, models, list(self._notes))


def merge(results: Iterable[TaskResult]) -> dict[str, TaskResult]:
    """Join the results of several folds and seeds, keeping every value with its key.

    Args:
        results: results of any tasks; those of one task are joined.

    Returns:
        task -> result, in the order in which tasks first appear.

    Raises:
        FoldError: two results hold the same metric under the same ``fold/seed/slide`` key.
    """
    merged: dict[str, TaskResult] = {}
    for result in results:
        old = merged.get(result.task, TaskResult(result.task, {}))
        merged[result.task] = _join(old, result)
    return merged


def _join(left: TaskResult, right: TaskResult) -> TaskResult:
    models = {model: dict(metrics) for model, metrics in left.models.items()}
    for model, metrics in right.models.items():
        row = models.setdefault(model, {})
        for name, metric in metrics.items():
            where = f"{right.task}, {model}, {name}"
            row[name] = _join_metric(row[name], metric, where) if name in row else metric
    notes = left.notes + [note for note in right.notes if note not in left.notes]
    return TaskResult(left.task, models, notes)


def _join_metric(left: Metric, right: Metric, where: str) -> Metric:
    repeated = set(left.keys) & set(right.keys)
    if repeated:
        raise FoldError(
            f"{where}: two values under the key {min(repeated)!r}; give each fold and seed a "
            "name of its own"
        )
    if left.unit != right.unit:
        raise FoldError(f"{where}: units {left.unit!r} and {right.unit!r} cannot be joined")
    parts = [(m.chance, len(m.values)) for m in (left, right) if m.chance is not None]
    weight = sum(size for _, size in parts)
    chance = math.fsum(value * size for value, size in parts) / weight if weight else None
    return Metric(left.values + right.values, left.unit, chance, left.keys + right.keys)


def to_json(
    config: object, data: object, tasks: Mapping[str, TaskResult] | Iterable[TaskResult]
) -> dict[str, Any]:
    """The whole results file as plain Python objects, NaN as None.

    Args:
        config: the resolved configuration (a dataclass, a mapping, or anything made of them).
        data: what was evaluated: stores, splits, seeds.
        tasks: results; several of one task are merged.
    """
    listed = tasks.values() if isinstance(tasks, Mapping) else tasks
    merged = merge(listed)
    body = {"config": config, "data": data, "tasks": {t: r.to_json() for t, r in merged.items()}}
    plain: dict[str, Any] = _plain(body, "results")
    return plain


def write_results(
    path: Path | str,
    config: object,
    data: object,
    tasks: Mapping[str, TaskResult] | Iterable[TaskResult],
) -> dict[str, Any]:
    """Write ``results.json`` in one step and return what was written.

    Args:
        path: the file; its folder is made when missing.
        config: see `to_json`.
        data: see `to_json`.
        tasks: see `to_json`.

    Raises:
        FoldError: a value cannot be written as JSON; its place is named.
    """
    body = to_json(config, data, tasks)
    with atomic_path(Path(path)) as temporary:
        text = json.dumps(body, indent=1, allow_nan=False, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return body


def _plain(value: object, where: str) -> Any:
    """Plain JSON types; NaN and infinities become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _plain(named, where)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), where)
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(items)]
    return _plain_scalar(value, where)


def _plain_scalar(value: object, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    raise FoldError(
        f"{where}: {type(value).__name__} cannot be written as JSON; give numbers, strings, "
        "lists, mappings or dataclasses"
    )
