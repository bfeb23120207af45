"""Patch against profile: symmetric InfoNCE, soft targets as a control, spot against own region.

See docs/method.md 5. Regions are compared with each other by `info_nce` too.

Legend: N pairs, S spots, R regions, D embedding width, V spot-vector length, n x m a tile of N x N.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from hibio.losses.logits import (
    CHUNK_ROWS,
    TilePairs,
    checked_temperature,
    cosine_logits,
    full_precision,
    logit_sums,
    mean_of_rows,
)

Negatives = Literal["all", "same_slide", "mixed"]
ALL = slice(None)


class ExcludedPairs(Protocol):
    """Pairs that are no negatives, asked for a tile at a time."""

    @property
    def n_spots(self) -> int:
        """N: pairs run over N x N."""
        ...

    def rows(self, start: int, stop: int, columns: slice = ALL) -> Tensor:
        """(n, m) bool, True takes (image i, omics j) out of the negatives of both directions."""
        ...


def info_nce(
    image_ND: Tensor,
    omics_ND: Tensor,
    temperature: Tensor | float,
    exclude: ExcludedPairs | None = None,
    group_N: Tensor | None = None,
    negatives: Negatives = "all",
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Symmetric InfoNCE with identity targets: row i of one tower belongs to row i of the other.

    No N x N matrix is ever held: see `hibio.losses.logits`.

    Args:
        image_ND: (N, D) image embeddings; normalised here.
        omics_ND: (N, D) omics embeddings; normalised here.
        temperature: positive number or one-element tensor, typically 0.07.
        exclude: pairs to leave out, such as `NearDuplicates`; the diagonal always stays.
        group_N: (N,) slide of every pair, needed for ``same_slide`` and ``mixed``.
        negatives: ``all`` rows, only those of the ``same_slide``, or the mean of both losses.
        chunk_rows: rows and columns of a tile; memory grows with its square.

    Returns:
        Scalar, mean of image -> omics and omics -> image; 0 (with a graph) when N is 0.

    Raises:
        ValueError: shapes that do not fit, a missing ``group_N`` or an unknown ``negatives``.
    """
    _check_pairs(image_ND, omics_ND)
    n = image_ND.shape[0]
    if exclude is not None and exclude.n_spots != n:
        raise ValueError(f"exclude is of {exclude.n_spots} spots, expected one for each of {n}")
    _check_negatives(negatives, group_N, n)
    if n == 0:
        return (image_ND * 0).sum() + (omics_ND * 0).sum()
    pairs = _Candidates(torch.arange(n, device=image_ND.device), exclude, group_N, negatives)
    sums = logit_sums(image_ND, omics_ND, temperature, pairs, chunk_rows)
    return ((sums.row_KN + sums.column_KM) / 2 - sums.own_N).mean()


def _check_pairs(image_ND: Tensor, omics_ND: Tensor) -> None:
    if image_ND.shape != omics_ND.shape:
        raise ValueError(
            f"image is {tuple(image_ND.shape)}, omics {tuple(omics_ND.shape)}; expected pairs, "
            "row by row"
        )


def _check_negatives(negatives: str, group_N: Tensor | None, n: int) -> None:
    if negatives not in get_args(Negatives):
        raise ValueError(f"negatives is {negatives!r}, expected one of: all, same_slide, mixed")
    if negatives != "all" and (group_N is None or group_N.shape != (n,)):
        found = "none" if group_N is None else f"{tuple(group_N.shape)}"
        raise ValueError(
            f"negatives={negatives!r} needs group_N of shape {(n,)} (slide of each pair), found "
            f"{found}"
        )


