"""Niches of one slide: clusters of embeddings beside the labels they are scored with.

METHOD section 6.3. Shapes: S spots.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment

from eval.figures.canvas import Figure, check_spots, window_of
from eval.figures.panels import (
    LEGEND_WIDTH,
    Panel,
    draw_panels,
    label_colours,
    label_shades,
    labels_panel,
    spots_panel,
)
from eval.metrics import ari


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
