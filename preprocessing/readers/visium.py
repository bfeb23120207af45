"""Space Ranger output (versions 1 to 4): matrix, tissue positions, scale factors."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.manifest import SlideRow
from preprocessing.readers.coordinates import VISIUM_PITCH_UM, hex_pitch_px, step_px
from preprocessing.readers.labels import read_labels
from preprocessing.readers.tables import (
    number_column,
    open_text,
    read_parquet,
    read_table,
    require_columns,
)
from preprocessing.readers.tenx import matrix_files, read_tenx
from preprocessing.spot_table import SpotTable, unique_names

MATRIX = "filtered_feature_bc_matrix"

COLUMNS = [
    "barcode",
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
]

POSITION_FILES = (
    "tissue_positions.csv",
    "tissue_positions_list.csv",
    "tissue_positions.parquet",
)

SCALE_FACTORS = "scalefactors_json.json"

_SCALED_IMAGES = {
    "tissue_hires_image": "tissue_hires_scalef",
    "tissue_lowres_image": "tissue_lowres_scalef",
}

_MPP_DIFFERENCE = 0.1


@dataclass(frozen=True)
class VisiumFiles:
    """The files of one Space Ranger folder; ``scale_factors`` may be absent."""

    matrix: Path
    positions: Path
    scale_factors: Path | None

    def by_role(self) -> dict[str, Path]:
        """Return the files that are there; a matrix of three files has three roles."""
        files = {**matrix_files(self.matrix), "spots": self.positions}
        if self.scale_factors is not None:
            files["scale_factors"] = self.scale_factors
        return files


def find_visium_files(counts: Path, spots: Path | None = None) -> VisiumFiles:
    """Find the files of a Space Ranger folder.

    Args:
        counts: the sample folder, its ``outs``, the matrix folder or the .h5 file.
        spots: positions file to use instead of spatial/tissue_positions*.

    Raises:
        DataError: matrix or positions are not there; names what was looked for.
    """
    if counts.is_file() or any(counts.glob("matrix.mtx*")):
        bases, matrices = [counts.parent], [counts]
    else:
        bases = [counts, counts / "outs"]
        matrices = [base / name for base in bases for name in (f"{MATRIX}.h5", MATRIX)]
    matrix = next((m for m in matrices if m.exists()), None) or _only(bases, f"*{MATRIX}.h5")
    if matrix is None:
        raise DataError(
            f"{counts} holds no {MATRIX}.h5 and no folder {MATRIX} (nor does its "
            f"folder 'outs'); give the folder that Space Ranger wrote{_hint(bases)}"
        )
    spatial = [base / "spatial" for base in bases]
    found = [folder / name for folder in spatial for name in POSITION_FILES]
    positions = spots or next((p for p in found if p.is_file()), None)
    positions = positions or _only([*spatial, *bases], "*tissue_positions*")
    if positions is None:
        raise DataError(
            f"{spatial[0]} holds none of {', '.join(POSITION_FILES)}; copy the folder "
            "'spatial' beside the matrix, or name the file in the column 'spots'"
        )
    scale = (p for folder in spatial if (p := folder / SCALE_FACTORS).is_file())
    factors = next(scale, None) or _only([*spatial, *bases], f"*{SCALE_FACTORS}*")
    return VisiumFiles(matrix, positions, factors)


def _only(folders: list[Path], pattern: str) -> Path | None:
    """The one file of that name with something in front or behind, as archives rename them."""
    for folder in folders:
        found = [p for p in sorted(folder.glob(pattern)) if p.is_file()]
        if len(found) > 1:
            raise DataError(
                f"{folder} holds {len(found)} files {pattern} ({found[0].name}, {found[1].name}); "
                "put each sample into a folder of its own"
            )
        if found:
            return found[0]
    return None


def _hint(bases: list[Path]) -> str:
    """What the folder is instead, for the error."""
    for base in bases:
        if (base / "binned_outputs").is_dir() or base.name == "binned_outputs":
            return "; this is a Visium HD sample: write format visium_hd"
        if any(base.glob("*raw_feature_bc_matrix*")):
            return "; it holds the raw matrix only, copy the filtered one"
    return ""


def source_files(row: SlideRow) -> dict[str, Path]:
    """Return the files that `read_visium` reads (image and labels excluded), by role."""
    return find_visium_files(row.counts_path, row.spots).by_role()


def read_visium(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one Space Ranger folder; only spots in tissue stay.

    mpp, the first that is known: manifest mpp (um per px of the image named); manifest pitch_um
    (neighbouring array rows or columns of a square grid; centre to centre on a hexagonal one);
    the image file's own; microns_per_pixel of the scale factors; 100 um between neighbours of a
    hexagonal Visium lattice.

    Args:
        row: the manifest row.
        image_mpp: mpp that the image file states, um per level-0 px.

    Raises:
        DataError: a file is unusable, no barcode has a position, or the scale is unknown.
    """
    files = find_visium_files(row.counts_path, row.spots)
    matrix = read_tenx(files.matrix, row.modality)
    positions = read_positions(files.positions)
    factors = {} if files.scale_factors is None else read_scale_factors(files.scale_factors)
    scale = image_scale(row, factors)
    pixel = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(dtype=np.float64)
    array = positions[["array_row", "array_col"]].to_numpy(dtype=np.int64)
    notes = list(matrix.notes)
    mpp = _mpp(row, array, pixel * scale, image_mpp, factors.get("microns_per_pixel"), scale, notes)
    place, kept = _join(matrix.barcodes, positions, files, notes)
    xy_px0 = pixel[kept] * scale
    barcodes = matrix.barcodes[place]
    labels = pd.DataFrame(index=pd.RangeIndex(len(kept)))
    if row.labels is not None:
        labels, found = read_labels(row.labels, barcodes)
        notes.extend(found)
    names, renamed = unique_names(matrix.gene_names.tolist())
    if renamed:
        notes.append(f"{renamed} repeated gene names got an ending '-1', '-2', ...")
    diameter = factors.get("spot_diameter_fullres")
    return SpotTable(
        counts=matrix.counts[place],
        gene_ids=matrix.gene_ids,
        gene_names=names,
        barcodes=barcodes,
        xy_px0=xy_px0,
        xy_um=xy_px0 * mpp,
        mpp=mpp,
        diameter_um=None if diameter is None else diameter * scale * mpp,
        labels=labels,
        notes=tuple(notes),
        modality=row.modality,
    )


