"""Results of tasks: values per (fold, seed, slide), merged over folds, written as strict JSON.

A task declares what it asks (`Question`), what each of its metrics is (`Measure`) and what each
row is (`Row`), where it computes them; the readers of results.json look nothing up by name. A task
in the file is written down in docs/architecture.md; NaN becomes null.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from eval.errors import FoldError
from hibio.keys import MAIN
from preprocessing.files import atomic_path

RAW = "raw_features"
TOWER_SUFFIX = "_tower"
DECODER_SUFFIX = "_decoder"
SEED_MEAN = "_seed_mean"
NO_FOLD = "none"  # trained on every slide
UNDECLARED = "not recorded"

Role = Literal["model", "variant", "baseline", "control", "oracle"]
Better = Literal["high", "low", "none"]
Seen = Literal["", "patient", "slide"]
SEEN: dict[Seen, str] = {"patient": "seen patient", "slide": "trained on"}  # marks of rows


@dataclass(frozen=True)
class Question:
    """What a task asks.

    Args:
        task: its name.
        words: the question in a sentence or two.
        short: the metrics that stand for it, of which the first that a model has is its headline.
    """

    task: str
    words: str = ""
    short: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measure:
    """What a metric is.

    Args:
        name, unit: such as ``image_to_omics/recall@10%`` and ``Pearson r per slide``.
        better: which values are; ``none`` of a number that ranks nothing.
        words: sentences on the parts of the name, ``part: meaning``.
        transductive: whether all spots of the test slide were used at once.
    """

    name: str
    unit: str
    better: Better = "high"
    words: tuple[str, ...] = ()
    transductive: bool = False

    def to_json(self) -> dict[str, Any]:
        """The declaration as the results file holds it; the unit stands with the values."""
        record = {"better": self.better, "words": list(self.words)}
        return record | {"transductive": self.transductive}


@dataclass(frozen=True)
class Row:
    """What a row of the results is.

    Args:
        role: ``model`` under test, ``variant`` built on its embeddings, ``baseline``, ``control``
            (something is shuffled or random on purpose), or ``oracle`` (sees what no prediction
            has).
        words: what it does; may be empty.
        seen: ``patient``: its test slides are of trained patients; ``slide``: were trained on.
    """

    role: Role
    words: str = ""
    seen: Seen = ""

    def to_json(self) -> dict[str, str]:
        """The row as the results file holds it; ``seen`` only where it is not empty."""
        return {name: text for name, text in vars(self).items() if text or name != "seen"}


class Described(Protocol):
    """A model that says what it is; `eval.folds.fold.Representation` is one."""

    @property
    def name(self) -> str:
        """Row name."""
        ...

    @property
    def row(self) -> Row:
        """What it is."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Printed with the results."""
        ...


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
        """Defined values."""
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
    """All values of one task, with what was declared of them.

    Args:
        task: its name.
        models: ``models[MODEL][METRIC]``.
        notes: what a report must print.
        question: what is asked.
        measures: of every metric.
        rows: of every model.
    """

    task: str
    models: dict[str, dict[str, Metric]]
    notes: list[str] = field(default_factory=list)
    question: Question | None = None
    measures: dict[str, Measure] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The task as the results file holds it."""
        question = self.question or Question(self.task)
        return {
            "models": {
                model: {name: metric.to_json() for name, metric in metrics.items()}
                for model, metrics in self.models.items()
            },
            "notes": list(self.notes),
            "words": question.words,
            "short": list(question.short),
            "metrics": {name: measure.to_json() for name, measure in self.measures.items()},
            "rows": {name: row.to_json() for name, row in self.rows.items()},
        }


@dataclass(frozen=True)
class Task:
    """A task: its config class, whose defaults are the published settings, and its function.

    Args:
        config: the config class.
        run: ``run(fold, config)``; of a pooled task ``run(folds, config)``.
        pooled: whether it scores all folds of a seed together.
    """

    config: type[Any]
    run: Callable[[Any, Any], TaskResult]
    pooled: bool = False


class ResultTable:
    """Collects single values while a task runs; `result` freezes them."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._cells: dict[tuple[str, str], list[tuple[str, float, float | None]]] = {}
        self._units: dict[tuple[str, str], str] = {}
        self._measures: dict[str, Measure] = {}
        self._rows: dict[str, Row] = {}
        self._notes: list[str] = []

    def add(
        self, model: str, measure: Measure, key: str, value: float, chance: float | None = None
    ) -> None:
        """Add one value of one metric of one model, under its ``fold/seed/slide`` key."""
        self._cells.setdefault((model, measure.name), []).append((key, float(value), chance))
        self._units[model, measure.name] = measure.unit
        self._measures.setdefault(measure.name, measure)

    def row(self, model: str, role: Role, words: str = "") -> None:
        """Declare a row that the task itself makes."""
        self._rows.setdefault(model, Row(role, words))

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self._notes:
            self._notes.append(text)

    def result(self, described: Iterable[Described] = ()) -> TaskResult:
        """Everything that was added, with roles and notes of those models that have values.

        Raises:
            FoldError: nobody says what a row is.
        """
        models: dict[str, dict[str, Metric]] = {}
        for (model, name), cell in self._cells.items():
            chances = [chance for _, _, chance in cell if chance is not None]
            models.setdefault(model, {})[name] = Metric(
                values=[value for _, value, _ in cell],
                unit=self._units[model, name],
                chance=math.fsum(chances) / len(chances) if chances else None,
                keys=[key for key, _, _ in cell],
            )
        for one in described:
            if one.name in models:
                self._rows.setdefault(one.name, one.row)
                for text in one.notes:
                    self.note(f"{one.name}: {text}")
        unknown = [model for model in models if model not in self._rows]
        if unknown:
            raise FoldError(
                f"task {self._question.task}: nobody says what the row {unknown[0]!r} is; declare "
                "it with ResultTable.row, or pass its representation to ResultTable.result"
            )
        rows = {model: self._rows[model] for model in models}
        task = self._question.task
        return TaskResult(task, models, list(self._notes), self._question, self._measures, rows)


