"""The sections of report.html in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report.facts import config_section, models_section, run_section
from eval.report.figures.canvas import Figure, figure_parts
from eval.report.headline import headline_section
from eval.report.tasks import task_section
from eval.results import headlines, task_records
from preprocessing.pages import Section, write_page


def write_report(
    path: Path,
    results: Mapping[str, Any],
    figures: Sequence[Figure] = (),
    title: str = "HiBio evaluation",
) -> Path:
    """Write report.html in one step: no network, no script, figures inside.

    Args:
        path: the file; an old one is replaced only when the new one is complete.
        results: the content of results.json (docs/architecture.md).
        figures: shown in this order.
        title: heading of the page.

    Returns:
        The path that was written.
    """
    rows = headlines(results)
    sections = [Section(run_section(results), "This run", "run")]
    if rows:
        sections.append(Section(headline_section(results, rows), "Headline", "headline"))
    sections.append(Section(figure_parts(figures), "Figures", "figures"))
    for index, task in enumerate(task_records(results)):
        sections.append(Section(task_section(task), f"Task: {task.task}", f"task-{index}"))
    if (results.get("data") or {}).get("models"):
        sections.append(Section(models_section(results), "Models", "models"))
    sections.append(Section(config_section(results), "Config", "config"))
    return write_page(Path(path), title, sections)
