"""Drawing ground of every figure of `eval`: the palettes, spots on a slide, PNG bytes.

Shapes: S spots, h x w picture pixels. Coordinates are pixels of the slide thumbnail, so y grows
downwards. matplotlib is imported inside the functions and pyplot is never touched.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import cKDTree

from preprocessing.canvas import picture_of
from preprocessing.errors import DataError
from preprocessing.pages import Part, Picture, Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Page
    from PIL.Image import Image

MAX_PNG_BYTES = 400_000
LONE_PITCH = 20.0
MISSING = "#D9D9D9"
HIGHLIGHT = "#D55E00"
QUIET = "#8FA3B8"
SEQUENTIAL = "viridis"
# Okabe-Ito without yellow, which is too pale for a line on white.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
# Paul Tol's "muted" scheme and two darker tones: areas that touch stay apart for any reader.
AREAS = (
    *("#88CCEE", "#CC6677", "#DDCC77", "#117733", "#332288", "#AA4499"),
    *("#44AA99", "#999933", "#882255", "#6699CC", "#E8A07A", "#555555"),
)


@dataclass(frozen=True)
class Figure:
    """One finished picture of a report.

    Attributes:
        title: short heading, plain text.
        caption: what is shown and how to read it, plain text.
        png: the picture as PNG bytes.
    """

    title: str
    caption: str
    png: bytes


def figure_parts(figures: Sequence[Figure]) -> list[Part]:
    """Numbered pictures of a page, or a sentence when there is none."""
    if not figures:
        return [Text("This run has no figures.", "soft")]
    return [
        Picture(one.png, one.title, one.caption, f"Figure {number}. {one.title}.")
        for number, one in enumerate(figures, start=1)
    ]


def place(page: Page, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes at a place given in inches from the top left corner of a page."""
    full_width, full_height = page.get_size_inches()
    bottom = full_height - top - height
    box = (left / full_width, bottom / full_height, width / full_width, height / full_height)
    return page.add_axes(box)


