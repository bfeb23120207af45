"""Space Ranger output (versions 1 to 4): matrix, tissue positions, scale factors."""

from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.files import files_in
from preprocessing.readers.alignment import SCALED
from preprocessing.readers.coordinates import (
    VISIUM_LATTICE,
    VISIUM_PITCH_UM,
    hex_pitch_px,
    row_mpp,
    step_px,
)
from preprocessing.readers.format import Format, file_name, first_file
from preprocessing.readers.joins import first_names, match_rows
from preprocessing.readers.labels import labels_of
from preprocessing.readers.parquet import read_parquet
from preprocessing.readers.tables import (
    number_column,
    open_text,
    read_json_object,
    read_table,
    require_columns,
    text_head,
    truth_column,
)
from preprocessing.readers.tenx import TenxMatrix, is_mex, matrix_files, read_tenx, sample_mark
from preprocessing.scale import IMAGE_FILE, Statement, require_scale, stated
from preprocessing.sections import SUFFIX, section_mask, several_gems, several_sections
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable, unique_gene_names

MATRIX = "filtered_feature_bc_matrix"
CELL_MATRIX = "filtered_feature_cell_matrix"  # of segmented cells, Space Ranger 4
COLUMNS = [
    "barcode",
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
]
POSITION_FILES = ("tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions.parquet")
MARKED_MEX = "*_matrix.mtx*"  # in a flat folder, with the mark of its sample
SCALE_FACTORS = "scalefactors_json.json"
BINS_UM = (2.0, 8.0, 16.0)  # what Space Ranger writes of a Visium HD slide
_SCALED_IMAGES = {name: f"{name.removesuffix('image')}scalef" for name in SCALED}
_SEURAT = (
    ("imagerow", "pxl_row_in_fullres"),
    ("imagecol", "pxl_col_in_fullres"),
    ("tissue", "in_tissue"),
    ("row", "array_row"),
    ("col", "array_col"),
)
_AGGR = "aggr_tissue_positions"
BINNED, SEGMENTED = "binned_outputs", "segmented_outputs"


@dataclass(frozen=True)
class VisiumFiles:
    """The files of one Space Ranger folder; ``scale_factors`` may be absent."""

    matrix: Path
    positions: Path
    scale_factors: Path | None

    def factors(self, notes: list[str]) -> dict[str, float]:
        """The scale factors, as `read_scale_factors` says; empty without their file."""
        return {} if self.scale_factors is None else read_scale_factors(self.scale_factors, notes)

    def by_role(self) -> dict[str, Path]:
        """Return the files that are there; a matrix of three files has three roles."""
        files = {**matrix_files(self.matrix), "spots": self.positions}
        if self.scale_factors is not None:
            files["scale_factors"] = self.scale_factors
        return files


def find_visium_files(
    counts: Path, spots: Path | None = None, image: Path | None = None
) -> VisiumFiles:
    """Find the files of a Space Ranger folder.

    In a flat folder, as GEO gives them, the files of a sample begin with the same mark
    (``GSM111_A1_matrix.mtx.gz``, ``GSM111_A1_tissue_positions_list.csv``).

    Args:
        counts: the sample folder, its ``outs``, the matrix folder, the .h5 or the .mtx file.
        spots: positions file to use instead of spatial/tissue_positions*.
        image: the picture named; `spaceranger aggr` keeps the scale factors of a library beside it.

    Raises:
        DataError: matrix or positions are not there; names what was looked for.
    """
    if counts.is_file() and not sample_mark(counts) and is_mex(counts):
        counts = counts.parent
    if counts.is_file() or any(counts.glob("matrix.mtx*")):
        bases, matrices = [counts.parent], [counts]
    else:
        bases = [counts, counts / "outs"]
        matrices = [base / name for base in bases for name in (f"{MATRIX}.h5", MATRIX)]
    matrix = next((m for m in matrices if m.exists()), None)
    matrix = matrix or _only(bases, f"*{MATRIX}.h5") or _only(bases, MARKED_MEX)
    if matrix is None:
        raise DataError(
            f"{counts} holds no {MATRIX}.h5 and no folder {MATRIX} (nor does its "
            f"folder 'outs'); give the folder that Space Ranger wrote{_hint(bases)}"
        )
    spatial = [base / "spatial" for base in bases]
    beside = _Beside(sample_mark(matrix), spatial, bases)
    positions = spots or beside.find(POSITION_FILES, "tissue_positions*")
    if positions is None:
        raise DataError(
            f"{spatial[0]} holds none of {', '.join(POSITION_FILES)}; copy the folder "
            "'spatial' beside the matrix, or name the file in the column 'spots'"
        )
    factors = beside.find((SCALE_FACTORS,), f"{SCALE_FACTORS}*")
    if factors is None and image is not None and (image.parent / SCALE_FACTORS).is_file():
        factors = image.parent / SCALE_FACTORS
    return VisiumFiles(matrix, positions, factors)


