"""AnnData files (.h5ad) of any version, with raw counts or intensities and coordinates."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError, did_you_mean
from preprocessing.readers.cells import OWN_PLACES, Cells, cell_format, cell_table
from preprocessing.readers.coordinates import (
    VISIUM_LATTICE,
    VISIUM_PITCH_UM,
    Scale,
    find_pair,
    frame_xy,
    hex_pitch_px,
    number_pair,
    require_pair,
)
from preprocessing.readers.format import NO_BINS, file_name
from preprocessing.readers.hdf5 import (
    Node,
    column_names,
    files_with_cells,
    first_values,
    index_values,
    open_hdf5,
    read_column,
    read_frame,
    read_matrix,
    read_texts,
)
from preprocessing.readers.tenx import wanted_features
from preprocessing.scale import Statement, hexagonal_spacing, stated
from preprocessing.sections import is_library, section_mask, several_sections
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable, allowed_values, checked_counts

_COUNTS = ("counts", "raw_counts", "raw", "umi", "umis", "count", "raw_count")  # likely layers
_WHAT = "an AnnData file (.h5ad)"
_OBSM = ("spatial_um", "X_spatial_um", "spatial", "X_spatial")
_SYMBOLS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol")
_IDS = ("gene_ids", "gene_id", "ensembl_id", "feature_id", "Accession")


def read_h5ad(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one AnnData file.

    The counts are what the column layer names, else X where it holds whole numbers, else
    layers['counts'], else raw.X (proteins: the first of them without negative values); the notes
    say which. The coordinates are
    obsm['spatial_um'], obsm['spatial'] or obsm['X_spatial'], else a pair of obs columns. mpp: the
    manifest, else microns_per_pixel in uns['spatial'], else the lattice of a Visium slide.
    """
    cells, scale = h5ad_cells(row.counts_path, row.modality, row.layer, row.section)
    return cell_table(row, cells, scale, image_mpp)


def h5ad_cells(
    path: Path, modality: str, layer: str = "", section: str = ""
) -> tuple[Cells, Scale]:
    """Read what an AnnData file says of its cells, and of the scale of their coordinates.

    All cells come back; the scale is that of the ``section`` (as the manifest names it).

    Raises:
        DataError: no raw counts, no coordinates, or a damaged file.
    """
    with open_hdf5(path, _WHAT) as file:
        if "obs" not in file or "var" not in file:
            raise DataError(f"{path} has no obs and var ({', '.join(file)}); expected {_WHAT}")
        notes: list[str] = []
        columns, odd = read_frame(file["obs"])
        if odd:
            notes.append(f"obs columns that are no numbers or texts left out: {', '.join(odd)}")
        barcodes = index_values(file["obs"])
        counts, var = _counts(file, (modality, layer), notes, path)
        if barcodes is None:
            barcodes = np.array([str(i) for i in range(counts.shape[0])], dtype=object)
        ids, names = _genes(var, counts.shape[1], path)
        xy, used, in_um = _coordinates(file, columns, path, notes)
        if not len(barcodes) == len(xy) == counts.shape[0]:
            raise DataError(
                f"{path}: the matrix has {counts.shape[0]} rows, obs {len(barcodes)}, the "
                f"coordinates {len(xy)}; expected one a cell"
            )
        if columns.empty:
            columns = pd.DataFrame(index=pd.RangeIndex(len(barcodes)))
        libraries = tuple(file["uns/spatial"]) if "uns/spatial" in file else ()
        own = section_mask(section, columns, barcodes, path)
        library = _library(columns[own], libraries, section)
        said = () if in_um else _said(file, columns[own], xy[own], library)
        scale = Scale(in_um, said)
        if "feature_types" in column_names(var):
            kinds = read_texts(var["feature_types"])
            kept, left_out = wanted_features(kinds, modality, str(path))
            counts, ids, names = counts[:, kept], ids[kept], names[kept]
            notes += left_out
        columns = columns.drop(columns=used)
        return Cells(counts, barcodes, ids, names, xy, columns, notes, libraries), scale


def _library(columns: pd.DataFrame, libraries: Sequence[str], section: str) -> str | None:
    """The library in uns['spatial'] that the cells are of; None: none, or it is not said."""
    if len(libraries) < 2:
        return next(iter(libraries), None)
    values = [columns[n].astype(str).unique() for n in columns if is_library(n)]
    named = [one[0] for one in values if len(one) == 1] + [section.partition("=")[2]]
    return next((name for name in named if name in libraries), None)


