"""Stereo-seq GEM files: one line a gene and DNB, summed into square bins or, of cells, by cell.

Shapes: L lines, S bins or cells, G genes.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.files import files_in
from preprocessing.readers.cells import OWN_PLACES, Cells, cell_format, cell_table
from preprocessing.readers.coordinates import Scale
from preprocessing.readers.format import NO_LAYERS, file_name
from preprocessing.readers.tables import open_text
from preprocessing.scale import stated
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable

DNB_UM = 0.5  # between neighbouring DNBs of a chip, which x and y count
BIN_UM = 50.0  # bin100
_COUNTS = ("MIDCount", "MIDCounts", "UMICount", "MIDcount")
_NAMES = ("geneName", "geneID", "gene")
_CELL = "CellID"
_LINES = 2_000_000  # in memory at once


def read_gem(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one GEM file, plain or gzipped.

    With a column CellID (cell bins) the lines are summed by cell, 0 is no cell; else, or with
    bin_um, into squares whose edges lie at multiples of bin_um (50 um where it is empty). x and y
    count DNBs, 0.5 um apart; OffsetX and OffsetY of the comments are not applied, so that a picture
    of the whole chip may need an image_transform.
    """
    path = row.counts_path
    header, skipped = _head(path)
    count = next((name for name in _COUNTS if name in header), None)
    genes = [name for name in _NAMES if name in header]
    if count is None or not genes or not {"x", "y"} <= set(header):
        raise DataError(
            f"{path}: columns {', '.join(header[:8])}; expected those of a GEM file: geneID, x, y, "
            f"{_COUNTS[0]}"
        )
    by_cell = _CELL in header and row.bin_um is None
    step = (row.bin_um or BIN_UM) / DNB_UM
    if step != int(step):
        raise DataError(f"bin_um {row.bin_um:g} is no multiple of {DNB_UM} um, the step of a chip")
    keys = [_CELL] if by_cell else ["x", "y"]
    used = list(dict.fromkeys([*genes[:2], "x", "y", count, *keys]))
    parts = []
    for block in _blocks(path, skipped, used, count):
        if by_cell:
            block = block[block[_CELL] != 0]
        else:
            block[["x", "y"]] = block[["x", "y"]] // int(step)
        block["lines"] = 1
        parts.append(block.groupby([*keys, *genes[:2]], sort=False, as_index=False).sum())
    table = cell_table(row, *_summed(pd.concat(parts), keys, genes[:2], count, step), image_mpp)
    if by_cell or row.pitch_um is not None:
        return table
    return replace(table, pitch_um=step * DNB_UM, notes=(*table.notes, f"bins of {step / 2:g} um"))


def _summed(
    lines: pd.DataFrame, keys: list[str], genes: list[str], count: str, step: float
) -> tuple[Cells, Scale]:
    """The bins or cells of the lines, and what is known of their scale."""
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
    cells = Cells(counts, barcodes, ids, names, xy, pd.DataFrame(index=range(len(spots))))
    return cells, Scale(said=stated(DNB_UM, "the step of a Stereo-seq chip"))


def _head(path: Path) -> tuple[list[str], int]:
    """Names of the columns, and how many lines of comments stand in front of them."""
    with open_text(path) as text:
        for skipped, line in enumerate(text):
            if not line.startswith("#"):
                return line.rstrip("\r\n").split("\t"), skipped
    raise DataError(f"{path} has no table below its comments; download it again")


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


def _discover(folder: Path) -> list[SlideRow]:
    files = [path for path in files_in(folder, "*.gem*") if _is_gem(path)]
    name = [path.name.partition(".")[0] for path in files]
    kind = {"technology": "Stereo-seq"}
    return [drafted_row(n, p, "stereoseq", **kind) for n, p in zip(name, files, strict=True)]


FORMAT = cell_format(
    "stereoseq",
    read_gem,
    detect=lambda counts, spots: _is_gem(counts),
    discover=_discover,
    layout="Stereo-seq .gem files",
    forbids={**OWN_PLACES, **NO_LAYERS},
)
