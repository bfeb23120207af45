"""Visium HD output of Space Ranger: square bins of 2, 8 or 16 um.

Shapes: S bins in tissue, N barcodes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.readers.coordinates import row_mpp, row_step, step_px
from preprocessing.readers.format import NO_LAYERS, Format
from preprocessing.readers.joins import first_names
from preprocessing.readers.parquet import require_pyarrow, require_sound_parquet
from preprocessing.readers.tables import (
    require_columns,
    truth_column,
)
from preprocessing.readers.tenx import read_tenx
from preprocessing.readers.visium import (
    BINNED,
    BINS_UM,
    COLUMNS,
    VisiumFiles,
    factor_scale,
    find_visium_files,
    image_scale,
    is_binned,
    matrix_spots,
    read_positions,
    scaled_image,
)
from preprocessing.scale import IMAGE_FILE, Statement, require_scale, stated
from preprocessing.sections import section_mask, several_gems
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable

DEFAULT_BIN_UM = 8.0
_BATCH = 1 << 18
_BARCODE = re.compile(rb"s_(\d{3})um_(\d{5})_(\d{5})-(\d+)")
_DIGITS = (slice(8, 13), slice(14, 19))
_SQUARE = re.compile(r"square_(\d{3})um")
_SAMPLE = 50_000  # bins that are looked at to measure the pitch


@dataclass(frozen=True)
class BinPositions:
    """Bins in tissue.

    Attributes:
        array: (S, 2) int32 row and column of the array.
        pixel: (S, 2) float64 x and y in pixels of the full-resolution image.
        names: (S,) barcodes, or None where row and column say the same.
        outside: how many bins of the file lie outside the tissue.
    """

    array: np.ndarray
    pixel: np.ndarray
    names: np.ndarray | None
    outside: int


def read_bins(path: Path) -> BinPositions:
    """Read tissue positions; only bins in tissue stay, and their barcodes only where needed.

    Args:
        path: tissue_positions.parquet (read in batches), or a .csv of any Space Ranger version.

    Raises:
        DataError: not a positions table, no bin in tissue, or pyarrow is needed and missing.
    """
    arrays, pixels, names = [], [], []
    outside, told = 0, True
    for frame in _batches(path):
        inside = truth_column(frame, "in_tissue", path)
        outside += int((~inside).sum())
        frame = frame[inside]
        array = frame[["array_row", "array_col"]].to_numpy().astype(np.int32)
        told = told and _same(frame["barcode"].to_numpy(), array)
        arrays.append(array)
        pixels.append(frame[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64))
    array = np.concatenate(arrays) if arrays else np.empty((0, 2), dtype=np.int32)
    if len(array) == 0:
        raise DataError(f"{path} lists no bin in tissue (in_tissue 1); copy it from Space Ranger")
    pixel = np.concatenate(pixels)
    if not np.isfinite(pixel).all():
        bad = int((~np.isfinite(pixel)).any(axis=1).sum())
        raise DataError(f"{path}: {bad} bins have no finite pixel position; copy it again")
    if told:
        return BinPositions(array, pixel, None, outside)
    for frame in _batches(path):  # a second time, since most files do not need their barcodes
        inside = truth_column(frame, "in_tissue", path)
        names.append(frame["barcode"][inside].astype(str).to_numpy(dtype=object))
    return BinPositions(array, pixel, np.concatenate(names), outside)


def match_bins(barcodes: np.ndarray, bins: BinPositions) -> np.ndarray:
    """Find the bin of each barcode.

    Args:
        barcodes: (N,) of the matrix.
        bins: of the positions file.

    Returns:
        (N,) int64 rows of ``bins``; -1 where there is none.

    Raises:
        DataError: a bin occurs twice in the positions.
    """
    if bins.names is not None:
        index = pd.Index(bins.names)
        if not index.is_unique:
            twice = index[index.duplicated()][0]
            raise DataError(
                f"barcode {twice!r} occurs twice in the positions: several sections, or "
                "rows written twice; keep one row a bin, and one section a file"
            )
        return np.asarray(index.get_indexer(pd.Index(barcodes)), dtype=np.int64)
    places = bin_places(barcodes)
    if places is None:
        return np.full(len(barcodes), -1, dtype=np.int64)
    width = int(max(bins.array[:, 1].max(), places[:, 1].max(initial=0))) + 1
    keys = bins.array[:, 0].astype(np.int64) * width + bins.array[:, 1]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    if (keys[1:] == keys[:-1]).any():
        row, column = divmod(int(keys[:-1][keys[1:] == keys[:-1]][0]), width)
        raise DataError(
            f"row {row}, column {column} occurs twice in the positions: several sections, "
            "or rows written twice; keep one row a bin, and one section a file"
        )
    wanted = places[:, 0] * width + places[:, 1]
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[found] == wanted, order[found], -1)


def bin_places(barcodes: np.ndarray) -> np.ndarray | None:
    """Read row and column out of barcodes such as "s_008um_00437_00602-1".

    Args:
        barcodes: (N,) str.

    Returns:
        (N, 2) int64, or None when a barcode is not of this form.
    """
    result = np.empty((len(barcodes), 2), dtype=np.int64)
    for first in range(0, len(barcodes), _BATCH):
        texts = barcodes[first : first + _BATCH].tolist()
        try:
            packed = np.array([str(text).encode("ascii") for text in texts], dtype=bytes)
        except UnicodeEncodeError:
            return None
        head = _BARCODE.fullmatch(texts[0].encode())
        if head is None or packed.itemsize != len(texts[0]):
            return None
        letters = packed.view(np.uint8).reshape(len(texts), -1)
        known = np.frombuffer(texts[0].encode(), dtype=np.uint8)
        fixed = np.ones(letters.shape[1], dtype=bool)
        for place in _DIGITS:
            fixed[place] = False
        digits = letters[:, ~fixed].astype(np.int64) - ord("0")
        if (letters[:, fixed] != known[fixed]).any() or not ((digits >= 0) & (digits <= 9)).all():
            return None
        powers = 10 ** np.arange(4, -1, -1)
        result[first : first + _BATCH, 0] = digits[:, :5] @ powers
        result[first : first + _BATCH, 1] = digits[:, 5:] @ powers
    return result


def _same(names: np.ndarray, array: np.ndarray) -> bool:
    """Whether the barcodes say the same as row and column."""
    places = bin_places(names)
    return places is not None and bool((places == array).all())


def _batches(path: Path) -> Iterator[pd.DataFrame]:
    if path.suffix != ".parquet":
        yield read_positions(path)
        return
    require_pyarrow(path)
    import pyarrow
    import pyarrow.parquet

    try:
        require_sound_parquet(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            require_columns(pd.DataFrame(columns=file.schema_arrow.names), tuple(COLUMNS), path)
            for batch in file.iter_batches(batch_size=_BATCH, columns=COLUMNS):
                frame = batch.to_pandas()
                require_columns(frame, tuple(COLUMNS), path)
                yield frame
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a complete parquet file ({error})") from error


@dataclass(frozen=True)
class BinFiles:
    """The files of one bin size; ``bin_um`` None where the names of the folders do not tell."""

    files: VisiumFiles
    bin_um: float | None


def bin_folders(counts: Path) -> dict[float, Path]:
    """Folders square_XXXum below a sample's root, its ``outs`` or ``binned_outputs``, by um."""
    for base in (counts, counts / BINNED, counts / "outs" / BINNED):
        found = {p: _SQUARE.fullmatch(p.name) for p in sorted(base.glob("square_*um"))}
        folders = {float(match[1]): p for p, match in found.items() if match and p.is_dir()}
        if folders:
            return folders
    return {}