def legend_below(page: Page, axes: Axes, columns: int) -> None:
    """One legend of the names in these axes, below all panels of the page."""
    handles, names = axes.get_legend_handles_labels()
    page.legend(
        handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


def png_bytes(page: Page) -> bytes:
    """Draw a page and encode it, at most `MAX_PNG_BYTES` long where that is possible.

    A picture that is too heavy (stained tissue compresses badly) is first reduced to a palette of
    256 colours, then made smaller in steps of a fifth.
    """
    from PIL import Image

    picture = picture_of(page)
    data = _encode(picture)
    if len(data) <= MAX_PNG_BYTES:
        return data
    data = _encode(picture.quantize(256))
    while len(data) > MAX_PNG_BYTES and min(picture.size) > 200:
        width, height = (int(side * 0.8) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        data = _encode(picture.quantize(256))
    return data


def _encode(picture: Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def clipped(text: str, length: int) -> str:
    """At most ``length`` characters; what is longer ends in an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def check_spots(xy: np.ndarray, **columns: np.ndarray) -> np.ndarray:
    """Check coordinates and the values that belong to them.

    Args:
        xy: (S, 2) positions, thumbnail pixels.
        **columns: arrays whose last axis has S entries, by the name used in the message.

    Returns:
        The coordinates as float64 (S, 2).

    Raises:
        DataError: no spots, or a length that differs from S.
    """
    xy = np.asarray(xy, dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2 or len(xy) == 0:
        raise DataError(f"xy has shape {xy.shape}, expected (S, 2) with S >= 1: pass x and y")
    if not np.isfinite(xy).all():
        count = int((~np.isfinite(xy)).any(axis=1).sum())
        raise DataError(f"{count} of {len(xy)} spots have no finite position: leave them out")
    for name, column in columns.items():
        if np.ndim(column) == 0 or np.shape(column)[-1] != len(xy):
            raise DataError(
                f"{name} has shape {np.shape(column)}, expected {len(xy)} entries "
                "(one a spot) on its last axis: pass the values of the same slide as xy"
            )
    return xy


def spot_pitch(xy: np.ndarray) -> float:
    """Median distance to the nearest other spot, in the unit of `xy` (20 for a lone spot)."""
    if len(xy) < 2:
        return LONE_PITCH
    distance = cKDTree(xy).query(xy, k=2)[0][:, 1]
    positive = distance[distance > 0]
    return float(np.median(positive)) if positive.size else LONE_PITCH


@dataclass(frozen=True)
class Window:
    """The part of a slide that every panel of a figure shows.

    Attributes:
        x: (left, right), thumbnail pixels.
        y: (top, bottom), thumbnail pixels.
        diameter: drawn size of a spot, thumbnail pixels.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    diameter: float

    @property
    def aspect(self) -> float:
        """Height over width, kept between 0.4 and 2.5 so that pages stay readable."""
        ratio = (self.y[1] - self.y[0]) / (self.x[1] - self.x[0])
        return float(np.clip(ratio, 0.4, 2.5))


def window_of(xy: np.ndarray, panel_px: float = 260.0) -> Window:
    """Bounding box of the spots with a margin, and the marker size that fits their density.

    Args:
        xy: (S, 2) positions, thumbnail pixels.
        panel_px: expected width of a panel on the page; markers never fall below 1.3 of its
            pixels, so a dense slide does not fade away.
    """
    pitch = spot_pitch(xy)
    low, high = xy.min(axis=0), xy.max(axis=0)
    side = max(float((high - low).max()), 4 * pitch)
    middle, half = (low + high) / 2, np.maximum((high - low) / 2, side * 0.1)
    half = half + max(pitch, 0.02 * side)
    (x0, y0), (x1, y1) = middle - half, middle + half
    return Window((x0, x1), (y0, y1), max(0.94 * pitch, 1.3 * side / panel_px))


def frame(axes: Axes, window: Window) -> None:
    """Give an axes the slide's geometry: equal aspect, y downwards, no ticks."""
    axes.set_xlim(*window.x)
    axes.set_ylim(window.y[1], window.y[0])
    axes.set_aspect("equal", adjustable="box")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#BBBBBB")
        spine.set_linewidth(0.6)


def draw_slide(axes: Axes, thumbnail: np.ndarray, window: Window) -> None:
    """Show the slide picture, uint8 (h, w, 3), inside the window.

    Raises:
        DataError: the thumbnail is no colour picture, or the spots lie beside it.
    """
    picture = np.asarray(thumbnail)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise DataError(
            f"thumbnail is {picture.dtype} {picture.shape}, expected uint8 (h, w, 3): "
            "pass SlideStore.thumbnail, or None for a slide without a picture"
        )
    height, width = picture.shape[:2]
    x, y = sum(window.x) / 2, sum(window.y) / 2
    if not (0 <= x <= width and 0 <= y <= height):
        raise DataError(
            f"the middle of the spots ({x:.0f}, {y:.0f}) lies outside the thumbnail of {width} x "
            f"{height} px: divide level-0 pixels by SlideStore.thumbnail_downsample"
        )
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="antialiased")
    frame(axes, window)


def draw_spots(axes: Axes, xy: np.ndarray, colours: np.ndarray, window: Window) -> None:
    """Draw discs at (S, 2) in RGBA (S, 4); their size in slide units fits any density."""
    from matplotlib.collections import EllipseCollection

    size = np.full(len(xy), window.diameter)
    discs: Any = EllipseCollection(
        size,
        size,
        np.zeros(len(xy)),
        units="xy",
        offsets=xy,
        offset_transform=axes.transData,
        facecolors=colours,
        edgecolors="none",
    )
    axes.add_collection(discs)
    frame(axes, window)


def score_colours(values: np.ndarray) -> np.ndarray:
    """Map scores to colours between their 2nd and 98th percentile.

    Args:
        values: (S,) any unit; entries that are not finite become grey.

    Returns:
        (S, 4) RGBA. A constant score gets the middle colour everywhere.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba

    values = np.asarray(values, dtype=np.float64)
    colours = np.tile(np.asarray(to_rgba(MISSING)), (len(values), 1))
    finite = np.isfinite(values)
    if not finite.any():
        return colours
    low, high = np.percentile(values[finite], [2, 98])
    if high <= low:
        low, high = values[finite].min(), values[finite].max()
    scaled = np.full(int(finite.sum()), 0.5)
    if high > low:
        scaled = np.clip((values[finite] - low) / (high - low), 0, 1)
    colours[finite] = colormaps[SEQUENTIAL](scaled)
    return colours


def score_bar(page: Page, axes: Axes) -> None:
    """Fill an axes with the colour bar of the score panels, low to high."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = page.colorbar(ScalarMappable(Normalize(0, 1), SEQUENTIAL), cax=axes)
    bar.set_ticks([0, 1], labels=["low", "high"])
    bar.ax.tick_params(labelsize=8, length=0)