@dataclass(frozen=True)
class TaskRecord:
    """One task of a results file, read: its values and what was declared of them.

    A file of an older version declares nothing: its roles are ``not recorded`` (but for the row
    ``hibio``) and its metrics rank nothing until it is measured again.

    Args:
        task: its name.
        body: what stands under that name.
    """

    task: str
    body: Mapping[str, Any]

    @property
    def models(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """``models[MODEL][METRIC]``."""
        return self.body.get("models") or {}

    @property
    def main(self) -> str:
        """Name of the model under test."""
        return next((name for name in self.models if self.role(name) == "model"), MAIN)

    @property
    def metrics(self) -> list[str]:
        """All metrics; those with the same prefix stand together, in order of appearance."""
        names = list(dict.fromkeys(name for metrics in self.models.values() for name in metrics))
        groups = list(dict.fromkeys(prefix_of(name) for name in names))
        return sorted(names, key=lambda name: groups.index(prefix_of(name)))

    @property
    def headline(self) -> str | None:
        """The metric that stands for the task: of those declared the first of the main model."""
        own = list(self.models.get(self.main) or {}) or self.metrics
        return next((name for name in self.body.get("short") or () if name in own), None) or next(
            iter(own), None
        )

    def entries(self, metric: str) -> dict[str, Mapping[str, Any]]:
        """A metric of every model that has it."""
        return {name: table[metric] for name, table in self.models.items() if metric in table}

    def role(self, model: str) -> str:
        """Role of a row."""
        declared = (self.body.get("rows") or {}).get(model)
        if declared is not None:
            return str(declared["role"])
        return "model" if model == MAIN else UNDECLARED

    def label(self, model: str) -> str:
        """A row's name, marked where its test slides or their patients were trained on."""
        seen = ((self.body.get("rows") or {}).get(model) or {}).get("seen")
        return marked(model, seen) if seen else model

    def words(self, model: str) -> str:
        """What a row does; may be empty."""
        return str(((self.body.get("rows") or {}).get(model) or {}).get("words", ""))

    def meanings(self, metric: str) -> list[str]:
        """Sentences on the parts of a metric's name."""
        return list(self._declared(metric).get("words", ()))

    def better(self, metric: str) -> Better:
        """Which values of a metric are better; ``none`` also where that is not recorded."""
        found: Better = self._declared(metric).get("better", "none")
        return found

    def sign(self, metric: str) -> float:
        """-1 where lower values are better, else 1."""
        return -1.0 if self.better(metric) == "low" else 1.0

    def transductive(self, metric: str) -> bool:
        """Whether a metric uses all spots of the test slide at once."""
        return bool(self._declared(metric).get("transductive"))

    def direction(self, metric: str) -> str:
        """Words for `better`."""
        if metric not in (self.body.get("metrics") or {}):
            return "direction not recorded"
        return {"high": "higher is better", "low": "lower is better", "none": "ranks nothing"}[
            self.better(metric)
        ]

    def _declared(self, metric: str) -> Mapping[str, Any]:
        return (self.body.get("metrics") or {}).get(metric) or {}


def task_records(results: Mapping[str, Any]) -> list[TaskRecord]:
    """The tasks of a results file."""
    return [TaskRecord(task, body) for task, body in (results.get("tasks") or {}).items()]


def task_record(results: Mapping[str, Any], task: str) -> TaskRecord:
    """One task of a results file; an empty one where it is not there."""
    return TaskRecord(task, (results.get("tasks") or {}).get(task) or {})


def headlines(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Task and headline metric of every task that has values."""
    found = [(one.task, one.headline) for one in task_records(results)]
    return [(task, metric) for task, metric in found if metric is not None]


def prefix_of(metric: str) -> str:
    """What stands before the last slash of a metric's name."""
    return metric.rpartition("/")[0]


def marked(model: str, seen: Seen) -> str:
    """A row's name with its mark behind it, once."""
    mark = f" ({SEEN[seen]})"
    return model if model.endswith(mark) else model + mark


def merge(results: Iterable[TaskResult]) -> dict[str, TaskResult]:
    """Join the results of a task over folds and seeds, keeping every value with its key.

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
    return dataclasses.replace(
        left,
        models=models,
        notes=notes,
        question=left.question or right.question,
        measures=left.measures | right.measures,
        rows=left.rows | right.rows,
    )


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
    """Write `to_json` of the parts in one step and return it; a missing folder is made.

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
