"""Cells summed into square pseudo-spots of a chosen pitch (docs/method.md 0: X and P).

Shapes: S cells, B pseudo-spots, G genes.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.spot_table import PROTEIN, SpotTable, checked_counts

CELLS = "cells"  # label column: how many cells a pseudo-spot holds
SHARE = " share"  # ending of the column with the share of the commonest label


def pseudo_spots(table: SpotTable, pitch_um: float) -> SpotTable:
    """Sum the cells of each square of a grid; squares without cells are not made.

    The edges of the squares lie at multiples of the pitch, whatever the cells are. Counts are
    summed, intensities of proteins averaged. Of a column of texts the commonest stays (of equally
    common ones the first by name), with its share among the cells that have one; of a column of
    numbers the mean of those that are there.

    Returns:
        B pseudo-spots at the centres of their squares, row by row, with the column "cells".

    Raises:
        DataError: all cells lie in one square, or a sum does not fit into 32 bits.
    """
    place = np.floor(table.xy_um / pitch_um).astype(np.int64)  # (S, 2) column and row
    squares, code = np.unique(place[:, ::-1], axis=0, return_inverse=True)
    code, count = code.ravel(), len(squares)
    if count < 2:
        raise DataError(
            f"all {table.n_spots} cells lie in one square of {pitch_um:g} um; give a smaller "
            "pitch_um, or leave it empty to keep the cells"
        )
    ones = np.ones(len(code), dtype=np.int64)
    into = csr_matrix((ones, (code, np.arange(len(code)))), (count, len(code)))
    cells = np.bincount(code, minlength=count)
    if table.modality == PROTEIN:
        mean = into.astype(np.float64).multiply(1.0 / cells[:, None]).tocsr()
        counts = mean @ table.counts.astype(np.float64)
    else:
        counts = into @ table.counts.astype(np.int64)
    names = np.array([f"x{x}_y{y}" for y, x in squares.tolist()], dtype=object)
    xy_um = (squares[:, ::-1] + 0.5) * pitch_um
    note = (
        f"{table.n_spots} cells put together into {count} squares of {pitch_um:g} um (median "
        f"{np.median(cells):g} cells)"
    )
    return replace(
        table,
        counts=checked_counts(counts, table.modality, names, table.gene_names),
        barcodes=names,
        xy_px0=xy_um / table.mpp,
        xy_um=xy_um,
        diameter_um=pitch_um,
        pitch_um=pitch_um,
        labels=_labels(table.labels, code, cells),
        notes=(*table.notes, note),
    )


def beyond_picture(table: SpotTable, pitch_um: float, size_px0: tuple[int, int]) -> np.ndarray:
    """Pseudo-spots whose centre lies outside the picture although their cells lie in it.

    A square at the right or lower edge may reach up to its whole pitch beyond it, its centre up to
    half a pitch. Most of such a patch would be white padding. Centres farther out are none of
    these: then the coordinates belong to another picture. `size_px0` is (width, height) of it.
    """
    over = np.maximum(table.xy_px0 - np.asarray(size_px0), -table.xy_px0).max(axis=1)
    return np.asarray((over > 0) & (over * table.mpp <= pitch_um / 2 * (1 + 1e-9)))


def _labels(labels: pd.DataFrame, code: np.ndarray, cells: np.ndarray) -> pd.DataFrame:
    """Labels of the pseudo-spots, (B, columns): texts and their shares, means, and "cells"."""
    columns: dict[str, np.ndarray] = {}
    for name in map(str, labels.columns):
        values = labels[name].to_numpy()
        if values.dtype.kind in "fiub":
            columns[name] = _mean(values.astype(np.float64), code, len(cells))
        else:
            columns[name], columns[f"{name}{SHARE}"] = _commonest(values, code, len(cells))
    columns[CELLS] = cells.astype(np.float64)
    return pd.DataFrame(columns, index=pd.RangeIndex(len(cells)))


def _mean(values: np.ndarray, code: np.ndarray, count: int) -> np.ndarray:
    known = np.isfinite(values)
    total = np.bincount(code[known], values[known], minlength=count)
    number = np.bincount(code[known], minlength=count)
    return np.asarray(np.divide(total, number, out=np.full(count, np.nan), where=number > 0))


def _commonest(values: np.ndarray, code: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The commonest text of each square and its share among the cells that have one, (B,) each."""
    texts = np.array([str(value) for value in values.tolist()], dtype=object)
    known = texts != ""
    label, share = np.full(count, "", dtype=object), np.full(count, np.nan)
    if not known.any():
        return label, share
    names, kind = np.unique(texts[known].astype(str), return_inverse=True)
    pairs, times = np.unique(code[known] * len(names) + kind, return_counts=True)
    square, kind = np.divmod(pairs, len(names))
    order = np.lexsort((kind, -times, square))
    square, kind, times = square[order], kind[order], times[order]
    first = np.flatnonzero(np.diff(square, prepend=-1))
    total = np.bincount(square, times, minlength=count)
    label[square[first]] = names[kind[first]].astype(object)
    share[square[first]] = times[first] / total[square[first]]
    return label, share
