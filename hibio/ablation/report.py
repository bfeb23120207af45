"""What an ablation leaves behind: table.csv, values.csv, table.md, results.json, report.html."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval.figures.canvas import Figure
from eval.glossary import lower_is_better
from eval.markdown import markdown_table
from eval.report.markup import Html, details, heading_row, join, number, paragraph, table, tag, text
from eval.report.page import figures_section, page
from eval.results import Metric, TaskResult, write_results
from hibio.ablation.config import BASELINES, GridConfig
from hibio.ablation.figures import figures
from hibio.ablation.gains import term_table
from hibio.ablation.plan import ONE_CELL, GridJob
from hibio.ablation.table import Tables, make_tables, points_of
from hibio.config import to_dict
from hibio.provenance import provenance
from preprocessing.atomic import atomic_path

HEADINGS = (
    *("row", "mean", "sd", "n", "sd of seeds", "difference", "interval"),
    *("p (Holm)", "better in", "parameters", "training"),
)
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


def write_tables(grid: GridConfig, jobs: Sequence[GridJob]) -> Path:
    """Join what is done and write every form of it; returns the HTML report.

    Raises:
        ConfigError: nothing is done, or a metric that no job has.
    """
    tables = make_tables(grid, jobs)
    out = grid.out
    frames = {"table": tables.summary, "values": tables.values}
    gains = term_table(grid, tables.values, points_of(jobs))
    if grid.terms:
        frames["gains"] = gains
    for name, frame in frames.items():
        with atomic_path(out / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(as_markdown(grid, tables, gains), encoding="utf-8")
    facts = _facts(grid, jobs, tables)
    write_results(out / "results.json", grid, facts, _task_results(tables.values))
    pictures = figures(grid, tables, points_of(jobs))
    for number_, picture in enumerate(pictures, start=1):
        with atomic_path(out / "figures" / f"{number_:02d}.png") as temporary:
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


def _task_results(values: pd.DataFrame) -> list[TaskResult]:
    """All values in the schema of results.json; a model is a row, behind its cell if several."""
    several = values.cell.nunique() > 1
    tasks: dict[str, dict[str, dict[str, Metric]]] = {}
    for key, part in values.groupby(["task", "cell", "row", "metric"], sort=False):
        task, cell, row, metric = (str(name) for name in key)
        chance = part.chance.dropna()
        model = f"{cell}/{row}" if several else row
        tasks.setdefault(task, {}).setdefault(model, {})[metric] = Metric(
            values=part.value.tolist(),
            unit=str(part.quantity.iloc[0]),
            chance=float(chance.mean()) if len(chance) else None,
            keys=[f"{f}/{s}/{u}" for f, s, u in zip(part.fold, part.seed, part.unit, strict=True)],
        )
    return [TaskResult(task, models) for task, models in tasks.items()]


def _blocks(tables: Tables) -> list[tuple[str, str, str, pd.DataFrame]]:
    """(cell, task, metric, lines) of each table, in order."""
    grouped = tables.summary.groupby(["task", "metric", "cell"], sort=False)
    return [(str(k[2]), str(k[0]), str(k[1]), lines) for k, lines in grouped]


def _title(cell: str, task: str, metric: str) -> str:
    better = "lower" if lower_is_better(metric, task) else "higher"
    where = "" if cell == ONE_CELL else f", {cell}"
    return f"{task}: {metric} ({better} is better){where}"


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
    cost = [f"{line['n_parameters']:,.0f}" if trained else "–"]
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
    """The tables with every value, for ``docs/results``.

    Args:
        grid: the ablation.
        tables: what was measured.
        gains: of the terms, empty without any.
    """
    facts = provenance()
    parts = ["\n".join(f"- {name}: {facts[name]}" for name in ("command", "date", "machine"))]
    parts.append(f"Reference: `{grid.reference}`. {_how(grid)}")
    if tables.missing:
        parts.append(f"{len(tables.missing)} jobs are not done: {', '.join(tables.missing[:8])}")
    if not gains.empty:
        parts.append(f"# Terms\n\n{GAINS_HOW}")
    for title, cells in _gain_blocks(gains):
        parts += [f"## {title}", markdown_table(GAIN_HEADINGS, cells)]
    for cell, task, metric, lines in _blocks(tables):
        rows = [[_name(one), *_cells(one, grid.reference)] for one in lines.to_dict("records")]
        values = [f"- {one['row']}: {one['values']}" for one in lines.to_dict("records")]
        heading = f"## {_title(cell, task, metric)}"
        parts += [heading, markdown_table(HEADINGS, rows), "Every value:", "\n".join(values)]
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
    run = [paragraph(f"{name}: {facts[name]}", "soft") for name in shown]
    run.append(paragraph(_how(grid)))
    sections: list[tuple[str, str, Html]] = [("run", "This ablation", join(run))]
    blocks = [_html_table(grid, *block) for block in _blocks(tables)]
    sections.append(("figures", "Figures", figures_section(pictures)))
    if not gains.empty:
        terms = [
            table(
                [heading_row(GAIN_HEADINGS)],
                [
                    tag(
                        "tr",
                        tag("th", text(row[0]), scope="row"),
                        *(tag("td", text(c)) for c in row[1:]),
                    )
                    for row in cells
                ],
                title,
            )
            for title, cells in _gain_blocks(gains)
        ]
        sections.append(("terms", "Terms", join([paragraph(GAINS_HOW), *terms])))
    sections.append(("tables", "Tables", join(blocks)))
    settings = tag("pre", text(_yaml(grid)))
    sections.append(("grid", "Grid", details("The grid as it was run", settings)))
    with atomic_path(path) as temporary:
        temporary.write_text(page("HiBio ablation", sections), encoding="utf-8")
    return path


def _html_table(grid: GridConfig, cell: str, task: str, metric: str, lines: pd.DataFrame) -> Html:
    body = []
    for line in lines.to_dict("records"):
        head = tag("th", text(_name(line)), scope="row")
        cells = [tag("td", text(value)) for value in _cells(line, grid.reference)]
        kind = "self" if line["row"] == grid.reference else None
        kind = "chance" if line["group"] == BASELINES else kind
        body.append(tag("tr", head, *cells, class_=kind))
    values = [
        tag("p", tag("b", text(one["row"])), text(f": {one['values']}"), class_="soft")
        for one in lines.to_dict("records")
    ]
    whole = table([heading_row(HEADINGS)], body, _title(cell, task, metric))
    return join([whole, details("Every value", *values)])


def _yaml(grid: GridConfig) -> str:
    import yaml

    return yaml.safe_dump(to_dict(grid), sort_keys=False)
