"""First-generation Spatial Transcriptomics: a counts table with rows "XxY" and a spot table."""

import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.manifest import SlideRow
from preprocessing.readers.coordinates import step_px
from preprocessing.readers.labels import position_names, read_labels
from preprocessing.readers.tables import number_column, open_text, read_table, require_columns
from preprocessing.spot_table import SpotTable, integer_counts, unique_names

_POSITION = re.compile(r"\d+x\d+")

_SPOT_COLUMNS = ("x", "y", "pixel_x", "pixel_y")


def source_files(row: SlideRow) -> dict[str, Path]:
    """Return the files that `read_legacy_st` reads (image and labels excluded), by role."""
    return {"counts": row.counts_path} | ({} if row.spots is None else {"spots": row.spots})


def read_legacy_st(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one legacy ST slide.

    mpp of the image: manifest mpp, else pitch_um / (median pixel step per array unit), else the
    image file's own. Only spots with ``selected`` = 1 (where the column exists) and counts stay.

    Args:
        row: the manifest row; ``spots`` is required.
        image_mpp: mpp that the image file states, um per level-0 px.

    Raises:
        DataError: a file is unusable or the scale is unknown.
    """
    if row.spots is None:
        raise DataError("format legacy_st needs the column 'spots' (table x y pixel_x pixel_y)")
    counts, names, genes, notes = read_count_table(row.counts_path)
    array, pixel, selected = _read_spots(row.spots)
    scale = 1.0 if row.image_scale is None else row.image_scale
    mpp = _mpp(row, array, pixel * scale, image_mpp)
    keys = position_names(array)
    if not selected.all():
        notes.append(f"{int((~selected).sum())} spots not selected in {row.spots.name} left out")
    place = pd.Index(names).get_indexer(keys)
    if (selected & (place < 0)).any():
        missing = int((selected & (place < 0)).sum())
        notes.append(f"{missing} spots of {row.spots.name} without counts left out")
    extra = int((~pd.Index(names).isin(keys)).sum())
    if extra:
        notes.append(f"{extra} rows of {row.counts_path.name} without a spot left out")
    kept = np.flatnonzero(selected & (place >= 0))
    if len(kept) == 0:
        raise DataError(
            f"no row of {row.counts} belongs to a selected spot of {row.spots} (rows are "
            f"{', '.join(map(str, names[:2]))}; spots are {', '.join(map(str, keys[:2]))})"
        )
    labels = pd.DataFrame(index=pd.RangeIndex(len(kept)))
    if row.labels is not None:
        labels, found = read_labels(row.labels, keys[kept], array[kept])
        notes.extend(found)
    return SpotTable(
        counts=counts[place[kept]],
        gene_ids=genes,
        gene_names=genes.copy(),
        barcodes=keys[kept],
        xy_px0=pixel[kept] * scale,
        xy_um=pixel[kept] * scale * mpp,
        mpp=mpp,
        labels=labels,
        notes=tuple(notes),
    )


def read_count_table(path: Path) -> tuple[csr_matrix, np.ndarray, np.ndarray, list[str]]:
    """Read a tab-separated counts table, spots "XxY" x genes (or turned round).

    Args:
        path: text, gzipped or not; the header's first cell may be empty or absent.

    Returns:
        (S, G) int32 CSR, (S,) row names, (G,) unique gene names, notes.

    Raises:
        DataError: names the file and the line that is not as expected.
    """
    with open_text(path) as text:
        header = text.readline().rstrip("\r\n").split("\t")
        names: list[str] = []
        blocks: list[tuple[np.ndarray, np.ndarray]] = []
        columns = 0
        for number, line in enumerate(text, start=2):
            if not line.strip():
                continue
            name, _, rest = line.rstrip("\r\n").partition("\t")
            if not names:
                columns = _gene_count(path, header, rest)
            names.append(name.strip().strip('"'))
            blocks.append(_sparse_line(path, number, rest, columns))
    if not names:
        raise DataError(f"empty matrix: {path} has no rows below the header")
    sizes = np.array([len(index) for index, _ in blocks])
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    data = np.concatenate([values for _, values in blocks])
    indices = np.concatenate([index for index, _ in blocks])
    counts = integer_counts(csr_matrix((data, indices, indptr), (len(names), columns)))
    return _oriented(path, counts, names, [g.strip().strip('"') for g in header[-columns:]])


def _gene_count(path: Path, header: list[str], rest: str) -> int:
    columns = rest.count("\t") + 1 if rest else 0
    if columns == 0 or len(header) not in (columns, columns + 1):
        raise DataError(
            f"{path}: the header has {len(header)} cells and the first row {columns} values; "
            "expected a tab-separated table, rows 'XxY' and one column a gene"
        )
    return columns


def _sparse_line(path: Path, number: int, rest: str, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the non-zero columns and values of one line; integers fast, other numbers slowly."""
    cells = rest.count("\t") + 1
    if cells != columns:
        raise DataError(
            f"{path}, line {number}: {cells} values, expected {columns}; the file is truncated "
            "or not tab-separated"
        )
    values = _parse_integers(rest)
    if values is None or len(values) != columns:
        try:
            values = np.array(rest.split("\t"), dtype=np.float64)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: {error}; expected raw counts separated by tabs"
            ) from error
    index = np.flatnonzero(values)
    return index, values[index]


