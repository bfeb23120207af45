"""Fold-in: factors of genes never seen in training, from bridge slides (docs/method.md 3).

A bridge slide measures known genes and new ones. Its known genes give the spot vectors Z; the
factors of a new gene are the least-squares coefficients of its TF-IDF value x on them, about the
means of each slide: f = (Z'Z + ridge)^-1 Z'x. The factors of training solve the same equations on
the training spots, so a known gene that is folded in from them gets its own factors back. x is
relative to the known genes: their depth, and the length of their row. Where the bridge lacks known
genes, f is multiplied by C'C of the matched ones, the identity when all are there. Last, each
component is multiplied by the slope of the matched genes' own factors on those that the bridge
gives each of them without itself: that is the scale of a gene never seen, and it shrinks a
component that the bridge does not reproduce.
Shapes: S spots, G known genes, U new genes, r factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from preprocessing.coexpression.bridge import (
    BridgeBlocks,
    Detections,
    Moments,
    read_detections,
    read_moments,
)
from preprocessing.coexpression.gene_factors import GeneFactors
from preprocessing.errors import DataError
from preprocessing.tfidf import TfidfReweighter
from preprocessing.tfidf.weights import FitSums

_LISTED = 5  # dropped genes named for each reason
_GENES = 1024  # genes whose (r, r) systems are held at once
_MIN_KNOWN = 5  # known genes found on the bridge
_MIN_DETECTED = 10  # bridge spots with a new gene
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class FoldIn:
    """Genes that were folded in.

    Attributes:
        genes: (U,) their names.
        components: (U, r) float32 factors, on the scale of `GeneFactors.components`.
        df: (U,) int64 spots with the gene, scaled to the N training spots.
        extra: (U,) int64 the TF-IDF variant's own sum, scaled likewise.
        n_spots: bridge spots used.
        explained: (U,) float32 share of the gene's variance within slides that the spot vectors
            explain, less what they would explain of noise.
    """

    genes: NDArray[np.str_]
    components: NDArray[np.float32]
    df: Integers
    extra: Integers
    n_spots: int
    explained: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Refuses arrays of different numbers of genes."""
        parts = (self.genes, self.components, self.df, self.extra, self.explained)
        if len({len(part) for part in parts}) != 1 or self.components.ndim != 2:
            raise DataError(
                f"fold-in: arrays of {[part.shape for part in parts]}, expected (U,), (U, r) and "
                "three times (U,). Compute them with fold_in."
            )

    @property
    def n_genes(self) -> int:
        """U."""
        return len(self.genes)


