"""Readers: one file a format, all giving a `SpotTable`."""

from collections.abc import Callable
from pathlib import Path

from preprocessing.errors import DataError
from preprocessing.manifest import FORMATS, IMAGE_ONLY, SlideRow
from preprocessing.readers import legacy_st, visium
from preprocessing.readers.legacy_st import read_legacy_st
from preprocessing.readers.tissue_grid import read_tissue_grid
from preprocessing.readers.visium import read_visium
from preprocessing.slides import Slide
from preprocessing.spot_table import SpotTable

__all__ = [
    "READERS",
    "read_legacy_st",
    "read_slide_spots",
    "read_spots",
    "read_tissue_grid",
    "read_visium",
    "source_files",
]

READERS: dict[str, Callable[[SlideRow, float | None], SpotTable]] = {
    "visium": read_visium,
    "legacy_st": read_legacy_st,
}

_SOURCES: dict[str, Callable[[SlideRow], dict[str, Path]]] = {
    "visium": visium.source_files,
    "legacy_st": legacy_st.source_files,
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