def _parse_integers(text: str) -> np.ndarray | None:
    if " " in text:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return np.fromstring(text, dtype=np.int64, sep="\t")
        except ValueError:
            return None


def _oriented(
    path: Path, counts: csr_matrix, names: list[str], columns: list[str]
) -> tuple[csr_matrix, np.ndarray, np.ndarray, list[str]]:
    """Turn a genes x spots table round; check the spot names and make gene names unique."""
    notes = []
    if not all(map(_POSITION.fullmatch, names)):
        if not all(map(_POSITION.fullmatch, columns)):
            bad = next(n for n in names if not _POSITION.fullmatch(n))
            raise DataError(
                f"{path}: row {bad!r} is not an array position; expected names like "
                "'10x13' (x and y of the spot table)"
            )
        names, columns = columns, names
        counts = counts.T.tocsr()
        notes.append("counts were genes x spots; turned round")
    if len(set(names)) != len(names):
        twice = next(n for i, n in enumerate(names) if n in names[:i])
        raise DataError(f"{path}: spot {twice!r} occurs twice; keep one row a spot")
    genes, renamed = unique_names(columns)
    if renamed:
        notes.append(f"{renamed} repeated gene names got an ending '-1', '-2', ...")
    return counts, np.array(names, dtype=object), genes, notes


def _read_spots(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return array positions (S, 2) int64, pixels (S, 2) float64 and selected (S,) bool."""
    frame = read_table(path)
    require_columns(frame, _SPOT_COLUMNS, path)
    if frame.empty:
        raise DataError(f"{path} lists no spots below the header")
    x, y, pixel_x, pixel_y = (number_column(frame, c, path) for c in _SPOT_COLUMNS)
    array = np.column_stack([x, y])
    if (np.rint(array) != array).any() or np.abs(array).max() > 1e6:
        raise DataError(f"{path}: x and y must be whole array positions (measured: new_x, new_y)")
    selected = np.ones(len(frame), dtype=bool)
    if "selected" in frame.columns:
        selected = number_column(frame, "selected", path) == 1
    array = array.astype(np.int64)
    if len(np.unique(array, axis=0)) != len(array):
        raise DataError(f"{path}: an array position occurs twice; keep one row a spot")
    return array, np.column_stack([pixel_x, pixel_y]), selected


def _mpp(row: SlideRow, array: np.ndarray, pixel: np.ndarray, image_mpp: float | None) -> float:
    """Return um per pixel of the image; ``pixel`` are image pixels (S, 2)."""
    if row.mpp is not None:
        return row.mpp
    if row.pitch_um is not None:
        step = step_px(array, pixel)
        if step is None or step <= 0:
            raise DataError(
                f"{row.spots}: too few neighbouring spots to turn pitch_um into mpp; give the "
                "column mpp (um per image pixel)"
            )
        return row.pitch_um / step
    if image_mpp is not None:
        return image_mpp
    raise DataError(
        "mpp is unknown; give one of these manifest columns: pitch_um (um per array unit: 200 "
        "for 1,000-spot ST arrays, 100 for checkerboard arrays) or mpp (um per image pixel)"
    )
