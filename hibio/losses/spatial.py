"""Spatially-aware contrast of two views of the omics branch (docs/method.md 3.1).

Legend: S spots, D embedding width, V spot-vector length, n x m a tile of S x S.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hibio.losses.contrastive import ALL, NearDuplicates
from hibio.losses.logits import CHUNK_ROWS, TilePairs, logit_sums, mean_of_rows, tiles


def spatial_contrast(
    view_a_SD: Tensor,
    view_b_SD: Tensor,
    xy_um_S2: Tensor,
    slide_of_spot_S: Tensor,
    profile_SV: Tensor,
    temperature: Tensor | float,
    *,
    radius_um: float = 150.0,
    correlation: float = 0.5,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Multi-positive InfoNCE between two views of the same spots, with space in micrometres.

    For spot i of one view the candidates are the spots j of the other. Positive: i itself, and the
    spots that `SpatialPairs` calls positive. Negative: spots far away or on another slide. What
    is near without being alike is neither. The loss of a row is the mean over its positives of
    -log softmax over all its positives and negatives (so with p positives its least value is
    ln p), and a row without a negative is left out. No S x S matrix is ever held: see
    `hibio.losses.logits`.

    Args:
        view_a_SD: (S, D) embeddings of one view; normalised here.
        view_b_SD: (S, D) embeddings of the other, row by row the same spots.
        xy_um_S2: (S, 2) centres in micrometres.
        slide_of_spot_S: (S,) slide of each spot.
        profile_SV: (S, V) profiles of the unaltered spots.
        temperature: positive number or one-element tensor, typically 0.1.
        radius_um: near is closer than this.
        correlation: alike is a Pearson correlation of profiles above this.
        chunk_rows: rows and columns of a tile; memory grows with its square.

    Returns:
        Scalar, mean of both directions; 0 (with a graph) when no row has a negative.

    Raises:
        ValueError: shapes that do not fit, or a setting outside its range.
    """
    if view_a_SD.shape != view_b_SD.shape:
        raise ValueError(
            f"view a is {tuple(view_a_SD.shape)}, view b {tuple(view_b_SD.shape)}; expected two "
            "views of the same spots, row by row"
        )
    if len(view_a_SD) != len(profile_SV):
        raise ValueError(
            f"{len(view_a_SD)} embeddings and {len(profile_SV)} profiles; expected one a spot"
        )
    pairs = SpatialPairs(xy_um_S2, slide_of_spot_S, profile_SV, radius_um, correlation)
    if len(view_a_SD) == 0:
        return (view_a_SD * 0).sum() + (view_b_SD * 0).sum()
    positive_2S, negative_2S = pairs.counts(chunk_rows)
    sums = logit_sums(view_a_SD, view_b_SD, temperature, pairs, chunk_rows)
    forward_S = sums.row_KN[0] - sums.own_N / positive_2S[0]
    backward_S = sums.column_KM[0] - sums.own_M / positive_2S[1]
    forward = mean_of_rows(forward_S, negative_2S[0] > 0)
    return (forward + mean_of_rows(backward_S, negative_2S[1] > 0)) / 2


@dataclass
class SpatialPairs:
    """Which pairs of spots attract and which repel; the rest (near, but not alike) do neither.

    Positives and negatives are the candidates of `logit_sums`, the positives what is looked for.

    Attributes:
        xy_um_S2: (S, 2) centres in micrometres.
        slide_of_spot_S: (S,) slide of each spot.
        profile_SV: (S, V) profiles (a constant row correlates with nothing).
        radius_um: pairs of one slide closer than this are near.
        correlation: near pairs that correlate (Pearson) above this are positive.

    Raises:
        ValueError: shapes that do not fit, or a setting outside its range.
    """

    xy_um_S2: Tensor
    slide_of_spot_S: Tensor
    profile_SV: Tensor
    radius_um: float = 150.0
    correlation: float = 0.5
    target_N: Tensor | None = field(default=None, init=False)
    _last: tuple[tuple[slice, slice], TilePairs] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.radius_um >= 0:
            raise ValueError(
                f"radius_um is {self.radius_um}, expected 0 or more micrometres; try 150"
            )
        if not -1 <= self.correlation <= 1:
            raise ValueError(f"correlation is {self.correlation}, expected -1 to 1; try 0.5")
        _ = self._close  # its shapes are checked where it is made

    @cached_property
    def _close(self) -> NearDuplicates:
        return NearDuplicates(
            self.profile_SV, self.xy_um_S2, self.slide_of_spot_S, self.radius_um, self.correlation
        )

    @torch.no_grad()
    def rows(self, start: int, stop: int, columns: slice = ALL) -> tuple[Tensor, Tensor]:
        """Positive and negative pairs of spots start..stop with the spots of ``columns``.

        Returns:
            Two (stop - start, m) bool, never both; a spot and itself are positive.
        """
        near = self._close.near(start, stop, columns)
        alike = near & self._close.alike(start, stop, columns)
        number = torch.arange(self._close.n_spots, device=near.device)
        own = number[start:stop, None] == number[None, columns]
        return alike | own, ~(near | own)

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        """See `hibio.losses.logits.Pairs`; the last one is kept, it may be the only one."""
        if self._last is None or self._last[0] != (rows, columns):
            positive, negative = self.rows(rows.start, rows.stop, columns)
            self._last = (rows, columns), TilePairs((positive | negative,), positive)
        return self._last[1]

    def counts(self, chunk_rows: int) -> tuple[Tensor, Tensor]:
        """How many positives and negatives each row and each column has, (2, S) int64 each."""
        n_spots = self._close.n_spots
        found = torch.zeros(2, 2, n_spots, dtype=torch.int64, device=self.profile_SV.device)
        for rows, columns in tiles(n_spots, n_spots, chunk_rows):
            tile = self.tile(rows, columns)
            for count_2S, mask in zip(found, (tile.positive, *tile.candidates), strict=True):
                assert mask is not None
                count_2S[0, rows] += mask.sum(dim=1)
                count_2S[1, columns] += mask.sum(dim=0)
        return found[0], found[1] - found[0]
