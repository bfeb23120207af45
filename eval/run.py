"""Checkpoints and stores to results.json and report.html."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.assemble import JobGroup, assemble, group_checkpoints
from eval.embed import find_checkpoints
from eval.gallery import gallery
from eval.report import write_report
from eval.results import merge, write_results
from eval.tasks import TASKS, find_task
from hibio.data.splits import SlideEntry, read_entries, with_counts
from hibio.provenance import provenance
from preprocessing.run import stores_in


def evaluate(checkpoint: Path, data: Path, out: Path, tasks: Sequence[str] | None = None) -> Path:
    """Measure every checkpoint below a folder on the slides it was not trained on.

    Args:
        checkpoint: a checkpoint, or a run folder with all folds, seeds and trained baselines.
        data: folder of stores, training slides included (read-outs are fitted on them).
        out: ``results.json`` and ``report.html`` go there.
        tasks: names of :data:`eval.tasks.TASKS`; all when None.

    Returns:
        The report.
    """
    started = time.perf_counter()
    names = list(tasks) if tasks else list(TASKS)
    chosen = [(name, find_task(name)) for name in names]
    entries = with_counts(read_entries(stores_in(data)), "evaluation")
    groups = group_checkpoints(find_checkpoints(checkpoint))
    results, first, seen = [], None, set()
    bar = tqdm(total=len(groups) * len(chosen), desc="evaluate", disable=None)
    for group in groups:
        fold = assemble(group, entries, with_baselines=group.fold not in seen)
        seen.add(group.fold)
        first = first or fold
        for name, task in chosen:
            bar.set_postfix_str(f"fold {group.fold}, seed {group.seed}, {name}")
            results.append(task.run(fold, task.config()))
            bar.update()
    bar.close()
    merged = {task: r for task, r in merge(results).items() if r.models}
    out.mkdir(parents=True, exist_ok=True)
    facts = _facts(groups, entries, time.perf_counter() - started)
    body = write_results(out / "results.json", groups[0].main.settings, facts, merged)
    assert first is not None
    figures = gallery(groups, first, entries, body)
    return write_report(out / "report.html", body, figures)


def _facts(
    groups: Sequence[JobGroup], entries: Sequence[SlideEntry], seconds: float
) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = groups[0].main.model
    return {
        **provenance(),
        "checkpoint": str(groups[0].main.path),
        "folds": sorted({group.fold for group in groups}),
        "seeds": sorted({group.seed for group in groups}),
        "n_slides": len(entries),
        "n_patients": len({entry.patient_id for entry in entries}),
        "n_spots": sum(entry.n_spots for entry in entries),
        "n_genes": model.artifacts.n_genes,
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pathways": f"{model.artifacts.database.name} {model.artifacts.database.sha256[:12]}",
        "wall_time_s": seconds,
    }