@dataclass(frozen=True)
class _Candidates:
    """Who is compared with whom: each row with its target, and the negatives of each kind."""

    target_N: Tensor
    exclude: ExcludedPairs | None = None
    group_N: Tensor | None = None
    negatives: str = "all"

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        """See `hibio.losses.logits.Pairs`."""
        everyone: Tensor | None = None
        if self.exclude is not None:
            everyone = ~self.exclude.rows(rows.start, rows.stop, columns)
            everyone |= self.target_N[rows, None] == self.target_N[None, columns]
        masks = [everyone] if self.negatives in ("all", "mixed") else []
        if self.negatives in ("same_slide", "mixed"):
            assert self.group_N is not None
            same = self.group_N[rows, None] == self.group_N[None, columns]
            masks.append(same if everyone is None else same & everyone)
        return TilePairs(tuple(masks))


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of spots too alike to be negatives: close by on one slide with near-equal profiles.

    Attributes:
        vector_SV: (S, V) profiles; rows are compared by Pearson correlation (a constant row
            correlates with nothing).
        xy_um_S2: (S, 2) centres in micrometres.
        slide_of_spot_S: (S,) slide of each spot.
        radius_um: pairs closer than this, typically 150 um.
        threshold: and correlated above this, typically 0.9.

    Raises:
        ValueError: shapes that do not fit, or a radius that is negative.
    """

    vector_SV: Tensor
    xy_um_S2: Tensor
    slide_of_spot_S: Tensor
    radius_um: float
    threshold: float

    def __post_init__(self) -> None:
        vector, xy, slide = self.vector_SV, self.xy_um_S2, self.slide_of_spot_S
        n = len(vector)
        if vector.ndim != 2 or xy.shape != (n, 2) or slide.shape != (n,):
            raise ValueError(
                f"vector is {tuple(vector.shape)}, xy {tuple(xy.shape)}, slide "
                f"{tuple(slide.shape)}; expected (S, V), (S, 2) and (S,)"
            )
        if not self.radius_um >= 0:
            raise ValueError(f"radius_um is {self.radius_um}, expected 0 or more micrometres")

    @property
    def n_spots(self) -> int:
        """S."""
        return len(self.vector_SV)

    @torch.no_grad()
    def rows(self, start: int, stop: int, columns: slice = ALL) -> Tensor:
        """The pairs of spots start..stop with the spots of ``columns``.

        Returns:
            (stop - start, m) bool; a spot is never its own duplicate.
        """
        return self.near(start, stop, columns) & self.alike(start, stop, columns)

    @torch.no_grad()
    def near(self, start: int, stop: int, columns: slice = ALL) -> Tensor:
        """(stop - start, m) bool, other spots of one slide within the radius."""
        rows = slice(start, stop)
        xy, slide = self._xy_S2, self.slide_of_spot_S
        distance = torch.cdist(xy[rows], xy[columns], compute_mode="donot_use_mm_for_euclid_dist")
        found = (distance < self.radius_um) & (slide[rows, None] == slide[None, columns])
        own = torch.arange(self.n_spots, device=slide.device)
        return found & (own[rows, None] != own[None, columns])

    @torch.no_grad()
    def alike(self, start: int, stop: int, columns: slice = ALL) -> Tensor:
        """(stop - start, m) bool, spots anywhere that correlate above the threshold."""
        centred = self._centred_SV
        return cosine_logits(centred[start:stop], centred[columns], 1.0) > self.threshold

    @cached_property
    def _xy_S2(self) -> Tensor:
        return full_precision(self.xy_um_S2)

    @cached_property
    def _centred_SV(self) -> Tensor:
        vector = full_precision(self.vector_SV.detach())
        centred = vector - vector.mean(dim=1, keepdim=True)
        flat = centred.norm(dim=1) <= 1e-5 * vector.norm(dim=1)  # rounding of a constant row
        return torch.where(flat[:, None], torch.zeros_like(centred), centred)


def soft_info_nce(
    image_ND: Tensor,
    omics_ND: Tensor,
    temperature: Tensor | float,
    target_temperature: float = 0.1,
    group_N: Tensor | None = None,
) -> Tensor:
    """Cross entropy against soft targets from the similarities within both towers, both ways.

    The target of spot i is the softmax over the candidates j of the mean of cos(image i, image j)
    and cos(omics i, omics j) over the target temperature, without gradient. As it falls to 0 the
    targets become identity ones. The whole N x N matrix is held.

    Args:
        image_ND: (N, D) image embeddings; normalised here.
        omics_ND: (N, D) omics embeddings; normalised here.
        temperature: positive number or one-element tensor, typically 0.1.
        target_temperature: positive; larger spreads the target.
        group_N: (N,) slide of every pair: candidates are those of the same slide. None: all.

    Returns:
        Scalar, mean of both directions; 0 (with a graph) when N is 0.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    _check_pairs(image_ND, omics_ND)
    n = len(image_ND)
    if group_N is not None and group_N.shape != (n,):
        raise ValueError(f"group is {tuple(group_N.shape)}, expected ({n},): one a pair")
    checked_temperature(target_temperature)
    logits_NN = cosine_logits(image_ND, omics_ND, temperature)
    if n == 0:
        return (image_ND * 0).sum() + (omics_ND * 0).sum()
    other_NN = torch.zeros_like(logits_NN, dtype=torch.bool)
    if group_N is not None:
        other_NN = group_N[:, None] != group_N[None, :]
    with torch.no_grad():
        within = [cosine_logits(one, one, target_temperature) for one in (image_ND, omics_ND)]
        target_NN = ((within[0] + within[1]) / 2).masked_fill(other_NN, -torch.inf).softmax(dim=1)
    return (
        _entropy(logits_NN, target_NN, other_NN) + _entropy(logits_NN.T, target_NN, other_NN)
    ) / 2