@dataclass(frozen=True)
class _Beside:
    """Where the files beside a matrix may lie: ``mark`` is what its own name begins with."""

    mark: str
    spatial: list[Path]
    bases: list[Path]

    def find(self, names: tuple[str, ...], pattern: str) -> Path | None:
        """The file with the matrix's mark; of the only sample, in spatial/ or the only one."""
        marked = [base / f"{self.mark}spatial" for base in self.bases]
        folders = [*self.spatial, *marked, *self.bases]
        if self.mark and (own := _only(folders, f"{escape(self.mark)}*{pattern}")):
            return own
        if self.mark and any(len(_flat(base)) > 1 for base in self.bases):
            return None  # what is there belongs to the other samples
        places = (folder / name for folder in folders[: -len(self.bases)] for name in names)
        return next((p for p in places if p.is_file()), None) or _only(folders, f"*{pattern}")


def _only(folders: list[Path], pattern: str) -> Path | None:
    """The one file of that name with something in front or behind, as archives rename them."""
    for folder in folders:
        found = files_in(folder, pattern)
        if len(found) > 1:
            raise DataError(
                f"{folder} holds {len(found)} files {pattern} ({found[0].name}, {found[1].name}): "
                "several samples, told by the prefixes of their names; write one row a sample, its "
                "matrix file in the column counts and its positions in spots (`hibio manifest` "
                "drafts these rows), or put each sample into a folder of its own"
            )
        if found:
            return found[0]
    return None


def _hint(bases: list[Path]) -> str:
    """What the folder is instead, for the error."""
    for base in bases:
        if (base / BINNED).is_dir() or base.name == BINNED:
            return "; this is a Visium HD sample: write format visium_hd"
        if any(base.glob("*raw_feature_bc_matrix*")):
            return "; it holds the raw matrix only, copy the filtered one"
        if others := files_in(base, "*.h5"):
            return f"; if {others[0].name} is its matrix, name that file in the column counts"
    return ""


