"""Geometry of a simulated slide: hex lattice, tissue outline, nested tissue domains.

Legend: L lattice positions, S spots in tissue, (H, W) cells of a coarse grid of ``CELL_UM``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

PITCH_UM = 100.0
CELL_UM = 20.0
N_LAYERED = 3
N_PATCHY = 2
N_COARSE = N_LAYERED + N_PATCHY
N_FINE = 2 * N_COARSE
COARSE_NAMES = tuple(f"D{k + 1}" for k in range(N_COARSE))
FINE_NAMES = tuple(f"{name}{side}" for name in COARSE_NAMES for side in "ab")
_TISSUE_EDGE_UM = 65.0
_GLASS_UM = 140.0
_BAND_UM = 600.0
_PATCH_FIELD_UM = 260.0
_FINE_FIELD_UM = 140.0
_PATCH_SHARE = 0.2


@dataclass(frozen=True)
class Lattice:
    """The array of one slide and the tissue on it.

    Attributes:
        array_row: (L,) row of each lattice position.
        array_col: (L,) column; odd rows have odd columns (Visium).
        xy_um: (L, 2) centres in micrometres from the image's top left corner.
        in_tissue: (L,) True for spots.
        size_um: Width and height of the image in micrometres.
        inside_um: (H, W) distance to the outline on the coarse grid, negative on glass (um).
        pitch_um: Distance of neighbouring positions.
    """

    array_row: NDArray[np.int64]
    array_col: NDArray[np.int64]
    xy_um: NDArray[np.float64]
    in_tissue: NDArray[np.bool_]
    size_um: tuple[float, float]
    inside_um: NDArray[np.float32]
    pitch_um: float = PITCH_UM

    @property
    def spots_um(self) -> NDArray[np.float64]:
        """(S, 2) centres of the spots in tissue, micrometres."""
        return self.xy_um[self.in_tissue]

    @property
    def spot_cells(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and column of the coarse grid cell under each spot, (S,) each."""
        return cells_at(self.spots_um, self.inside_um.shape)


@dataclass(frozen=True)
class Domains:
    """Domain of every spot: (S,) coarse 0..4, (S,) fine 0..9 with fine // 2 == coarse."""

    coarse: NDArray[np.int64]
    fine: NDArray[np.int64]


