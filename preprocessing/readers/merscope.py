"""MERSCOPE output of a region: cell_by_gene.csv and cell_metadata.csv, in micrometres."""

from dataclasses import replace
from pathlib import Path

from preprocessing.errors import DataError
from preprocessing.image_transform import read_matrix
from preprocessing.readers.cells import cell_format, cell_table, read_joined
from preprocessing.readers.coordinates import Scale
from preprocessing.readers.format import first_file
from preprocessing.readers.tables import text_head
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable

_COUNTS, _CELLS = "*cell_by_gene*.csv*", "*cell_metadata*.csv*"
_PLACE = ("center_x", "center_y")
_MOSAIC = "micron_to_mosaic_pixel_transform.csv"


def find_merscope_files(folder: Path) -> dict[str, Path] | None:
    """The table of counts and that of cells, told by center_x and center_y; None: not both."""
    counts, cells = first_file(folder, _COUNTS), first_file(folder, _CELLS)
    if counts is None or cells is None or any(name not in text_head(cells) for name in _PLACE):
        return None
    return {"counts": counts, "spots": cells}


def _sources(row: SlideRow) -> dict[str, Path]:
    files = find_merscope_files(row.counts_path)
    if files is None:
        raise DataError(
            f"{row.counts_path} has no cell_by_gene.csv beside a cell_metadata.csv with "
            f"{' and '.join(_PLACE)}; give the folder of one region of a MERSCOPE run (region_0)"
        )
    mosaic = _mosaic(row)
    return files if mosaic is None else {**files, "alignment": mosaic}


def _mosaic(row: SlideRow) -> Path | None:
    """How the mosaic pictures lie to micrometres: beside the image, or for one in images/."""
    if row.image is None or row.image_transform:
        return None
    folders = [row.image.parent]
    if row.image.name.startswith("mosaic_"):
        folders.append(row.counts_path / "images")
    return next((path for folder in folders if (path := folder / _MOSAIC).is_file()), None)


def read_merscope(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one region; center_x and center_y are micrometres, as Vizgen defines them.

    On a mosaic picture they lie as `_MOSAIC` says (pixels = matrix x micrometres).

    The cells are joined by the first columns of both tables (cell, EntityID, or without a name).
    """
    files = _sources(row)
    cells, _, keys = read_joined(files["counts"], files["spots"])
    mosaic = files.get("alignment")
    scale = Scale(in_um=True)
    if mosaic is not None:
        scale = replace(scale, to_image=read_matrix(mosaic), to_image_from=mosaic.name)
    return cell_table(row, cells, scale, image_mpp, keys)


def _discover(folder: Path) -> list[SlideRow]:
    if find_merscope_files(folder) is None:
        return []
    place = folder.resolve()
    name = f"{place.parent.name}_{place.name}" if place.name.startswith("region") else place.name
    return [drafted_row(name, folder, "merscope", technology="MERSCOPE")]


FORMAT = cell_format(
    "merscope",
    read_merscope,
    sources=_sources,
    detect=lambda counts, spots: find_merscope_files(counts) is not None,
    discover=_discover,
    layout="MERSCOPE regions",
)
