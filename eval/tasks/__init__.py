"""Evaluation tasks: each is a frozen config dataclass and ``run(fold, config) -> TaskResult``."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from eval.fold import Fold, FoldError
from eval.results import TaskResult
from eval.tasks import annotation, domains, expression, pathway_query, regions, retrieval


@dataclass(frozen=True)
class Task:
    """A task: its config class, whose defaults are the published settings, and its function."""

    config: type[Any]
    run: Callable[[Fold, Any], TaskResult]


TASKS: dict[str, Task] = {
    "expression": Task(expression.ExpressionConfig, expression.run),
    "retrieval": Task(retrieval.RetrievalConfig, retrieval.run),
    "domains": Task(domains.DomainsConfig, domains.run),
    "regions": Task(regions.RegionsTaskConfig, regions.run),
    "annotation": Task(annotation.AnnotationConfig, annotation.run),
    "pathway_query": Task(pathway_query.PathwayQueryConfig, pathway_query.run),
}


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        FoldError: unknown name; the choices and the nearest one are listed.
    """
    if name in TASKS:
        return TASKS[name]
    near = get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise FoldError(f"unknown task {name!r}; tasks are {sorted(TASKS)}{hint}")
