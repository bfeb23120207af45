"""Differences between runs with their intervals, a line a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.figures.canvas import HIGHLIGHT, LINES, QUIET, Figure, new_page, png_bytes
from preprocessing.errors import DataError

if TYPE_CHECKING:
    from eval.paired_results import Compared

MAX_LABEL = 60


def difference_plot(found: Sequence[Compared]) -> Figure:
    """Draw every difference with its interval; right of zero the first run is better.

    Metrics of different units share the axis only in their direction, so each is divided by its
    larger absolute mean.

    Args:
        found: comparisons of one run with one or more others.

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
    names = [_label(one, len(others) > 1) for one in found]
    axes.set_yticks(range(len(found)), labels=names, fontsize=8)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.axvline(0, color="#777777", linewidth=0.9)
    axes.set_xlabel(f"relative difference, right: {found[0].first} is better", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#E5E7EB", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    caption = (
        "Paired difference of the means and its 95 % bootstrap interval over units (slides, or "
        "folds for pooled metrics), divided by the larger of the two means. Filled: different "
        "after correction for the number of comparisons and at least three folds."
    )
    return Figure(f"{found[0].first} against {', '.join(others)}", caption, png_bytes(page))


def _label(one: Compared, several: bool) -> str:
    text = f"{one.task}: {one.metric}" + (f" vs {one.second}" if several else "")
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"
