"""From the parts of a table of cells to a `SpotTable`. Shapes: S cells, G genes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.pseudo_spots import pseudo_spots
from preprocessing.readers.coordinates import (
    Scale,
    check_coordinates,
    find_pair,
    number_pair,
    place,
    require_pair,
)
from preprocessing.readers.format import NO_BINS, NO_LAYERS, Format
from preprocessing.readers.joins import first_names, match_rows
from preprocessing.readers.labels import CODED, read_labels
from preprocessing.readers.tables import (
    MISSING,
    Header,
    read_header,
    read_typed,
    read_wide_table,
    truth_column,
)
from preprocessing.readers.tenx import TenxMatrix
from preprocessing.sections import section_mask, several_sections
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import RNA, SpotTable, checked_counts, unique_gene_names

IN_TISSUE = "in_tissue"
MEASURED = "activity:"  # number columns with this beginning are measurements of a cell
OWN_PLACES = {"spots": "brings its own coordinates"}
_ID_FROM = 20  # a text column whose values all differ is an id, in a table larger than this
_LISTED = 6
_FIRST = 8  # ids stand among the first columns of a counts table
_INDEX = ("", "Unnamed: 0", "column_1", "row_name", "index")  # of the numbers of the rows
_ID_NAMES = ("barcode", "cell_id", "cell_ID", "CellID", "cell", "Cell", "row_name", "")


def cell_format(
    name: str, read: Callable[[SlideRow, float | None], SpotTable], **known: Any
) -> Format:
    """A `Format` of cells that bring their own coordinates; ``known`` as for `Format`."""
    defaults: dict[str, Any] = {
        "forbids": {**OWN_PLACES, **NO_BINS, **NO_LAYERS},
        "complain": _complain,
        "cells": True,
    }
    return Format(name, read, **(defaults | known))


def _complain(columns: Mapping[str, object]) -> list[str]:
    if columns.get("image_scale") and not columns.get("image"):
        return ["image_scale is given without image; leave it empty or name the image"]
    return []


@dataclass(frozen=True)
class Cells:
    """What a reader found in its files.

    Attributes:
        counts: (S, G) counts or intensities, not yet checked.
        barcodes: (S,) names of the cells.
        gene_ids: (G,) ids, or the names again.
        gene_names: (G,) as in the file, repeats allowed.
        xy: (S, 2) float64, coordinates of the file.
        columns: (S, ...) what else the file says of a cell.
        notes: what the reader left out.
        libraries: names in uns['spatial'] of an AnnData file.
    """

    counts: csr_matrix
    barcodes: np.ndarray
    gene_ids: np.ndarray
    gene_names: np.ndarray
    xy: np.ndarray
    columns: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    libraries: tuple[str, ...] = ()

    @classmethod
    def of_matrix(
        cls,
        matrix: TenxMatrix,
        rows: np.ndarray,
        xy: np.ndarray,
        columns: pd.DataFrame,
        notes: list[str],
    ) -> "Cells":
        """The barcodes ``rows`` (S,) of a 10x matrix, at ``xy`` (S, 2)."""
        counts, barcodes = matrix.counts[rows], matrix.barcodes[rows]
        return cls(counts, barcodes, matrix.gene_ids, matrix.gene_names, xy, columns, notes)

    def of_section(self, section: str, where: str) -> "Cells":
        """The cells of the section that a manifest row names; all where it names none.

        Raises:
            DataError: there is no such column or value, or what is left holds several sections.
        """
        mask = section_mask(section, self.columns, self.barcodes, where)
        cells = self if mask.all() else self.take(np.flatnonzero(mask))
        libraries = () if section else self.libraries
        several = several_sections(cells.xy, cells.columns, cells.barcodes, libraries)
        if several:
            raise several.error(where)
        return cells

    def in_tissue(self, where: str) -> "Cells":
        """The cells whose column in_tissue is 1, without that column; all where there is none.

        Raises:
            DataError: the column holds something else than truth values.
        """
        if IN_TISSUE not in self.columns.columns:
            return self
        inside = truth_column(self.columns, IN_TISSUE, where)
        notes = list(self.notes)
        if not inside.all():
            notes.append(f"{int((~inside).sum())} spots outside the tissue (in_tissue 0) left out")
        told = replace(self, columns=self.columns.drop(columns=[IN_TISSUE]), notes=notes)
        return told if inside.all() else told.take(np.flatnonzero(inside))

    def take(self, rows: np.ndarray) -> "Cells":
        """Return the cells ``rows`` (numbers or a mask)."""
        return replace(
            self,
            counts=self.counts[rows],
            barcodes=self.barcodes[rows],
            xy=self.xy[rows],
            columns=self.columns.iloc[rows].reset_index(drop=True),
        )


def cell_table(
    row: SlideRow,
    cells: Cells,
    scale: Scale,
    image_mpp: float | None = None,
    keys: Sequence[str] = (),
) -> SpotTable:
    """Check the cells of one slide and put them together; with ``pitch_um`` as pseudo-spots.

    Genes that occur twice are summed (same name, and same id where there are ids); proteins, and
    genes that share the name only, are renamed. Both are noted.

    Args:
        row: the manifest row.
        cells: what was read.
        scale: what the file says of its coordinates.
        image_mpp: mpp that the image file states.
        keys: columns that make up a barcode, for the manifest's labels table.

    Raises:
        DataError: fewer than two cells, no genes, bad values, or bad coordinates.
    """
    where = str(row.counts)
    cells = cells.of_section(row.section, where).in_tissue(where)
    notes = list(cells.notes)
    spots, genes = cells.counts.shape
    if spots == 0 or genes == 0:
        raise DataError(
            f"empty matrix: {where} has {spots} cells x {genes} genes left; expected at least "
            f"two cells and one gene ({'; '.join(notes) or 'nothing was left out'})"
        )
    if spots == 1:
        raise DataError(
            f"{where} has 1 cell ({cells.barcodes[0]!s}); a slide needs at least 2, with their "
            "places: look whether cells of one slide were written as several files"
        )
    check_coordinates(cells.xy, cells.barcodes, where)
    counts = checked_counts(cells.counts, row.modality, cells.barcodes, cells.gene_names)
    counts, ids, names = _distinct(row.modality, counts, cells.gene_ids, cells.gene_names, notes)
    labels = label_columns(cells.columns, cells.barcodes, notes)
    if row.labels is not None:
        labels = _with_file(row, labels, cells.barcodes, keys, notes)
    places = place(row, cells.xy, scale, image_mpp)
    if places.image_transform is not None:
        notes.append(f"places taken to the image by {scale.to_image_from}")
    table = SpotTable(
        counts=counts,
        gene_ids=ids,
        gene_names=names,
        barcodes=cells.barcodes,
        xy_px0=places.xy_px0,
        xy_um=places.xy_um,
        mpp=places.mpp,
        scale=places.scale,
        labels=labels,
        notes=tuple(notes),
        modality=row.modality,
        image_transform=places.image_transform,
    )
    return table if row.pitch_um is None else pseudo_spots(table, row.pitch_um)


def _distinct(
    modality: str, counts: csr_matrix, ids: np.ndarray, names: np.ndarray, notes: list[str]
) -> tuple[csr_matrix, np.ndarray, np.ndarray]:
    """Sum genes that occur twice; rename those that share only their name."""
    if modality == RNA:
        code, first = pd.factorize(pd.MultiIndex.from_arrays([ids, names]))
        if len(first) < len(names):
            notes.append(
                f"{len(names) - len(first)} repeated genes were added to the first of their name"
            )
            ones = np.ones(len(code), dtype=np.int64)
            into = csr_matrix((ones, (np.arange(len(code)), code)), (len(code), len(first)))
            counts = checked_counts(counts.astype(np.int64) @ into, modality)
            kept = np.unique(code, return_index=True)[1]
            ids, names = ids[kept], names[kept]
    return counts, ids, unique_gene_names(names, notes)


def label_columns(columns: pd.DataFrame, barcodes: np.ndarray, notes: list[str]) -> pd.DataFrame:
    """Choose the labels among the columns of a table of cells.

    Texts and categories become labels (missing ""), except ids: columns equal to the barcodes, or
    with another value for every cell. Numbers become measurements where the name begins with
    "activity:", labels where whole numbers stand in a column named like a code (cluster, region,
    ...), and are left out otherwise. What is left out is noted.

    Args:
        columns: (S, ...) without the coordinates.
        barcodes: (S,) names of the cells.
        notes: gets a sentence for what was left out.

    Returns:
        (S, columns) of float64 or str.
    """
    kept: dict[str, object] = {}
    numbers, ids = [], []
    for name in map(str, columns.columns):
        values = columns[name]
        if pd.api.types.is_numeric_dtype(values.dtype):
            number = pd.to_numeric(values).to_numpy(dtype=np.float64, na_value=np.nan)
            if name.startswith(MEASURED):
                kept[name] = number
            elif CODED.search(name) and (np.mod(number, 1) == 0).all():
                kept[name] = np.array([str(int(v)) for v in number], dtype=object)
            else:
                numbers.append(name)
            continue
        text = _texts(values)
        if _is_id(text, barcodes):
            ids.append(name)
        else:
            kept[name] = text
    if numbers:
        notes.append(
            f"{len(numbers)} number columns left out ({_listed(numbers)}); to keep one, name it "
            f"'{MEASURED}...' or give it in a labels table"
        )
    if ids:
        notes.append(f"{len(ids)} columns of ids left out ({_listed(ids)})")
    return pd.DataFrame(kept, index=pd.RangeIndex(len(barcodes)))


def _texts(values: pd.Series) -> np.ndarray:
    text = values.astype(object).where(values.notna(), "").astype(str).str.strip()
    return np.asarray(text.mask(text.isin(MISSING), "").to_numpy(dtype=object))


def _is_id(text: np.ndarray, barcodes: np.ndarray) -> bool:
    if len(text) > _ID_FROM and pd.Index(text).is_unique:
        return True
    return bool((text == np.asarray(barcodes, dtype=object)).all())


def _listed(names: list[str]) -> str:
    more = ", ..." if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _with_file(
    row: SlideRow, labels: pd.DataFrame, barcodes: np.ndarray, keys: Sequence[str], notes: list[str]
) -> pd.DataFrame:
    """Add the manifest's labels table; its columns stand for those of the same name."""
    assert row.labels is not None
    table, found = read_labels(row.labels, barcodes, keys=keys)
    notes.extend(found)
    both = [name for name in labels.columns if name in table.columns]
    if both:
        notes.append(f"labels: {_listed(both)} taken from {row.labels.name}, not from the cells")
    return pd.concat([labels.drop(columns=both), table], axis=1)


