"""Bars of one metric: every model's mean with each single value as a dot, and chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.figures.canvas import HIGHLIGHT, QUIET, Figure, new_page, png_bytes
from eval.glossary import HIBIO, kind_of, lower_is_better
from preprocessing.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def metric_bars(results: Mapping[str, Any], task: str, metric: str) -> Figure:
    """Draw one metric of one task for every model that has it.

    Args:
        results: The content of results.json.
        task: For example "retrieval".
        metric: For example "image_to_omics/recall@10%".

    Raises:
        DataError: No model has this metric.
    """
    models = results.get("tasks", {}).get(task, {}).get("models", {})
    entries = {name: table[metric] for name, table in models.items() if metric in table}
    means = {name: _number(entry.get("mean")) for name, entry in entries.items()}
    if not any(np.isfinite(mean) for mean in means.values()):
        known = sorted({name for table in models.values() for name in table})
        raise DataError(
            f"no model has a value of {metric!r} in task {task!r}; metrics there: "
            f"{', '.join(known) or 'none'}"
        )
    lower = lower_is_better(metric, task)
    order = sorted(means, key=lambda name: _rank(means[name], lower))
    page = new_page(7.4, 0.85 + 0.3 * len(order))
    axes = page.subplots()
    for row, name in enumerate(order):
        _draw_model(axes, row, name, means[name], entries[name])
    _draw_chance(axes, entries)
    _finish(axes, order, f"{metric} ({'lower' if lower else 'higher'} is better)")
    caption = (
        "Bar: mean. Dots: every single value (fold, seed or slide). Orange: this checkpoint; "
        "blue-grey: everything it is compared with."
    )
    missing = [name for name in order if not np.isfinite(means[name])]
    caption += f" No finite mean: {', '.join(missing)}." if missing else ""
    return Figure(f"{task}: {metric}", caption, png_bytes(page))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float | np.number) else float("nan")


def _rank(mean: float, lower: bool) -> float:
    if not np.isfinite(mean):
        return float("inf")
    return mean if lower else -mean


def _draw_model(axes: Axes, row: int, name: str, mean: float, entry: Mapping[str, Any]) -> None:
    colour = HIGHLIGHT if kind_of(name).is_checkpoint else QUIET
    if np.isfinite(mean):
        axes.barh(row, mean, height=0.62, color=colour, alpha=0.75, zorder=2)
    values = np.asarray([_number(value) for value in entry.get("values") or []])
    values = values[np.isfinite(values)]
    spread = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(len(values))
    size = 14 if len(values) <= 40 else 6
    axes.scatter(values, row + spread, s=size, color="#222222", alpha=0.65, linewidths=0, zorder=3)


def _draw_chance(axes: Axes, entries: Mapping[str, Mapping[str, Any]]) -> None:
    levels = {_number(entry.get("chance")) for entry in entries.values()}
    for index, level in enumerate(sorted(level for level in levels if np.isfinite(level))):
        label = "chance" if index == 0 else None
        axes.axvline(level, color="#222222", linewidth=1, linestyle=(0, (3, 2)), label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False, borderpad=0
        )


def _label(name: str) -> str:
    """Name for the axis, with its role where it does not compete (oracle, transductive)."""
    short = name if len(name) <= 40 else name[:39] + "…"
    kind = kind_of(name)
    return short if kind.competes else f"{short} ({kind.name})"


def _finish(axes: Axes, order: list[str], label: str) -> None:
    names = [_label(name) for name in order]
    axes.set_yticks(range(len(order)), labels=names, fontsize=8)
    for name, tick in zip(order, axes.get_yticklabels(), strict=True):
        tick.set_fontweight("bold" if name == HIBIO else "normal")
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.grid(axis="x", color="#E5E7EB", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
