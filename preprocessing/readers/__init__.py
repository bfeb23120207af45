"""Readers: one file a format, all giving a `SpotTable`."""

from collections.abc import Callable
from pathlib import Path

from preprocessing.errors import DataError
from preprocessing.manifest import FORMATS, IMAGE_ONLY, SlideRow
from preprocessing.readers import (
    cell_csv,
    cosmx,
    h5ad,
    hd_cells,
    hest,
    legacy_st,
    loom,
    spatialdata,
    visium,
    visium_hd,
    xenium,
)
from preprocessing.readers.cell_csv import read_csv_cells
from preprocessing.readers.cosmx import read_cosmx
from preprocessing.readers.h5ad import read_h5ad
from preprocessing.readers.hd_cells import read_hd_cells
from preprocessing.readers.hest import read_hest
from preprocessing.readers.legacy_st import read_legacy_st
from preprocessing.readers.loom import read_loom
from preprocessing.readers.spatialdata import read_spatialdata
from preprocessing.readers.tissue_grid import read_tissue_grid
from preprocessing.readers.visium import read_visium
from preprocessing.readers.visium_hd import read_visium_hd
from preprocessing.readers.xenium import read_xenium
from preprocessing.slides import Slide
from preprocessing.spot_table import SpotTable

__all__ = [
    "READERS",
    "read_cosmx",
    "read_csv_cells",
    "read_h5ad",
    "read_hd_cells",
    "read_hest",
    "read_legacy_st",
    "read_loom",
    "read_slide_spots",
    "read_spatialdata",
    "read_spots",
    "read_tissue_grid",
    "read_visium",
    "read_visium_hd",
    "read_xenium",
    "source_files",
]

READERS: dict[str, Callable[[SlideRow, float | None], SpotTable]] = {
    "visium": read_visium,
    "visium_hd": read_visium_hd,
    "legacy_st": read_legacy_st,
    "hest": read_hest,
    "h5ad": read_h5ad,
    "loom": read_loom,
    "csv": read_csv_cells,
    "xenium": read_xenium,
    "spatialdata": read_spatialdata,
    "cosmx": read_cosmx,
    "visium_hd_cells": read_hd_cells,
}

_SOURCES: dict[str, Callable[[SlideRow], dict[str, Path]]] = {
    "visium": visium.source_files,
    "visium_hd": visium_hd.source_files,
    "legacy_st": legacy_st.source_files,
    "hest": hest.source_files,
    "h5ad": h5ad.source_files,
    "loom": loom.source_files,
    "csv": cell_csv.source_files,
    "xenium": xenium.source_files,
    "spatialdata": spatialdata.source_files,
    "cosmx": cosmx.source_files,
    "visium_hd_cells": hd_cells.source_files,
}


def read_spots(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read counts, coordinates and labels of one slide.

    Args:
        row: the manifest row.
        image_mpp: um per level-0 px that the image file states, if it does.

    Raises:
        DataError: names the slide and what is wrong with its files.
    """
    _check_format(row)
    if row.format == IMAGE_ONLY:
        raise DataError(f"slide {row.slide_id}: format image needs the column 'image'")
    try:
        return READERS[row.format](row, image_mpp)
    except DataError as error:
        place = "" if str(row.counts) in str(error) else f" ({row.counts})"
        raise DataError(f"slide {row.slide_id}{place}: {error}") from error


def read_slide_spots(row: SlideRow, slide: Slide, patch_um: float) -> SpotTable:
    """Read the spots of a slide with an image; without counts they are windows over its tissue.

    Args:
        row: the manifest row.
        slide: its open image.
        patch_um: edge of the patches of this run, um.

    Raises:
        DataError: names the slide and what is wrong with its files.
    """
    if row.format != IMAGE_ONLY:
        return read_spots(row, slide.mpp)
    try:
        return read_tissue_grid(row, slide, patch_um)
    except DataError as error:
        raise DataError(f"slide {row.slide_id}: {error}") from error


def source_files(row: SlideRow) -> dict[str, Path]:
    """Return every file that belongs to a slide, by role (counts, spots, image, labels, ...).

    Raises:
        DataError: a file of the format is missing.
    """
    _check_format(row)
    files = {} if row.format == IMAGE_ONLY else dict(_SOURCES[row.format](row))
    if row.image is not None:
        files["image"] = row.image
    if row.labels is not None:
        files["labels"] = row.labels
    return files


def _check_format(row: SlideRow) -> None:
    if row.format not in FORMATS:
        raise DataError(
            f"slide {row.slide_id}: unknown format {row.format!r}; formats are {', '.join(FORMATS)}"
        )