def read_joined(
    counts: Path, spots: Path, keys: Sequence[str] | None = None
) -> tuple[Cells, bool, tuple[str, ...]]:
    """Read a table cells x genes and a table of cells with coordinates, and join them.

    The key are the columns among the first eight of the counts that the table of cells has too;
    else the first column of the counts and the table's column of barcodes (or its first). Counts
    that are genes x cells are turned round.

    Args:
        counts: ids, then one column a gene.
        spots: ids, coordinates, and what else is known of a cell.
        keys: the columns of the key, where the format names them.

    Returns:
        The cells that are in both, whether the coordinates are micrometres by name, and the key.

    Raises:
        DataError: no shared cell, a cell occurs twice, no coordinates, or bad numbers.
    """
    header, known = read_header(counts), read_header(spots)
    x, y, in_um = require_pair(known.names, str(spots))
    shared, n_ids = _shared(header, known, (x, y)) if keys is None else _named(header, known, keys)
    table = read_wide_table(header, n_ids)
    own = shared or (_id_column(known, (x, y)),)
    frame = read_typed(spots, own)
    cell_keys = _joined(frame, own)
    count_keys = _joined(table.ids, shared or (str(table.ids.columns[0]),))
    values, genes, notes = table.values, table.names, []
    if not shared and not set(count_keys) & set(cell_keys) and set(genes) & set(cell_keys):
        values, count_keys, genes = csr_matrix(values.T), genes, count_keys
        notes.append("counts were genes x cells; turned round")
    for path, names in ((counts, count_keys), (spots, cell_keys)):
        _check_once(path, names)
    rows, places = match_rows(
        count_keys,
        cell_keys,
        f"no cell of {counts} is in {spots} (counts: {first_names(count_keys)}; cells: "
        f"{first_names(cell_keys)}); both need the same id columns",
        notes,
        f"cells of {counts.name} without a place left out",
        f"cells of {spots.name} without counts left out",
    )
    xy = number_pair(frame, x, y)[places]
    columns = frame.drop(columns=[x, y, *own]).iloc[places].reset_index(drop=True)
    cells = Cells(values[rows], count_keys[rows], genes, genes, xy, columns, notes)
    return cells, in_um, shared


