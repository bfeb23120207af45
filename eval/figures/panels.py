"""Headed panels that show one part of a slide, beside each other. Shapes: S spots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.figures.canvas import (
    AREAS,
    MISSING,
    Window,
    draw_spots,
    grid_size,
    new_page,
    place,
    png_bytes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = tuple[str, Callable[["Axes"], None]]
LEGEND_WIDTH = 1.75
LEGEND_HEIGHT = 3.1  # of 14 names and two notes, so that a low slide does not cut them off


def spots_panel(xy: np.ndarray, colours: np.ndarray, window: Window) -> Callable[[Axes], None]:
    """Panel of spots (S, 2) in their colours (S, 4)."""
    return lambda axes: draw_spots(axes, xy, colours, window)


def draw_panels(panels: Sequence[Panel], window: Window, legend: float = 0.0) -> bytes:
    """Draw headed panels that share one window, row by row.

    Args:
        panels: Heading and drawing function of each.
        window: Part of the slide that all show.
        legend: Inches that the last panel needs free at its right.
    """
    columns = len(panels) if len(panels) <= 4 else min(4, -(-len(panels) // 2))
    rows, columns = grid_size(len(panels), columns)
    width, head, gap = 2.6, 0.3, 0.12
    height = width * window.aspect
    last_is_outermost = len(panels) == rows * columns
    page = new_page(
        columns * (width + gap) + gap + (legend if last_is_outermost else 0.0),
        max(rows * (height + head) + gap, LEGEND_HEIGHT if legend else 0.0),
        arranged=False,
    )
    for index, (heading, draw) in enumerate(panels):
        row, column = divmod(index, columns)
        left, top = gap + column * (width + gap), head + row * (height + head)
        cell = place(page, left, top, width, height)
        draw(cell)
        cell.set_title(heading, fontsize=9, loc="left", pad=4)
    return png_bytes(page)


def label_shades(labels: np.ndarray) -> dict[str, str]:
    """Colour of each name among the labels, by name; "" has none."""
    names = [str(name) for name in np.unique(labels.astype(str)) if str(name).strip()]
    return {name: AREAS[index % len(AREAS)] for index, name in enumerate(names)}


def label_colours(labels: np.ndarray, shade: Mapping[str, str]) -> np.ndarray:
    """RGBA (S, 4) of the labels; names without a colour are grey."""
    from matplotlib.colors import to_rgba

    return np.asarray([to_rgba(shade.get(str(label), MISSING)) for label in labels])


def labels_panel(xy: np.ndarray, labels: np.ndarray, window: Window) -> Callable[[Axes], None]:
    """Panel of named labels with their legend; more names than colours repeat with a note."""
    shade = label_shades(labels)
    names = list(shade)
    colours = label_colours(labels, shade)

    def draw(axes: Axes) -> None:
        from matplotlib.lines import Line2D

        draw_spots(axes, xy, colours, window)
        shown = names[:14]
        entries = [(shade[name], name) for name in shown]
        if len(names) > len(shown):
            entries.append(("none", f"and {len(names) - len(shown)} more"))
        if len(names) == 0 or any(not str(label).strip() for label in labels):
            entries.append((MISSING, "no label"))
        handles = [
            Line2D([], [], marker="o", linestyle="", color=colour, label=_short(name))
            for colour, name in entries
        ]
        axes.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0,
            fontsize=7,
            frameon=False,
            handletextpad=0.2,
        )

    return draw


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
