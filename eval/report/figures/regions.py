"""Maps of regions, of their history over rebuilds, and of niches, in colours that tell them apart.

docs/method.md 5 and 6.3. Shapes: S spots, L levels, T rebuilds. A region id below 0 means "no
region" and is drawn grey.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

from eval.measures.metrics import ari
from eval.report.figures.canvas import (
    AREAS,
    MISSING,
    Figure,
    Window,
    check_spots,
    clipped,
    draw_slide,
    draw_spots,
    place,
    png_bytes,
    window_of,
)
from preprocessing.canvas import grid_size, new_page
from preprocessing.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = tuple[str, Callable[["Axes"], None]]

MAX_REBUILDS = 8
LEGEND_WIDTH = 1.75  # inches
LEGEND_HEIGHT = 3.1  # of 14 names and two notes, so that a low slide does not cut them off


def spots_panel(xy: np.ndarray, colours: np.ndarray, window: Window) -> Callable[[Axes], None]:
    """Panel of spots (S, 2) in their colours (S, 4)."""
    return lambda axes: draw_spots(axes, xy, colours, window)


def draw_panels(panels: Sequence[Panel], window: Window, legend: float = 0.0) -> bytes:
    """Draw headed panels that share one window, row by row.

    The last panel has ``legend`` inches free at its right.
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
            Line2D([], [], marker="o", linestyle="", color=colour, label=clipped(name, 24))
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


def niche_maps(
    xy: np.ndarray, labels: np.ndarray, clusters: Mapping[str, np.ndarray], title: str
) -> Figure:
    """Draw clusters in the colours of the labels that they overlap most, one to one.

    Args:
        xy: (S, 2) spot centres.
        labels: (S,) strings; "" is unlabelled and not scored.
        clusters: model -> (S,) cluster of each spot.
        title: heading of the figure.

    Raises:
        DataError: shapes that do not fit together.
    """
    xy = check_spots(xy, labels=labels, **dict(clusters))
    window = window_of(xy)
    names = labels.astype(str)
    shade = label_shades(names)
    panels: list[Panel] = []
    for model, found in clusters.items():
        named = matched_names(names, found)
        score = ari(names[names != ""], found[names != ""])
        colours = label_colours(named, shade)
        panels.append((f"{model}: ARI {score:.2f}", spots_panel(xy, colours, window)))
    panels.append(("labels", labels_panel(xy, names, window)))
    caption = (
        "Clusters are found without labels; each then takes the colour of the label that it "
        "overlaps most, one to one. Grey is unlabelled, or a cluster without a partner."
    )
    return Figure(title, caption, draw_panels(panels, window, LEGEND_WIDTH))


def matched_names(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The label of each spot's cluster under the one-to-one matching of largest overlap.

    Args:
        labels: (S,) strings; "" is unlabelled.
        clusters: (S,) ids.

    Returns:
        (S,) strings; "" for a cluster without a partner.
    """
    ids, cluster = np.unique(clusters, return_inverse=True)
    names, label = np.unique(labels.astype(str), return_inverse=True)
    overlap = np.zeros((len(ids), len(names)))
    np.add.at(overlap, (cluster, label), 1.0)
    overlap[:, names == ""] = 0.0
    partner = np.full(len(ids), "", dtype=names.dtype)
    rows, columns = linear_sum_assignment(-overlap)
    real = overlap[rows, columns] > 0
    partner[rows[real]] = names[columns[real]]
    return np.asarray(partner[cluster])


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
        title: heading of the figure.

    Raises:
        DataError: shapes that do not fit together.
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
        free = set(range(len(AREAS))) - near or range(len(AREAS))
        pick = min(free, key=lambda shade: (used[shade], shade))
        chosen[int(region)] = pick
        used[pick] += 1
    shades = [AREAS[chosen[int(region)]] for region in ids]
    palette = np.asarray([to_rgba(name) for name in (*shades, MISSING)])
    index = np.where(history >= 0, np.searchsorted(ids, history), len(ids))
    return palette[index]


def _touching_ids(xy: np.ndarray, history: np.ndarray) -> dict[int, set[int]]:
    """Id -> the ids beside it in any rebuild."""
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
        title: heading of the figure.

    Raises:
        DataError: no rebuild, or shapes that do not fit together.
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
