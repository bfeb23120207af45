"""The report: results.json and figures as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report.facts import config_section, models_section, run_section
from eval.report.figures.canvas import Figure
from eval.report.headline import headline_section
from eval.report.page import Html, figures_section, page
from eval.report.tasks import task_section
from eval.results import headlines, task_records
from preprocessing.files import atomic_path

__all__ = ["write_report"]


def write_report(
    path: Path,
    results: Mapping[str, Any],
    figures: Sequence[Figure] = (),
    title: str = "HiBio evaluation",
) -> Path:
    """Write report.html in one step: no network, no script, figures inside.

    Args:
        path: The file; an old one is replaced only when the new one is complete.
        results: The content of results.json (docs/architecture.md).
        figures: Shown in this order.
        title: Heading of the page.

    Returns:
        The path that was written.
    """
    rows = headlines(results)
    sections: list[tuple[str, str, Html]] = [("run", "This run", run_section(results))]
    if rows:
        sections.append(("headline", "Headline", headline_section(results, rows)))
    sections.append(("figures", "Figures", figures_section(figures)))
    for index, task in enumerate(task_records(results)):
        sections.append((f"task-{index}", f"Task: {task.task}", task_section(task)))
    if (results.get("data") or {}).get("models"):
        sections.append(("models", "Models", models_section(results)))
    sections.append(("config", "Config", config_section(results)))
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(page(title, sections), encoding="utf-8")
    return Path(path)