@dataclass(frozen=True)
class FoldInReport:
    """What became of the genes of a bridge.

    Attributes:
        n_known: genes the model knows.
        matched: known genes seen on the bridge.
        folded_in: the new genes that got factors.
        dropped: every other new gene, and why.
        n_spots: bridge spots used.
        n_spots_without_known: bridge spots left out because no known gene is in them.
        agreement: cosine of the matched genes' own factors with those that the bridge gives each
            of them without itself, at most 1: how well it places a gene never seen. On the
            training slides it is near 1 in any case, because the factors were fitted on them.
        explained: mean explained share of the genes folded in; 0 without any.
    """

    n_known: int
    matched: int
    folded_in: tuple[str, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    n_spots: int = 0
    n_spots_without_known: int = 0
    agreement: float = 0.0
    explained: float = 0.0

    def __str__(self) -> str:
        """Numbers first, then the dropped genes by reason."""
        lines = [
            f"fold-in from {self.n_spots:,} bridge spots: {self.matched:,} of {self.n_known:,} "
            f"known genes matched (agreement {self.agreement:.2f}), {len(self.folded_in):,} new "
            f"genes folded in (explained variance {self.explained:.1%}), {len(self.dropped):,} "
            "dropped"
        ]
        if self.n_spots_without_known:
            lines.append(f"  {self.n_spots_without_known:,} spots without a known gene left out")
        for reason in dict.fromkeys(self.dropped.values()):
            genes = [gene for gene, why in self.dropped.items() if why == reason]
            rest = f" and {len(genes) - _LISTED:,} more" if len(genes) > _LISTED else ""
            lines.append(f"  dropped, {reason}: {', '.join(genes[:_LISTED])}{rest}")
        return "\n".join(lines)


def extend_factors(factors: GeneFactors, folded: FoldIn) -> GeneFactors:
    """Factors that also know the folded-in genes, as the last rows.

    The statistics of training spots stay as they are, so spot vectors of a slide with only new
    genes are standardised like those of any other.

    Raises:
        DataError: another number of components.
    """
    if folded.components.shape[1] != factors.rank:
        raise DataError(
            f"fold-in has {folded.components.shape[1]} components, the gene factors "
            f"{factors.rank}. Fold in again with these factors."
        )
    return GeneFactors(
        np.concatenate([factors.components, folded.components]).astype(np.float32),
        factors.spread,
        factors.mean,
        factors.sd,
        factors.singular_values,
    )


@dataclass(frozen=True)
class FoldInRule:
    """What is asked of a bridge and of a gene.

    Attributes:
        ridge: share of its own variance that is added to each component of Z.
        min_spots: bridge spots with known genes; None is 5 (r + 1).
        min_explained: the explained share of a gene's variance must be above it; it is adjusted,
            so 0 is what the spot vectors explain of noise. Higher values keep fewer and better
            genes: on STARmap that lowered the agreement of spot vectors.
        calibrate: multiply by the slopes; without, a known gene folded in from the training spots
            gets its own factors to the last per cent, but a new one is a little short.
    """

    ridge: float = 1e-3
    min_spots: int | None = None
    min_explained: float = 0.0
    calibrate: bool = True


def fold_in(
    blocks: BridgeBlocks,
    genes: Sequence[str],
    tfidf: TfidfReweighter,
    factors: GeneFactors,
    rule: FoldInRule | None = None,
) -> tuple[FoldIn, FoldInReport]:
    """Streams the bridge slides twice and folds the new genes in.

    Memory grows with r x (G + U), not with spots.

    Args:
        blocks: function that returns a fresh iterator over bridge slides.
        genes: U names of the new genes, in the order of their columns.
        tfidf: fitted on the G known genes.
        factors: of the same genes.
        rule: what is asked of a bridge and of a gene.

    Returns:
        The genes that could be folded in (perhaps none), and the account of all.

    Raises:
        DataError: no bridge slide, too few bridge spots or known genes on them, repeated names, or
            counts that do not fit.
    """
    rule = rule or FoldInRule()
    _check_genes(genes, tfidf, factors)
    seen = read_detections(blocks, len(genes), tfidf)
    _check_bridge(seen, factors.rank, rule)
    new_sums = _as_if_trained(seen, tfidf)
    moments = read_moments(blocks, new_sums, tfidf, factors)
    _check_moments(moments, seen, factors.rank)
    own = factors.components[seen.known].astype(np.float64)
    slope, agreement = _calibration(_leave_one_out(moments, seen.known, own, rule.ridge), own)
    coefficients = _solve(moments.zz, moments.zx.T, rule.ridge)
    components = coefficients @ (own.T @ own) * (slope if rule.calibrate else 1)
    explained = _explained(coefficients, moments)
    reasons = _reasons(seen.sums.df, explained, moments, rule)
    names, kept = np.asarray(genes, dtype=str), np.array([not why for why in reasons], dtype=bool)
    folded = FoldIn(
        names[kept],
        components[kept].astype(np.float32),
        new_sums.df[kept],
        new_sums.extra[kept],
        moments.n_spots,
        explained[kept].astype(np.float32),
    )
    return folded, FoldInReport(
        n_known=tfidf.n_genes,
        matched=len(own),
        folded_in=tuple(names[kept].tolist()),
        dropped={str(n): why for n, why in zip(names, reasons, strict=True) if why},
        n_spots=moments.n_spots,
        n_spots_without_known=seen.n_spots - seen.n_used,
        agreement=agreement,
        explained=float(folded.explained.mean()) if kept.any() else 0.0,
    )


def _check_genes(genes: Sequence[str], tfidf: TfidfReweighter, factors: GeneFactors) -> None:
    if tfidf.n_genes != factors.n_genes:
        raise DataError(
            f"fold-in: TF-IDF of {tfidf.n_genes} and gene factors of {factors.n_genes} genes; give "
            "both from one fit."
        )
    if len(set(genes)) != len(genes) or not len(genes):
        raise DataError(
            f"fold-in: {len(genes)} new genes with {len(set(genes))} names, expected at least one "
            "and all different. Add up or drop columns of one name first."
        )


def _check_bridge(seen: Detections, rank: int, rule: FoldInRule) -> None:
    matched = int(seen.known.sum())
    if matched < _MIN_KNOWN:
        raise DataError(
            f"fold-in: the bridge slides have {matched} of the {seen.known.size} known genes, "
            f"expected at least {_MIN_KNOWN}. Check organism and gene id type, or give "
            "slides that measure known genes beside the new ones."
        )
    need = 5 * (rank + 1) if rule.min_spots is None else rule.min_spots
    if seen.n_used < need:
        raise DataError(
            f"fold-in: {seen.n_used} of {seen.n_spots} bridge spots have a known gene, expected at "
            f"least {need} for {rank} factors. Give more bridge slides."
        )


def _check_moments(moments: Moments, seen: Detections, rank: int) -> None:
    if moments.n_spots != seen.n_used or moments.free <= rank:
        raise DataError(
            f"fold-in: {seen.n_used} bridge spots in the first pass, {moments.n_spots} on "
            f"{moments.n_slides} slides in the second; expected as many, and more than {rank} "
            "beyond the slides. Give blocks as a function that returns a fresh iterator, and "
            "larger bridge slides."
        )


def new_gene_sums(blocks: BridgeBlocks, n_new: int, tfidf: TfidfReweighter) -> FitSums:
    """TF-IDF sums of U new genes on the bridge slides, as if seen on the training spots."""
    return _as_if_trained(read_detections(blocks, n_new, tfidf), tfidf)


def _as_if_trained(seen: Detections, tfidf: TfidfReweighter) -> FitSums:
    ratio = tfidf.n_spots / seen.n_spots
    df, extra = (_scaled(own, ratio) for own in (seen.sums.df, seen.sums.extra))
    return FitSums(tfidf.n_spots, tfidf.sums.depth, df, extra)


def _scaled(sums: Integers, ratio: float) -> Integers:
    return np.asarray(np.rint(sums * ratio), dtype=np.int64)


def _solve(square: Doubles, products: Doubles, ridge: float) -> Doubles:
    """(n, r) ridge coefficients; `square` is Z'Z, (r, r) or one for each of the n genes."""
    variance = np.einsum("...rr->...r", square)
    floor = 1e-9 * variance.max(axis=-1, keepdims=True) + 1e-30
    penalty = (ridge * variance + floor)[..., None] * np.eye(square.shape[-1])
    return np.asarray(np.linalg.solve(square + penalty, products[..., None])[..., 0])


def _leave_one_out(
    moments: Moments, known: NDArray[np.bool_], own: Doubles, ridge: float
) -> Doubles:
    """(matched, r) factors of each matched gene from the others, before the calibration.

    Z without gene g is Z - x_g c_g', so its products follow from those with it.
    """
    found = np.empty_like(own)
    for start in range(0, len(own), _GENES):
        part = slice(start, start + _GENES)
        c, zk, kk = own[part], moments.zk.T[known][part], moments.kk[known][part]
        cross = zk[:, :, None] * c[:, None, :]
        square = moments.zz - cross - cross.transpose(0, 2, 1)
        square += kk[:, None, None] * c[:, :, None] * c[:, None, :]
        coefficients = _solve(square, zk - kk[:, None] * c, ridge)
        inside = (coefficients * c).sum(axis=1, keepdims=True)
        found[part] = coefficients @ (own.T @ own) - inside * c
    return found


def _calibration(found: Doubles, own: Doubles) -> tuple[Doubles, float]:
    """Slope (r,) of own factors on those found, and the cosine of the two.

    With few genes for many components the slopes are drawn to their common one.
    """
    product, square = (found * own).sum(axis=0), (found * found).sum(axis=0)
    if not square.any():
        return np.zeros_like(square), 0.0
    prior = square.mean() * found.shape[1] / len(found)
    slope = (product + prior * product.sum() / square.sum()) / (square + prior)
    length = np.sqrt(square.sum() * (own * own).sum())
    return np.maximum(slope, 0), float(product.sum() / length)


def _explained(components: Doubles, moments: Moments) -> Doubles:
    """(U,) adjusted share of each new gene's variance that the spot vectors explain."""
    fitted = 2 * np.einsum("ur,ru->u", components, moments.zx) - np.einsum(
        "ur,ur->u", components @ moments.zz, components
    )
    varies = _varies(moments)
    share = np.divide(fitted, moments.xx, out=np.zeros_like(fitted), where=varies)
    free, rank = moments.free, components.shape[1]
    return np.where(varies, 1 - (1 - share) * free / (free - rank), 0.0)


def _varies(moments: Moments) -> NDArray[np.bool_]:
    return moments.xx > 1e-12 * moments.n_spots


def _reasons(
    detected: Integers,
    explained: Doubles,
    moments: Moments,
    rule: FoldInRule,
) -> list[str]:
    """Why each new gene is dropped; empty for those that are kept."""
    rare = f"found in fewer than {_MIN_DETECTED} bridge spots"
    constant = "constant over the bridge spots"
    weak = f"known genes explain no more than {rule.min_explained:.1%} of its variance"
    return [
        rare if few else constant if not varies else weak if share <= rule.min_explained else ""
        for few, varies, share in zip(
            detected < _MIN_DETECTED, _varies(moments), explained, strict=True
        )
    ]