def _shared(header: Header, known: Header, pair: tuple[str, str]) -> tuple[tuple[str, ...], int]:
    """The shared id columns, and how many columns of the counts stand before the genes."""
    own = set(known.names) - {*_INDEX, *pair}
    candidates = [n for n in header.names[:_FIRST] if n in own]
    if not candidates:
        return (), 1
    end = header.names.index(candidates[-1]) + 1
    inside = find_pair(header.names[:_FIRST])
    if inside is not None:
        end = max(end, *(header.names.index(name) + 1 for name in inside[:2]))
    return tuple(candidates), end


def without_index(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """A table of ids (R, k) without the row numbers that pandas and R write in front of them."""
    if frame.shape[1] < 2 or str(frame.columns[0]) not in _INDEX:
        return frame
    numbers = pd.to_numeric(frame.iloc[:, 0], errors="coerce").to_numpy()
    counted = any((numbers == np.arange(first, first + len(frame))).all() for first in (0, 1))
    if not counted or not frame.iloc[:, 1].is_unique:
        return frame
    notes.append(f"first column left out: row numbers, the ids are {frame.columns[1]!r}")
    return frame.iloc[:, 1:]


def _named(header: Header, known: Header, keys: Sequence[str]) -> tuple[tuple[str, ...], int]:
    for found in (header, known):
        missing = [key for key in keys if key not in found.names]
        if missing:
            raise DataError(
                f"{found.path}: column {', '.join(missing)} is missing; found "
                f"{', '.join(found.names[:8])}; expected {', '.join(keys)}"
            )
    end = max(header.names.index(key) for key in keys) + 1
    extra = [i + 1 for i, name in enumerate(header.names[:_FIRST]) if name in known.names]
    return tuple(keys), max([end, *extra])


def _id_column(known: Header, pair: tuple[str, str]) -> str:
    names = [name for name in known.names if name not in pair]
    return next((n for n in _ID_NAMES if n in names), names[0] if names else known.names[0])


def _joined(frame: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    texts = frame[list(columns)].fillna("").astype(str)
    joined = texts.iloc[:, 0].str.strip()
    for name in columns[1:]:
        joined = joined + "_" + texts[name].str.strip()
    return np.asarray(joined.to_numpy(dtype=object))


def _check_once(path: Path, names: np.ndarray) -> None:
    index = pd.Index(names)
    if not index.is_unique:
        twice = index[index.duplicated()]
        raise DataError(
            f"{path}: {len(twice)} ids occur twice (first: {twice[0]!r}); keep one row a cell, "
            "with all the columns that tell cells apart (such as fov and cell_ID)"
        )