def _entropy(logits_NN: Tensor, target_NN: Tensor, other_NN: Tensor) -> Tensor:
    """Mean over the rows of - sum of target x log softmax over the row's candidates."""
    log_NN = logits_NN.masked_fill(other_NN, -torch.inf).log_softmax(dim=1)
    return -(target_NN * log_NN.masked_fill(other_NN, 0.0)).sum(dim=1).mean()


def spot_to_region(
    spot_SD: Tensor,
    region_RD: Tensor,
    region_of_spot_S: Tensor,
    temperature: Tensor | float,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Cross entropy of a spot to its own region, with the other regions as negatives.

    Args:
        spot_SD: (S, D) spot embeddings.
        region_RD: (R, D) region embeddings (of the other tower).
        region_of_spot_S: (S,) row of ``region_RD``; -1 (halo) leaves the spot out.
        temperature: positive number or one-element tensor.
        chunk_rows: rows and columns of a tile (`hibio.losses.logits`).

    Returns:
        Scalar; 0 (with a graph) when no spot has a region or there is only one region.

    Raises:
        ValueError: shapes that do not fit or a region id outside -1..R-1.
    """
    n_spots, n_regions = spot_SD.shape[0], region_RD.shape[0]
    if region_of_spot_S.shape != (n_spots,):
        raise ValueError(
            f"region_of_spot is {tuple(region_of_spot_S.shape)}, expected ({n_spots},): one a spot"
        )
    if n_spots and not -1 <= int(region_of_spot_S.min()) <= int(region_of_spot_S.max()) < n_regions:
        raise ValueError(
            f"region ids run from {int(region_of_spot_S.min())} to {int(region_of_spot_S.max())}, "
            f"expected -1 (none) to {n_regions - 1}: number the regions within the batch"
        )
    if n_spots == 0 or n_regions == 0:
        return (spot_SD * 0).sum() + (region_RD * 0).sum()
    own = _Candidates(region_of_spot_S.long())
    sums = logit_sums(spot_SD, region_RD, temperature, own, chunk_rows, by_column=False)
    return mean_of_rows(sums.row_KN[0] - sums.own_N, region_of_spot_S >= 0)
