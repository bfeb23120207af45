"""Cosine logits: temperature-scaled similarity, and log-sum-exps of a matrix that is never held.

The matrix is walked through in tiles. The forward pass keeps only the log-sum-exp of every row and
column; the backward pass computes every tile again. Memory is that of a few tiles and of the
embeddings, whatever N is. A matrix of one tile is kept instead of computed again.

Legend: N rows, M columns, D embedding width, K kinds of candidates, n x m a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK_ROWS = 2048  # rows and columns of a tile; up to this many, nothing is computed twice


def full_precision(value: Tensor) -> Tensor:
    """The tensor in float32 (float64 stays): logits in half precision lose the loss."""
    return value if value.dtype == torch.float64 else value.float()


def unit_rows(value_ND: Tensor) -> Tensor:
    """Rows (N, D) of length 1 in full precision; a row of zeros stays 0."""
    with torch.autocast(value_ND.device.type, enabled=False):
        return functional.normalize(full_precision(value_ND), dim=1)


def check_embeddings(left_ND: Tensor, right_MD: Tensor) -> None:
    """Refuse what is not (N, D) and (M, D) with one D.

    Raises:
        ValueError: shapes that do not fit.
    """
    if left_ND.ndim != 2 or right_MD.ndim != 2 or left_ND.shape[1] != right_MD.shape[1]:
        raise ValueError(
            f"embeddings are {tuple(left_ND.shape)} and {tuple(right_MD.shape)}, expected (N, D) "
            "and (M, D) with one D; project both towers to the same width"
        )


def checked_temperature(temperature: Tensor | float) -> Tensor | float:
    """The temperature as a number or a full-precision scalar tensor.

    Raises:
        ValueError: not positive, or not one number.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            shape = tuple(temperature.shape)
            raise ValueError(f"temperature has shape {shape}, expected one number")
        return full_precision(temperature.reshape(()))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0; try 0.07")
    return temperature


def cosine_logits(left_ND: Tensor, right_MD: Tensor, temperature: Tensor | float) -> Tensor:
    """Cosine of every row with every row, over the temperature; never in half precision.

    Args:
        left_ND: (N, D) embeddings, any scale (a zero row has cosine 0 with everything).
        right_MD: (M, D) embeddings.
        temperature: positive number or one-element tensor, typically 0.05 to 0.2.

    Returns:
        (N, M) float32 logits (float64 for float64 input).

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive or not one number.
    """
    check_embeddings(left_ND, right_MD)
    temperature = checked_temperature(temperature)
    with torch.autocast(left_ND.device.type, enabled=False):
        return unit_rows(left_ND) @ unit_rows(right_MD).T / temperature


def mean_of_rows(value_S: Tensor, used_S: Tensor) -> Tensor:
    """Mean over the used rows; 0 (with a graph) when there are none. No device synchronisation.

    Args:
        value_S: (S,) one value a row; left-out rows must be finite.
        used_S: (S,) bool.
    """
    total = torch.where(used_S, value_S, torch.zeros_like(value_S)).sum()
    return total / used_S.sum().clamp(min=1)


@dataclass(frozen=True)
class TilePairs:
    """Which pairs of one tile take part in what.

    Attributes:
        candidates: K masks (n, m) bool of the pairs inside each log-sum-exp; None is all of them.
        positive: (n, m) bool, pairs whose logits are summed; None: what the target says.
    """

    candidates: tuple[Tensor | None, ...]
    positive: Tensor | None = None


class Pairs(Protocol):
    """Says of any tile which pairs take part; asked anew in the backward pass."""

    @property
    def target_N(self) -> Tensor | None:
        """(N,) column whose logit is each row's own, -1 for none; None: `TilePairs.positive`."""
        ...

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        """The pairs of these rows and columns."""
        ...


class LogitSums(NamedTuple):
    """What a contrastive loss needs to know of the logits.

    Attributes:
        row_KN: log-sum-exp over the candidates of each row.
        column_KM: log-sum-exp over the candidates of each column; (K, 0) when not asked for.
        own_N: sum of the logits of each row's positive pairs.
        own_M: of each column's; (0,) when not asked for.
    """

    row_KN: Tensor
    column_KM: Tensor
    own_N: Tensor
    own_M: Tensor


def logit_sums(
    left_ND: Tensor,
    right_MD: Tensor,
    temperature: Tensor | float,
    pairs: Pairs,
    chunk_rows: int = CHUNK_ROWS,
    *,
    by_column: bool = True,
) -> LogitSums:
    """Row and column sums of cosine(left, right) / temperature.

    Args:
        left_ND: (N, D) embeddings, N at least 1; normalised here.
        right_MD: (M, D) embeddings, M at least 1.
        temperature: positive number or one-element tensor.
        pairs: which pairs count; every row and column needs a candidate of each kind.
        chunk_rows: rows and columns of a tile.
        by_column: whether the columns' sums are needed as well as the rows'.

    Returns:
        The sums, float32 (float64 for float64 input), with the exact gradient of both embeddings
        and of the temperature.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive or not one number,
            or a tile without rows.
    """
    check_embeddings(left_ND, right_MD)
    left, right = unit_rows(left_ND), unit_rows(right_MD)
    scale = torch.as_tensor(
        1.0 / checked_temperature(temperature), dtype=left.dtype, device=left.device
    )
    return LogitSums(*_LogitSums.apply(left, right, scale, pairs, (chunk_rows, by_column)))


