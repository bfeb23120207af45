"""Spatial graphs over the spots of one slide (METHOD section 3).

One class is one strategy; all of them turn spot centres in micrometres into a `SpotGraph`. Graphs
are symmetric and never cross slides, because each is built from the spots of one slide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import Delaunay, QhullError, cKDTree

from preprocessing.errors import DataError
from preprocessing.graphs.spot_graph import SpotGraph, components, morans_i

__all__ = [
    "DelaunayGraph",
    "GraphBuilder",
    "GridGraph",
    "KNNGraph",
    "RadiusGraph",
    "SpotGraph",
    "components",
    "morans_i",
]

_CROWDED = 512  # mean number of neighbours above which a radius is surely a mistake
_GRID_DEGREE = 8  # no planar array has more touching neighbours


class GraphBuilder(Protocol):
    """A strategy that joins the spots of one slide."""

    def build(self, xy_um: NDArray[np.float64]) -> SpotGraph:
        """Joins spot centres (S, 2), micrometres."""


@dataclass(frozen=True)
class KNNGraph:
    """Joins two spots when either is among the k nearest of the other (the union).

    Among neighbours at exactly the same distance the choice is arbitrary but repeatable.

    Attributes:
        k: neighbours asked for each spot; 6 on a hexagonal array.
        prune: edges longer than `prune` x the median edge are dropped; inf keeps all.
    """

    k: int = 6
    prune: float = 3.0

    def __post_init__(self) -> None:
        """Refuses settings that no graph can meet."""
        if self.k < 1:
            raise DataError(f"KNNGraph: k is {self.k}, expected at least 1 (6 is usual).")
        _check_prune(self.prune)

    def build(self, xy_um: NDArray[np.float64]) -> SpotGraph:
        """Joins spot centres (S, 2), micrometres."""
        xy = _checked_xy(xy_um)
        n_spots = len(xy)
        width = min(self.k + 1, n_spots)
        nearest = cKDTree(xy).query(xy, k=[*range(1, width + 1)])[1]
        is_self = nearest == np.arange(n_spots)[:, None]
        is_self[~is_self.any(axis=1), -1] = True  # crowded out by copies of itself
        source, place = np.nonzero(~is_self)
        return _graph_of_pairs(xy, source, nearest[source, place], self.prune)


@dataclass(frozen=True)
class RadiusGraph:
    """Joins all spots at most `radius_um` apart.

    Attributes:
        radius_um: reach in micrometres; 150 takes the first ring of a 100 um array.
    """

    radius_um: float

    def __post_init__(self) -> None:
        """Refuses settings that no graph can meet."""
        _check_length("RadiusGraph: radius_um", self.radius_um)

    def build(self, xy_um: NDArray[np.float64]) -> SpotGraph:
        """Joins spot centres (S, 2), micrometres."""
        xy = _checked_xy(xy_um)
        tree = cKDTree(xy)
        mean = tree.count_neighbors(tree, self.radius_um) / len(xy) - 1
        if mean > _CROWDED:
            raise DataError(
                f"RadiusGraph: within {self.radius_um:g} um a spot has {mean:.0f} neighbours on "
                f"average, expected at most {_CROWDED}. Give a smaller radius_um, or check that "
                "the coordinates are micrometres."
            )
        pairs = tree.query_pairs(self.radius_um, output_type="ndarray")
        return _graph_of_pairs(xy, pairs[:, 0], pairs[:, 1], math.inf)


@dataclass(frozen=True)
class DelaunayGraph:
    """Joins the corners of every triangle of the Delaunay triangulation.

    Attributes:
        prune: edges longer than `prune` x the median edge are dropped; inf keeps all.
    """

    prune: float = 3.0

    def __post_init__(self) -> None:
        """Refuses settings that no graph can meet."""
        _check_prune(self.prune)

    def build(self, xy_um: NDArray[np.float64]) -> SpotGraph:
        """Joins spot centres (S, 2), micrometres; at most two spots are simply joined.

        Raises:
            DataError: all spots lie on one line, or two at the same place.
        """
        xy = _checked_xy(xy_um)
        if len(xy) < 3:
            first = np.arange(len(xy) - 1)
            return _graph_of_pairs(xy, first, first + 1, self.prune)
        try:
            triangles = Delaunay(xy - xy.mean(axis=0))
        except QhullError as error:
            raise DataError(
                f"DelaunayGraph: the {len(xy)} spots lie on one line (or at one place), so no "
                "triangle exists. Use KNNGraph for this slide."
            ) from error
        if triangles.coplanar.size:
            spot, _, twin = triangles.coplanar[0]
            raise DataError(
                f"DelaunayGraph: {len(triangles.coplanar)} spots lie on top of another spot, first "
                f"spot {spot} on spot {twin} at {xy[spot].tolist()} um. Remove the copies or use "
                "KNNGraph."
            )
        corners = triangles.simplices
        source = np.concatenate([corners[:, 0], corners[:, 1], corners[:, 2]])
        target = np.concatenate([corners[:, 1], corners[:, 2], corners[:, 0]])
        return _graph_of_pairs(xy, source, target, self.prune)


@dataclass(frozen=True)
class GridGraph:
    """Joins the touching spots of a regular array: 6 on a hexagonal, 4 on a square one.

    Two spots touch when they are at most (1 + tolerance) x pitch apart, so the array geometry
    itself says which kind it is.

    Attributes:
        pitch_um: centre-to-centre distance; None measures it (median nearest distance).
        tolerance: slack for stage jitter; must stay below 0.41, where square diagonals begin.
    """

    pitch_um: float | None = None
    tolerance: float = 0.2

    def __post_init__(self) -> None:
        """Refuses settings that no graph can meet."""
        if self.pitch_um is not None:
            _check_length("GridGraph: pitch_um", self.pitch_um)
        if not 0 <= self.tolerance < 0.41:
            raise DataError(
                f"GridGraph: tolerance is {self.tolerance:g}, expected 0 to 0.41: above it the "
                "diagonals of a square array count as touching. Use RadiusGraph for those."
            )

    def build(self, xy_um: NDArray[np.float64]) -> SpotGraph:
        """Joins spot centres (S, 2), micrometres.

        Raises:
            DataError: the coordinates are no array of this pitch.
        """
        xy = _checked_xy(xy_um)
        if len(xy) == 1:
            return _graph_of_pairs(xy, np.zeros(0, np.int64), np.zeros(0, np.int64), math.inf)
        step = float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))
        pitch = step if self.pitch_um is None else self.pitch_um
        _check_length("GridGraph: the median distance to the nearest spot", pitch)
        if step < pitch * (1 - self.tolerance) / 2 or (len(xy) > 2 and step > 4 * pitch):
            raise self._no_array(pitch, f"the median nearest spot is {step:.4g} um away")
        graph = RadiusGraph(pitch * (1 + self.tolerance)).build(xy)
        if graph.degree.max() > _GRID_DEGREE:
            raise self._no_array(pitch, f"a spot has {graph.degree.max()} touching neighbours")
        return graph

    def _no_array(self, pitch: float, found: str) -> DataError:
        return DataError(
            f"GridGraph: the spots are no regular array of pitch {pitch:g} um: {found}. Leave "
            "pitch_um out to have it measured, check that coordinates are micrometres, or use "
            "KNNGraph."
        )


def _graph_of_pairs(
    xy: NDArray[np.float64], source: NDArray[Any], target: NDArray[Any], prune: float
) -> SpotGraph:
    """Makes undirected pairs (in any order, repeated or not) a pruned symmetric graph."""
    low = np.minimum(source, target).astype(np.int64)
    high = np.maximum(source, target).astype(np.int64)
    pair = np.sort(low * len(xy) + high)  # sort and compare: ten times faster than np.unique
    low, high = np.divmod(pair[np.diff(pair, prepend=-1) > 0], len(xy))
    distance = np.linalg.norm(xy[low] - xy[high], axis=1)
    apart = distance[distance > 0]
    if apart.size and math.isfinite(prune):
        kept = distance <= prune * np.median(apart)
        low, high, distance = low[kept], high[kept], distance[kept]
    return SpotGraph.from_edges(len(xy), low, high, distance)


def _checked_xy(xy_um: NDArray[Any]) -> NDArray[np.float64]:
    xy = np.asarray(xy_um, dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2 or len(xy) == 0:
        raise DataError(f"spot centres have shape {xy.shape}, expected (S, 2) with S at least 1.")
    bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if bad.size:
        raise DataError(
            f"{bad.size} of {len(xy)} spot centres are not finite, first row {bad[0]}: "
            f"{xy[bad[0]].tolist()}. Drop these spots or repair their coordinates."
        )
    return xy


def _check_prune(prune: float) -> None:
    if not prune >= 1:
        raise DataError(f"prune is {prune}, expected at least 1 x the median edge (3 is usual).")


def _check_length(name: str, length_um: float) -> None:
    if not (length_um > 0 and math.isfinite(length_um)):
        raise DataError(f"{name} is {length_um}, expected a positive length in micrometres.")
