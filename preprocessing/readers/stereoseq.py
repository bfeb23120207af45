"""Stereo-seq: GEM text or GEF (HDF5), a count a gene and DNB, in square bins or, of cells, by cell.

x and y count DNBs from the file's own offset (OffsetX and OffsetY, minX and minY), which is not
added: a warning says what a picture of the whole chip needs. Shapes: S bins or cells, G genes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.files import files_in
from preprocessing.findings import SlideWarning
from preprocessing.readers.cells import OWN_PLACES, Cells, cell_format, cell_table
from preprocessing.readers.coordinates import Scale
from preprocessing.readers.format import NO_LAYERS, file_name
from preprocessing.readers.hdf5 import open_hdf5, read_column
from preprocessing.readers.tables import open_text
from preprocessing.scale import stated
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable

DNB_UM = 0.5  # between neighbouring DNBs of a chip, where the file says nothing else
BIN_DNB = 100  # edge of a bin where the manifest says nothing
_COUNTS = ("MIDCount", "MIDCounts", "UMICount", "MIDcount")
_NAMES = ("geneName", "geneID", "gene")
_CELL = "CellID"
_LINES = 2_000_000  # in memory at once
_BIN, _CELLS = "geneExp/bin1", "cellBin"
_FIELDS = {  # of the tables of a GEF file
    f"{_BIN}/gene": ("offset", "count"),
    f"{_BIN}/expression": ("x", "y", "count"),
    f"{_CELLS}/gene": (),
    f"{_CELLS}/cell": ("id", "x", "y", "offset", "geneCount"),
    f"{_CELLS}/cellExp": ("geneID", "count"),
}


def read_stereoseq(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read a GEM file (plain or gzipped), or a GEF file of bins or of cells.

    Cells (CellID of a GEM; cellBin of a GEF) stay cells, 0 is no cell; else, and of a GEM with
    bin_um, the counts are summed into squares whose edges lie at multiples of bin_um (100 DNBs
    where it is empty).
    """
    read = _read_gef if _is_gef(row.counts_path) else _read_gem
    cells, dnb_um, bins, begin = read(row)
    said = stated(dnb_um, "the step of a Stereo-seq chip")
    table = cell_table(row, cells, Scale(said=said), image_mpp)
    if any(begin) and row.image is not None and not row.image_transform:
        shift = " ".join(f"{dnb * dnb_um / table.mpp:g}" for dnb in begin)
        told = f"x and y begin at DNB {begin[0]}, {begin[1]} of the chip, which is not added"
        fix = f"if the image shows the whole chip, write shift:{shift} into image_transform"
        table = replace(table, warnings=(*table.warnings, SlideWarning(told, fix)))
    if bins is None or row.pitch_um is not None:
        return table
    um = bins * dnb_um
    return replace(table, pitch_um=um, notes=(*table.notes, f"bins of {um:g} um"))


#: Um between DNBs, DNBs along the edge of a bin, and where x and y begin on the chip.
_Read = tuple[Cells, float, int | None, tuple[int, int]]


def _step(row: SlideRow, dnb_um: float) -> int:
    """DNBs along the edge of a bin."""
    step = BIN_DNB if row.bin_um is None else row.bin_um / dnb_um
    if abs(step - round(step)) > 1e-6:
        raise DataError(
            f"bin_um {row.bin_um:g} is no multiple of {dnb_um:g} um, the step of this chip"
        )
    return round(step)


def _read_gem(row: SlideRow) -> _Read:
    path = row.counts_path
    header, comments = _head(path)
    skipped, begin = len(comments), (_begin(comments, "X"), _begin(comments, "Y"))
    count = next((name for name in _COUNTS if name in header), None)
    genes = [name for name in _NAMES if name in header]
    if count is None or not genes or not {"x", "y"} <= set(header):
        raise DataError(
            f"{path}: columns {', '.join(header[:8])}; expected those of a GEM file: geneID, x, y, "
            f"{_COUNTS[0]}"
        )
    by_cell = _CELL in header and row.bin_um is None
    step = _step(row, DNB_UM)
    keys = [_CELL] if by_cell else ["x", "y"]
    used = list(dict.fromkeys([*genes[:2], "x", "y", count, *keys]))
    parts = []
    for block in _blocks(path, skipped, used, count):
        if by_cell:
            block = block[block[_CELL] != 0]
        else:
            block[["x", "y"]] = block[["x", "y"]] // step
        block["lines"] = 1
        parts.append(block.groupby([*keys, *genes[:2]], sort=False, as_index=False).sum())
    cells = _summed(pd.concat(parts), keys, genes[:2], count, step)
    return cells, DNB_UM, None if by_cell else step, begin


