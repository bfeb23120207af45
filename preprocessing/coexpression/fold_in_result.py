"""What a fold-in gives: the new genes' factors, and an account of every gene.

Shapes: U new genes, r factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from preprocessing.coexpression.gene_factors import GeneFactors
from preprocessing.errors import DataError
from preprocessing.tfidf import TfidfReweighter

_LISTED = 5  # dropped genes named for each reason


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
    df: NDArray[np.int64]
    extra: NDArray[np.int64]
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

    Args:
        factors: of G genes.
        folded: U genes, folded in with these factors.

    Returns:
        Factors of G + U genes.

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


def extend_tfidf(tfidf: TfidfReweighter, folded: FoldIn) -> TfidfReweighter:
    """A reweighter that also knows the folded-in genes, as the last columns.

    Args:
        tfidf: of G genes.
        folded: U genes, folded in with this reweighter.

    Returns:
        One of G + U genes; `tfidf` is left as it is.
    """
    return tfidf.with_genes(folded.df, folded.extra)
