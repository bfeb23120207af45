"""Few-shot curves: accuracy against the number of labelled spots a class, with intervals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.measures.metrics import bootstrap_ci
from eval.report.figures.canvas import HIGHLIGHT, LINES, Figure, png_bytes
from eval.report.numbers import is_number
from eval.results import task_record
from preprocessing.canvas import new_page
from preprocessing.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = re.compile(r"(?P<side>\w+)/few_shot@(?P<k>\d+)")
MOST = 6  # curves that can be told apart


def few_shot_curves(results: Mapping[str, Any], side: str = "omics") -> Figure:
    """Draw the mean over test patients and draws, and its interval, for the best models.

    Args:
        results: the content of results.json.
        side: ``omics`` or ``image``.

    Raises:
        DataError: no model has few-shot values of this side.
    """
    task = task_record(results, "annotation")
    models = task.models
    curves = {name: found for name, m in models.items() if (found := _curve(m, side))}
    if not curves:
        raise DataError(f"no model has few-shot values of {side!r}: leave the figure out")
    order = sorted(curves, key=lambda name: (task.role(name) != "model", -_end(curves[name])))
    shown = order[:MOST]
    page = new_page(7.4, 4.2)
    axes = page.subplots()
    others = [colour for colour in LINES if colour != HIGHLIGHT]
    for index, name in enumerate(shown):
        colour = HIGHLIGHT if task.role(name) == "model" else others[index % len(others)]
        k = np.array(sorted(curves[name]))
        mean, low, high = (np.array([curves[name][i][part] for i in k]) for part in range(3))
        axes.plot(k, mean, "o-", color=colour, markersize=4, linewidth=1.5, label=name)
        if np.isfinite(low).all():
            axes.fill_between(k, low, high, color=colour, alpha=0.13, linewidth=0)
    chance = float(np.nanmean([_chance(models[name], side) for name in shown]))
    if np.isfinite(chance):
        axes.axhline(chance, color="#777777", linestyle=(0, (2, 2)), label="chance")
    _finish(axes, sorted({k for name in shown for k in curves[name]}))
    page.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    left_out = f" {len(order) - MOST} more models are in the tables." if len(order) > MOST else ""
    caption = (
        "Mean over test patients and random draws of the labelled spots; band: 95 % bootstrap "
        "interval over test patients (none with one patient). The dotted line is chance." + left_out
    )
    return Figure(f"Few-shot annotation, {side}", caption, png_bytes(page))


def _finish(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, labels=[str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_xlabel("labelled spots a class, all training patients together", fontsize=8)
    axes.set_ylabel("balanced accuracy in unseen patients", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(
    metrics: Mapping[str, Mapping[str, Any]], side: str
) -> dict[int, tuple[float, float, float]]:
    """The k of a model with mean and ends of the interval over patients."""
    found = {}
    for name, entry in metrics.items():
        match = NAME.fullmatch(name)
        if match and match["side"] == side and is_number(entry.get("mean")):
            pairs = zip(entry["keys"], entry["values"], strict=True)
            known = [(key, value) for key, value in pairs if is_number(value)]
            units = [key.split("/", 2)[2].split(":")[0] for key, _ in known]
            ends = bootstrap_ci([value for _, value in known], units)
            found[int(match["k"])] = (float(entry["mean"]), *ends)
    return found


def _end(curve: Mapping[int, tuple[float, float, float]]) -> float:
    return curve[max(curve)][0]


def _chance(metrics: Mapping[str, Mapping[str, Any]], side: str) -> float:
    levels = [
        float(entry["chance"])
        for name, entry in metrics.items()
        if name.startswith(f"{side}/few_shot@") and is_number(entry.get("chance"))
    ]
    return float(np.mean(levels)) if levels else float("nan")