def _read_gef(row: SlideRow) -> _Read:
    path = row.counts_path
    with open_hdf5(path, "a GEF file of Stereo-seq") as file:
        bins = file[f"{_BIN}/expression"].attrs if _BIN in file else {}
        told = np.ravel(bins.get("resolution", file.attrs.get("resolution", 1000 * DNB_UM)))  # nm
        dnb_um = float(told[0]) / 1000
        if not 0 < dnb_um < 100:
            raise DataError(f"{path}: resolution {told[0]} nm; expected some 500: write it again")
        if _BIN in file:
            step = _step(row, dnb_um)
            cells = _gef_bins(path, file, step)
            return cells, dnb_um, step, _offset(file[f"{_BIN}/expression"].attrs, "min")
        if _CELLS not in file:
            inside = ", ".join(file.get("geneExp", file)) or "nothing"
            raise DataError(
                f"{path} holds {inside}, neither {_BIN} nor {_CELLS}; give the file that SAW wrote"
            )
        if row.bin_um is not None:
            raise DataError(
                f"{path} holds cells and no bins; leave bin_um empty, or give the tissue.gef"
            )
        return _gef_cells(path, file), dnb_um, None, _offset(file.attrs, "offset")


def _offset(attrs: Mapping[str, Any], name: str) -> tuple[int, int]:
    x, y = (int(np.ravel(attrs.get(f"{name}{axis}", 0))[0]) for axis in "XY")
    return x, y


