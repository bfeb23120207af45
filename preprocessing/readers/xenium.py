"""Xenium output folders: cell-feature matrix and cells, in micrometres by definition."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.files import files_in
from preprocessing.findings import SlideWarning
from preprocessing.image_transform import read_matrix
from preprocessing.readers.cells import Cells, cell_format, cell_table
from preprocessing.readers.coordinates import Scale
from preprocessing.readers.joins import first_names, match_rows
from preprocessing.readers.parquet import read_parquet
from preprocessing.readers.tables import read_json_object, read_typed, require_columns
from preprocessing.readers.tenx import matrix_files, read_tenx
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable

_MATRIX = "cell_feature_matrix"
_CELLS = ("cells.csv.gz", "cells.csv", "cells.parquet")
_ALIGNMENT, _EXPERIMENT = "imagealignment.csv", "experiment.xenium"
_EXPLORER = "matrix.csv"  # as Xenium Explorer calls the same numbers
_PIXEL_UM = 0.2125  # of the morphology image, where the experiment does not say it
_PLACE = ["x_centroid", "y_centroid"]
_MORPHOLOGY = "morphology"
APPLIES = ".csv"


def find_xenium_files(folder: Path) -> tuple[Path, Path]:
    """Return the matrix (file or folder) and the table of cells.

    Raises:
        DataError: one is not there; names what was looked for.
    """
    matrices = [folder / f"{_MATRIX}.h5", folder / _MATRIX]
    matrix = next((m for m in matrices if m.exists()), None)
    if matrix is None:
        raise DataError(
            f"{folder} holds no {_MATRIX}.h5 and no folder {_MATRIX}; give the output folder of "
            f"Xenium (a packed {_MATRIX}.tar.gz must be unpacked)"
        )
    cells = next((p for name in _CELLS if (p := folder / name).is_file()), None)
    if cells is None:
        raise DataError(f"{folder} holds none of {', '.join(_CELLS)}; copy it from the output")
    return matrix, cells


def read_xenium(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one Xenium folder; only genes stay (modality protein: only proteins)."""
    matrix_path, cells_path = find_xenium_files(row.counts_path)
    matrix = read_tenx(matrix_path, row.modality)
    frame = _read_cells(cells_path)
    notes = list(matrix.notes)
    rows, places = match_rows(
        matrix.barcodes,
        frame["cell_id"],
        f"no cell of {matrix_path} is in {cells_path} (matrix: {first_names(matrix.barcodes)}; "
        f"cells: {first_names(frame['cell_id'])}); they belong to different slides",
        notes,
        "cells without a place left out",
    )
    columns = frame.drop(columns=["cell_id", *_PLACE]).iloc[places].reset_index(drop=True)
    xy = frame[_PLACE].iloc[places].to_numpy(dtype=np.float64)
    cells = Cells.of_matrix(matrix, rows, xy, columns, notes)
    scale = _scale(row)
    if scale.to_image is not None:
        return cell_table(replace(row, image_transform=""), cells, scale, image_mpp)
    table = cell_table(row, cells, scale, image_mpp)
    if row.image is None or row.image_transform or row.image.name.startswith(_MORPHOLOGY):
        return table
    told = f"no *{_ALIGNMENT} of {row.image.name} was found: its places are taken for micrometres "
    told += "over mpp, as on the morphology image"
    fix = f"of a picture taken after the run, name that file (Xenium Explorer: {_EXPLORER}) in "
    fix += "image_transform"
    return replace(table, warnings=(*table.warnings, SlideWarning(told, fix)))


def find_alignment(row: SlideRow) -> Path | None:
    """The text of 3 x 3 numbers that 10x gives with a picture taken after the run.

    It leads from the pixels of that picture to those of the morphology image: of SAMPLE_he_image
    it is SAMPLE_he_imagealignment.csv, beside the picture or in the folder, or what Xenium
    Explorer saves (IMAGE_matrix.csv, IMAGE_alignment_files/matrix.csv); else the only such file
    there, or matrix.csv. A .csv that the row names in
    image_transform is such a text. The morphology image, and a row with another image_transform,
    have none.

    Raises:
        DataError: several, and none has the name of the picture.
    """
    named_one = row.image_transform
    if isinstance(named_one, Path) and named_one.suffix.lower() == APPLIES:
        return named_one
    if row.image is None or named_one or row.image.name.startswith(_MORPHOLOGY):
        return None
    stem = row.image.name.partition(".")[0]
    named = f"{stem}alignment.csv"
    names = (named, f"{stem}_{_EXPLORER}", f"{stem}_alignment_files/{_EXPLORER}")
    folders = dict.fromkeys(path.resolve() for path in (row.image.parent, row.counts_path))
    there = (p for name in names for folder in folders if (p := folder / name).is_file())
    if (one := next(there, None)) is not None:
        return one
    found = [p for folder in folders for p in files_in(folder, f"*{_ALIGNMENT}")]
    if len(found) > 1:
        raise DataError(
            f"{found[0]} and {found[1].name} both say how a picture lies to the cells, and none is "
            f"{named}; name the right one in the manifest column image_transform, or move the other"
        )
    found += [path for folder in folders if (path := folder / _EXPLORER).is_file()]
    return next(iter(found), None)


def _scale(row: SlideRow) -> Scale:
    """Micrometres, and how they lie on a picture that was taken after the run."""
    path = find_alignment(row)
    if path is None:
        return Scale(in_um=True)
    experiment, px = row.counts_path / _EXPERIMENT, _PIXEL_UM
    if experiment.is_file():
        told = read_json_object(experiment, "of a Xenium run", "copy it again from the output")
        px = float(told.get("pixel_size", px))
    to_morphology = read_matrix(path)
    to_image = np.linalg.inv(to_morphology) @ np.diag([1 / px, 1 / px, 1.0])
    return Scale(in_um=True, to_image=to_image, to_image_from=path.name)


def _read_cells(path: Path) -> pd.DataFrame:
    frame = read_parquet(path) if path.suffix == ".parquet" else read_typed(path, ("cell_id",))
    require_columns(frame, ("cell_id", *_PLACE), path)
    ids = [v.decode() if isinstance(v, bytes) else str(v) for v in frame["cell_id"].tolist()]
    places = {name: pd.to_numeric(frame[name], errors="coerce") for name in _PLACE}
    frame = frame.assign(cell_id=ids, **places)
    if frame["cell_id"].duplicated().any():
        twice = frame.loc[frame["cell_id"].duplicated(), "cell_id"].iloc[0]
        raise DataError(f"{path}: cell {twice!r} occurs twice; keep one row a cell")
    return frame


def _sources(row: SlideRow) -> dict[str, Path]:
    matrix, cells = find_xenium_files(row.counts_path)
    alignment = find_alignment(row)
    more = {} if alignment is None or row.image_transform else {"alignment": alignment}
    return {**matrix_files(matrix), "spots": cells, **more}


def _discover(folder: Path) -> list[SlideRow]:
    try:
        find_xenium_files(folder)
    except DataError:
        return []
    return [drafted_row(folder.resolve().name, folder, "xenium", technology="Xenium")]


FORMAT = cell_format(
    "xenium",
    read_xenium,
    sources=_sources,
    detect=lambda counts, spots: any(counts.glob(f"{_MATRIX}*")) and any(counts.glob("cells.*")),
    discover=_discover,
    layout="Xenium folders",
    applies=APPLIES,
)
