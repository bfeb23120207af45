"""How well the map of a picture and the map of counts agree, wherever the spots are laid.

Shapes: S spots, n groups of spots (at most 600), K components, F picture maps, C candidate places,
h x w cells of the maps; a place is (2, 3), from the pixels given to pixels of the picture.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import csr_matrix, diags
from scipy.spatial import cKDTree
from skimage.color import hed_from_rgb

from preprocessing.graphs import KNNGraph, morans_i
from preprocessing.tissue import DARK, tissue_pixels

Array = NDArray[np.floating[Any]]
GIVEN = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
OUTLINE_UNIT = 0.05  # so much outline counts like one standard deviation of agreement
_GROUPS, _MEMBERS, _SHOWN = 600, 4, 300
_GENES, _SVD, _SMOOTHEST, _NEIGHBOURS, _DRAWS = 1000, 20, 6, 6, 99
_CELLS, _LEAST_PX, _MAPS, _FAR = 8, 3.0, 12, 4.0
_SHARP, _WIDTHS = (0.1, 0.3), (0.3, 1.0)  # pitches
_RIDGE = 5.0
_RING = (1.2, 2.4)  # pitches from the nearest spot
_BLOCK = 64  # places whose maps are in memory at once


class Agreement:
    """One picture and one table of counts.

    Attributes:
        pitch: pixels of the picture.
        middle: (2,) of the spots, pixels.
        size: (2,) width and height of the picture.
        moran: Moran's I of the smoothest component of the counts; low where they lie anyhow.
        sd: of the agreement under the null, at the place given unless `measure_at` another.
    """

    def __init__(
        self, picture: NDArray[np.uint8], xy: Array, counts: csr_matrix, others: Array
    ) -> None:
        """Make the maps.

        Args:
            picture: uint8 (h, w, 3).
            xy: (S, 2) places in its pixels.
            counts: (S, G).
            others: (O, 2) places of spots without counts.
        """
        rng = np.random.default_rng(0)
        everything = np.vstack([xy, others])
        nearest = cKDTree(everything).query(everything, k=2)[0][:, 1]
        area = float(np.prod(np.ptp(everything, axis=0)))
        usual = float(np.median(nearest[nearest > 0])) if (nearest > 0).any() else 0.0
        self.pitch = max(usual, np.sqrt(area / _GROUPS) / 4, _LEAST_PX)
        self.size = np.array([picture.shape[1], picture.shape[0]], dtype=np.float32)
        self.middle = (everything.min(axis=0) + everything.max(axis=0)) / 2
        self._read_picture(picture)
        self._group(xy, rng)
        self._read_counts(counts, rng)
        self._shown = everything[rng.permutation(len(everything))[:_SHOWN]].astype(np.float32)
        self._ring = _ring(everything, self.pitch)
        self._ring = self._ring[rng.permutation(len(self._ring))[:_SHOWN]]
        self.measure_at(GIVEN)

    def _read_picture(self, picture: NDArray[np.uint8]) -> None:
        """Maps (h x w, F) of mean 0 and variance 1 on the tissue, and which cells are tissue."""
        white = np.where((picture <= DARK).all(axis=2, keepdims=True), 255, picture)
        white = white.astype(np.uint8)
        self._step = max(1, int(self.pitch / _CELLS))
        self._rim = int(np.ceil(2 * self.pitch / self._step)) * self._step
        tissue = self._framed(tissue_pixels(white)[0].astype(np.float32), 0.0)
        on = _cells(tissue, self._step) > 0.5
        shades = _shades(self._framed(white, 255), self.pitch)
        cells = np.stack([_cells(shade, self._step) for shade in shades], axis=2)
        maps = _smoothed(cells, self.pitch / self._step)
        self._shape, self._tissue = on.shape, on.ravel()
        self._maps = _whitened(maps.reshape(on.size, -1), self._tissue)
        inner = on[(slice(self._rim // self._step, -(self._rim // self._step)),) * 2]
        self.glass = float(1 - inner.mean())
        where = np.argwhere(on)
        place = where.mean(axis=0)[::-1] if len(where) else np.array(on.shape[::-1]) / 2
        self.tissue_middle = (place + 0.5) * self._step - self._rim

    def _framed(self, pixels: NDArray[Any], value: float) -> NDArray[Any]:
        """The picture with a rim of glass of two pitches, its edges whole cells."""
        rim, step = self._rim, self._step
        more = [(rim, rim + -(n + 2 * rim) % step) for n in pixels.shape[:2]]
        return np.pad(pixels, [*more, *[(0, 0)] * (pixels.ndim - 2)], constant_values=value)

    def _group(self, xy: Array, rng: np.random.Generator) -> None:
        """Put the spots of a square together where they are many; four of each are looked at."""
        group = _groups(xy)
        self._group_of = group
        order = rng.permutation(len(group))
        order = order[np.argsort(group[order], kind="stable")]
        place = np.arange(len(group)) - np.searchsorted(group[order], group[order])
        chosen = order[place < _MEMBERS]
        self._members = xy[chosen].astype(np.float32)
        self._sizes = np.bincount(group[chosen]).astype(np.float32)
        self._starts = np.searchsorted(group[chosen], np.arange(len(self._sizes)))
        sums = np.stack([np.bincount(group, xy[:, k]) for k in (0, 1)], axis=1)
        self._middles: NDArray[np.float64] = sums / np.bincount(group)[:, None]

    def _read_counts(self, counts: csr_matrix, rng: np.random.Generator) -> None:
        """Components (n, K) without cubic trend, weighted, and draws of the null (99, n, K)."""
        spots, groups = len(self._group_of), len(self._sizes)
        into = csr_matrix((np.ones(spots), (self._group_of, np.arange(spots))), (groups, spots))
        graph = KNNGraph(k=_NEIGHBOURS).build(self._middles)
        values, moran = _components(into @ counts, graph)
        self.moran = float(moran.max())
        trend = _cubic(self._middles)
        values = values - trend @ (trend.T @ values)
        values /= np.linalg.norm(values, axis=0) + 1e-12
        weight = np.maximum(moran, 0) / max(float(np.maximum(moran, 0).sum()), 1e-12)
        weighted = values * np.sqrt(weight)
        draws = _spectral_draws(weighted, graph.matrix().toarray(), trend, rng)
        self._values, self._draws = weighted.astype(np.float32), draws.astype(np.float32)
        self._trend = trend.astype(np.float32)

    def _at(self, points: NDArray[np.float32], places: Array) -> tuple[Array, NDArray[np.int32]]:
        """Points (m, 2) laid by places (C, 2, 3): pixels (C, m, 2), and cells (C, m)."""
        places = np.asarray(places, dtype=np.float32)
        there = points @ places[:, :, :2].transpose(0, 2, 1) + places[:, None, :, 2]
        cell = ((there + self._rim) / self._step).astype(np.int32)
        h, w = self._shape
        return there, np.clip(cell[..., 1], 0, h - 1) * w + np.clip(cell[..., 0], 0, w - 1)

    def outline(self, places: Array) -> NDArray[np.float64]:
        """Share of the spots on tissue, less that of the ring around them, (C,).

        What lies beyond the picture is not tissue for a spot, and half tissue for the ring.
        """
        share = []
        for points, beyond in ((self._shown, 0.0), (self._ring, 0.5)):
            there, cell = self._at(points, places)
            inside = ((there >= 0) & (there < self.size)).all(axis=2)
            share.append(np.where(inside, self._tissue[cell], beyond).mean(axis=1))
        return np.asarray(share[0] - share[1], dtype=np.float64)

    def _features(self, places: Array, only: NDArray[np.bool_] | None = None) -> Array:
        """Maps of the picture at the groups, without cubic trend, (C, n, F)."""
        maps: Array = self._maps[self._at(self._members, places)[1]]
        if len(self._members) > len(self._sizes):
            maps = np.add.reduceat(maps, self._starts, axis=1) / self._sizes[:, None]
        trend = self._trend
        if only is not None:
            maps, trend = maps[:, only], _cubic(self._middles[only]).astype(np.float32)
        return np.asarray(maps - trend @ (trend.T @ maps))

    def counts_fit(self, places: Array, only: NDArray[np.bool_] | None = None) -> Array:
        """Part of the components that a ridge regression on the maps explains, 0..1, (C,).

        ``only`` (n,): of these groups, whose trend is taken out anew.
        """
        values = self._values
        if only is not None:
            values = values[only]
            trend = _cubic(self._middles[only]).astype(np.float32)
            values = values - trend @ (trend.T @ values)
        blocks = (places[i : i + _BLOCK] for i in range(0, len(places), _BLOCK))
        return np.concatenate([_explained(self._features(b, only), values) for b in blocks])

    def _null(self, place: Array) -> Array:
        """`counts_fit` of the draws, (99,)."""
        return _explained(self._features(place[None]), self._draws)

    def measure_at(self, place: Array) -> None:
        """Take the spread of the null at this place (2, 3) as the unit of agreement."""
        self.sd = max(float(self._null(place).std()), 1e-3)

    def z(self, place: Array) -> float:
        """Agreement of the counts at a place (2, 3), standard deviations above the null."""
        null = self._null(place)
        found = float(self.counts_fit(place[None])[0])
        return (found - float(null.mean())) / max(float(null.std()), 1e-3)

    def total(self, places: Array, outline: Array | None) -> Array:
        """Agreement of counts and, where it is given, outline (C,), in standard deviations."""
        found = self.counts_fit(places) / self.sd
        return found if outline is None else found + outline / OUTLINE_UNIT

    def apart(self, one: Array, other: Array) -> float:
        """How far two places (2, 3) carry the spots from each other, pitches: the median."""
        there, _ = self._at(self._shown, np.stack([one, other]))
        return float(np.median(np.hypot(*(there[0] - there[1]).T)) / self.pitch)

    def distance(self, places: Array) -> NDArray[np.float64]:
        """How far places (C, 2, 3) carry the spots, pitches, (C,): the median."""
        there, _ = self._at(self._shown, places)
        off = there - self._shown
        return np.asarray(np.median(np.hypot(off[..., 0], off[..., 1]), axis=1) / self.pitch)

    def inside(self, depth: float) -> NDArray[np.bool_]:
        """Groups (n,) that lie this many pitches inside the tissue as they are given."""
        tissue = self._tissue.reshape(self._shape)
        deep = ndimage.distance_transform_edt(tissue).ravel() * self._step / self.pitch
        cell = self._at(self._middles.astype(np.float32), GIVEN[None])[1][0]
        return np.asarray(deep[cell] >= depth)

    def on_tissue(self, places: Array, only: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Share of these groups (n,) that is on tissue, (C,)."""
        cell = self._at(self._middles[only].astype(np.float32), places)[1]
        return np.asarray(self._tissue[cell].mean(axis=1))

    def middle_of(self, only: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Middle (2,) of these groups (n,)."""
        return np.asarray(self._middles[only].mean(axis=0))


def _ring(xy: Array, pitch: float) -> NDArray[np.float32]:
    """Points between 1.2 and 2.4 pitches from the nearest spot, half a pitch apart, (R, 2)."""
    low, high = xy.min(axis=0) - _RING[1] * pitch, xy.max(axis=0) + _RING[1] * pitch
    across = [np.arange(a, b, pitch / 2) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*across), axis=-1).reshape(-1, 2)
    far = cKDTree(xy).query(points)[0] / pitch
    return np.asarray(points[(far > _RING[0]) & (far < _RING[1])], dtype=np.float32)


def _cells(pixels: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Means of squares of step x step pixels."""
    parts = (pixels[i::step, j::step] for i in range(step) for j in range(step))
    return np.asarray(sum(parts) / np.float32(step**2))


def _shades(picture: NDArray[np.uint8], pitch: float) -> list[NDArray[np.float32]]:
    """Optical density of three channels, two stains, saturation, fine texture; then squares."""
    density = -np.log((picture.astype(np.float32) + 1) / 256)
    stains = density @ hed_from_rgb.astype(np.float32)[:, :2]
    brightest = picture.max(axis=2).astype(np.float32)
    saturation = (brightest - picture.min(axis=2)) / np.maximum(brightest, 1)
    dark = density.mean(axis=2)
    fine = [
        np.abs(dark - ndimage.gaussian_filter(dark, max(s * pitch, 0.7), truncate=3))
        for s in _SHARP
    ]
    plain = [*np.moveaxis(density, 2, 0), *np.moveaxis(stains, 2, 0), saturation, *fine]
    return [*plain, dark, dark**2, stains[..., 0] ** 2]


def _smoothed(cells: NDArray[np.float32], pitch: float) -> NDArray[np.float32]:
    """Means and local deviations at two widths, (h, w, 20); cells as `_shades` lists them."""
    maps = []
    for width in _WIDTHS:
        mean = ndimage.gaussian_filter(cells, (width * pitch, width * pitch, 0), truncate=3)
        spread = mean[..., 9:11] - mean[..., [8, 3]] ** 2
        maps += [mean[..., :8], np.sqrt(np.maximum(spread, 0))]
    return np.concatenate(maps, axis=2)


def _whitened(maps: NDArray[np.float32], tissue: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The 12 main directions of the maps on tissue, each of variance 1 there, (cells, F)."""
    on = tissue if tissue.sum() > 2 * maps.shape[1] else np.ones_like(tissue)
    mean, sd = maps[on].mean(axis=0), maps[on].std(axis=0)
    scaled = np.clip((maps - mean) / np.maximum(sd, 1e-6), -_FAR, _FAR)
    middle = scaled[on].mean(axis=0)
    value, vector = np.linalg.eigh(np.cov((scaled[on] - middle).T))
    value, vector = value[::-1][:_MAPS], vector[:, ::-1][:, :_MAPS]
    kept = value > 1e-6 * value[0]
    turned = vector[:, kept] / np.sqrt(value[kept])
    return np.asarray((scaled - middle) @ turned, dtype=np.float32)


def _groups(xy: Array) -> NDArray[np.int64]:
    """A number for each spot (S,): its own, or of the square that it lies in; at most 600."""
    if len(xy) <= _GROUPS:
        return np.arange(len(xy))
    low = xy.min(axis=0)
    edge = 0.7 * np.sqrt(np.prod(np.maximum(np.ptp(xy, axis=0), 1e-9)) / _GROUPS)
    while True:
        cell = np.floor((xy - low) / edge).astype(np.int64)
        group = np.unique(cell, axis=0, return_inverse=True)[1].ravel()
        if group.max() < _GROUPS:
            return group.astype(np.int64)
        edge *= 1.05


def _cubic(xy: Array) -> NDArray[np.float64]:
    """Orthonormal basis (n, 10) of the polynomials of degree 3 in x and y."""
    x, y = ((xy - xy.mean(axis=0)) / np.maximum(xy.std(axis=0), 1e-9)).T
    powers = [x**i * y**j for i in range(4) for j in range(4 - i)]
    return np.asarray(np.linalg.qr(np.stack(powers, axis=1))[0])


def _components(counts: csr_matrix, graph: Any) -> tuple[Array, Array]:
    """The six smoothest directions of log-normalised counts, and the depth: (n, 7), Moran's I."""
    depth = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    usual = np.median(np.maximum(depth, 1e-12))
    logs = csr_matrix(diags(usual / np.maximum(depth, 1e-12)) @ counts, dtype=np.float64)
    logs.data = np.log1p(logs.data)
    mean = np.asarray(logs.mean(axis=0)).ravel()
    variance = np.asarray(logs.multiply(logs).mean(axis=0)).ravel() - mean**2
    top = np.sort(np.argsort(-variance, kind="stable")[:_GENES])
    dense = logs[:, top].toarray() - mean[top]
    axes = np.linalg.eigh(dense @ dense.T)[1][:, : -_SVD - 1 : -1]  # the main directions of spots
    adjacency = graph.matrix()
    smooth = axes.T @ (adjacency @ axes)
    value, vector = np.linalg.eigh((smooth + smooth.T) / 2)
    turned = axes @ vector[:, np.argsort(-value)[:_SMOOTHEST]]
    found = np.column_stack([turned, np.log1p(depth)])
    return found, np.nan_to_num(morans_i(found, graph))


def _spectral_draws(
    values: Array, adjacency: Array, trend: Array, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Values as smooth as these, but elsewhere, (99, n, K): neighbouring modes turned in pairs.

    Modes are the eigenvectors of the graph without trend, by eigenvalue; a pair is turned by one
    angle in all columns, which keeps their correlations.
    """
    left = np.eye(len(trend)) - trend @ trend.T
    value, modes = np.linalg.eigh(left @ adjacency @ left)
    modes = modes[:, np.argsort(-value)]
    modes = modes[:, ((trend.T @ modes) ** 2).sum(axis=0) < 0.5]
    parts = modes.T @ values
    pairs = len(parts) // 2
    first, second = parts[: 2 * pairs : 2], parts[1 : 2 * pairs : 2]
    draws = np.empty((_DRAWS, *values.shape))
    for draw in draws:
        angle = rng.uniform(0, 2 * np.pi, (pairs, 1))
        turned = parts.copy()
        turned[: 2 * pairs : 2] = np.cos(angle) * first - np.sin(angle) * second
        turned[1 : 2 * pairs : 2] = np.sin(angle) * first + np.cos(angle) * second
        draw[:] = modes @ turned
    return draws


def _explained(maps: Array, values: Array) -> NDArray[np.float64]:
    """Sum of squares of values (n, K) or (D, n, K) that ridge on maps (C, n, F) explains, (C,)."""
    turned = maps.transpose(0, 2, 1)
    gram = (turned @ maps).astype(np.float64) + _RIDGE * np.eye(maps.shape[2])
    cross = (turned @ values).astype(np.float64)
    return np.asarray((cross * np.linalg.solve(gram, cross)).sum(axis=(1, 2)))