def h5ad_sections(path: Path) -> list[str]:
    """The sections of an AnnData file as the manifest column section names them; [] of one."""
    with open_hdf5(path, _WHAT) as file:
        columns, barcodes = read_frame(file["obs"])[0], index_values(file["obs"])
        xy, _, _ = _coordinates(file, columns, path, [])
        libraries = tuple(file["uns/spatial"]) if "uns/spatial" in file else ()
        if barcodes is None or len(xy) != len(barcodes):
            return []
        several = several_sections(xy, columns, barcodes, libraries)
    if several is None:
        return []
    return [f"{several.column}={value}" for value in several.sizes]


def _discover(folder: Path) -> list[SlideRow]:
    """AnnData files with coordinates; one row a section where a column tells several apart."""
    rows = []
    for row in files_with_cells(folder, "h5ad", has_cells):
        sections: list[str] = []
        with suppress(DataError):  # `prepare` says what is wrong
            sections = h5ad_sections(row.counts_path)
        names = [f"{row.slide_id}_{section.partition('=')[2]}" for section in sections]
        rows += [
            drafted_row(name, row.counts, "h5ad", section=section)
            for name, section in zip(names, sections, strict=True)
        ] or [row]
    return rows


def has_cells(path: Path) -> bool:
    """Tell whether a file is an AnnData file with a matrix and coordinates."""
    if not h5py.is_hdf5(path):
        return False
    with open_hdf5(path, _WHAT) as file:
        if any(name not in file for name in ("obs", "var")) or not {"X", "layers"} & set(file):
            return False
        placed = any(key in file.get("obsm", ()) for key in _OBSM)
        return placed or find_pair(column_names(file["obs"])) is not None


def _sources(file: h5py.File) -> dict[str, tuple[Node, Node]]:
    """The matrices that may hold raw counts, each with its table of genes, in order."""
    paths = {
        "X": ("X", "var"),
        "layers['counts']": ("layers/counts", "var"),
        "raw.X": ("raw/X", "raw/var"),
        "raw.X ": ("raw.X", "raw.var"),  # as AnnData wrote it before version 0.7
    }
    return {
        name.strip(): (file[matrix], file[var])
        for name, (matrix, var) in paths.items()
        if matrix in file and var in file
    }


def _named(file: h5py.File, layer: str, path: Path) -> dict[str, tuple[Node, Node]]:
    """The matrix that the manifest's column layer names."""
    sources = _sources(file)
    if layer in sources:
        return {layer: sources[layer]}
    if layer in file.get("layers", ()):
        return {f"layers['{layer}']": (file["layers"][layer], file["var"])}
    choices = [*file.get("layers", ()), *(name for name in sources if "[" not in name)]
    listed = f"found {', '.join(choices) or 'none'}"
    hint = did_you_mean(layer, choices, "did you mean", listed)
    raise DataError(f"{path} has no layer {layer!r} ({hint}); correct the manifest column layer")


def _layers_told(file: h5py.File, modality: str) -> str:
    """The layers, and which of them may hold what the modality asks for, for an error."""
    layers = file.get("layers", {})
    if not len(layers):
        return ""
    usable = [n for n, node in layers.items() if _may_hold(node, modality)]
    likely = [name for name in usable if name.lower() in _COUNTS] or usable
    write = f"; write {likely[0]} into the manifest column layer" if likely else ""
    return f" Its layers are {', '.join(layers)}{write}"


def _may_hold(node: Node, modality: str) -> bool:
    values = first_values(node)
    return len(values) > 0 and allowed_values(values, modality)


def _counts(
    file: h5py.File, asked: tuple[str, str], notes: list[str], path: Path
) -> tuple[csr_matrix, Node]:
    """Return the first matrix that holds what modality and layer ask for, and its genes."""
    modality, layer = asked
    sources = _named(file, layer, path) if layer else _sources(file)
    told = "" if layer else _layers_told(file, modality)
    if not sources:
        raise DataError(
            f"{path} has neither X, layers['counts'] nor raw.X; expected raw counts.{told}"
        )
    for name, (node, var) in sources.items():
        if not allowed_values(first_values(node), modality):
            continue
        matrix = read_matrix(node)
        if allowed_values(matrix.data, modality):
            notes.append(f"counts are {name}")
            return matrix, var
    name, (node, var) = next(iter(sources.items()))
    matrix = read_matrix(node)
    genes = index_values(var)
    try:
        checked_counts(matrix, modality, index_values(file["obs"]), genes)
    except DataError as error:
        raise DataError(
            f"{path}: none of {', '.join(sources)} is usable; {name}: {error}.{told}"
        ) from error
    raise DataError(f"{path}: {name} holds no numbers.{told}")


