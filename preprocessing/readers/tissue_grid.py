"""A slide without counts: patch-sized windows on a square grid over its tissue.

Shapes: W windows of the whole grid, S of them on tissue.
"""

import math
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.files import files_in
from preprocessing.readers.coordinates import row_mpp
from preprocessing.readers.format import Format
from preprocessing.readers.labels import labels_of
from preprocessing.scale import IMAGE_FILE, require_scale, stated
from preprocessing.slide_row import IMAGE_ONLY, SlideRow, drafted_row
from preprocessing.slides import Slide
from preprocessing.spot_table import SpotTable
from preprocessing.tissue import tissue_fraction, tissue_mask

MIN_TISSUE = 0.25  # part of a window that must be tissue
MAX_WINDOWS = 4_000_000  # a larger grid means a wrong mpp or pitch_um
SLIDE_SUFFIXES = (".svs", ".ndpi", ".scn", ".mrxs", ".bif", ".vms", ".vmu", ".svslide")


def read_tissue_grid(row: SlideRow, slide: Slide, patch_um: float) -> SpotTable:
    """Lay the spots of a slide that has an image and nothing else.

    The windows lie inside the picture, centred in it; those with less than a quarter of tissue are
    left out. The barcode "x0012_y0034" is column 12 and row 34 of the grid.

    Args:
        row: the manifest row; pitch_um is the distance of neighbouring centres (None: patch_um),
            mpp goes before the one that the file states.
        slide: its open image.
        patch_um: edge of a window, um.

    Returns:
        S spots without genes, row by row.

    Raises:
        DataError: mpp is unknown, the grid is absurdly large, or nothing is tissue.
    """
    notes: list[str] = []
    said = require_scale(
        (*row_mpp(row), *stated(slide.mpp, IMAGE_FILE, of_image=True)),
        f"{slide.path} does not state it; give the manifest column mpp (um per image pixel: about "
        "0.25 for a scan at 40x, 0.5 at 20x), or an image file that states its resolution",
    )
    mpp = said[0].mpp
    pitch_um = patch_um if row.pitch_um is None else row.pitch_um
    place, xy_px0 = window_grid(slide, patch_um / mpp, pitch_um / mpp)
    fraction = tissue_fraction(tissue_mask(slide), xy_px0, patch_um, mpp)
    kept = np.flatnonzero(fraction >= MIN_TISSUE)
    if len(kept) == 0:
        raise DataError(
            f"{slide.path}: none of its {len(place)} windows of {patch_um:g} um holds "
            f"{MIN_TISSUE:.0%} of stained tissue (the most is {fraction.max():.0%}); check that "
            "the image is a stained section, mpp, and --patch-um"
        )
    notes.append(f"{len(place) - len(kept)} of {len(place)} windows left out: not on tissue")
    place, xy_px0 = place[kept], xy_px0[kept]
    barcodes = np.array([f"x{x:04d}_y{y:04d}" for x, y in place.tolist()], dtype=object)
    labels = labels_of(row, barcodes, notes, place)
    return SpotTable(
        counts=csr_matrix((len(kept), 0), dtype=np.int32),
        gene_ids=np.empty(0, dtype=object),
        gene_names=np.empty(0, dtype=object),
        barcodes=barcodes,
        xy_px0=xy_px0,
        xy_um=xy_px0 * mpp,
        mpp=mpp,
        scale=said,
        pitch_um=pitch_um,
        labels=labels,
        notes=tuple(notes),
        image_only=True,
        tissue_fraction=fraction[kept],
    )


def window_grid(slide: Slide, side_px: float, pitch_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Lay as many windows as fit into the picture, at least one, centred in it.

    Args:
        slide: an open slide.
        side_px: edge of a window, level-0 pixels.
        pitch_px: distance of neighbouring centres, level-0 pixels.

    Returns:
        (W, 2) int64 column and row, and (W, 2) float64 centres (x, y) in level-0 pixels.

    Raises:
        DataError: more than `MAX_WINDOWS`.
    """
    extent = [float(value) for value in slide.level_dimensions[0]]
    fit = [max(0, math.floor((value - side_px) / pitch_px + 1e-9)) + 1 for value in extent]
    if math.prod(fit) > MAX_WINDOWS:
        raise DataError(
            f"{slide.path}: a grid of {fit[0]} x {fit[1]} windows every {pitch_px:.3g} pixels; at "
            f"most {MAX_WINDOWS} are made: check mpp and pitch_um"
        )
    x, y = (
        (value - (count - 1) * pitch_px) / 2 + pitch_px * np.arange(count)
        for value, count in zip(extent, fit, strict=True)
    )
    row, column = np.divmod(np.arange(math.prod(fit)), fit[0])
    return np.column_stack([column, row]), np.column_stack([x[column], y[row]])


def _read(row: SlideRow, image_mpp: float | None) -> SpotTable:
    raise DataError("format image needs the column 'image'")


def _discover(folder: Path) -> list[SlideRow]:
    """Whole-slide images."""
    return [
        drafted_row(path.stem, None, IMAGE_ONLY, image=path)
        for path in files_in(folder)
        if path.suffix.lower() in SLIDE_SUFFIXES
    ]


FORMAT = Format(
    IMAGE_ONLY,
    _read,
    sources=lambda row: {},
    discover=_discover,
    layout="whole-slide images",
    needs={"image": "slide image"},
    forbids=dict.fromkeys(
        ("counts", "spots", "image_scale", "bin_um", "layer", "section"), "lays its own grid"
    ),
    no_protein="measures nothing; leave the column 'modality' empty",
    lay=read_tissue_grid,
)
