"""Scattering points by a density map and stamping ellipses on a canvas, vectorised.

Legend: N stamps, (h, w) coarse grid cells of ``CELL_UM``, (H, W) pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preprocessing.simulate.layout import CELL_UM, Lattice

_PIXELS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Stamps:
    """Ellipses: centres (N,) and semi-axes (N, 2) in pixels, angle (N,) in radians, value (N,)."""

    y: NDArray[np.float64]
    x: NDArray[np.float64]
    semi_axes: NDArray[np.float64]
    angle: NDArray[np.float64]
    value: NDArray[np.float64]


def scatter(
    rng: np.random.Generator,
    density: NDArray[np.float32] | NDArray[np.float64],
    lattice: Lattice,
    mpp: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Poisson points inside the tissue.

    Args:
        rng: Random generator.
        density: (h, w) points per square micrometre.
        lattice: Whose tissue holds the points.
        mpp: Micrometres per pixel.

    Returns:
        y and x in pixels and the flat index of the grid cell, (N,) each.
    """
    expected = np.where(lattice.inside_um > 0, density, 0.0) * CELL_UM**2
    cell = np.repeat(np.arange(expected.size), rng.poisson(expected).ravel())
    row, column = np.divmod(cell, expected.shape[1])
    y = (row + rng.random(len(cell))) * (CELL_UM / mpp)
    x = (column + rng.random(len(cell))) * (CELL_UM / mpp)
    return y, x, cell


def stamp(shape: tuple[int, int], stamps: Stamps) -> NDArray[np.float32]:
    """(H, W) canvas: the largest value of the ellipses over each pixel, with soft edges of 1 px."""
    canvas = np.zeros(shape, dtype=np.float32)
    order = np.argsort(stamps.semi_axes.max(axis=1, initial=0.0), kind="stable")
    start = 0
    while start < len(order):
        half = int(np.ceil(stamps.semi_axes[order[start]].max())) + 2
        step = max(1, _PIXELS_AT_ONCE // (2 * half + 1) ** 2)
        block = order[start : start + step]
        _stamp_block(canvas, stamps, block)
        start += step
    return canvas


def _stamp_block(canvas: NDArray[np.float32], stamps: Stamps, block: NDArray[np.int64]) -> None:
    """Stamp ellipses of similar size on ``canvas`` in place."""
    axes = stamps.semi_axes[block].astype(np.float32)
    half = int(np.ceil(axes.max())) + 2
    offset = np.arange(-half, half + 1)
    y, x = stamps.y[block], stamps.x[block]
    row, column = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    dy = (offset + 0.5)[None, :] - (y - row)[:, None]
    dx = (offset + 0.5)[None, :] - (x - column)[:, None]
    cos, sin = np.cos(stamps.angle[block]), np.sin(stamps.angle[block])
    first = (cos[:, None] * dx).astype(np.float32)[:, None, :]
    first = first + (sin[:, None] * dy).astype(np.float32)[:, :, None]
    second = (-sin[:, None] * dx).astype(np.float32)[:, None, :]
    second = second + (cos[:, None] * dy).astype(np.float32)[:, :, None]
    first /= axes[:, 0, None, None]
    second /= axes[:, 1, None, None]
    distance = np.sqrt(first**2 + second**2)
    cover = np.clip((1 - distance) * axes.min(axis=1)[:, None, None] + 0.5, 0, 1)
    cover *= stamps.value[block].astype(np.float32)[:, None, None]
    rows, columns = row[:, None] + offset, column[:, None] + offset
    inside = (
        ((rows >= 0) & (rows < canvas.shape[0]))[:, :, None]
        & ((columns >= 0) & (columns < canvas.shape[1]))[:, None, :]
        & (cover > 0)
    )
    flat = rows[:, :, None] * canvas.shape[1] + columns[:, None, :]
    np.maximum.at(canvas.reshape(-1), flat[inside], cover[inside])