def _gef_table(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """A table of a GEF file; DataError where it or one of its columns is missing."""
    table = file.get(name)
    names: tuple[str, ...] = getattr(getattr(table, "dtype", None), "names", None) or ()
    if not names or not set(_FIELDS[name]) <= set(names) or table.ndim != 1 or not len(table):
        raise DataError(
            f"{path}: {name} has the columns {', '.join(names) or 'none'}; expected "
            f"{', '.join(_FIELDS[name]) or 'geneName'} and at least one row; write it again"
        )
    return table


def _gef_genes(path: Path, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Names and ids (G,) of the genes of a GEF file; its versions call them otherwise."""
    known = [read_column(genes[name]) for name in _NAMES if name in (genes.dtype.names or ())]
    texts = [column for column in known if column is not None and column.dtype.kind == "O"]
    if not texts:
        raise DataError(f"{path}: genes without a name; expected the column geneName")
    return texts[0], texts[-1]


def _gef_bins(path: Path, file: h5py.File, step: int) -> Cells:
    """Counts of single DNBs, gene after gene, summed into bins; a block of them in memory."""
    genes = _gef_table(path, file, f"{_BIN}/gene")[:]
    places = _gef_table(path, file, f"{_BIN}/expression")
    ends = _ends(path, genes["offset"], genes["count"], len(places))
    names, ids = _gef_genes(path, genes)
    parts = []
    for first in range(0, len(places), _LINES):
        block = places[first : first + _LINES]
        gene = np.searchsorted(ends, np.arange(first, first + len(block)), side="right")
        lines = pd.DataFrame({n: block[n].astype(np.int64) for n in ("x", "y", "count")})
        lines[["x", "y"]] //= step
        grouped = lines.assign(gene=gene).groupby(["x", "y", "gene"], sort=False, as_index=False)
        parts.append(grouped.sum())
    whole = pd.concat(parts)
    told = whole.assign(name=names[whole["gene"]], id=ids[whole["gene"]])
    return _summed(told, ["x", "y"], ["name", "id"], "count", step)


def _gef_cells(path: Path, file: h5py.File) -> Cells:
    """Counts of cells, cell after cell, and their centres."""
    genes = _gef_table(path, file, f"{_CELLS}/gene")[:]
    cells = _gef_table(path, file, f"{_CELLS}/cell")[:]
    counts = _gef_table(path, file, f"{_CELLS}/cellExp")[:]
    ends = _ends(path, cells["offset"], cells["geneCount"], len(counts))
    names, ids = _gef_genes(path, genes)
    indptr, columns = np.concatenate([[0], ends]), counts["geneID"].astype(np.int64)
    if columns.max() >= len(names):
        raise DataError(f"{path}: gene {columns.max()} of {len(names)} genes; copy it again")
    shape = (len(cells), len(names))
    matrix = csr_matrix((counts["count"].astype(np.int64), columns, indptr), shape)
    xy = np.column_stack([cells["x"], cells["y"]]).astype(np.float64)
    barcodes = np.array([str(number) for number in cells["id"].tolist()], dtype=object)
    return Cells(matrix, barcodes, ids, names, xy, pd.DataFrame(index=range(len(cells))))


def _ends(path: Path, offset: np.ndarray, count: np.ndarray, length: int) -> np.ndarray:
    """Where the rows of each gene or cell end, (n,); DataError where they leave gaps."""
    ends = np.cumsum(count.astype(np.int64))
    if ends[-1] != length or (offset.astype(np.int64) != ends - count).any():
        raise DataError(
            f"{path}: its offsets do not cover its counts, it is damaged; copy it again"
        )
    return ends


def _summed(lines: pd.DataFrame, keys: list[str], genes: list[str], count: str, step: int) -> Cells:
    """The bins or cells of the lines."""
    codes, spots = pd.factorize(pd.MultiIndex.from_frame(lines[keys]), sort=True)
    columns, known = pd.factorize(pd.MultiIndex.from_frame(lines[genes]), sort=True)
    shape = (len(spots), len(known))
    counts = csr_matrix((lines[count].to_numpy(np.int64), (codes, columns)), shape)
    if len(keys) == 1:
        weight = np.bincount(codes, lines["lines"])
        xy = np.column_stack([np.bincount(codes, lines[n]) / weight for n in ("x", "y")])
    else:
        xy = (spots.to_frame().to_numpy(np.float64) + 0.5) * step - 0.5
    barcodes = np.array(["_".join(map(str, map(int, spot))) for spot in spots], dtype=object)
    names, ids = (np.array(known.get_level_values(i).astype(str), dtype=object) for i in (0, -1))
    return Cells(counts, barcodes, ids, names, xy, pd.DataFrame(index=range(len(spots))))


def _head(path: Path) -> tuple[list[str], list[str]]:
    """Names of the columns, and the lines of comments that stand in front of them."""
    comments: list[str] = []
    with open_text(path) as text:
        for line in text:
            if not line.startswith("#"):
                return line.rstrip("\r\n").split("\t"), comments
            comments.append(line.strip())
    raise DataError(f"{path} has no table below its comments; download it again")


def _begin(comments: list[str], axis: str) -> int:
    """OffsetX or OffsetY of the comments; 0 where they say no whole number."""
    told = next((c.partition("=")[2] for c in comments if c.startswith(f"#Offset{axis}=")), "")
    return int(told) if told.strip().isdecimal() else 0


def _blocks(path: Path, skipped: int, used: list[str], count: str) -> Iterator[pd.DataFrame]:
    """The lines, a block at a time."""
    numbers = [name for name in used if name in ("x", "y", _CELL, count)]
    kinds = {name: np.int64 if name in numbers else str for name in used}
    try:
        with open_text(path) as text:
            yield from pd.read_csv(
                text,
                sep="\t",
                skiprows=skipped,
                usecols=used,
                dtype=kinds,
                keep_default_na=False,
                chunksize=_LINES,
            )
    except DataError:
        raise
    except (ValueError, OverflowError) as error:
        raise DataError(f"{path} is not a whole GEM table ({error}); download it again") from error


def _is_gem(path: Path) -> bool:
    return file_name(path).endswith((".gem", ".gem.txt"))


def _is_gef(path: Path) -> bool:
    return path.name.lower().endswith((".gef", ".bgef", ".cgef"))


def _discover(folder: Path) -> list[SlideRow]:
    """A row a chip: its tissue.gef, another GEF or GEM of bins, or the one of its cells."""
    files = [path for path in files_in(folder, "*.g*") if _is_gem(path) or _is_gef(path)]
    chips: dict[str, Path] = {}
    for path in sorted(files, key=lambda p: ("cell" in p.name, ".tissue." not in p.name)):
        chips.setdefault(path.name.partition(".")[0], path)
    return [
        drafted_row(name, path, "stereoseq", technology="Stereo-seq")
        for name, path in sorted(chips.items())
    ]


FORMAT = cell_format(
    "stereoseq",
    read_stereoseq,
    detect=lambda counts, spots: _is_gem(counts) or _is_gef(counts),
    discover=_discover,
    layout="Stereo-seq .gem and .gef files",
    forbids={**OWN_PLACES, **NO_LAYERS},
)
