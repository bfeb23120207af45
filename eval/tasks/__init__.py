"""Evaluation tasks: each is a frozen config dataclass and ``run(fold, config) -> TaskResult``.

A pooled task has ``run(folds, config)`` with all folds of one seed instead.
"""

from eval.results import Task
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
