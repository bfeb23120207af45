"""Cells that Space Ranger 4 segments on a Visium HD slide: folder `segmented_outputs`.

The layout is that of the page "Segmented Outputs" of Space Ranger's documentation: the matrix of
cells, whose barcodes are cellid_000000001-1, and their outlines in pixels of the microscope image.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.manifest import SlideRow
from preprocessing.readers.cells import Cells, cell_table
from preprocessing.readers.coordinates import Scale
from preprocessing.readers.geojson import read_centroids
from preprocessing.readers.tenx import TenxMatrix, matrix_files, read_tenx
from preprocessing.readers.visium import SCALE_FACTORS, image_scale, read_scale_factors
from preprocessing.spot_table import SpotTable

SEGMENTED = "segmented_outputs"
MATRIX = "filtered_feature_cell_matrix"
OUTLINES = ("cell_segmentations.geojson", "graphclust_annotated_cell_segmentations.geojson")
_KEY = "cell_id"
_BARCODE = re.compile(r"cellid_0*(\d+)-\d+")
_HINT = "; scalefactors_json.json in the folder 'spatial' states it"


@dataclass(frozen=True)
class CellFiles:
    """The files of one `segmented_outputs`; ``scale_factors`` may be absent."""

    matrix: Path
    outlines: Path
    scale_factors: Path | None


def find_cell_files(counts: Path) -> CellFiles:
    """Find the files of the segmented cells.

    Args:
        counts: the sample's root, its ``outs``, ``segmented_outputs``, or the .h5 file in it.

    Raises:
        DataError: the matrix or the outlines are not there; names what was looked for.
    """
    start = counts.parent if counts.is_file() else counts
    places = (start, start / SEGMENTED, start / "outs" / SEGMENTED)
    matrices = [place / name for place in places for name in (f"{MATRIX}.h5", MATRIX)]
    matrix = next((path for path in matrices if path.exists()), None)
    if matrix is None:
        raise DataError(
            f"{counts} holds no {MATRIX}.h5 and no folder {MATRIX} (nor does its folder "
            f"{SEGMENTED}); give the output of Space Ranger 4, run with cell segmentation"
        )
    folder = matrix.parent
    outlines = next((path for name in OUTLINES if (path := folder / name).is_file()), None)
    if outlines is None:
        raise DataError(f"{folder} holds none of {', '.join(OUTLINES)}; copy it from the output")
    spatial = (folder / "spatial" / SCALE_FACTORS, folder.parent / "spatial" / SCALE_FACTORS)
    return CellFiles(matrix, outlines, next((path for path in spatial if path.is_file()), None))


def source_files(row: SlideRow) -> dict[str, Path]:
    """Return the files that `read_hd_cells` reads (image and labels excluded), by role."""
    found = find_cell_files(row.counts_path)
    files = {**matrix_files(found.matrix), "outlines": found.outlines}
    if found.scale_factors is not None:
        files["scale_factors"] = found.scale_factors
    return files


def read_hd_cells(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read the segmented cells of one slide; the place of a cell is the centroid of its outline.

    mpp: the manifest, the image file, microns_per_pixel of the scale factors.

    Args:
        row: the manifest row; ``counts`` is the sample's root or its ``segmented_outputs``.
        image_mpp: mpp that the image file states, um per level-0 px.

    Raises:
        DataError: a file is missing or unusable, no cell has an outline, or the scale is unknown.
    """
    files = find_cell_files(row.counts_path)
    matrix = read_tenx(files.matrix, row.modality)
    factors = {} if files.scale_factors is None else read_scale_factors(files.scale_factors)
    numbers, centres, empty = read_centroids(files.outlines, _KEY)
    notes = [*matrix.notes]
    if empty:
        notes.append(f"{empty} outlines without points left out")
    rows, places = _match(matrix, numbers, files, notes)
    cells = Cells(
        matrix.counts[rows],
        matrix.barcodes[rows],
        matrix.gene_ids,
        matrix.gene_names,
        centres[places],
        pd.DataFrame(index=pd.RangeIndex(len(rows))),
        notes,
    )
    scale = Scale(um_per_unit=factors.get("microns_per_pixel"), hint=_HINT)
    if row.image is not None:
        row = replace(row, image_scale=image_scale(row, factors))
    return cell_table(row, cells, scale, image_mpp)


def _match(
    matrix: TenxMatrix, numbers: list[int], files: CellFiles, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the matrix and of the outlines that belong together, (S,) each."""
    index = pd.Index(np.array(numbers, dtype=object))
    if not index.is_unique:
        twice = index[index.duplicated()][0]
        raise DataError(f"{files.outlines}: cell {twice} has two outlines; keep one a cell")
    found = [_BARCODE.fullmatch(str(barcode)) for barcode in matrix.barcodes]
    keys = np.array([-1 if match is None else int(match[1]) for match in found], dtype=object)
    place = index.get_indexer(pd.Index(keys))
    rows = np.flatnonzero(place >= 0)
    if len(rows) == 0:
        raise DataError(
            f"no cell of {files.matrix} has an outline in {files.outlines} (barcodes: "
            f"{', '.join(map(str, matrix.barcodes[:2]))}; {_KEY}: "
            f"{', '.join(map(str, numbers[:2]))}); expected barcodes like cellid_000000001-1"
        )
    if len(rows) < len(place):
        notes.append(f"{len(place) - len(rows)} cells without an outline left out")
    if len(rows) < len(numbers):
        notes.append(f"{len(numbers) - len(rows)} outlines without counts left out")
    return rows, place[rows]
