"""Bars and curves: a metric, training losses, retrieval, paired differences, few-shot labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.integrate import trapezoid

from eval.measures.metrics import bootstrap_ci
from eval.report.figures.canvas import (
    HIGHLIGHT,
    LINES,
    QUIET,
    Figure,
    clipped,
    legend_below,
    png_bytes,
)
from eval.report.markdown import is_number
from eval.results import TaskRecord, task_record
from preprocessing.canvas import new_page, panel_grid
from preprocessing.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from eval.compare.paired import Compared

Record = Mapping[str, Any]
Curve = tuple[np.ndarray, np.ndarray]

STAGE_SHADES = ("#F1F4F8", "#FFFFFF")
STYLES = ("-", "--", ":", "-.")
MAX_POINTS = 200
MAX_LABEL = 60
MOST = 6  # few-shot curves that can be told apart
FEW_SHOT = re.compile(r"(?P<side>\w+)/few_shot@(?P<k>\d+)")


def metric_bars(results: Mapping[str, Any], task: str, metric: str) -> Figure:
    """Draw one metric of one task for every model that has it.

    Raises:
        DataError: no model has this metric.
    """
    own = task_record(results, task)
    entries = own.entries(metric)
    means = {name: _number(entry.get("mean")) for name, entry in entries.items()}
    if not any(np.isfinite(mean) for mean in means.values()):
        known = sorted(own.metrics)
        raise DataError(
            f"no model has a value of {metric!r} in task {task!r}; metrics there: "
            f"{', '.join(known) or 'none'}"
        )
    sign = own.sign(metric)
    rank = {name: -sign * mean if np.isfinite(mean) else np.inf for name, mean in means.items()}
    order = sorted(means, key=rank.__getitem__)
    page = new_page(7.4, 0.85 + 0.3 * len(order))
    axes = page.subplots()
    for row, name in enumerate(order):
        colour = HIGHLIGHT if own.role(name) == "model" else QUIET
        _draw_model(axes, row, colour, means[name], entries[name])
    _draw_chance(axes, entries)
    axes.axvline(0, color="#999999", linewidth=0.8)
    _finish_rows(axes, [_label(own, name) for name in order])
    for name, tick in zip(order, axes.get_yticklabels(), strict=True):
        tick.set_fontweight("bold" if own.role(name) == "model" else "normal")
    axes.set_xlabel(f"{metric} ({own.direction(metric)})", fontsize=8)
    caption = (
        "Bar: mean. Dots: every single value (fold, seed or slide). Orange: this checkpoint; "
        "blue-grey: everything it is compared with."
    )
    missing = [name for name in order if not np.isfinite(means[name])]
    caption += f" No finite mean: {', '.join(missing)}." if missing else ""
    return Figure(f"{task}: {metric}", caption, png_bytes(page))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float | np.number) else float("nan")


def _draw_model(axes: Axes, row: int, colour: str, mean: float, entry: Mapping[str, Any]) -> None:
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


def _label(task: TaskRecord, name: str) -> str:
    """Name for the axis; an oracle says that it is one."""
    short = clipped(task.label(name), 54)
    return f"{short} (oracle)" if task.role(name) == "oracle" else short


def _finish_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names down the left side, the first on top."""
    axes.set_yticks(range(len(names)), labels=names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#E5E7EB", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def loss_curves(logs: Mapping[str, Sequence[Record]]) -> Figure:
    """Draw the total loss, every term and the learning rate over steps, one colour a run.

    Args:
        logs: run name -> log records `{"step", "stage", "terms": {"spot/contrastive": float},
            "total", "lr", "seconds"}`. Runs may differ in their terms and stages.

    Returns:
        Small multiples; the stages of the first run are shaded and named in the first panel.

    Raises:
        DataError: no record at all.
    """
    logs = {name: records for name, records in logs.items() if len(records)}
    if not logs:
        raise DataError("no training log record was found: train first, or leave the figure out")
    panels = _loss_panels(logs)
    page, cells = panel_grid(len(panels), 3, (3.3, 2.15), (0.0, 0.45))
    columns = min(3, len(panels))
    broken = 0
    for position, (cell, panel) in enumerate(zip(cells, panels, strict=True)):
        for index, (name, records) in enumerate(logs.items()):
            broken += _draw_run(cell, records, panel, name, index)
        _shade_stages(cell, next(iter(logs.values())), named=position == 0)
        _finish_loss_panel(cell, panel, position < columns, position + columns >= len(panels))
    if len(logs) > 1:
        legend_below(page, cells[0], 4)
    return Figure("Training losses", _loss_caption(logs, broken), png_bytes(page))


def _loss_panels(logs: Mapping[str, Sequence[Record]]) -> list[str]:
    """Panel keys: total, every term in order of first appearance, then lr when logged."""
    terms: dict[str, None] = {}
    has_lr = False
    for records in logs.values():
        for record in records:
            terms.update(dict.fromkeys(record.get("terms") or {}))
            has_lr = has_lr or record.get("lr") is not None
    return ["total", *terms, *(["lr"] if has_lr else [])]


def _segments(records: Sequence[Record], panel: str) -> list[Curve]:
    """Steps and values of one panel, cut where the stage changes: terms enter and leave there.

    A term that a record lacks is left out.
    """
    pairs: list[list[tuple[float, float]]] = []
    previous = None
    for position, record in enumerate(records):
        source = record if panel in ("total", "lr") else record.get("terms") or {}
        if panel in source:
            stage = ("" if panel == "lr" else str(record.get("stage", "")),)
            if stage != previous:
                pairs.append([])
            previous = stage
            value = source[panel]
            pairs[-1].append((record.get("step", position), np.nan if value is None else value))
    tables = [np.asarray(part, dtype=np.float64) for part in pairs]
    return [(table[:, 0], table[:, 1]) for table in tables]


def _draw_run(axes: Axes, records: Sequence[Record], panel: str, name: str, index: int) -> int:
    """Draw one run in one panel, never across stages; return how many values are not finite."""
    colour = LINES[index % len(LINES)]
    style = STYLES[index // len(LINES) % len(STYLES)]
    broken = 0
    for part, (steps, values) in enumerate(_segments(records, panel)):
        broken += int((~np.isfinite(values)).sum())
        steps, means = _binned(steps, values)
        marker = "o" if len(steps) == 1 else ""
        if panel != "lr" and len(means) >= 30:
            axes.plot(steps, means, color=colour, alpha=0.25, linewidth=0.7)
            means = _smoothed(means, max(5, len(means) // 15))
        label = name if part == 0 else None
        axes.plot(
            *(steps, means, style),
            color=colour,
            linewidth=1.5,
            marker=marker,
            markersize=3,
            label=label,
        )
    return broken


def _binned(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Mean of equal runs of records, at most `MAX_POINTS` a stage (non-finite values left out)."""
    size = -(-len(steps) // MAX_POINTS) if len(steps) else 1
    starts = np.arange(0, len(steps), size)
    if not len(starts):
        return steps, values
    good = np.isfinite(values)
    count = np.add.reduceat(good.astype(float), starts)
    total = np.add.reduceat(np.where(good, values, 0.0), starts)
    mean = np.divide(total, count, out=np.full(len(starts), np.nan), where=count > 0)
    middle = np.minimum(starts + size // 2, len(steps) - 1)
    return steps[middle], mean


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean over finite values, shorter at both ends."""
    good = np.isfinite(values)
    kernel = np.ones(width)
    count = np.convolve(good.astype(float), kernel, mode="same")
    total = np.convolve(np.where(good, values, 0.0), kernel, mode="same")
    return np.where(good & (count > 0), total / np.maximum(count, 1), np.nan)


def _stage_spans(records: Sequence[Record]) -> list[tuple[str, float, float]]:
    """(stage, first step, first step of the next stage) for consecutive records of a stage."""
    spans: list[tuple[str, float, float]] = []
    for position, record in enumerate(records):
        stage, step = str(record.get("stage", "")), float(record.get("step", position))
        if spans and spans[-1][0] == stage:
            spans[-1] = (stage, spans[-1][1], step)
        else:
            if spans:
                spans[-1] = (*spans[-1][:2], step)
            spans.append((stage, step, step))
    return spans


def _shade_stages(axes: Axes, records: Sequence[Record], named: bool) -> None:
    """Shade alternate stages; in the named panel write their names above the axes."""
    spans = _stage_spans(records)
    for index, (stage, start, stop) in enumerate(spans):
        axes.axvspan(start, stop, color=STAGE_SHADES[index % 2], zorder=-10, linewidth=0)
        if index:
            axes.axvline(start, color="#9AA5B1", linewidth=0.7, linestyle=(0, (3, 2)), zorder=-5)
        if named and stage:
            axes.annotate(
                clipped(stage, max(4, 40 // len(spans))),
                ((start + stop) / 2, 1.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=7,
                color="#52606D",
            )


def _finish_loss_panel(axes: Axes, panel: str, first_row: bool, last_row: bool) -> None:
    title = {"total": "total loss", "lr": "learning rate"}.get(panel, panel)
    axes.set_title(title, fontsize=9, loc="left", pad=14 if first_row else 5)
    axes.tick_params(labelsize=7)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    if panel == "lr":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if last_row:
        axes.set_xlabel("step", fontsize=8)


def _loss_caption(logs: Mapping[str, Sequence[Record]], broken: int) -> str:
    names = ", ".join(f"{name} ({len(records)} records)" for name, records in logs.items())
    first = next(iter(logs))
    text = f"Loss terms over optimiser steps for {names}. Shading: the stages of {first}. "
    text += "Thick lines are running means, thin ones the logged values. "
    text += "These are training losses: they say nothing about held-out patients."
    return text + (f" {broken} values were not finite and left gaps." if broken else "")


def retrieval_curves(curves: Mapping[str, Curve], direction: str = "image to omics") -> Figure:
    """Draw recall against the share of the pool that is looked at, and its first tenth.

    Args:
        curves: model -> (fraction (n,) in 0..1 rising, recall (n,) in 0..1).
        direction: what is searched with what, for the title.

    Raises:
        DataError: no curve, or arrays that do not match.
    """
    if not curves:
        raise DataError("no retrieval curve was given: leave the figure out")
    clean = {name: _checked_curve(name, curve) for name, curve in curves.items()}
    areas = {name: float(trapezoid(y, x)) for name, (x, y) in clean.items()}
    order = sorted(clean, key=lambda name: -areas[name])
    page = new_page(8.8, 3.9 + 0.18 * ((len(order) + 2) // 3))
    whole, start = page.subplots(1, 2)
    for axes, limit, title in ((whole, 1.0, "whole pool"), (start, 0.1, "first 10 % of the pool")):
        for index, name in enumerate(order):
            _draw_curve(axes, clean[name], limit, f"{name} (area {areas[name]:.3f})", index)
        axes.plot([0, limit], [0, limit], color="#777777", linestyle=(0, (2, 2)), label="chance")
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlim(0, limit)
        axes.set_ylim(0, None if limit < 1 else 1.01)
        axes.set_xlabel("share of the pool inspected", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    whole.set_ylabel("recall", fontsize=8)
    legend_below(page, whole, 3)
    caption = (
        "Share of queries whose partner is found when that share of the ranked pool is inspected. "
        "The dotted line is chance; the area under it is 0.5. Right: the first tenth, enlarged."
    )
    return Figure(f"Retrieval, {direction}", caption, png_bytes(page))


def _checked_curve(name: str, curve: Curve) -> Curve:
    x, y = (np.asarray(part, dtype=np.float64) for part in curve)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2 or (np.diff(x) < 0).any():
        raise DataError(
            f"retrieval curve of {name!r}: fractions {x.shape} and recalls {y.shape}, expected "
            "two rising one-dimensional arrays of the same length >= 2"
        )
    return x, y


def _draw_curve(axes: Axes, curve: Curve, limit: float, label: str, index: int) -> None:
    """Draw one curve up to `limit`, ending exactly there so that the y limits fit."""
    x, y = curve
    keep = x < limit
    x_cut, y_cut = np.append(x[keep], limit), np.append(y[keep], np.interp(limit, x, y))
    style = STYLES[index // len(LINES) % len(STYLES)]
    axes.plot(x_cut, y_cut, style, color=LINES[index % len(LINES)], linewidth=1.5, label=label)


def difference_plot(found: Sequence[Compared]) -> Figure:
    """Draw every difference with its interval; right of zero the first run is better.

    Metrics of different units share the axis only in their direction, so each is divided by its
    larger absolute mean.

    Raises:
        DataError: no comparison.
    """
    if not found:
        raise DataError("no comparison was made: leave the figure out")
    others = list(dict.fromkeys(one.second for one in found))
    page = new_page(8.2, 0.9 + 0.32 * len(found))
    axes = page.subplots()
    for row, one in enumerate(found):
        scale = max(abs(one.value_first), abs(one.value_second), 1e-12)
        colour = LINES[others.index(one.second) % len(LINES)] if len(others) > 1 else QUIET
        colour = HIGHLIGHT if one.verdict in ("better", "worse") and len(others) == 1 else colour
        ends = np.array([one.low, one.high]) / scale
        if np.isfinite(ends).all():
            axes.plot(ends, [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
        filled = colour if one.verdict in ("better", "worse") else "white"
        axes.plot(
            one.difference / scale, row, "o", color=colour, markerfacecolor=filled, markersize=6
        )
    names = [f"{one.task}: {one.metric}" for one in found]
    if len(others) > 1:
        names = [f"{name} vs {one.second}" for name, one in zip(names, found, strict=True)]
    axes.axvline(0, color="#777777", linewidth=0.9)
    _finish_rows(axes, [clipped(name, MAX_LABEL) for name in names])
    axes.set_xlabel(f"relative difference, right: {found[0].first} is better", fontsize=8)
    caption = (
        "Paired difference of the means and its 95 % bootstrap interval over units (slides, or "
        "folds for pooled metrics), divided by the larger of the two means. Filled: different "
        "after correction for the number of comparisons and at least three folds."
    )
    return Figure(f"{found[0].first} against {', '.join(others)}", caption, png_bytes(page))


def few_shot_curves(results: Mapping[str, Any], side: str = "omics") -> Figure:
    """Draw the mean over test patients and draws, and its interval, for the best models of a side.

    Raises:
        DataError: no model has few-shot values of this side.
    """
    task = task_record(results, "annotation")
    models = task.models
    curves = {name: found for name, m in models.items() if (found := _curve(m, side))}
    if not curves:
        raise DataError(f"no model has few-shot values of {side!r}: leave the figure out")
    ends = {name: curve[max(curve)][0] for name, curve in curves.items()}
    order = sorted(curves, key=lambda name: (task.role(name) != "model", -ends[name]))
    shown = order[:MOST]
    page = new_page(7.4, 4.2)
    axes = page.subplots()
    others = [colour for colour in LINES if colour != HIGHLIGHT]
    for index, name in enumerate(shown):
        colour = HIGHLIGHT if task.role(name) == "model" else others[index % len(others)]
        k = np.array(sorted(curves[name]))
        mean, low, high = (np.array([curves[name][i][part] for i in k]) for part in range(3))
        axes.plot(k, mean, "o-", color=colour, markersize=4, linewidth=1.5, label=task.label(name))
        if np.isfinite(low).all():
            axes.fill_between(k, low, high, color=colour, alpha=0.13, linewidth=0)
    chance = float(np.nanmean([_chance(models[name], side) for name in shown]))
    if np.isfinite(chance):
        axes.axhline(chance, color="#777777", linestyle=(0, (2, 2)), label="chance")
    _finish_few_shot(axes, sorted({k for name in shown for k in curves[name]}))
    page.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    left_out = f" {len(order) - MOST} more models are in the tables." if len(order) > MOST else ""
    caption = (
        "Mean over test patients and random draws of the labelled spots; band: 95 % bootstrap "
        "interval over test patients (none with one patient). The dotted line is chance." + left_out
    )
    return Figure(f"Few-shot annotation, {side}", caption, png_bytes(page))


def _finish_few_shot(axes: Axes, ticks: list[int]) -> None:
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
        match = FEW_SHOT.fullmatch(name)
        if match and match["side"] == side and is_number(entry.get("mean")):
            pairs = zip(entry["keys"], entry["values"], strict=True)
            known = [(key, value) for key, value in pairs if is_number(value)]
            units = [key.split("/", 2)[2].split(":")[0] for key, _ in known]
            ends = bootstrap_ci([value for _, value in known], units)
            found[int(match["k"])] = (float(entry["mean"]), *ends)
    return found


def _chance(metrics: Mapping[str, Mapping[str, Any]], side: str) -> float:
    levels = [
        float(entry["chance"])
        for name, entry in metrics.items()
        if name.startswith(f"{side}/few_shot@") and is_number(entry.get("chance"))
    ]
    return float(np.mean(levels)) if levels else float("nan")