def read_visium(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one Space Ranger folder; only spots in tissue stay.

    mpp, the first that is known: manifest mpp (um per px of the image named); manifest pitch_um
    (neighbouring array rows or columns of a square grid; centre to centre on a hexagonal one);
    the image file's own; microns_per_pixel of the scale factors; 100 um between neighbours of a
    hexagonal Visium lattice.
    """
    files = find_visium_files(row.counts_path, row.spots, row.image)
    matrix = read_tenx(files.matrix, row.modality)
    positions = read_positions(files.positions)
    own = section_mask(
        row.section, positions.iloc[:, :0], positions["barcode"].to_numpy(), files.positions
    )
    positions = positions[own].reset_index(drop=True)
    notes = list(matrix.notes)
    factors = files.factors(notes)
    scale = image_scale(row, factors)
    place, kept = match_rows(
        matrix.barcodes,
        positions["barcode"],
        f"no barcode of {files.matrix} is in {files.positions} (matrix: "
        f"{first_names(matrix.barcodes)}; positions: {first_names(positions['barcode'])}); they "
        "belong to different slides",
        notes,
        "barcodes without position left out",
    )
    pixel = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(dtype=np.float64)
    array = positions[["array_row", "array_col"]].to_numpy(dtype=np.int64)
    several = several_gems(matrix.barcodes[place]) or several_sections(
        pixel[kept], positions.iloc[:, :0], matrix.barcodes[place], array=array[kept], spots=True
    )
    if several:
        raise several.error(files.positions)
    said = _scale(row, array, pixel * scale, image_mpp, factor_scale(factors, scale))
    mpp = said[0].mpp
    inside = positions["in_tissue"].to_numpy()[kept] == 1
    if not inside.all():
        notes.append(f"{int((~inside).sum())} spots outside the tissue (in_tissue 0) left out")
    xy_px0 = pixel[kept[inside]] * scale
    diameter = factors.get("spot_diameter_fullres")
    diameter_um = None if diameter is None else diameter * scale * mpp
    table = matrix_spots(row, matrix, place[inside], xy_px0, said, diameter_um, notes)
    return replace(table, array=array[kept[inside]])


def matrix_spots(
    row: SlideRow,
    matrix: TenxMatrix,
    place: np.ndarray | None,
    xy_px0: np.ndarray,
    scale: tuple[Statement, ...],
    diameter_um: float | None,
    notes: list[str],
) -> SpotTable:
    """Put the spots of a 10x matrix together, with their labels.

    Args:
        row: the manifest row.
        matrix: all barcodes.
        place: (S,) those that stay; None: all.
        xy_px0: (S, 2) their centres in pixels of the image.
        scale: what is said of um per pixel of the image, the one taken first.
        diameter_um: of a spot.
        notes: what was left out.
    """
    barcodes = matrix.barcodes if place is None else matrix.barcodes[place]
    labels = labels_of(row, barcodes, notes)
    names = unique_gene_names(matrix.gene_names, notes)
    return SpotTable(
        counts=matrix.counts if place is None else matrix.counts[place],
        gene_ids=matrix.gene_ids,
        gene_names=names,
        barcodes=barcodes,
        xy_px0=xy_px0,
        xy_um=xy_px0 * scale[0].mpp,
        mpp=scale[0].mpp,
        scale=scale,
        diameter_um=diameter_um,
        labels=labels,
        notes=tuple(notes),
        modality=row.modality,
    )


def read_positions(path: Path) -> pd.DataFrame:
    """Read tissue positions of any Space Ranger version.

    Args:
        path: .csv with header (version 2 and later) or without (version 1), or .parquet; or the
            coordinates of a Seurat object (tissue, row, col, imagerow, imagecol).

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
            first = text.readline().lower()
        has_header = any(name in first for name in ("barcode", COLUMNS[-1], _SEURAT[0][0]))
        frame = read_table(path, None if has_header else list(COLUMNS), _barcode_column)
        named = {name: name.lower() for name in frame.columns if name.lower() in COLUMNS}
        frame = _of_seurat(frame.rename(columns=named))
    require_columns(frame, tuple(COLUMNS), path)
    if frame.empty:
        raise DataError(f"{path} lists no spots; expected {', '.join(COLUMNS)}")
    result = pd.DataFrame({"barcode": frame["barcode"].astype(str)})
    result["in_tissue"] = truth_column(frame, "in_tissue", path).astype(np.int64)
    for name in COLUMNS[2:]:
        values = number_column(frame, name, path)
        result[name] = values if name.startswith("pxl") else values.astype(np.int64)
    if result["barcode"].duplicated().any():
        twice = result["barcode"][result["barcode"].duplicated()].iloc[0]
        raise DataError(
            f"{path}: barcode {twice!r} occurs twice: several sections, or rows "
            "written twice; keep one row a spot, and one section a file"
        )
    return result


def _of_seurat(frame: pd.DataFrame) -> pd.DataFrame:
    """The coordinates that Seurat keeps of a Visium image, under Space Ranger's names."""
    if not {old for old, _ in _SEURAT[:2]} <= set(frame.columns):
        return frame
    (ids,) = _barcode_column(list(frame.columns))
    return frame.rename(columns={ids: "barcode", **dict(_SEURAT)})


def _barcode_column(names: list[str]) -> list[str]:
    """The one that holds the barcodes, where Seurat's table has no such name the first."""
    known = ("barcode", "row_name", "cell")
    return [next((n for one in known for n in names if n.lower() == one), names[0])]


def read_scale_factors(path: Path, notes: list[str]) -> dict[str, float]:
    """Read scalefactors_json.json; keep the positive numbers.

    A factor that is no positive number (CytAssist and edited files have such) is left out and
    noted: most are never needed, and where one is, it is missing.

    Raises:
        DataError: not a JSON object.
    """
    content = read_json_object(path, "of scale factors", "copy it again from Space Ranger")
    factors = {k: float(v) for k, v in content.items() if isinstance(v, int | float)}
    good = {k: v for k, v in factors.items() if np.isfinite(v) and v > 0}
    bad = [f"{k} {v:g}" for k, v in factors.items() if k not in good]
    if bad:
        notes.append(f"scale factors that are no positive numbers not used: {', '.join(bad)}")
    return good


def image_scale(row: SlideRow, factors: dict[str, float]) -> float:
    """Image pixels per full-resolution pixel."""
    if row.image_scale is not None:
        return row.image_scale
    name = "" if row.image is None else row.image.stem
    factor = next((factor for end, factor in _SCALED_IMAGES.items() if name.endswith(end)), None)
    if factor is None:
        return 1.0
    if factor not in factors:
        raise DataError(
            f"image {row.image} is a scaled one, but {factor} is not known (no positive number in "
            f"{SCALE_FACTORS}, or no such file); copy it into 'spatial' or fill the manifest "
            "column image_scale"
        )
    return factors[factor]


def factor_scale(factors: dict[str, float], scale: float) -> tuple[Statement, ...]:
    """What the scale factors say of um per image pixel, ``scale`` of which are one full one."""
    um = factors.get("microns_per_pixel")
    return stated(um and um / scale, f"microns_per_pixel of {SCALE_FACTORS}")


def _scale(
    row: SlideRow,
    array: np.ndarray,
    pixel: np.ndarray,
    image_mpp: float | None,
    factors: tuple[Statement, ...],
) -> tuple[Statement, ...]:
    """Um per image pixel; ``pixel`` (S, 2) are image pixels of all spots of the array."""
    hexagonal = hex_pitch_px(array, pixel)
    step = None if row.pitch_um is None else hexagonal or step_px(array, pixel)
    pitch = row.pitch_um / step if row.pitch_um and step else None
    known = [
        *row_mpp(row),
        *stated(pitch, "the manifest column pitch_um over the array's step", decides=True),
        *stated(image_mpp, IMAGE_FILE, of_image=True),
        *factors,
        *stated(hexagonal and VISIUM_PITCH_UM / hexagonal, VISIUM_LATTICE),
    ]
    return require_scale(
        known,
        "neither the image nor the scale factors state it and the spots are no hexagonal Visium "
        "lattice; give one of these manifest columns: mpp (um per image pixel) or pitch_um "
        "(centre-to-centre um of neighbouring array rows or columns)",
    )


def is_cell_matrix(counts: Path) -> bool:
    """Whether this is the matrix file of segmented cells, by its name."""
    return file_name(counts).endswith(f"{CELL_MATRIX}.h5")


def is_visium(counts: Path) -> bool:
    """Whether this is a matrix of Space Ranger, or a folder with one; also of bins."""
    if not counts.is_dir():
        is_h5 = file_name(counts).endswith(".h5") and not is_cell_matrix(counts)
        return is_h5 or is_mex(counts)
    names = (f"*{MATRIX}", f"*{MATRIX}.h5", f"outs/{MATRIX}", f"outs/{MATRIX}.h5")
    return any(any(counts.glob(name)) for name in (*names, "matrix.mtx*", MARKED_MEX))


def is_binned(counts: Path) -> bool:
    """Whether these are bins of Visium HD, by the names of folders or by the scale factors."""
    places = (counts, counts / BINNED, counts / "outs" / BINNED)
    if any(any(place.glob("square_*um")) for place in places):
        return True
    folder = counts if counts.is_dir() else counts.parent
    return is_visium(counts) and "bin_size_um" in text_head(folder / "spatial" / SCALE_FACTORS)


def scaled_image(spatial: Path) -> Path | None:
    """The larger of the scaled images that Space Ranger puts beside the positions."""
    return first_file(spatial, *(f"{name}.png" for name in _SCALED_IMAGES))


def _discover(folder: Path) -> list[SlideRow]:
    """A folder with spatial/ and filtered_feature_bc_matrix(.h5); bins of Visium HD by scale."""
    spatial, matrix = folder / "spatial", folder / MATRIX
    flat = _flat(folder)
    if len(flat) > 1 or (flat and is_mex(flat[0])):
        rows = [_flat_row(one) for one in flat]
        return rows if any(row.spots is not None for row in rows) else []
    has_matrix = matrix.is_dir() or first_file(folder, f"*{MATRIX}.h5") is not None
    positions = first_file(spatial, "*tissue_positions*") or first_file(folder, f"{_AGGR}*")
    if not has_matrix or positions is None:
        return []
    if positions.suffix != ".parquet" and (rows := _aggregated(folder, positions)):
        return rows
    binned = _bin_um(spatial / SCALE_FACTORS)
    row = drafted_row(
        folder.resolve().name,
        folder,
        "visium" if binned is None else "visium_hd",
        image=scaled_image(spatial),
        labels=first_file(folder, "*labels*.csv", "*labels*.tsv"),
        technology="Visium" if binned is None else "Visium HD",
        bin_um=binned,
    )
    return [row]


def _flat(folder: Path) -> list[Path]:
    """The matrices whose names have the mark of a sample."""
    found = [m for name in (f"*{MATRIX}.h5", MARKED_MEX) for m in files_in(folder, name)]
    return [matrix for matrix in found if sample_mark(matrix)]


def _flat_row(matrix: Path) -> SlideRow:
    """The row of one sample of a flat folder, with the files that have its mark."""
    mark = sample_mark(matrix)
    folders = [matrix.parent, matrix.parent / "spatial", matrix.parent / f"{mark}spatial"]
    spots, image = (
        next((p for f in folders if (p := first_file(f, *patterns))), None)
        for patterns in (
            [f"{escape(mark)}*tissue_positions*"],
            [f"{escape(mark)}*{name}.png" for name in _SCALED_IMAGES],
        )
    )
    known = {"spots": spots, "image": image, "technology": "Visium"}
    return drafted_row(mark.rstrip("_.-"), matrix, "visium", **known)


def _aggregated(folder: Path, positions: Path) -> list[SlideRow]:
    """One row a library of `spaceranger aggr`, by the endings of the barcodes; [] of one."""
    try:
        several = several_gems(read_positions(positions)["barcode"].to_numpy())
        table = folder / "aggregation.csv"
        libraries = [str(one) for one in read_table(table)["library_id"]] if table.is_file() else []
    except (DataError, KeyError):  # `prepare` says what is wrong
        return []
    rows, name = [], drafted_row(folder.resolve().name, folder, "visium").slide_id
    for value in () if several is None else sorted(several.sizes, key=int):
        known = 0 < int(value) <= len(libraries)
        library = libraries[int(value) - 1] if known else f"{name}_{value}"
        image = scaled_image(folder / "spatial" / library) if known else None
        section = f"{SUFFIX}={value}"
        more = {"image": image, "section": section, "technology": "Visium"}
        rows.append(drafted_row(library, folder, "visium", **more))
    return rows


def _bin_um(path: Path) -> float | None:
    """Size of the bins by the scale factors; None: no bins, or no such file."""
    try:
        found = read_json_object(path, "", "").get("bin_size_um")
    except (OSError, DataError):  # `prepare` tells what is wrong
        return None
    return float(found) if found in BINS_UM else None


FORMAT = Format(
    "visium",
    read_visium,
    sources=lambda row: find_visium_files(row.counts_path, row.spots, row.image).by_role(),
    detect=lambda counts, spots: is_visium(counts) and not is_binned(counts),
    discover=_discover,
    layout="spatial/ + filtered_feature_bc_matrix, GEO's GSM..._matrix.mtx.gz",
    loupe=True,
)
