"""CosMx flat files: a counts table and a table of cells, joined by fov and cell_ID."""

from pathlib import Path

import numpy as np

from preprocessing.errors import DataError
from preprocessing.readers.cells import Cells, cell_format, cell_table, read_joined
from preprocessing.readers.coordinates import Scale
from preprocessing.readers.format import first_file
from preprocessing.readers.tables import read_header, read_typed, text_head
from preprocessing.scale import stated
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable

KEYS = ("fov", "cell_ID")
_COUNTS = ("*_exprMat_file.csv*", "*exprMat*.csv*", "cell_by_gene.csv*")
_CELLS = ("*_metadata_file.csv*", "*metadata*.csv*", "cells.csv*")
_FIELDS = "*fov_positions_file.csv*"
_FRAMES = {5472: 0.18, 4256: 0.12028}  # width of a field of view, pixels: um per pixel
_HINT = (
    "; CosMx coordinates are pixels: 0.12028 um on commercial instruments (ImPixel_nm in the "
    "run's configuration), 0.18 um in the 2022 lung data (fields of view 5472 pixels wide)"
)


def _sources(row: SlideRow) -> dict[str, Path]:
    files = find_cosmx_files(row.counts_path)
    if files is None:
        folder = row.counts_path
        found = ", ".join(sorted(p.name for p in folder.glob("*.csv*"))[:6]) or "no CSV file"
        raise DataError(
            f"{folder} has no *_exprMat_file.csv and *_metadata_file.csv (nor cell_by_gene.csv and "
            f"cells.csv); found {found}; give the folder of the CosMx flat files"
        )
    return files


def find_cosmx_files(folder: Path) -> dict[str, Path] | None:
    """Return counts, table of cells and, where it is there, positions of the fields of view."""
    counts, cells, fields = (first_file(folder, *names) for names in (_COUNTS, _CELLS, (_FIELDS,)))
    if counts is None or cells is None:
        return None
    return {"counts": counts, "spots": cells} | ({} if fields is None else {"fields": fields})


def read_cosmx(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one CosMx slide; the barcode "2_35" is cell 35 of field of view 2.

    cell_ID 0 (transcripts outside cells) is left out and noted. mpp: the
    manifest, else the positions of the fields of view where they are given in pixels and mm.
    """
    files = _sources(row)
    cells, in_um, keys = read_joined(files["counts"], files["spots"], KEYS)
    cells = _real_cells(cells)
    um = stated_mpp(files["fields"]) if "fields" in files else None
    said = stated(um, "the fields of view in pixels and mm")
    return cell_table(row, cells, Scale(in_um, said, hint=_HINT), image_mpp, keys)


def stated_mpp(fields: Path) -> float | None:
    """Um per pixel from the positions of the fields of view; None where they are in one unit."""
    names = set(read_header(fields).names)
    if not {"x_global_px", "y_global_px", "x_global_mm", "y_global_mm"} <= names:
        return None
    frame = read_typed(fields)
    span = [
        np.ptp(frame[[f"x_global_{unit}", f"y_global_{unit}"]].to_numpy(dtype=np.float64), axis=0)
        for unit in ("mm", "px")
    ]
    axis = int(np.argmax(span[1]))
    return float(1000 * span[0][axis] / span[1][axis]) if span[1][axis] > 0 else None


def mpp_of_frame(fields: Path) -> float | None:
    """Um per pixel as the distance of fields of view tells the instrument; None: not told.

    Neighbouring fields of the 2022 data lie 5472 pixels apart (0.985 mm), those of commercial
    instruments 4256 (0.512 mm).
    """
    if {"x_global_px", "y_global_px"} - set(read_header(fields).names):
        return None
    frame = read_typed(fields)
    step = np.abs(np.diff(np.unique(frame["x_global_px"].to_numpy(dtype=np.float64))))
    near = {mpp for px, mpp in _FRAMES.items() if (np.abs(step - px) < 1).any()}
    return near.pop() if len(near) == 1 else None


def _real_cells(cells: Cells) -> Cells:
    outside = np.array([str(name).rpartition("_")[2] == "0" for name in cells.barcodes])
    if not outside.any():
        return cells
    cells.notes.append(f"{int(outside.sum())} rows of cell_ID 0 (outside cells) left out")
    return cells.take(np.flatnonzero(~outside))


def _detect(counts: Path, spots: Path | None) -> bool:
    by_gene = first_file(counts, "cell_by_gene.csv*")
    keyed = by_gene is not None and all(key in text_head(by_gene) for key in KEYS)
    return keyed or first_file(counts, "*_exprMat_file.csv*") is not None


def _discover(folder: Path) -> list[SlideRow]:
    """A folder of flat files; mpp by the width of the fields of view, where it is known."""
    files = find_cosmx_files(folder)
    if files is None:
        return []
    try:
        headers = [read_header(files[role]).names for role in ("counts", "spots")]
    except DataError:
        return []
    if not all(set(KEYS) <= set(names) for names in headers):
        return []
    mpp = mpp_of_frame(files["fields"]) if "fields" in files else None
    return [drafted_row(folder.resolve().name, folder, "cosmx", mpp=mpp, technology="CosMx")]


FORMAT = cell_format(
    "cosmx",
    read_cosmx,
    sources=_sources,
    detect=_detect,
    discover=_discover,
    layout="CosMx folders",
)