def find_bin_files(row: SlideRow) -> BinFiles:
    """Find the files of the bins that a row asks for.

    Raises:
        DataError: the bins, or one of their files, are not there; names what is.
    """
    counts = row.counts_path
    folders = bin_folders(counts)
    if folders:
        wanted = DEFAULT_BIN_UM if row.bin_um is None else row.bin_um
        if wanted not in folders:
            raise DataError(
                f"{counts} has no bins of {wanted:g} um, but of "
                f"{', '.join(f'{um:g}' for um in sorted(folders))} um; choose one of them in the "
                "manifest column bin_um"
            )
        return BinFiles(find_visium_files(folders[wanted], row.spots), wanted)
    place = counts if counts.is_dir() else counts.parent
    named = _SQUARE.fullmatch(place.name)
    return BinFiles(find_visium_files(counts, row.spots), float(named[1]) if named else None)


def read_visium_hd(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read the bins of one size; only those in tissue stay.

    Little more than the result is in memory: the matrix is read in blocks of bins, the positions
    in batches. mpp, the first that is known: the manifest; the image file; microns_per_pixel of
    the scale factors; the size of a bin over its pixels.
    """
    found = find_bin_files(row)
    notes: list[str] = []
    factors = found.files.factors(notes)
    bin_um = _bin_um(row, found, factors)
    bins = read_bins(found.files.positions)
    matrix = read_tenx(found.files.matrix, row.modality)
    notes += [*matrix.notes, f"bins of {bin_um:g} um"]
    scale = image_scale(row, factors)
    image = stated(image_mpp, IMAGE_FILE, of_image=True)
    said = _scale((*row_mpp(row), *image, *factor_scale(factors, scale)), bins, scale, bin_um)
    place, kept = _join(row, matrix.barcodes, bins, found.files, notes)
    whole = len(place) == len(matrix.barcodes)
    xy_px0 = bins.pixel[kept] * scale
    return matrix_spots(row, matrix, None if whole else place, xy_px0, said, bin_um, notes)


def _bin_um(row: SlideRow, found: BinFiles, factors: dict[str, float]) -> float:
    """The size of the bins; what the manifest asks for must be what the files hold."""
    told = {
        "the manifest's bin_um": row.bin_um,
        "the folder": found.bin_um,
        "bin_size_um of the scale factors": factors.get("bin_size_um"),
    }
    known = {name: value for name, value in told.items() if value is not None}
    if len(set(known.values())) > 1:
        said = ", ".join(f"{value:g} um by {name}" for name, value in known.items())
        raise DataError(f"{found.files.positions.parent}: bins of {said}; correct the manifest")
    if not known:
        raise DataError(
            f"{found.files.positions.parent}: the size of the bins is unknown; copy "
            "scalefactors_json.json into 'spatial', or fill the manifest column bin_um"
        )
    return next(iter(known.values()))


def _scale(
    said: tuple[Statement, ...], bins: BinPositions, scale: float, bin_um: float
) -> tuple[Statement, ...]:
    """Um per pixel of the image: what is stated, then by the distance of the bins."""
    array = bins.array[:_SAMPLE].astype(np.int64)
    step = step_px(array, bins.pixel[:_SAMPLE] * scale) if row_step(array) == 1 else None
    grid = stated(bin_um / step if step else None, f"the distance of bins of {bin_um:g} um")
    return require_scale(
        (*said, *grid),
        "neither the image nor the scale factors state it and there are too few neighbouring "
        "bins; give the manifest column mpp (um per pixel of the image)",
    )


def _join(
    row: SlideRow, barcodes: np.ndarray, bins: BinPositions, files: VisiumFiles, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the matrix and of ``bins`` that belong together, (S,) each."""
    found = match_bins(barcodes, bins)
    if row.section:
        nothing = pd.DataFrame(index=range(len(barcodes)))
        own = section_mask(row.section, nothing, barcodes, files.matrix)
        found = np.where(own, found, -1)
    place = np.flatnonzero(found >= 0)
    several = None if bins.names is None else several_gems(barcodes[place])
    if several:
        raise several.error(files.positions)
    if len(place) == 0:
        raise DataError(
            f"no barcode of {files.matrix} is a bin in tissue of {files.positions} (matrix: "
            f"{first_names(barcodes)}); they belong to different slides or bin sizes"
        )
    if len(place) < len(barcodes):
        notes.append(f"{len(barcodes) - len(place)} bins outside the tissue or unknown left out")
    return place, found[place]


def _discover(folder: Path) -> list[SlideRow]:
    """A sample with binned_outputs/square_XXXum; 8 um, or the finest that is there."""
    folders = bin_folders(folder)
    if not folders:
        return []
    bin_um = DEFAULT_BIN_UM if DEFAULT_BIN_UM in folders else min(folders)
    image = scaled_image(folders[bin_um] / "spatial")
    known = {"image": image, "technology": "Visium HD", "bin_um": bin_um}
    return [drafted_row(folder.resolve().name, folder, "visium_hd", **known)]


def _complain(columns: Mapping[str, object]) -> list[str]:
    found = []
    if columns.get("pitch_um"):
        found.append("format visium_hd has bins; give bin_um and leave pitch_um empty")
    if columns.get("bin_um") not in (None, *BINS_UM):
        known = ", ".join(f"{value:g}" for value in BINS_UM)
        found.append(f"bin_um is {columns['bin_um']:g}; Visium HD has bins of {known} um")
    return found


FORMAT = Format(
    "visium_hd",
    read_visium_hd,
    sources=lambda row: find_bin_files(row).files.by_role(),
    detect=lambda counts, spots: is_binned(counts),
    discover=_discover,
    layout="binned_outputs/",
    whole=True,
    forbids=NO_LAYERS,
    complain=_complain,
    loupe=True,
)