def read_positions(path: Path) -> pd.DataFrame:
    """Read tissue positions of any Space Ranger version.

    Args:
        path: .csv with header (version 2 and later) or without (version 1), or .parquet.

    Returns:
        (all spots, 6) with barcode str, in_tissue, array_row, array_col int64, and
        pxl_row_in_fullres, pxl_col_in_fullres float64.

    Raises:
        DataError: not a positions table, or pyarrow is needed and missing.
    """
    if path.suffix == ".parquet":
        frame = read_parquet(path)
    else:
        with open_text(path) as text:
            has_header = text.readline().lstrip('"').startswith("barcode")
        frame = read_table(path, None if has_header else list(COLUMNS))
    require_columns(frame, tuple(COLUMNS), path)
    if frame.empty:
        raise DataError(f"{path} lists no spots; expected {', '.join(COLUMNS)}")
    result = pd.DataFrame({"barcode": frame["barcode"].astype(str)})
    for name in COLUMNS[1:]:
        values = number_column(frame, name, path)
        result[name] = values if name.startswith("pxl") else values.astype(np.int64)
    if result["barcode"].duplicated().any():
        twice = result["barcode"][result["barcode"].duplicated()].iloc[0]
        raise DataError(f"{path}: barcode {twice!r} occurs twice; keep one row a spot")
    return result


def read_scale_factors(path: Path) -> dict[str, float]:
    """Read scalefactors_json.json; keep the numbers.

    Raises:
        DataError: not a JSON object, or a factor is not positive.
    """
    try:
        with open_text(path) as text:
            content = json.load(text)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); copy it again from Space Ranger") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object of scale factors")
    factors = {k: float(v) for k, v in content.items() if isinstance(v, int | float)}
    bad = [k for k, v in factors.items() if not (np.isfinite(v) and v > 0)]
    if bad:
        raise DataError(f"{path}: {bad[0]} is {factors[bad[0]]}; expected a positive number")
    return factors


def image_scale(row: SlideRow, factors: dict[str, float]) -> float:
    """Image pixels per full-resolution pixel."""
    if row.image_scale is not None:
        return row.image_scale
    name = "" if row.image is None else row.image.stem
    if name not in _SCALED_IMAGES:
        return 1.0
    factor = _SCALED_IMAGES[name]
    if factor not in factors:
        raise DataError(
            f"image {row.image} is a scaled one, but {factor} is not known; copy "
            "scalefactors_json.json into 'spatial' or fill the manifest column image_scale"
        )
    return factors[factor]


def _mpp(
    row: SlideRow,
    array: np.ndarray,
    pixel: np.ndarray,
    image_mpp: float | None,
    full_mpp: float | None,
    scale: float,
    notes: list[str],
) -> float:
    """Return um per image pixel; ``pixel`` (S, 2) are image pixels of all spots of the array."""
    hexagonal = hex_pitch_px(array, pixel)
    lattice = None if hexagonal is None else VISIUM_PITCH_UM / hexagonal
    pitch = None
    if row.pitch_um is not None:
        step = hexagonal or step_px(array, pixel)
        pitch = row.pitch_um / step if step else None
    stated = None if full_mpp is None else full_mpp / scale
    known = (row.mpp, pitch, image_mpp, stated, lattice)
    mpp = next((value for value in known if value is not None), None)
    if mpp is None:
        raise DataError(
            "mpp is unknown: neither the image nor the scale factors state it and the spots are "
            "no hexagonal Visium lattice; give one of these manifest columns: mpp (um per image "
            "pixel) or pitch_um (centre-to-centre um of neighbouring array rows or columns)"
        )
    if lattice is not None and abs(mpp / lattice - 1) > _MPP_DIFFERENCE:
        notes.append(
            f"mpp {mpp:.4g} differs from {lattice:.4g}, which 100 um between neighbours "
            "of the Visium lattice would give"
        )
    return mpp


def _join(
    barcodes: np.ndarray, positions: pd.DataFrame, files: VisiumFiles, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the matrix and rows of ``positions`` of the spots that stay, (S,) each."""
    where = pd.Index(positions["barcode"]).get_indexer(barcodes)
    known = where >= 0
    if not known.any():
        raise DataError(
            f"no barcode of {files.matrix} is in {files.positions} (matrix: "
            f"{', '.join(map(str, barcodes[:2]))}; positions: "
            f"{', '.join(positions['barcode'][:2])}); they belong to different slides"
        )
    if not known.all():
        notes.append(f"{int((~known).sum())} barcodes without position left out")
    place = np.flatnonzero(known)
    kept = where[place]
    inside = positions["in_tissue"].to_numpy()[kept] == 1
    if not inside.all():
        notes.append(f"{int((~inside).sum())} spots outside the tissue (in_tissue 0) left out")
    return place[inside], kept[inside]
