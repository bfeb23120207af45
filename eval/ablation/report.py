"""What an ablation leaves behind: its tables and figures, results.json and report.html."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from eval.ablation.config import BASELINES, GridConfig
from eval.ablation.plan import ONE_CELL, GridJob
from eval.ablation.table import (
    VALUE_COLUMNS,
    Points,
    Tables,
    direction_of,
    gains_by_seed,
    make_tables,
    points_of,
    sign_of,
    term_table,
)
from eval.report.figures.canvas import (
    HIGHLIGHT,
    LINES,
    QUIET,
    Figure,
    figure_parts,
    legend_below,
    png_bytes,
)
from eval.report.markdown import markdown_table, number
from eval.results import Measure, Metric, Role, Row, TaskResult, write_results
from hibio.checkpoint import provenance
from hibio.config.files import to_dict
from preprocessing.canvas import panel_grid
from preprocessing.files import atomic_path, spreadsheet_text
from preprocessing.pages import Box, Line, Part, Section, Table, Text, Verbatim, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PANELS = 12
INK = "#222222"
HEADINGS = (
    *("row", "mean", "sd", "n", "sd of seeds", "difference", "interval"),
    *("p (Holm)", "better in", "parameters", "steps", "training"),
)
SPENT = ("n_parameters", "steps")  # columns of the summary under "parameters" and "steps"
GAIN_HEADINGS = ("term", "gain", "interval", "control", "term over control", "interval", "p")
GAINS_HOW = (
    "Gain over the reference on the same slides, of the term and of its matched control, and of "
    "the term over its control; positive is better. p (sign flips over slides) is of the last, not "
    "corrected. A term counts where both its gain and its lead over the control lie above 0."
)
HOW = (
    "Difference: row minus reference on the same slide of the same fold, seeds averaged first. "
    "Interval: {level:.0%} of {draws} bootstrap draws over slides; p: sign flips, corrected by "
    "Holm over the rows of one table. They speak of these slides: models are not trained again, "
    "and slides of one patient are alike. sd: of all values; sd of seeds: of the seeds' means. "
    "Training: mean wall time of a job without the fit before the first step, which rows share."
)

#: Of the folder of a grid, beside results.json.
FILES = ("table.csv", "values.csv", "gains.csv", "table.md", "report.html")


def figures(grid: GridConfig, tables: Tables, points: Points) -> list[Figure]:
    """All pictures of the tabled metrics."""
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
                drawn.append(term_maps(grid, values, points, axis, sign_of(values)))
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

    The ``values`` are of one metric, as are the ``lines`` of the summary, which order the rows.
    """
    cells = list(dict.fromkeys(lines.cell))
    order = list(dict.fromkeys(lines.row))
    size = (3.1, 0.9 + 0.24 * len(order))
    page, panels = panel_grid(len(cells), 3, size, (1.9, 0.3), sharex=True, sharey=True)
    for panel, cell in zip(panels, cells, strict=True):
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
    better = direction_of(values)
    caption = (
        f"Dots: every value (fold, seed, slide). Bar: their mean. Dashed: mean of the reference, "
        f"{grid.reference}. {better.capitalize()}."
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

    The ``values`` are of one metric; the axes beside the numeric one make a panel each.
    """
    panels_of = _panels(points, axis)
    page, panels = panel_grid(len(panels_of), 3, (4.2, 3.2), (0.0, 0.6), sharey=True)
    rows = [row for row in grid.ordered_rows if row in set(values.row)]
    for panel, (title, cells) in zip(panels, panels_of.items(), strict=True):
        for index, row in enumerate(rows):
            own = values[values.row.eq(row) & values.cell.isin(cells)]
            by_seed = own.groupby(["cell", "seed"]).value.mean().reset_index()
            x = by_seed.cell.map(lambda cell: float(points[cell][axis])).to_numpy()
            colour = LINES[index % len(LINES)]
            style = ("-", "--", ":")[index // len(LINES) % 3]
            _draw_curve(panel, (x, by_seed.value.to_numpy()), colour, style, row)
        _finish(panel, title, axis)
    panels[0].set_ylabel(metric, fontsize=8)
    legend_below(page, panels[0], 2 * min(3, len(panels)))
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

    The ``values`` are of one metric, ``sign`` is its `sign_of`; the axes beside the numeric one
    (usually the cohort's size) make a line each.
    """
    metric = str(values.metric.iloc[0])
    size, rim = (3.5, 2.9), (0.0, 0.7)
    page, panels = panel_grid(len(grid.terms), 3, size, rim, sharex=True, sharey=True)
    for panel, (title, term) in zip(panels, grid.terms.items(), strict=True):
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
    panels[0].set_ylabel(f"gain over {grid.reference}, {metric}", fontsize=8)
    legend_below(page, panels[0], min(3, len(panels)))
    caption = (
        f"Gain of a term over {grid.reference} in {metric}, on the same held-out slides (above 0 "
        "is better). Solid line, full dots: the term; dashed, open: its matched control. A dot is "
        "one seed, a line the mean of the seeds. A term pays where its line lies above 0 and above "
        "its control."
    )
    return Figure(f"Where each term pays: {metric}", caption, png_bytes(page))


def _finish(panel: Axes, title: str, axis: str) -> None:
    panel.set_title(title, fontsize=9, loc="left")
    panel.set_xlabel(axis, fontsize=8)
    panel.tick_params(labelsize=8, labelbottom=True)
    panel.grid(color="#E5E7EB", zorder=0)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def write_tables(grid: GridConfig, jobs: Sequence[GridJob]) -> Path:
    """Join what is done and write every form of it; returns the HTML report.

    Raises:
        ConfigError: nothing is done, or a metric that no job has.
    """
    tables = make_tables(grid, jobs)
    out = grid.out
    frames = {"table": tables.summary, "values": tables.values[VALUE_COLUMNS]}
    facts = _facts(grid, jobs, tables)  # first: they say who made the others
    write_results(out / "results.json", grid, facts, _task_results(grid, tables.values))
    gains = term_table(grid, tables.values, points_of(jobs))
    if grid.terms:
        frames["gains"] = gains
    for name, frame in frames.items():
        with atomic_path(out / f"{name}.csv") as temporary:
            plain = frame.map(lambda one: spreadsheet_text(one) if isinstance(one, str) else one)
            plain.to_csv(temporary, index=False)
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(as_markdown(grid, tables, gains), encoding="utf-8")
    pictures = figures(grid, tables, points_of(jobs))
    for position, picture in enumerate(pictures, start=1):
        with atomic_path(out / "figures" / f"{position:02d}.png") as temporary:
            temporary.write_bytes(picture.png)
    return _write_page(out / "report.html", grid, (tables, gains), facts, pictures)


def _facts(grid: GridConfig, jobs: Sequence[GridJob], tables: Tables) -> dict[str, Any]:
    lines = tables.summary.drop(columns="values", errors="ignore").to_dict("records")
    return {
        **provenance(),
        "reference": grid.reference,
        "n_jobs": len(jobs),
        "n_missing": len(tables.missing),
        "train_s": float(tables.costs.train_s.sum()),
        "measure_s": float(tables.costs.measure_s.sum()),
        "comparisons": lines,
    }


def _task_results(grid: GridConfig, values: pd.DataFrame) -> list[TaskResult]:
    """All values in the schema of results.json; a model is a row, behind its cell if several."""
    several = values.cell.nunique() > 1
    tasks: dict[str, TaskResult] = {}
    for key, part in values.groupby(["task", "cell", "row", "metric"], sort=False):
        task, cell, row, metric = (str(name) for name in key)
        chance = part.chance.dropna()
        model = f"{cell}/{row}" if several else row
        unit, better = str(part.quantity.iloc[0]), part.better.iloc[0]
        result = tasks.setdefault(task, TaskResult(task, {}))
        result.rows[model] = Row(_role(grid, row, str(part.role.iloc[0])))
        if better != "none":
            result.measures[metric] = Measure(metric, unit, better)
        result.models.setdefault(model, {})[metric] = Metric(
            values=part.value.tolist(),
            unit=unit,
            chance=float(chance.mean()) if len(chance) else None,
            keys=[f"{f}/{s}/{u}" for f, s, u in zip(part.fold, part.seed, part.unit, strict=True)],
        )
    return list(tasks.values())


def _role(grid: GridConfig, row: str, declared: str) -> Role:
    """The reference is the model, trained rows are its variants; controls stay controls."""
    if row == grid.reference:
        return "model"
    if row in grid.rows:
        return "control" if declared == "control" else "variant"
    return "control" if declared == "control" else "oracle" if declared == "oracle" else "baseline"


def _blocks(tables: Tables) -> list[tuple[str, list[dict[Hashable, Any]]]]:
    """Title and lines of each table, in order."""
    blocks = []
    for key, lines in tables.summary.groupby(["task", "metric", "cell"], sort=False):
        task, metric, cell = (str(name) for name in key)
        wanted = tables.values.task.eq(task) & tables.values.metric.eq(metric)
        where = "" if cell == ONE_CELL else f", {cell}"
        title = f"{task}: {metric} ({direction_of(tables.values[wanted])}){where}"
        blocks.append((title, lines.to_dict("records")))
    return blocks


def _name(line: Mapping[Hashable, Any]) -> str:
    return f"{line['group']}: {line['row']}" if line["group"] else str(line["row"])


def _cells(line: Mapping[Hashable, Any], reference: str) -> list[str]:
    """One line of a table as texts, in the order of `HEADINGS`."""
    start = [
        number(line["mean"], 4),
        number(line["std"], 4),
        str(line["n"]),
        number(line["std_seeds"], 4),
    ]
    if line["row"] == reference:
        test = ["reference", "", "", ""]
    else:
        test = [
            f"{line['difference']:+.4f}" if pd.notna(line["difference"]) else "–",
            f"{number(line['low'], 4)} to {number(line['high'], 4)}",
            number(line["p_holm"], 3),
            f"{line['better']:.0f} of {line['units']:.0f}" if pd.notna(line["units"]) else "–",
        ]
    trained = pd.notna(line["n_parameters"])
    cost = [f"{line[name]:,.0f}" if pd.notna(line[name]) else "–" for name in SPENT]
    return [*start, *test, *cost, f"{line['train_s']:.1f} s" if trained else "–"]


def _how(grid: GridConfig) -> str:
    return HOW.format(level=grid.level, draws=grid.draws)


def _gain_blocks(gains: pd.DataFrame) -> list[tuple[str, list[list[str]]]]:
    """Title and rows of the gains of each metric and cell."""
    if gains.empty:
        return []
    blocks = []
    for key, lines in gains.groupby(["task", "metric", "cell"], sort=False):
        task, metric, cell = (str(name) for name in key)
        blocks.append(
            (f"{task}: {metric}, {cell}", [_gain_cells(one) for one in lines.to_dict("records")])
        )
    return blocks


def _gain_cells(line: Mapping[Hashable, Any]) -> list[str]:
    gain, control, over = (
        f"{line[name]:+.4f}" if pd.notna(line[name]) else "–"
        for name in ("gain", "control", "over")
    )
    ends = {
        name: f"{number(line[f'{name}_low'], 4)} to {number(line[f'{name}_high'], 4)}"
        for name in ("gain", "over")
    }
    p = number(line["over_p"], 3)
    return [str(line["term"]), gain, ends["gain"], control, over, ends["over"], p]


def as_markdown(grid: GridConfig, tables: Tables, gains: pd.DataFrame) -> str:
    """The tables and the gains of the terms with every value, for ``docs/results``."""
    facts = provenance()
    parts = ["\n".join(f"- {name}: {facts[name]}" for name in ("command", "date", "machine"))]
    parts.append(f"Reference: `{grid.reference}`. {_how(grid)}")
    if tables.missing:
        parts.append(f"{len(tables.missing)} jobs are not done: {', '.join(tables.missing[:8])}")
    if not gains.empty:
        parts.append(f"# Terms\n\n{GAINS_HOW}")
    for title, cells in _gain_blocks(gains):
        parts += [f"## {title}", markdown_table(GAIN_HEADINGS, cells)]
    for title, lines in _blocks(tables):
        rows = [[_name(one), *_cells(one, grid.reference)] for one in lines]
        values = [f"- {one['row']}: {one['values']}" for one in lines]
        parts += [f"## {title}", markdown_table(HEADINGS, rows), "Every value:", "\n".join(values)]
    return "\n\n".join(parts) + "\n"


def _write_page(
    path: Path,
    grid: GridConfig,
    found: tuple[Tables, pd.DataFrame],
    facts: Mapping[str, Any],
    pictures: Sequence[Figure],
) -> Path:
    tables, gains = found
    shown = ("command", "date", "commit", "machine", "reference", "n_jobs", "n_missing")
    run = [*(Text(f"{name}: {facts[name]}", "soft") for name in shown), Text(_how(grid))]
    sections = [
        Section(run, "This ablation", "run"),
        Section(figure_parts(pictures), "Figures", "figures"),
    ]
    if not gains.empty:
        terms = [
            Table(GAIN_HEADINGS, [Line(row) for row in cells], title)
            for title, cells in _gain_blocks(gains)
        ]
        sections.append(Section([Text(GAINS_HOW), *terms], "Terms", "terms"))
    blocks = [part for title, lines in _blocks(tables) for part in _parts(grid, title, lines)]
    sections.append(Section(blocks, "Tables", "tables"))
    settings = Box(
        "The grid as it was run", [Verbatim(yaml.safe_dump(to_dict(grid), sort_keys=False))]
    )
    sections.append(Section([settings], "Grid", "grid"))
    return write_page(path, "HiBio ablation", sections)


def _parts(grid: GridConfig, title: str, lines: Sequence[Mapping[Hashable, Any]]) -> list[Part]:
    """One table and, in a box, every value of it."""
    rows = []
    for line in lines:
        kind = "self" if line["row"] == grid.reference else ""
        kind = "chance" if line["group"] == BASELINES else kind
        rows.append(Line((_name(line), *_cells(line, grid.reference)), kind))
    values = [Text(f": {one['values']}", "soft", str(one["row"])) for one in lines]
    return [Table(HEADINGS, rows, title), Box("Every value", values)]
