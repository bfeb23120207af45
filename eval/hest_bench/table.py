"""Scores of HEST-Bench as results, published summary and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.hest_bench.audit import Finding
from eval.hest_bench.layout import BenchTask
from eval.hest_bench.scores import FoldScores
from eval.markdown import markdown_table
from eval.results import ResultTable
from preprocessing.atomic import atomic_path

Scores = Mapping[tuple[str, str], Sequence[FoldScores]]
POOLED = "Pearson r over all test spots of a fold, mean over genes"
HEAD = (
    "encoder",
    "published",
    "varying genes",
    "per slide",
    "nested alpha",
    "training genes",
    "constant genes",
)
READING = (
    "published: PCA 256, alpha = 100 / (dimensions x genes), Pearson of each of the published "
    "genes over all test spots of a fold, mean over genes, then mean ± population standard "
    "deviation over folds. Beside it, never mixed: the same over genes that vary in the test spots "
    "(a constant gene makes the published number undefined); within each test section; with the "
    "penalty chosen by inner folds of the training patients; with genes chosen on the training "
    "sections alone; and published genes that are constant, mean over folds."
)


def add_scores(
    table: ResultTable, task: BenchTask, model: str, found: Sequence[FoldScores], seed: int
) -> None:
    """Every value of one encoder, under ``fold/seed/pooled`` or ``fold/seed/sample``."""
    for split, scores in zip(task.splits, found, strict=True):
        pooled = f"{split.name}/{seed}/pooled"
        values = {
            "pearson/published": scores.published,
            "pearson/varying_genes": scores.varying,
            "pearson/nested_alpha": scores.nested,
            "pearson/training_genes": scores.own_genes,
        }
        for name, value in values.items():
            table.add(model, name, pooled, value, POOLED)
        for sample, value in scores.per_slide.items():
            key = f"{split.name}/{seed}/{sample}"
            table.add(model, "pearson/per_slide", key, value, "Pearson r per slide")
            unit = "published genes that are constant on the slide"
            table.add(model, "constant_genes/per_slide", key, scores.constant_in[sample], unit)
        unit = "published genes that are constant over the test spots"
        table.add(model, "constant_genes/pooled", pooled, scores.constant, unit)
        table.note(f"{model}: {scores.n_components} components, published alpha {scores.alpha:.4g}")


def published_summary(tasks: Sequence[BenchTask], scores: Scores) -> dict[str, Any]:
    """Mean, population standard deviation and every gene, as the published tool reports them."""
    models = list(dict.fromkeys(model for _, model in scores))
    summary: dict[str, Any] = {task.name: {} for task in tasks}
    for task in tasks:
        for model in models:
            found = scores[task.name, model]
            each = [one.published for one in found]
            genes = np.stack([one.genes for one in found], axis=1)
            summary[task.name][model] = {
                "mean": float(np.mean(each)),
                "std": float(np.std(each)),
                "mean_per_split": each,
                "genes": dict(zip(task.genes, genes.tolist(), strict=True)),
            }
    average = {m: float(np.mean([summary[t.name][m]["mean"] for t in tasks])) for m in models}
    return {"tasks": summary, "average": average}


def write_tables(
    path: Path,
    tasks: Sequence[BenchTask],
    models: Sequence[str],
    scores: Scores,
    findings: Sequence[Finding],
) -> str:
    """Write the tables as Markdown in one step.

    Returns:
        The same text.
    """
    parts = ["# HEST-Bench", READING]
    for task in tasks:
        rows = [_row(model, scores[task.name, model]) for model in models]
        parts += [f"## {task.name}, {len(task.splits)} folds", markdown_table(HEAD, rows)]
    if len(tasks) > 1:
        rows = [_average(model, [scores[task.name, model] for task in tasks]) for model in models]
        parts += [f"## Average over {len(tasks)} tasks", markdown_table(HEAD, rows)]
    audit = [f"- {finding}" for finding in findings] or ["- nothing found"]
    parts += ["## Leakage audit", "\n".join(audit)]
    text = "\n\n".join(parts) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def _columns(found: Sequence[FoldScores]) -> list[float]:
    """Means over folds of the columns behind the published one."""
    slides = [value for one in found for value in one.per_slide.values()]
    return [
        float(np.mean([one.varying for one in found])),
        float(np.mean(slides)),
        float(np.mean([one.nested for one in found])),
        float(np.mean([one.own_genes for one in found])),
        float(np.mean([one.constant for one in found])),
    ]


def _row(model: str, found: Sequence[FoldScores]) -> list[str]:
    each = [one.published for one in found]
    spread = f"{_shown(np.mean(each))} ± {_shown(np.std(each))}"
    return [model, spread, *_cells(_columns(found))]


def _average(model: str, by_task: Sequence[Sequence[FoldScores]]) -> list[str]:
    published = np.mean([np.mean([one.published for one in found]) for found in by_task])
    means = np.mean([_columns(found) for found in by_task], axis=0)
    return [model, _shown(published), *_cells(means.tolist())]


def _cells(values: Sequence[float]) -> list[str]:
    return [*(_shown(value) for value in values[:-1]), f"{values[-1]:.1f}"]


def _shown(value: float | np.floating) -> str:
    return f"{value:.4f}" if np.isfinite(value) else "undefined"
