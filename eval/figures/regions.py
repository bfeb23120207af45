"""Regions on the slide: every level beside the tissue, and their history over rebuilds.

METHOD section 5 (Ward tree constrained by the spatial graph). Shapes: S spots, L levels, T
rebuilds. A region id below 0 means "no region" and is drawn grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.figures.canvas import (
    AREAS,
    MISSING,
    Figure,
    check_spots,
    draw_slide,
    window_of,
)
from eval.figures.panels import LEGEND_WIDTH, Panel, draw_panels, labels_panel, spots_panel
from preprocessing.errors import DataError

if TYPE_CHECKING:
    pass

MAX_REBUILDS = 8


def slide_regions(
    thumbnail: np.ndarray | None,
    xy_thumb: np.ndarray,
    regions: np.ndarray,
    level_names: Sequence[str],
    labels: np.ndarray | None = None,
    title: str = "Regions of one slide",
) -> Figure:
    """Draw a slide beside its regions at each level and, when known, its labels.

    Args:
        thumbnail: uint8 (h, w, 3), or None for a slide without a picture.
        xy_thumb: (S, 2) spot centres, thumbnail pixels.
        regions: int (L, S) region of every spot at every level.
        level_names: L names, fine to coarse or as the run orders them.
        labels: (S,) strings, planted or a pathologist's; "" is unlabelled.
        title: Heading of the figure.

    Raises:
        DataError: Shapes that do not fit together.
    """
    regions = np.atleast_2d(np.asarray(regions))
    xy = check_spots(xy_thumb, regions=regions)
    if len(level_names) != len(regions):
        raise DataError(
            f"{len(level_names)} level names for {len(regions)} levels of regions: name each level"
        )
    window = window_of(xy)
    panels: list[Panel] = []
    if thumbnail is not None:
        panels.append(("H&E", lambda axes: draw_slide(axes, thumbnail, window)))
    for name, ids in zip(level_names, regions, strict=True):
        count = len(np.unique(ids[ids >= 0]))
        heading = f"{name}: {count} region{'' if count == 1 else 's'}"
        colours = region_colours(xy, ids[None])[0]
        panels.append((heading, spots_panel(xy, colours, window)))
    if labels is not None:
        check_spots(xy, labels=labels)
        panels.append(("labels", labels_panel(xy, np.asarray(labels), window)))
    legend = 0.0 if labels is None else LEGEND_WIDTH
    picture = draw_panels(panels, window, legend)
    return Figure(title, _regions_caption(thumbnail, labels), picture)


def _regions_caption(thumbnail: np.ndarray | None, labels: np.ndarray | None) -> str:
    caption = (
        "Colours only tell neighbouring regions apart; the same colour in two panels means "
        "nothing. Regions are found without labels."
    )
    if labels is not None:
        caption += " The last panel shows the labels that came with the slide, for comparison."
    return caption if thumbnail is not None else caption + " This slide has no picture."


def region_colours(xy: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Colour regions so that an id keeps its colour and ids that ever touch differ.

    Greedy colouring of the adjacency graph (6 nearest spots), largest region first, taking the
    allowed colour that has been used least.

    Args:
        xy: (S, 2) positions.
        history: int (T, S) region ids, matched across rebuilds.

    Returns:
        (T, S, 4) RGBA in 0..1.
    """
    from matplotlib.colors import to_rgba

    history = np.asarray(history)
    ids, sizes = np.unique(history[history >= 0], return_counts=True)
    touching = _touching_ids(xy, history)
    chosen: dict[int, int] = {}
    used = np.zeros(len(AREAS), dtype=np.int64)
    for region in ids[np.argsort(-sizes, kind="stable")]:
        near = {chosen[other] for other in touching.get(int(region), ()) if other in chosen}
        free = [shade for shade in range(len(AREAS)) if shade not in near] or list(
            range(len(AREAS))
        )
        pick = min(free, key=lambda shade: (used[shade], shade))
        chosen[int(region)] = pick
        used[pick] += 1
    shades = [AREAS[chosen[int(region)]] for region in ids]
    palette = np.asarray([to_rgba(name) for name in (*shades, MISSING)])
    place = np.searchsorted(ids, history)
    return palette[np.where(history >= 0, place, len(ids))]


def _touching_ids(xy: np.ndarray, history: np.ndarray) -> dict[int, set[int]]:
    """Pairs of ids that hold neighbouring spots in any rebuild."""
    from scipy.spatial import cKDTree

    if len(xy) < 2:
        return {}
    neighbour = cKDTree(xy).query(xy, k=min(7, len(xy)))[1][:, 1:]
    own = np.repeat(history[:, :, None], neighbour.shape[1], axis=2)
    other = history[:, neighbour]
    keep = (own != other) & (own >= 0) & (other >= 0)
    pairs = np.unique(np.column_stack([own[keep], other[keep]]), axis=0)
    touching: dict[int, set[int]] = {}
    for first, second in pairs.tolist():
        touching.setdefault(first, set()).add(second)
        touching.setdefault(second, set()).add(first)
    return touching


def region_history(
    history: np.ndarray, xy: np.ndarray, title: str = "How regions changed over rebuilds"
) -> Figure:
    """Draw the regions of one slide and level after every rebuild, as small multiples.

    Args:
        history: int (T, S) region ids after each rebuild, matched across rebuilds by overlap.
        xy: (S, 2) positions, any unit, y downwards.
        title: Heading of the figure.

    Raises:
        DataError: No rebuild, or shapes that do not fit together.
    """
    history = np.atleast_2d(np.asarray(history))
    xy = check_spots(xy, history=history)
    if len(history) == 0:
        raise DataError("region history has no rebuild: leave the figure out")
    shown = np.unique(np.linspace(0, len(history) - 1, min(len(history), MAX_REBUILDS)).astype(int))
    moved = np.r_[np.nan, (history[1:] != history[:-1]).mean(axis=1)]
    window = window_of(xy)
    colours = region_colours(xy, history)
    panels: list[Panel] = []
    for step in shown:
        heading = f"build {step}" if step == 0 else f"build {step}: {moved[step]:.1%} changed"
        panels.append((heading, spots_panel(xy, colours[step], window)))
    caption = (
        "Each region keeps its colour from build to build (matched by overlap). "
        '"changed" is the share of spots whose region differs from the build before.'
    )
    if len(shown) < len(history):
        caption += f" {len(shown)} of {len(history)} builds are drawn, evenly spaced."
    return Figure(title, caption, draw_panels(panels, window))
