"""The report: results.json and figures as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report.facts import config_section, models_section, run_section
from eval.report.figures.canvas import Figure
from eval.report.headline import HeadlineRow, headline_section
from eval.report.page import Html, figures_section, page
from eval.report.tasks import metric_names, task_section
from hibio.keys import MAIN
from preprocessing.files import atomic_path

__all__ = ["HeadlineRow", "default_headline", "write_report"]

# The metric that stands for a task when the caller names none: the first one that is present.
PREFERRED: dict[str, tuple[str, ...]] = {
    "expression": ("pearson/top50_hvg", "pearson"),
    "retrieval": ("image_to_omics/recall@10%", "recall@10%"),
    "domains": ("omics_ari/kmeans", "ari/"),
    "regions": ("ari/matched",),
    "annotation": ("omics/balanced_accuracy", "balanced_accuracy"),
    "imputation": ("pearson/hidden_genes",),
    "outcome": ("auroc", "c_index"),
    "hest_bench": ("pearson/published",),
    "pathway_query": ("pearson/default/median", "spearman", "pearson"),
}


def write_report(
    path: Path,
    results: Mapping[str, Any],
    figures: Sequence[Figure] = (),
    headline: Sequence[HeadlineRow] | None = None,
    title: str = "HiBio evaluation",
) -> Path:
    """Write report.html in one step: no network, no script, figures inside.

    Args:
        path: The file; an old one is replaced only when the new one is complete.
        results: The content of results.json (docs/architecture.md).
        figures: Shown in this order.
        headline: Rows of the headline table; None takes one metric a task
            (`default_headline`), an empty list leaves the table out.
        title: Heading of the page.

    Returns:
        The path that was written.
    """
    rows = default_headline(results) if headline is None else headline
    tasks: Mapping[str, Any] = results.get("tasks") or {}
    sections: list[tuple[str, str, Html]] = [("run", "This run", run_section(results))]
    if rows:
        sections.append(("headline", "Headline", headline_section(results, rows)))
    sections.append(("figures", "Figures", figures_section(figures)))
    for index, (task, result) in enumerate(tasks.items()):
        sections.append((f"task-{index}", f"Task: {task}", task_section(task, result)))
    if (results.get("data") or {}).get("models"):
        sections.append(("models", "Models", models_section(results)))
    sections.append(("config", "Config", config_section(results)))
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(page(title, sections), encoding="utf-8")
    return Path(path)


def default_headline(results: Mapping[str, Any]) -> list[HeadlineRow]:
    """One row a task: its preferred metric when present, else the first one of the checkpoint."""
    rows = []
    for task, result in (results.get("tasks") or {}).items():
        models = result.get("models") or {}
        own = list(models.get(MAIN) or {}) or metric_names(models)
        wanted = [m for part in PREFERRED.get(task.split("/")[0], ()) for m in own if part in m]
        if own:
            rows.append(HeadlineRow(task, task, (wanted or own)[0]))
    return rows
