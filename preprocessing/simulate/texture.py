"""An H&E-like picture drawn from texture parameters: nuclei, fibres, fat holes, stains.

Legend: S spots, N stamps, T texture parameters, (h, w) coarse grid cells of ``CELL_UM``, (H, W)
pixels. Absorbance (optical density, base e) is composed per stain and turned into RGB at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from preprocessing.simulate.layout import CELL_UM, Lattice

TEXTURES = (
    "nuclei_density",
    "nuclei_size",
    "nuclei_darkness",
    "eosin",
    "eosin_tint",
    "haze",
    "fibres",
    "vacuoles",
    "granules",
    "erythrocytes",
)
_PIXELS_AT_ONCE = 2_000_000
_KERNEL = 0.42  # sigma, in pitches of the array
#: Absorbance in red, green, blue of haematoxylin, two tints of eosin, and erythrocytes.
_STAIN_H = np.array([0.62, 0.72, 0.32])
_STAIN_PINK = np.array([0.07, 0.80, 0.33])
_STAIN_SALMON = np.array([0.13, 0.66, 0.62])
_STAIN_RED = np.array([0.10, 0.85, 0.75])
_GLASS = 243.0  # of 255
Float = NDArray[np.float32]
Double = NDArray[np.float64]


@dataclass(frozen=True)
class Stamps:
    """Ellipses: centres (N,) and semi-axes (N, 2) in pixels, angle (N,) in radians, value (N,)."""

    y: Double
    x: Double
    semi_axes: Double
    angle: Double
    value: Double


def stamp(shape: tuple[int, int], stamps: Stamps) -> Float:
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


def _stamp_block(canvas: Float, stamps: Stamps, block: NDArray[np.int64]) -> None:
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


@dataclass(frozen=True)
class Stain:
    """Staining of one slide: factors of the two stains and a small shift of their colours."""

    haematoxylin: float
    eosin: float
    hue: tuple[float, float, float]


def draw_stain(rng: np.random.Generator, spread: float) -> Stain:
    """Stain strengths with log standard deviation ``spread``, colours with a fifth of it."""
    strength = np.exp(spread * rng.standard_normal(2))
    hue = np.exp(0.2 * spread * rng.standard_normal(3))
    return Stain(
        float(strength[0]), float(strength[1]), (float(hue[0]), float(hue[1]), float(hue[2]))
    )


def parameter_maps(values: Double, lattice: Lattice) -> Float:
    """(T, h, w) texture parameters of the coarse grid from those of the spots (S, T).

    Gaussian kernel average of the spots (sigma .42 pitches), squashed to within 2.5.
    """
    shape = lattice.inside_um.shape
    at = lattice.spot_cells
    layers = np.concatenate([values.T, np.ones((1, len(values)))])
    impulse = np.zeros((len(layers), *shape), dtype=np.float32)
    for layer, value in zip(impulse, layers, strict=True):
        np.add.at(layer, at, value)
    sigma = _KERNEL * lattice.pitch_um / CELL_UM
    smooth = ndimage.gaussian_filter(impulse, (0, sigma, sigma), truncate=6)
    mean = smooth[:-1] / np.maximum(smooth[-1], 1e-9)
    maps: Float = (2.5 * np.tanh(mean / 2.5)).astype(np.float32)
    return maps


def enlarge(grid: Float, shape: tuple[int, int]) -> Float:
    """Bilinear enlargement of a grid (h, w) to (H, W) pixels, cell centres kept in place."""
    picture = Image.fromarray(np.ascontiguousarray(grid, dtype=np.float32))
    return np.array(picture.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale_px: float) -> Float:
    """(H, W) noise of unit sd (about) whose features are ``scale_px`` pixels wide."""
    small = tuple(int(np.ceil(n / scale_px)) + 2 for n in shape)
    noise = ndimage.gaussian_filter(rng.standard_normal(small, dtype=np.float32), 0.7)
    picture = Image.fromarray(noise / noise.std())
    box = (0.0, 0.0, min(shape[1] / scale_px, small[1]), min(shape[0] / scale_px, small[0]))
    return np.array(picture.resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box=box))


def fibre_noise(rng: np.random.Generator, shape: tuple[int, int], mpp: float) -> Float:
    """(H, W) wavy streaks of unit sd, about 3 um wide, along one direction per slide."""
    side = 1024
    white = rng.standard_normal((side, side), dtype=np.float32)
    tile = ndimage.gaussian_filter(white, (1.4 / mpp, 16.0 / mpp), mode="wrap")
    tile /= tile.std()
    angle = rng.uniform(0, np.pi)
    across, along = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    y = np.arange(shape[0], dtype=np.float32)[:, None]
    x = np.arange(shape[1], dtype=np.float32)[None, :]
    v = y * across - x * along + (14 / mpp) * smooth_noise(rng, shape, 90 / mpp)
    u = y * along + x * across + (14 / mpp) * smooth_noise(rng, shape, 90 / mpp)
    index = (v.astype(np.int32) % side) * side + u.astype(np.int32) % side
    streaks: Float = tile.ravel()[index]
    return streaks


def render(
    rng: np.random.Generator,
    parameters: Float,
    lattice: Lattice,
    stain: Stain,
    mpp: float,
) -> NDArray[np.uint8]:
    """The slide at level 0, (H, W, 3) uint8.

    Args:
        rng: Random generator of this slide's picture.
        parameters: (T, h, w) texture parameters in the order of ``TEXTURES``, about unit variance.
        lattice: Gives the tissue outline and the size of the picture.
        stain: Staining of this slide.
        mpp: Micrometres per pixel.
    """
    width, height = (round(n / mpp) for n in lattice.size_um)
    shape = (height, width)
    level = dict(zip(TEXTURES, parameters, strict=True))
    layers = _Layers(rng, level, lattice, shape, mpp)
    tissue = np.clip(enlarge(lattice.inside_um, shape) / 5.0, 0, 1)
    solid = tissue * (1 - layers.holes())
    haematoxylin = layers.haematoxylin() * solid
    eosin = layers.eosin() * solid
    red = layers.erythrocytes() * solid
    tint = enlarge(1 / (1 + np.exp(-1.1 * level["eosin_tint"])), shape)
    haematoxylin *= stain.haematoxylin
    eosin *= stain.eosin
    picture = np.empty((*shape, 3), dtype=np.uint8)
    for channel in range(3):
        pink, salmon = _STAIN_PINK[channel], _STAIN_SALMON[channel]
        density = eosin * (np.float32(pink) + np.float32(salmon - pink) * tint)
        density += np.float32(_STAIN_H[channel]) * haematoxylin
        density += np.float32(_STAIN_RED[channel]) * red
        light = np.exp(-np.float32(stain.hue[channel]) * density) * np.float32(_GLASS)
        light += np.float32(1.8) * rng.standard_normal(shape, dtype=np.float32)
        np.clip(light + 0.5, 0, 255, out=light)
        picture[..., channel] = light
    return picture


@dataclass(frozen=True)
class _Layers:
    """What one slide is drawn with; each method draws one layer of it, (H, W)."""

    rng: np.random.Generator
    level: dict[str, Float]
    lattice: Lattice
    shape: tuple[int, int]
    mpp: float

    def scatter(self, density: Float | Double) -> tuple[Double, Double, NDArray[np.int64]]:
        """Poisson points inside the tissue, of a density (h, w) per square micrometre.

        Returns:
            y and x in pixels and the flat index of the grid cell, (N,) each.
        """
        expected = np.where(self.lattice.inside_um > 0, density, 0.0) * CELL_UM**2
        cell = np.repeat(np.arange(expected.size), self.rng.poisson(expected).ravel())
        row, column = np.divmod(cell, expected.shape[1])
        y = (row + self.rng.random(len(cell))) * (CELL_UM / self.mpp)
        x = (column + self.rng.random(len(cell))) * (CELL_UM / self.mpp)
        return y, x, cell

    def noise(self, scale_um: float) -> Float:
        """Smooth noise whose features are ``scale_um`` wide."""
        return smooth_noise(self.rng, self.shape, scale_um / self.mpp)

    def eosin(self) -> Float:
        """Eosin density: stroma with fibres (fine streaks) and granules (4 um blotches)."""
        fibre = enlarge(0.30 / (1 + np.exp(-1.2 * self.level["fibres"])), self.shape)
        granule = enlarge(0.30 / (1 + np.exp(-1.2 * self.level["granules"])), self.shape)
        grain = 1 + fibre * fibre_noise(self.rng, self.shape, self.mpp)
        grain += granule * self.noise(4.5)
        grain += np.float32(0.07) * self.noise(25)
        base = enlarge(0.62 * np.exp(0.20 * self.level["eosin"]), self.shape)
        density: Float = base * np.clip(grain, 0.12, 3)
        return density

    def haematoxylin(self) -> Float:
        """Haematoxylin density: elliptic nuclei of 6-12 um with chromatin, over a faint haze."""
        rng, level = self.rng, self.level
        y, x, cell = self.scatter(0.0026 * np.exp(0.50 * level["nuclei_density"]))
        n = len(y)
        size = 0.17 * level["nuclei_size"].ravel()[cell] + rng.normal(0, 0.15, n)
        radius = 4.1 * np.exp(size) / self.mpp
        stretch = np.exp(np.abs(rng.normal(0.0, 0.28, n)) / 2)
        dark = 0.22 * level["nuclei_darkness"].ravel()[cell] + rng.normal(0, 0.15, n)
        axes = np.column_stack([radius * stretch, radius / stretch])
        angle = rng.uniform(0, np.pi, n)
        nuclei = stamp(self.shape, Stamps(y, x, axes, angle, value=0.95 * np.exp(dark)))
        nuclei *= np.clip(1 + np.float32(0.22) * self.noise(1.6), 0.3, 2)
        haze = enlarge(0.11 * np.exp(0.5 * level["haze"]), self.shape)
        density: Float = np.maximum(nuclei, 0) + haze
        return density

    def holes(self) -> Float:
        """0..1 where fat vacuoles (20-60 um) leave white holes; covers about 2 to 30 %."""
        share = np.minimum(0.055 * np.exp(0.75 * self.level["vacuoles"]), 0.4)
        y, x, _ = self.scatter(share / (np.pi * 18.0**2))
        radius = np.clip(18.0 * np.exp(self.rng.normal(0.0, 0.3, len(y))), 8, 32) / self.mpp
        stretch = np.exp(self.rng.normal(0.0, 0.12, len(y)))
        axes = np.column_stack([radius * stretch, radius / stretch])
        angle = self.rng.uniform(0, np.pi, len(y))
        return stamp(self.shape, Stamps(y, x, axes, angle, value=np.ones(len(y))))

    def erythrocytes(self) -> Float:
        """Density of red blood cells: round, 6 um, red."""
        y, x, _ = self.scatter(0.0007 * np.exp(0.8 * self.level["erythrocytes"]))
        axes = np.full((len(y), 2), 3.1 / self.mpp)
        value = self.rng.uniform(0.6, 0.9, len(y))
        return stamp(self.shape, Stamps(y, x, axes, angle=np.zeros(len(y)), value=value))


def lay_wrongly(
    picture: NDArray[np.uint8], turn: tuple[bool, int, int], shift_px: tuple[int, int]
) -> tuple[NDArray[np.uint8], Double]:
    """A picture turned, then moved over glass in its own frame; what leaves the frame is lost.

    Args:
        picture: (H, W, 3).
        turn: Whether x and y are exchanged, then the sign of each axis (`config.TURNS`).
        shift_px: By how much the picture moves to the right and down, pixels.

    Returns:
        The picture as it lies, and the (3, 3) matrix that takes x, y, 1 (pixels) of a place on the
        picture before to the same place on it now.
    """
    swap, *signs = turn
    if swap:
        picture = picture.transpose(1, 0, 2)
    picture = picture[:: signs[1], :: signs[0]]
    height, width = picture.shape[:2]
    matrix = np.eye(3)
    matrix[:2, :2] = np.diag(signs) @ (np.eye(2)[::-1] if swap else np.eye(2))
    matrix[:2, 2] = [width * (signs[0] < 0), height * (signs[1] < 0)]
    matrix[:2, 2] += shift_px
    moved = np.full_like(picture, round(_GLASS))
    right, down = shift_px
    rows, columns = height - abs(down), width - abs(right)
    if rows > 0 and columns > 0:
        kept = picture[max(0, -down) :, max(0, -right) :][:rows, :columns]
        moved[max(0, down) :, max(0, right) :][:rows, :columns] = kept
    return moved, matrix
