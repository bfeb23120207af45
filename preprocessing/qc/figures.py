"""Pictures of a quality page: maps over the slide, histograms, flagged patches, the cohort.

matplotlib is imported inside the functions and pyplot is never touched. Shapes: S spots.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocessing.canvas import panel_grid, picture_of
from preprocessing.qc.slide import Limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 100
GREY, INK, MARK = "#C9CED6", "#5B7083", "#D55E00"
FLAG_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_JPEG_QUALITY = 82
_TILE_PX = 96
_BINS = 40
_MOST_RIMS = 500
_MANY_TICKS = 30.0
_SPOT_SHARE, _MARK_SHARE = 1 / 250, 1 / 70  # of the longer edge: what can still be seen
_BAR_INCHES = 0.55


def patch_strip(patches: NDArray[np.uint8]) -> bytes:
    """Put patches (n, px, px, 3) side by side, each 96 px wide with a white rim; JPEG."""
    strip = Image.new("RGB", (len(patches) * (_TILE_PX + 4), _TILE_PX), "white")
    for number, patch in enumerate(patches):
        small = Image.fromarray(patch).resize((_TILE_PX, _TILE_PX), Image.Resampling.BOX)
        strip.paste(small, (number * (_TILE_PX + 4), 0))
    return encode(strip, "JPEG")


def small_picture(picture: NDArray[np.uint8], edge_px: int = 140) -> bytes:
    """Return a thumbnail of a thumbnail; JPEG."""
    image = Image.fromarray(picture)
    image.thumbnail((edge_px, edge_px))
    return encode(image, "JPEG")


def encode(picture: Image.Image, form: str) -> bytes:
    """Encode a picture as "PNG" or "JPEG"."""
    stream = io.BytesIO()
    how: dict[str, Any] = {"quality": _JPEG_QUALITY} if form == "JPEG" else {"optimize": True}
    picture.save(stream, format=form, **how)
    return stream.getvalue()


@dataclass(frozen=True)
class Ground:
    """What the spots of a slide are drawn on.

    Attributes:
        xy_um: (S, 2) places, micrometres, y downwards.
        diameter_um: size of a drawn spot.
        picture: thumbnail uint8 (h, w, 3), or None.
        size_um: (width, height) of the thumbnail.
    """

    xy_um: NDArray[np.float64]
    diameter_um: float
    picture: NDArray[np.uint8] | None = None
    size_um: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Panel:
    """One measurement as a map and as a histogram.

    Attributes:
        title: words above it.
        values: (S,) numbers; NaN is grey.
        unit: words under the histogram.
        log: logarithmic colours and bins.
        limit: a line in the histogram; NaN none.
    """

    title: str
    values: NDArray[np.float64]
    unit: str = ""
    log: bool = False
    limit: float = math.nan


def spot_maps(ground: Ground, panels: Sequence[Panel]) -> bytes:
    """Draw each measurement over the slide; JPEG."""
    axes, page = _grid(ground, len(panels), _BAR_INCHES)
    for place, panel in zip(axes, panels, strict=True):
        _base(place, ground, panel.title)
        known = np.isfinite(panel.values) & ((panel.values > 0) | (not panel.log))
        _spots(place, ground, ~known, colour=GREY)
        if known.any():
            drawn = _spots(place, ground, known)
            drawn.set_array(panel.values[known])
            drawn.set_norm(_norm(panel.values[known], panel.log))
            bar = page.colorbar(drawn, ax=place, shrink=0.7, pad=0.02)
            bar.ax.tick_params(labelsize=7)
            if panel.log:
                _round_ticks(bar.ax.yaxis, *drawn.get_clim())
    return _jpeg(page)


def flag_maps(ground: Ground, flags: dict[str, NDArray[np.bool_]]) -> bytes:
    """Draw the bare slide, then which spots stand out for each reason that has any; JPEG."""
    shown = {reason: mask for reason, mask in flags.items() if mask.any()}
    axes, page = _grid(ground, 1 + len(shown))
    _base(axes[0], ground, "slide" if ground.picture is not None else "spots")
    if ground.picture is None:
        _spots(axes[0], ground, np.ones(len(ground.xy_um), dtype=bool), colour=GREY)
    for number, (reason, mask) in enumerate(shown.items(), start=1):
        _base(axes[number], ground, f"{reason}: {int(mask.sum())}")
        if ground.picture is None:
            _spots(axes[number], ground, ~mask, colour=GREY)
        colour = FLAG_COLOURS[(number - 1) % len(FLAG_COLOURS)]
        drawn = _spots(axes[number], ground, mask, colour=colour, alpha=0.9, least=_MARK_SHARE)
        if mask.sum() <= _MOST_RIMS:  # found more easily on a picture
            drawn.set(edgecolor="black", linewidth=0.6)
    return _jpeg(page)


def two_places(ground: Ground, there_um: NDArray[np.float64]) -> bytes:
    """Draw the spots as they are given, and at other places (S, 2), over the slide; JPEG."""
    axes, page = _grid(ground, 2)
    everywhere = np.ones(len(there_um), dtype=bool)
    for axis, title, xy_um in zip(
        axes, ("as given", "where they fit"), (ground.xy_um, there_um), strict=True
    ):
        _base(axis, ground, title)
        small = replace(ground, xy_um=xy_um, diameter_um=0.5 * ground.diameter_um)
        _spots(axis, small, everywhere, colour=FLAG_COLOURS[1], alpha=0.7)
    return _jpeg(page)


def histograms(panels: Sequence[Panel]) -> bytes:
    """Draw the distribution of each measurement, its limit as a dashed line; PNG."""
    page, axes = panel_grid(len(panels), 3, (3.1, 2.2), dpi=DPI)
    for place, panel in zip(axes, panels, strict=True):
        values = panel.values[np.isfinite(panel.values)]
        values = values[values > 0] if panel.log else values
        place.set_title(panel.title, fontsize=9)
        place.set_xlabel(panel.unit, fontsize=8)
        place.tick_params(labelsize=7)
        for side in ("top", "right"):
            place.spines[side].set_visible(False)
        if len(values) == 0:
            continue
        place.hist(values, bins=_edges(values, panel.log).tolist(), color=INK)
        if panel.log:
            place.set_xscale("log")
            _round_ticks(place.xaxis, float(values.min()), float(values.max()))
        place.set_ylabel("spots", fontsize=8)
        if math.isfinite(panel.limit):
            place.axvline(panel.limit, color=MARK, linestyle="--", linewidth=1.2)
    return _png(page)


def cohort_dots(
    rows: Sequence[tuple[str, NDArray[np.float64], Limits, bool]], names: Sequence[str]
) -> bytes:
    """Draw each measure (all are 0 or more) of all slides as dots, with the usual range; PNG.

    Args:
        rows: (label, values a slide, usual range, logarithmic).
        names: slides, written beside the dots outside the range.
    """
    page, axes = panel_grid(len(rows), 2, (4.6, 1.15), dpi=DPI)
    for place, (label, values, limits, log) in zip(axes, rows, strict=True):
        place.set_title(label, fontsize=9, loc="left")
        place.set_yticks([])
        place.tick_params(labelsize=7)
        for side in ("top", "right", "left"):
            place.spines[side].set_visible(False)
        if math.isfinite(limits.low):
            place.axvspan(max(limits.low, 0.0), limits.high, color="#E3E9EF", linewidth=0)
        place.axvline(limits.median, color=INK, linewidth=1)
        far = limits.below(values) | limits.above(values)
        height = np.linspace(0.2, 0.8, len(values))
        place.scatter(values, height, s=14, c=np.where(far, MARK, INK), linewidths=0)
        for number in np.flatnonzero(far)[:6]:
            place.annotate(
                names[number], (values[number], height[number]), fontsize=7, color=MARK,
                xytext=(4, -2), textcoords="offset points",
            )  # fmt: skip
        place.set_ylim(0, 1)
        known = values[np.isfinite(values)]
        if log and (known > 0).all():
            place.set_xscale("log")
            _round_ticks(place.xaxis, float(known.min()), float(known.max()))
    return _png(page)


def _grid(ground: Ground, count: int, beside: float = 0.0) -> tuple[Sequence[Axes], Figure]:
    """A page for maps, as high as the slide asks, with some inches beside each."""
    width, height = _extent(ground)[1] - _extent(ground)[0]
    ratio = min(max(height / max(width, 1e-9), 0.4), 1.6)
    page, axes = panel_grid(count, 3, (3.2 + beside, 3.0 * ratio + 0.4), dpi=DPI)
    return axes, page


def _extent(ground: Ground) -> NDArray[np.float64]:
    """Corners (x, y) of what is drawn, micrometres, (2, 2)."""
    if ground.picture is not None:
        return np.array([(0.0, 0.0), ground.size_um])
    rim = ground.diameter_um
    return np.stack([ground.xy_um.min(axis=0) - rim, ground.xy_um.max(axis=0) + rim])


def _base(place: Axes, ground: Ground, title: str) -> None:
    """Draw the slide under the spots, and a bar of a round length."""
    (left, top), (right, bottom) = _extent(ground)
    if ground.picture is not None:
        place.imshow(ground.picture, extent=(left, right, bottom, top), interpolation="bilinear")
    place.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    place.set_title(title, fontsize=9)
    length = _round_length((right - left) / 4)
    y = bottom - 0.04 * (bottom - top)
    x = left + 0.04 * (right - left)
    place.plot([x, x + length], [y, y], color="black", linewidth=2, solid_capstyle="butt")
    words = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    place.annotate(words, (x, y), xytext=(0, 3), textcoords="offset points", fontsize=7)


def _round_length(length: float) -> float:
    """Largest of 1, 2, 5 times a power of ten that is not above."""
    power = 10.0 ** math.floor(math.log10(max(length, 1e-9)))
    return max(step * power for step in (1, 2, 5) if step * power <= length * (1 + 1e-9))


def _spots(
    place: Axes,
    ground: Ground,
    mask: NDArray[np.bool_],
    colour: str | None = None,
    alpha: float = 0.85,
    least: float = _SPOT_SHARE,
) -> Any:
    """Draw some spots, at least as large as a share of the longer edge."""
    from matplotlib.collections import EllipseCollection

    edge = float(np.ptp(_extent(ground), axis=0).max())
    width = np.full(int(mask.sum()), max(ground.diameter_um, least * edge))
    drawn = EllipseCollection(
        width, width, np.zeros_like(width), units="xy", offsets=ground.xy_um[mask],
        offset_transform=place.transData, linewidths=0, alpha=alpha, cmap="viridis",
        facecolors=colour,
    )  # fmt: skip
    place.add_collection(drawn)
    return drawn


def _round_ticks(axis: Axis, low: float, high: float) -> None:
    """Mark a logarithmic axis at 1, 2 and 5 times powers of ten, or at powers only, if many."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < _MANY_TICKS else (1,)
    marks = [step * 10.0**power for power in powers for step in steps]
    axis.set_major_locator(FixedLocator(marks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _norm(values: NDArray[np.float64], log: bool) -> Any:
    """Colours from the 1st to the 99th percentile."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = np.percentile(values, [1, 99])
    if high <= low:
        high = low + max(abs(low) * 0.01, 1e-6)
    return LogNorm(low, high) if log else Normalize(low, high)


def _edges(values: NDArray[np.float64], log: bool) -> NDArray[np.float64]:
    """Edges of the bars."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        half = 0.5 if not log else 0.1 * low
        return np.linspace(low - half, high + half, 4)
    return np.geomspace(low, high, _BINS + 1) if log else np.linspace(low, high, _BINS + 1)


def _jpeg(page: Figure) -> bytes:
    return encode(picture_of(page), "JPEG")


def _png(page: Figure) -> bytes:
    return encode(picture_of(page).quantize(64), "PNG")
