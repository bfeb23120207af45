"""Pictures of an ablation: every value of every row, curves over a sweep, gain maps of the terms.

matplotlib is imported inside `eval.figures.canvas`; nothing here touches pyplot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from eval.figures.canvas import HIGHLIGHT, LINES, QUIET, Figure, grid_size, new_page, png_bytes
from eval.glossary import lower_is_better
from hibio.ablation.config import GridConfig
from hibio.ablation.gains import Points, gains_by_seed, sign_of
from hibio.ablation.table import Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Page

MAX_PANELS = 12
INK = "#222222"


def figures(grid: GridConfig, tables: Tables, points: Points) -> list[Figure]:
    """All pictures of the tabled metrics.

    Args:
        grid: rows, terms, metrics.
        tables: what was measured.
        points: cell -> axis -> value.
    """
    axis = numeric_axis(points)
    drawn = []
    for task, metrics in grid.tasks.items():
        for metric in metrics:
            wanted = tables.summary.task.eq(task) & tables.summary.metric.eq(metric)
            lines = tables.summary[wanted]
            wanted = tables.values.task.eq(task) & tables.values.metric.eq(metric)
            values = tables.values[wanted]
            if len(points) <= MAX_PANELS:
                drawn.append(row_dots(grid, values, lines, task, metric))
            if axis is not None and not grid.terms:
                drawn.append(sweep_curves(grid, values, points, axis, metric))
            if axis is not None and grid.terms:
                drawn.append(term_maps(grid, values, points, axis, sign_of(task, metric)))
    return drawn


def numeric_axis(points: Points) -> str | None:
    """The axis that curves are drawn over: the first whose values are numbers, or None."""
    axes = dict.fromkeys(axis for point in points.values() for axis in point)
    for axis in axes:
        values = {point.get(axis) for point in points.values()}
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if numbers and len(values) > 1:
            return axis
    return None


def row_dots(
    grid: GridConfig, values: pd.DataFrame, lines: pd.DataFrame, task: str, metric: str
) -> Figure:
    """Every value of every row as a dot, the mean as a bar, one panel a cell.

    Args:
        grid: reference.
        values: of one metric.
        lines: of the summary, of that metric; gives the order of the rows.
        task: for the title.
        metric: for the title.
    """
    cells = list(dict.fromkeys(lines.cell))
    order = list(dict.fromkeys(lines.row))
    n_rows, n_columns = grid_size(len(cells), 3)
    page = new_page(1.9 + 3.1 * n_columns, (0.9 + 0.24 * len(order)) * n_rows + 0.3)
    panels = page.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True).ravel()
    for panel, cell in zip(panels, cells, strict=False):
        own, mine = values[values.cell == cell], lines[lines.cell == cell].set_index("row")
        for place, row in enumerate(order):
            if row in mine.index:
                _draw_row(panel, place, own[own.row == row].value.to_numpy(), row, grid)
        if grid.reference in mine.index:
            mean = float(mine.loc[grid.reference, "mean"])
            panel.axvline(mean, color=HIGHLIGHT, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
        _finish(panel, cell if len(cells) > 1 else "", "")
        panel.set_yticks(range(len(order)), labels=order, fontsize=8)
        panel.set_ylim(len(order) - 0.4, -0.6)
    for panel in panels[len(cells) :]:
        panel.set_visible(False)
    better = "lower" if lower_is_better(metric, task) else "higher"
    caption = (
        f"Dots: every value (fold, seed, slide). Bar: their mean. Dashed: mean of the reference, "
        f"{grid.reference}. {better.capitalize()} is better."
    )
    return Figure(f"{task}: {metric}", caption, png_bytes(page))


def _draw_row(panel: Axes, place: int, values: np.ndarray, row: str, grid: GridConfig) -> None:
    values = values[np.isfinite(values)]
    spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else np.zeros(len(values))
    trained = row in grid.rows
    colour = HIGHLIGHT if row == grid.reference else LINES[0] if trained else QUIET
    size = 12 if len(values) <= 40 else 5
    panel.scatter(values, place + spread, s=size, color=colour, alpha=0.6, linewidths=0, zorder=2)
    if len(values):
        panel.plot([values.mean()] * 2, [place - 0.36, place + 0.36], color=INK, lw=1.6, zorder=3)


def sweep_curves(
    grid: GridConfig, values: pd.DataFrame, points: Points, axis: str, metric: str
) -> Figure:
    """Mean of every row over a numeric sweep; a dot is the mean of one seed.

    Args:
        grid: order of the rows.
        values: of one metric.
        points: cell -> axis -> value.
        axis: the numeric one; the others make a panel each.
        metric: for the axis.
    """
    panels_of = _panels(points, axis)
    n_rows, n_columns = grid_size(len(panels_of), 3)
    page = new_page(4.2 * n_columns, 3.2 * n_rows + 0.6)
    panels = page.subplots(n_rows, n_columns, squeeze=False, sharey=True).ravel()
    rows = [row for row in grid.ordered_rows if row in set(values.row)]
    for panel, (title, cells) in zip(panels, panels_of.items(), strict=False):
        for index, row in enumerate(rows):
            own = values[values.row.eq(row) & values.cell.isin(cells)]
            by_seed = own.groupby(["cell", "seed"]).value.mean().reset_index()
            x = by_seed.cell.map(lambda cell: float(points[cell][axis])).to_numpy()
            colour = LINES[index % len(LINES)]
            style = ("-", "--", ":")[index // len(LINES) % 3]
            _draw_curve(panel, (x, by_seed.value.to_numpy()), colour, style, row)
        _finish(panel, title, axis)
    for panel in panels[len(panels_of) :]:
        panel.set_visible(False)
    panels[0].set_ylabel(metric, fontsize=8)
    _legend(page, panels[0], 2 * n_columns)
    caption = "Lines: mean over folds, slides and seeds. Dots: the mean of each seed."
    return Figure(f"{metric} over {axis}", caption, png_bytes(page))


def _panels(points: Points, axis: str) -> dict[str, list[str]]:
    """What the other axes say -> its cells."""
    found: dict[str, list[str]] = {}
    for cell, point in points.items():
        others = ", ".join(f"{name} {value}" for name, value in point.items() if name != axis)
        found.setdefault(others, []).append(cell)
    return found


def _draw_curve(
    panel: Axes, curve: tuple[np.ndarray, np.ndarray], colour: str, style: str, label: str
) -> None:
    """A line through the means at each x, and every single point."""
    x, y = curve
    if not len(x):
        return
    places = np.unique(x)
    means = [float(np.mean(y[x == place])) for place in places]
    panel.plot(places, means, style, color=colour, linewidth=1.6, label=label, zorder=3)
    face = "none" if style == "--" else colour
    panel.scatter(x, y, s=16, facecolor=face, edgecolor=colour, alpha=0.6, lw=0.8, zorder=2)


def term_maps(
    grid: GridConfig, values: pd.DataFrame, points: Points, axis: str, sign: float
) -> Figure:
    """Gain of every term over the reference, beside the gain of its control: where it pays.

    Args:
        grid: the terms.
        values: of one metric.
        points: cell -> axis -> value.
        axis: the numeric one, usually the cohort's size; the others make a line each.
        sign: of the metric, see `sign_of`.
    """
    metric = str(values.metric.iloc[0])
    n_rows, n_columns = grid_size(len(grid.terms), 3)
    page = new_page(3.5 * n_columns, 2.9 * n_rows + 0.7)
    panels = page.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True).ravel()
    for panel, (title, term) in zip(panels, grid.terms.items(), strict=False):
        for row, style in ((term.row, "-"), (term.control, "--")):
            gains = gains_by_seed(grid, values, row, sign)
            name = "" if style == "-" else "control, "
            for index, (level, cells) in enumerate(_panels(points, axis).items()):
                own = gains[gains.cell.isin(cells)]
                x = own.cell.map(lambda cell: float(points[cell][axis])).to_numpy()
                curve = (x, own.gain.to_numpy())
                colour = LINES[index % len(LINES)]
                _draw_curve(panel, curve, colour, style, name + (level or "term"))
        panel.axhline(0, color=INK, linewidth=0.8)
        _finish(panel, f"{title}\n{term.row} against {term.control}", axis)
    for panel in panels[len(grid.terms) :]:
        panel.set_visible(False)
    panels[0].set_ylabel(f"gain over {grid.reference}, {metric}", fontsize=8)
    _legend(page, panels[0], n_columns)
    caption = (
        f"Gain of a term over {grid.reference} in {metric}, on the same held-out slides (above 0 "
        "is better). Solid line, full dots: the term; dashed, open: its matched control. A dot is "
        "one seed, a line the mean of the seeds. A term pays where its line lies above 0 and above "
        "its control."
    )
    return Figure(f"Where each term pays: {metric}", caption, png_bytes(page))


def _legend(page: Page, panel: Axes, columns: int) -> None:
    handles, names = panel.get_legend_handles_labels()
    page.legend(
        handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


def _finish(panel: Axes, title: str, axis: str) -> None:
    panel.set_title(title, fontsize=9, loc="left")
    panel.set_xlabel(axis, fontsize=8)
    panel.tick_params(labelsize=8, labelbottom=True)
    panel.grid(color="#E5E7EB", zorder=0)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