def _genes(var: Node, count: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids and names of the genes, (G,) each."""
    index = index_values(var)
    columns = column_names(var)
    symbols = next((n for n in _SYMBOLS if n in columns), None)
    given = next((n for n in _IDS if n in columns), None)
    names = index if symbols is None else read_texts(var[symbols])
    if names is None:
        raise DataError(f"{path}: var has no index of gene names; found {', '.join(columns)}")
    ids = index
    if given is not None and symbols is None:
        ids = read_texts(var[given])
    ids = names if ids is None else ids
    if len(names) != count or len(ids) != count:
        raise DataError(
            f"{path}: {len(names)} gene names for a matrix of {count} columns; write it again"
        )
    empty = (names == "") | (names == "nan")
    return ids, np.where(empty, ids, names)


def _coordinates(
    file: h5py.File, columns: pd.DataFrame, path: Path, notes: list[str]
) -> tuple[np.ndarray, list[str], bool]:
    """Return xy (S, 2), the obs columns used, and whether they are micrometres."""
    obsm = file.get("obsm", {})
    key = next((k for k in _OBSM if k in obsm), None)
    if key is None:
        there = f"{path}: no obsm {' or '.join(map(repr, _OBSM))} (obsm has: "
        there += f"{', '.join(obsm) or 'nothing'}), and obs"
        x, y, in_um = require_pair(columns.columns, there)
        return number_pair(columns, x, y), [x, y], in_um
    xy = _obsm_values(obsm[key])
    if xy is None:
        raise DataError(f"{path}: obsm[{key!r}] is not a table of numbers (S, 2)")
    if xy.shape[1] > 2:
        notes.append(f"obsm[{key!r}] has {xy.shape[1]} columns; the first two are x and y")
    return np.asarray(xy[:, :2], dtype=np.float64), [], key.endswith("_um")


def _obsm_values(node: Node) -> np.ndarray | None:
    if isinstance(node, h5py.Group):
        frame = read_frame(node)[0].select_dtypes("number")
        values = frame_xy(frame) if frame.shape[1] >= 2 else np.empty(0)
    else:
        values = node[()] if node.dtype.kind in "iuf" else np.empty(0)
    return values if values.ndim == 2 and values.shape[1] >= 2 else None


def _said(
    file: h5py.File, columns: pd.DataFrame, xy: np.ndarray, library: str | None
) -> tuple[Statement, ...]:
    """Um per coordinate unit by Space Ranger's scale factors, then by a hexagonal lattice."""
    factor = scale_factor(file, "microns_per_pixel", library)
    lattice = None
    if {"array_row", "array_col"} <= set(columns.columns):
        array = columns[["array_row", "array_col"]].to_numpy()
        if array.dtype.kind in "iu" and len(np.unique(array, axis=0)) == len(array):
            lattice = hex_pitch_px(array, xy)
    elif scale_factor(file, "spot_diameter_fullres", library) is not None:  # as Space Ranger has it
        lattice = hexagonal_spacing(xy)
    return (
        *stated(factor, "microns_per_pixel in uns['spatial']"),
        *stated(lattice and VISIUM_PITCH_UM / lattice, VISIUM_LATTICE),
    )


def scale_factor(file: h5py.File, name: str, library: str | None = None) -> float | None:
    """A positive number among the scale factors of a library (the only one) in uns['spatial']."""
    libraries = file.get("uns/spatial")
    if not isinstance(libraries, h5py.Group):
        return None
    if library is None and len(libraries) == 1:
        library = next(iter(libraries))
    if library is None or library not in libraries:
        return None
    stored = libraries[library].get(f"scalefactors/{name}")
    values = None if stored is None else read_column(np.ravel(stored[()]))
    if values is None or values.dtype.kind not in "iuf":
        return None
    return float(values[0]) if values[0] > 0 else None


FORMAT = cell_format(
    "h5ad",
    read_h5ad,
    detect=lambda counts, spots: file_name(counts).endswith(".h5ad"),
    discover=_discover,
    forbids={**OWN_PLACES, **NO_BINS},
    layout=".h5ad files with coordinates",
)
