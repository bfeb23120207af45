"""Positions of Visium HD bins, read in batches, and the bins that barcodes name.

Shapes: S bins in tissue, N barcodes.
"""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import DataError
from preprocessing.readers.text_table import number_column, require_columns
from preprocessing.readers.visium import COLUMNS, read_positions

_BATCH = 1 << 18
_BARCODE = re.compile(rb"s_(\d{3})um_(\d{5})_(\d{5})-(\d+)")
_DIGITS = (slice(8, 13), slice(14, 19))


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
        inside = number_column(frame, "in_tissue", path) == 1
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
        inside = number_column(frame, "in_tissue", path) == 1
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
    places = None if bins.names is not None else bin_places(barcodes)
    if places is None:
        names = bins.names
        if names is None:
            return np.full(len(barcodes), -1, dtype=np.int64)
        index = pd.Index(names)
        if not index.is_unique:
            twice = index[index.duplicated()][0]
            raise DataError(f"barcode {twice!r} occurs twice in the positions; keep one row a bin")
        return np.asarray(index.get_indexer(pd.Index(barcodes)), dtype=np.int64)
    width = int(max(bins.array[:, 1].max(), places[:, 1].max(initial=0))) + 1
    keys = bins.array[:, 0].astype(np.int64) * width + bins.array[:, 1]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    if (keys[1:] == keys[:-1]).any():
        row, column = divmod(int(keys[:-1][keys[1:] == keys[:-1]][0]), width)
        raise DataError(f"row {row}, column {column} occurs twice in the positions; keep one")
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
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(
            f"{path} is a parquet file, which needs pyarrow: pip install pyarrow (or hibio with "
            "its extra 'parquet')"
        )
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            require_columns(pd.DataFrame(columns=file.schema_arrow.names), tuple(COLUMNS), path)
            for batch in file.iter_batches(batch_size=_BATCH, columns=COLUMNS):
                frame = batch.to_pandas()
                require_columns(frame, tuple(COLUMNS), path)
                yield frame
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a complete parquet file ({error})") from error
