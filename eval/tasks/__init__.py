"""Evaluation tasks: each is a frozen config dataclass and ``run(fold, config) -> TaskResult``.

A pooled task has ``run(folds, config)`` with all folds of one seed instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.errors import FoldError
from eval.results import TaskResult
from eval.tasks import (
    annotation,
    domains,
    expression,
    imputation,
    outcome,
    pathway_query,
    regions,
    retrieval,
)
from preprocessing.errors import did_you_mean


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


TASKS: dict[str, Task] = {
    "expression": Task(expression.ExpressionConfig, expression.run),
    "retrieval": Task(retrieval.RetrievalConfig, retrieval.run),
    "domains": Task(domains.DomainsConfig, domains.run),
    "regions": Task(regions.RegionsTaskConfig, regions.run),
    "annotation": Task(annotation.AnnotationConfig, annotation.run),
    "imputation": Task(imputation.ImputationConfig, imputation.run),
    "outcome": Task(outcome.OutcomeConfig, outcome.run, pooled=True),
    "pathway_query": Task(pathway_query.PathwayQueryConfig, pathway_query.run),
}


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        FoldError: unknown name; the choices and the nearest one are listed.
    """
    if name in TASKS:
        return TASKS[name]
    hint = did_you_mean(name, TASKS)
    raise FoldError(f"unknown task {name!r}; tasks are {sorted(TASKS)}{hint}")