def cells_at(
    xy_um: NDArray[np.float64], shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Grid cell (row, column) that holds each point (N, 2) in micrometres, clipped to the grid."""
    cell = np.floor(xy_um / CELL_UM).astype(np.int64)
    return np.clip(cell[:, 1], 0, shape[0] - 1), np.clip(cell[:, 0], 0, shape[1] - 1)


def gaussian_field(
    rng: np.random.Generator, shape: tuple[int, ...], scale_um: float
) -> NDArray[np.float64]:
    """Smooth random field (H, W) with mean 0 and sd 1; ``scale_um`` is the kernel's sigma."""
    pad = int(np.ceil(2 * scale_um / CELL_UM))
    noise = rng.standard_normal(tuple(n + 2 * pad for n in shape))
    smooth = ndimage.gaussian_filter(noise, scale_um / CELL_UM, mode="wrap")
    field: NDArray[np.float64] = ((smooth - smooth.mean()) / smooth.std())[pad:-pad, pad:-pad]
    return field


def draw_lattice(rng: np.random.Generator, n_spots: int, pitch_um: float = PITCH_UM) -> Lattice:
    """A blob of tissue covering exactly ``n_spots`` positions of a hex lattice.

    The outline is a circle whose radius is modulated by four harmonics; the spots are the lattice
    positions with the smallest radius relative to it.
    """
    amplitude = rng.normal(0.0, 0.09, 4) / np.sqrt(np.arange(1, 5))
    phase = rng.uniform(0, 2 * np.pi, 4)

    def relative(dx: NDArray[np.float64], dy: NDArray[np.float64]) -> NDArray[np.float64]:
        angle = np.arctan2(dy, dx)[..., None] * np.arange(1, 5) + phase
        shape: NDArray[np.float64] = np.exp((amplitude * np.cos(angle)).sum(axis=-1))
        return shape

    row_um = pitch_um * np.sqrt(3) / 2
    reach = pitch_um * np.sqrt(n_spots * np.sqrt(3) / 2 / np.pi) * 1.9 + 3 * pitch_um
    rows, columns = np.meshgrid(
        np.arange(int(2 * reach / row_um)), np.arange(int(4 * reach / pitch_um)), indexing="ij"
    )
    keep = (rows + columns) % 2 == 0
    row, column = rows[keep], columns[keep]
    xy = np.column_stack([column * pitch_um / 2, row * row_um])
    offset = xy - xy.mean(axis=0) + rng.uniform(-30, 30, 2)
    ratio = np.hypot(offset[:, 0], offset[:, 1]) / relative(offset[:, 0], offset[:, 1])
    in_tissue = np.zeros(len(xy), dtype=bool)
    in_tissue[np.argsort(ratio, kind="stable")[:n_spots]] = True

    margin = _TISSUE_EDGE_UM + _GLASS_UM
    low, high = offset[in_tissue].min(axis=0) - margin, offset[in_tissue].max(axis=0) + margin
    size = np.ceil((high - low) / CELL_UM) * CELL_UM
    on_slide = ((offset > low + 30) & (offset < low + size - 30)).all(axis=1)
    x, y = np.meshgrid(*((np.arange(int(n / CELL_UM)) + 0.5) * CELL_UM for n in size))
    dx, dy = x + low[0], y + low[1]
    radius = relative(dx, dy) * ratio[in_tissue].max() + _TISSUE_EDGE_UM
    inside = radius - np.hypot(dx, dy) + 8.0 * gaussian_field(rng, dx.shape, 40.0)
    first = (int(row[on_slide].min()) // 2 * 2, int(column[on_slide].min()) // 2 * 2)
    return Lattice(
        array_row=row[on_slide] - first[0],
        array_col=column[on_slide] - first[1],
        xy_um=offset[on_slide] - low,
        in_tissue=in_tissue[on_slide],
        size_um=(float(size[0]), float(size[1])),
        inside_um=inside.astype(np.float32),
        pitch_um=pitch_um,
    )


def draw_domains(rng: np.random.Generator, lattice: Lattice) -> Domains:
    """Nested domains with a new geometry: layered and patchy at 0.6-1.2 mm, halves at 0.3-0.5 mm.

    Wavy parallel bands cycle through the layered domains; the highest fifths of two smooth random
    fields are the patchy ones; a finer field cuts every coarse domain at its median.
    """
    tissue = lattice.inside_um > 0
    coarse = _bands(rng, tissue)
    free = tissue.copy()
    for patchy in range(N_LAYERED, N_COARSE):
        field = gaussian_field(rng, tissue.shape, _PATCH_FIELD_UM)
        share = _PATCH_SHARE * tissue.sum() / max(1, free.sum())
        chosen = free & (field > np.quantile(field[free], 1 - share))
        coarse[chosen] = patchy
        free &= ~chosen
    field = gaussian_field(rng, tissue.shape, _FINE_FIELD_UM)
    side = np.zeros(tissue.shape, dtype=np.int64)
    for domain in range(N_COARSE):
        where = tissue & (coarse == domain)
        if where.any():
            side[where] = field[where] > np.median(field[where])
    at = lattice.spot_cells
    return Domains(coarse=coarse[at], fine=2 * coarse[at] + side[at])


def scatter(rng: np.random.Generator, domains: Domains, share: float) -> Domains:
    """The domains after a random share of the spots exchanged theirs among themselves."""
    n_spots = len(domains.fine)
    moved = rng.permutation(n_spots)[: round(share * n_spots)]
    source = np.arange(n_spots)
    source[moved] = rng.permutation(moved)
    return Domains(coarse=domains.coarse[source], fine=domains.fine[source])


def _bands(rng: np.random.Generator, tissue: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(H, W) layered domain of each cell: bands of about ``_BAND_UM`` across a random axis."""
    angle = rng.uniform(0, 2 * np.pi)
    row, column = np.indices(tissue.shape)
    along = CELL_UM * (column * np.cos(angle) + row * np.sin(angle))
    along = along + 110.0 * gaussian_field(rng, tissue.shape, 300.0)
    extent = float(np.ptp(along[tissue]))
    n_bands = max(N_LAYERED, round(extent / _BAND_UM))
    widths = rng.uniform(0.8, 1.2, n_bands)
    cuts = np.quantile(along[tissue], np.cumsum(widths)[:-1] / widths.sum())
    order = rng.permutation(N_LAYERED)
    bands: NDArray[np.int64] = order[np.searchsorted(cuts, along) % N_LAYERED]
    return bands
