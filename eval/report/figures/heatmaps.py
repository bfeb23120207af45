"""Scores over the tissue: pathway heatmaps, predicted beside measured.

docs/method.md 6.7. Shapes: S spots. All panels of a figure show the same window.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from eval.report.figures.canvas import (
    Figure,
    check_spots,
    draw_slide,
    draw_spots,
    place,
    png_bytes,
    score_bar,
    score_colours,
    window_of,
)
from preprocessing.canvas import new_page
from preprocessing.errors import DataError

PathwayMap = tuple[str, np.ndarray, np.ndarray | None, np.ndarray | None]

PAGE_WIDTH, SIDE, HEAD, GAP, BAR = 11.0, 0.55, 0.3, 0.14, 0.6  # inches
SCALE_NOTE = "Every panel has its own colour scale, from its 2nd to its 98th percentile."


@dataclass(frozen=True)
class MapRow:
    """One row of panels.

    Attributes:
        name: of the pathway.
        panels: (heading, values (S,) or None) in column order; None leaves the cell empty.
    """

    name: str
    panels: tuple[tuple[str, np.ndarray | None], ...]


def pathway_heatmaps(
    thumbnail: np.ndarray | None,
    xy_thumb: np.ndarray,
    maps: Sequence[PathwayMap],
    title: str = "Zero-shot pathway scores",
) -> Figure:
    """Draw pathways as rows: predicted from H&E, measured and (simulated data) planted.

    Args:
        thumbnail: uint8 (h, w, 3), or None.
        xy_thumb: (S, 2) spot centres, thumbnail pixels.
        maps: (name, image score (S,), measured score (S,) or None on a slide without counts,
            planted activity (S,) or None). A column that is None throughout is left out.
        title: heading of the figure.

    Raises:
        DataError: no pathway, or a score of another length.
    """
    with_counts = any(measured is not None for _, _, measured, _ in maps)
    with_truth = any(planted is not None for *_, planted in maps)
    rows = []
    for name, predicted, measured, planted in maps:
        panels = _score_panels(xy_thumb, predicted, measured, with_counts)
        if with_truth:
            panels.append(_planted_panel(xy_thumb, predicted, planted))
        rows.append(MapRow(name, tuple(panels)))
    caption = f"Score of each gene set from the image alone: there are no counts. {SCALE_NOTE}"
    if with_counts:
        caption = (
            "Left to right: score from the image alone, and the same gene set's score on the "
            "measured counts. ρ is Spearman's correlation of the two over the spots of this "
            f"slide. {SCALE_NOTE}"
        )
    if with_truth:
        caption += " Planted: the simulated truth, with its ρ to the prediction."
    return Figure(title, caption, _draw_rows(thumbnail, xy_thumb, rows))


def _score_panels(
    xy: np.ndarray, predicted: np.ndarray, measured: np.ndarray | None, with_counts: bool
) -> list[tuple[str, np.ndarray | None]]:
    """The predicted score and, on slides with counts, the measured one."""
    check_spots(xy, predicted=predicted)
    if measured is None:
        missing: list[tuple[str, np.ndarray | None]] = [("not measured", None)]
        return [("predicted from H&E", predicted), *missing * with_counts]
    check_spots(xy, measured=measured)
    heading = f"predicted from H&E, ρ {coefficient(spearman(predicted, measured))}"
    return [(heading, predicted), ("measured", measured)]


def _planted_panel(
    xy: np.ndarray, predicted: np.ndarray, planted: np.ndarray | None
) -> tuple[str, np.ndarray | None]:
    if planted is None:
        return "nothing planted", None
    check_spots(xy, planted=planted)
    return f"planted, ρ {coefficient(spearman(predicted, planted))} to predicted", planted


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rho (average ranks) over entries of (S,) finite in both; NaN when constant."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(spearmanr(x, y).statistic)


def coefficient(value: float) -> str:
    """Two decimals, or a dash when the correlation is not defined."""
    return f"{value:.2f}" if np.isfinite(value) else "–"


@dataclass(frozen=True)
class Layout:
    """Places of the panels on a page, in inches from its top left corner.

    Attributes:
        count: number of rows of panels (`MapRow`).
        columns: score panels of one row.
        with_slide: whether the slide picture stands at the left.
        aspect: height over width of a panel.
    """

    count: int
    columns: int
    with_slide: bool
    aspect: float

    @property
    def across(self) -> int:
        """Rows that stand beside each other: two, when they are short and many."""
        return 2 if self.columns <= 2 and self.count > 2 else 1

    @property
    def lines(self) -> int:
        """Rows of panels below each other."""
        return -(-self.count // self.across)

    @property
    def _enlarged(self) -> float:
        """Slide width over panel width: larger when several lines leave room for it."""
        return min(1.0 + 0.4 * (self.lines - 1), 1.6) if self.with_slide else 0.0

    @property
    def panel(self) -> tuple[float, float]:
        """(width, height) of a score panel, so that the page stays within `PAGE_WIDTH`."""
        side = SIDE * self.across + GAP * (self.columns * self.across + 1) + BAR
        width = min(2.6, (PAGE_WIDTH - side) / (self.columns * self.across + self._enlarged))
        return width, width * self.aspect

    @property
    def slide(self) -> tuple[float, float]:
        """(width, height) of the slide picture."""
        width, height = self.panel
        return width * self._enlarged, height * self._enlarged

    @property
    def block(self) -> float:
        """Width of one row of panels with its name."""
        return SIDE + self.columns * (self.panel[0] + GAP)

    @property
    def left(self) -> float:
        """Where the first row begins."""
        return self.slide[0] + GAP if self.with_slide else 0.0

    @property
    def size(self) -> tuple[float, float]:
        """(width, height) of the page."""
        height = max(self.lines * (self.panel[1] + HEAD), self.slide[1] + HEAD)
        return self.left + self.across * self.block + BAR, height + 0.1

    def corner(self, index: int, column: int) -> tuple[float, float]:
        """(left, top) of a score panel of row `index`."""
        line, beside = divmod(index, self.across)
        left = self.left + beside * self.block + SIDE + column * (self.panel[0] + GAP)
        return left, HEAD + line * (self.panel[1] + HEAD)


def _draw_rows(thumbnail: np.ndarray | None, xy_thumb: np.ndarray, rows: Sequence[MapRow]) -> bytes:
    """Draw rows of score panels, the slide (once, larger when there is room) at their left."""
    if not rows:
        raise DataError("no map was given: pass at least one, or leave the figure out")
    xy = check_spots(xy_thumb)
    window = window_of(xy)
    layout = Layout(len(rows), len(rows[0].panels), thumbnail is not None, window.aspect)
    page = new_page(*layout.size, arranged=False)
    if thumbnail is not None:
        cell = place(page, 0.1, HEAD, *layout.slide)
        draw_slide(cell, thumbnail, window)
        cell.set_title("H&E", fontsize=8, loc="left", pad=4)
    for index, row in enumerate(rows):
        for column, (heading, values) in enumerate(row.panels):
            cell = place(page, *layout.corner(index, column), *layout.panel)
            cell.set_title(heading, fontsize=8, loc="left", pad=4)
            if column == 0:
                cell.set_ylabel(_row_name(row.name), fontsize=8, fontweight="bold")
            if values is None:
                cell.set_axis_off()
                continue
            draw_spots(cell, xy, score_colours(values), window)
    bar_left = layout.left + layout.across * layout.block
    score_bar(page, place(page, bar_left, HEAD, 0.12, min(layout.panel[1], 1.6)))
    return png_bytes(page)


def _row_name(name: str) -> str:
    """Break a long pathway name into at most three lines for the side of its row."""
    words = name.replace("_", " ")
    return "\n".join(textwrap.wrap(words, 22, max_lines=3, placeholder="…"))