def tiles(n_rows: int, n_columns: int, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of every tile of a matrix.

    Args:
        n_rows: N.
        n_columns: M.
        chunk: rows and columns of a tile; those at the edge may be smaller.

    Raises:
        ValueError: a tile without rows.
    """
    if chunk < 1:
        raise ValueError(f"chunk_rows is {chunk}, expected at least 1; try {CHUNK_ROWS}")
    for row in range(0, n_rows, chunk):
        for column in range(0, n_columns, chunk):
            yield (
                slice(row, min(row + chunk, n_rows)),
                slice(column, min(column + chunk, n_columns)),
            )


def _place_in_tile(target_n: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Column of each row's target within the tile, and whether it lies there."""
    place_n = target_n - columns.start
    inside_n = (place_n >= 0) & (place_n < columns.stop - columns.start)
    return torch.where(inside_n, place_n, 0)[:, None], inside_n


class _LogitSums(torch.autograd.Function):
    """(left, right, scale) -> the four sums of logits = scale x left right'."""

    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        pairs: Pairs,
        how: tuple[int, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n_rows, n_columns = len(left), len(right)
        chunk, by_column = how
        one_tile = n_rows <= chunk and n_columns <= chunk
        row_KN = column_KM = None
        n_sums = n_columns if by_column else 0
        own_N, own_M = left.new_zeros(n_rows), left.new_zeros(n_sums)
        kept: Tensor | None = None
        for rows, columns in tiles(n_rows, n_columns, chunk):
            logit = _logits(left[rows], right[columns], scale)
            tile = pairs.tile(rows, columns)
            if row_KN is None or column_KM is None:
                n_kinds = len(tile.candidates)
                row_KN = left.new_full((n_kinds, n_rows), -torch.inf)
                column_KM = left.new_full((n_kinds, n_sums), -torch.inf)
            for k, mask in enumerate(tile.candidates):
                part = logit if mask is None else torch.where(mask, logit, -torch.inf)
                row = row_KN[k, rows]
                torch.logaddexp(row, part.logsumexp(dim=1), out=row)
                if by_column:
                    column = column_KM[k, columns]
                    torch.logaddexp(column, part.logsumexp(dim=0), out=column)
            _add_own(logit, tile, pairs.target_N, (rows, columns), own_N, own_M)
            if one_tile:
                kept, ctx.tile = logit, tile
        assert row_KN is not None
        assert column_KM is not None
        ctx.pairs, ctx.chunk = pairs, chunk
        ctx.save_for_backward(left, right, scale, row_KN, column_KM, kept)
        return row_KN, column_KM, own_N, own_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        left, right, scale, row_KN, column_KM, kept = ctx.saved_tensors
        to_left, to_right = torch.zeros_like(left), torch.zeros_like(right)
        to_scale = torch.zeros_like(scale)
        for rows, columns in tiles(len(left), len(right), ctx.chunk):
            if kept is None:
                logit = _logits(left[rows], right[columns], scale)
                tile = ctx.pairs.tile(rows, columns)
            else:
                logit, tile = kept, ctx.tile
            place = (rows, columns)
            slope = _slope(logit, tile, ctx.pairs.target_N, place, (row_KN, column_KM), gradients)
            to_scale += (slope * logit).sum()
            with torch.autocast(left.device.type, enabled=False):
                to_left[rows].addmm_(slope, right[columns])
                to_right[columns].addmm_(slope.T, left[rows])
        return to_left * scale, to_right * scale, to_scale / scale, None, None


def _logits(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    with torch.autocast(left.device.type, enabled=False):
        return (left * scale) @ right.T


def _add_own(
    logit: Tensor,
    tile: TilePairs,
    target_N: Tensor | None,
    place: tuple[slice, slice],
    own_N: Tensor,
    own_M: Tensor,
) -> None:
    """Add the logits of the positive pairs of one tile to the sums of its rows and columns."""
    rows, columns = place
    if target_N is None:
        assert tile.positive is not None
        value = torch.where(tile.positive, logit, 0)
        own_N[rows] += value.sum(dim=1)
        if len(own_M):
            own_M[columns] += value.sum(dim=0)
        return
    place_n1, inside_n = _place_in_tile(target_N[rows], columns)
    value_n = torch.where(inside_n, logit.gather(1, place_n1)[:, 0], 0)
    own_N[rows] += value_n
    if len(own_M):
        own_M[columns].index_add_(0, place_n1[:, 0], value_n)


def _slope(
    logit: Tensor,
    tile: TilePairs,
    target_N: Tensor | None,
    place: tuple[slice, slice],
    sums: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, ...],
) -> Tensor:
    """Derivative of the loss by every logit of one tile, (n, m)."""
    rows, columns = place
    row_KN, column_KM = sums
    to_row_KN, to_column_KM, to_own_N, to_own_M = gradients
    slope = torch.zeros((), dtype=logit.dtype, device=logit.device)
    for k, mask in enumerate(tile.candidates):
        part = (logit - row_KN[k, rows, None]).exp_().mul_(to_row_KN[k, rows, None])
        if column_KM.shape[1]:
            other = (logit - column_KM[k, None, columns]).exp_()
            part.addcmul_(other, to_column_KM[k, None, columns])
        part = part if mask is None else torch.where(mask, part, 0)
        slope = part if k == 0 else slope.add_(part)
    if target_N is None:
        assert tile.positive is not None
        own = to_own_N[rows, None]
        own = own + to_own_M[None, columns] if len(to_own_M) else own
        slope += torch.where(tile.positive, own, 0)
        return slope
    place_n1, inside_n = _place_in_tile(target_N[rows], columns)
    own_n = to_own_N[rows]
    own_n = own_n + to_own_M[columns][place_n1[:, 0]] if len(to_own_M) else own_n
    return slope.scatter_add_(1, place_n1, torch.where(inside_n, own_n, 0)[:, None])
