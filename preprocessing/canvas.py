"""Pages of matplotlib that leave no global state behind, for quality pages and reports alike.

matplotlib is imported inside the functions and pyplot is never touched: a page has its own Agg
canvas. Sizes are in inches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Page

DPI = 110
_OWN_FORMULA = "$\\mathdefault{"  # how matplotlib begins the powers of ten at its axes


def new_page(width: float, height: float, *, arranged: bool = True, dpi: int = DPI) -> Page:
    """Make an empty page; where it is not ``arranged``, the places of the axes are the caller's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    class PlainPage(Figure):
        """Names of genes, sets and slides are text, never formulas, whatever they hold."""

        def draw(self, renderer: Any) -> None:
            for text in self.findobj(Text):
                if text.get_text():  # ticks get their numbers later, while they are drawn
                    text.set_parse_math(text.get_text().startswith(_OWN_FORMULA))
            super().draw(renderer)

    page = PlainPage(
        figsize=(width, height),
        dpi=dpi,
        facecolor="white",
        layout="compressed" if arranged else None,
    )
    FigureCanvasAgg(page)
    return page


def grid_size(count: int, columns: int) -> tuple[int, int]:
    """Rows and columns for `count` panels, at most `columns` side by side."""
    columns = max(1, min(columns, count))
    return -(-max(count, 1) // columns), columns


def panel_grid(
    count: int,
    columns: int,
    panel: tuple[float, float],
    rim: tuple[float, float] = (0.0, 0.0),
    *,
    dpi: int = DPI,
    **shared: Any,
) -> tuple[Page, list[Axes]]:
    """A page with ``count`` equal panels, at most ``columns`` side by side.

    ``panel`` is (width, height) of each, ``rim`` what the page has beyond them; ``shared`` are
    ``sharex`` and ``sharey`` of the panels.
    """
    rows, columns = grid_size(count, columns)
    page = new_page(rim[0] + panel[0] * columns, panel[1] * rows + rim[1], dpi=dpi)
    axes = page.subplots(rows, columns, squeeze=False, **shared).ravel()
    for unused in axes[count:]:
        unused.set_visible(False)
    return page, list(axes[:count])


def picture_of(page: Page) -> Image.Image:
    """Draw a page as RGB."""
    canvas: Any = page.canvas
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
