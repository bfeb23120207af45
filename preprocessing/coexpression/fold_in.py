"""Fold-in: factors of genes never seen in training, from bridge slides (METHOD section 3).

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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preprocessing.coexpression.bridge import (
    BridgeBlocks,
    BridgeSlide,
    Detections,
    Moments,
    read_detections,
    read_moments,
)
from preprocessing.coexpression.fold_in_result import (
    FoldIn,
    FoldInReport,
    extend_factors,
    extend_tfidf,
)
from preprocessing.coexpression.gene_factors import GeneFactors
from preprocessing.errors import DataError
from preprocessing.tfidf import TfidfReweighter
from preprocessing.tfidf.term_weights import FitSums

__all__ = [
    "BridgeBlocks",
    "BridgeSlide",
    "FoldIn",
    "FoldInReport",
    "FoldInRule",
    "extend_factors",
    "extend_tfidf",
    "fold_in",
]
_GENES = 1024  # genes whose (r, r) systems are held at once


@dataclass(frozen=True)
class FoldInRule:
    """What is asked of a bridge and of a gene.

    Attributes:
        ridge: share of its own variance that is added to each component of Z.
        min_spots: bridge spots with known genes; None is 5 (r + 1).
        min_known: known genes found on the bridge.
        min_detected: bridge spots with the new gene.
        min_explained: the explained share of a gene's variance must be above it; it is adjusted,
            so 0 is what the spot vectors explain of noise. Higher values keep fewer and better
            genes: on STARmap that lowered the agreement of spot vectors.
        calibrate: multiply by the slopes; without, a known gene folded in from the training spots
            gets its own factors to the last per cent, but a new one is a little short.
    """

    ridge: float = 1e-3
    min_spots: int | None = None
    min_known: int = 5
    min_detected: int = 10
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
    _check(genes, tfidf, factors)
    seen = read_detections(blocks, len(genes), tfidf)
    _check_bridge(seen, factors.rank, rule)
    df = _scaled(seen.sums.df, tfidf.n_spots / seen.n_spots)
    extra = _scaled(seen.sums.extra, tfidf.n_spots / seen.n_spots)
    idf = tfidf.idf_rule.weight(FitSums(tfidf.n_spots, tfidf.sums.depth, df, extra))
    moments = read_moments(blocks, idf, tfidf, factors)
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
        df[kept],
        extra[kept],
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


def _check(genes: Sequence[str], tfidf: TfidfReweighter, factors: GeneFactors) -> None:
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
    if matched < max(rule.min_known, 1):
        raise DataError(
            f"fold-in: the bridge slides have {matched} of the {seen.known.size} known genes, "
            f"expected at least {max(rule.min_known, 1)}. Check organism and gene id type, or give "
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


def _scaled(sums: NDArray[np.int64], ratio: float) -> NDArray[np.int64]:
    return np.asarray(np.rint(sums * ratio), dtype=np.int64)


def _solve(
    square: NDArray[np.float64], products: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """(n, r) ridge coefficients; `square` is Z'Z, (r, r) or one for each of the n genes."""
    variance = np.einsum("...rr->...r", square)
    floor = 1e-9 * variance.max(axis=-1, keepdims=True) + 1e-30
    penalty = (ridge * variance + floor)[..., None] * np.eye(square.shape[-1])
    return np.asarray(np.linalg.solve(square + penalty, products[..., None])[..., 0])


def _leave_one_out(
    moments: Moments, known: NDArray[np.bool_], own: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
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


def _calibration(
    found: NDArray[np.float64], own: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
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


def _explained(components: NDArray[np.float64], moments: Moments) -> NDArray[np.float64]:
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
    detected: NDArray[np.int64],
    explained: NDArray[np.float64],
    moments: Moments,
    rule: FoldInRule,
) -> list[str]:
    """Why each new gene is dropped; empty for those that are kept."""
    rare = f"found in fewer than {rule.min_detected} bridge spots"
    constant = "constant over the bridge spots"
    weak = f"known genes explain no more than {rule.min_explained:.1%} of its variance"
    return [
        rare if few else constant if not varies else weak if share <= rule.min_explained else ""
        for few, varies, share in zip(
            detected < rule.min_detected, _varies(moments), explained, strict=True
        )
    ]
