"""Expression values, and which genes become nodes of a gene graph or targets (docs/method.md 1).

RNA counts are divided by the depth of their spot. Of protein intensities the arcsinh stands
instead: a cell that stains weakly is no cell that was sampled less. Each selector scores every gene
from one or two streams over the slides, so memory does not grow with the corpus; `select_genes`
keeps the best. Shapes: S spots, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.errors import DataError, unknown_name
from preprocessing.graphs import SpotGraph, morans_i
from preprocessing.spot_table import PROTEIN, RNA
from preprocessing.tfidf import TfidfReweighter, keyword_genes
from preprocessing.tfidf.weights import (
    ArcsinhTf,
    LogTf,
    RawTf,
    TermFrequency,
    checked_counts,
    dispersion_scores,
    frequencies,
)

LEAST_OVERLAP = 0.5  # of the keyword genes of two halves of a spot's counts
COFACTOR = 5.0  # intensities far below it count about linearly, far above it by their logarithm
CountBlocks = Sequence[Any] | Callable[[], Iterable[Any]]


def log_normalise(counts: Any) -> sparse.csr_matrix:
    """ln(1 + 10^4 x / depth), the usual expression value of RNA counts (S, G), CSR or dense.

    A spot without counts stays 0.

    Raises:
        DataError: a negative or non-finite value.
    """
    table = checked_counts(counts)
    depth = np.asarray(table.sum(axis=1)).ravel()
    share = table.data / np.repeat(depth, np.diff(table.indptr))
    return _with_values(table, np.log1p(1e4 * share))


def intensity(counts: Any, cofactor: float = COFACTOR) -> sparse.csr_matrix:
    """arcsinh(x / cofactor), the usual value of protein intensities; no depth scaling.

    Args:
        counts: (S, G) raw intensities, CSR or dense.
        cofactor: intensity at which the scale turns from linear to logarithmic; 5 is usual for
            mass cytometry and imaging, 150 for flow cytometry.

    Raises:
        DataError: a negative or non-finite value, or a cofactor that is not positive.
    """
    if not 0 < cofactor < np.inf:
        raise DataError(f"cofactor is {cofactor}, expected a positive number (5 is usual).")
    table = checked_counts(counts)
    return _with_values(table, np.arcsinh(table.data / cofactor))


#: How the values of a modality become expression values.
MODALITIES: Mapping[str, Callable[[Any], sparse.csr_matrix]] = MappingProxyType(
    {RNA: log_normalise, PROTEIN: intensity}
)


def normalised(counts: Any, modality: str) -> sparse.csr_matrix:
    """Expression values (S, G), float32: `log_normalise` of RNA, `intensity` of proteins.

    Raises:
        DataError: unknown modality, or a negative or non-finite value.
    """
    if modality not in MODALITIES:
        raise unknown_name("modality", modality, MODALITIES)
    return MODALITIES[modality](counts)


def _with_values(table: sparse.csr_matrix, values: Any) -> sparse.csr_matrix:
    parts = (values.astype(np.float32), table.indices.copy(), table.indptr.copy())
    return sparse.csr_matrix(parts, shape=table.shape)


@dataclass(frozen=True)
class Corpus:
    """What a selector may read.

    Attributes:
        blocks: (S, G) raw counts per slide: a list, or a function that starts a fresh stream.
        graphs: one spot graph per slide, same forms; only `svg` needs them.
        tfidf: a fitted reweighter; None fits the default one. Only `tfidf` reads it.
        depth: genes per spot that count as its keywords; only `tfidf` and `rank` read it.
        seed: of `random`.
        modality: `rna` (counts) or `protein` (intensities).
    """

    blocks: CountBlocks
    graphs: Sequence[SpotGraph] | Callable[[], Iterable[SpotGraph]] | None = None
    tfidf: TfidfReweighter | None = None
    depth: int = 128
    seed: int = 0
    modality: str = RNA

    @property
    def value(self) -> TermFrequency:
        """The expression value of a gene in a spot."""
        return ArcsinhTf() if self.modality == PROTEIN else LogTf()

    @property
    def share(self) -> TermFrequency:
        """How much of a spot a gene is."""
        return ArcsinhTf() if self.modality == PROTEIN else RawTf()

    @property
    def reweighter(self) -> TfidfReweighter:
        """The given TF-IDF, or the default of the modality fitted on these blocks."""
        variant = "arcsinh" if self.modality == PROTEIN else "log"
        return self.tfidf or TfidfReweighter(variant).fit(self.counts())

    def counts(self) -> Iterator[sparse.csr_matrix]:
        """A fresh stream of checked counts, one block per slide."""
        n_genes: int | None = None
        for block in self.blocks() if callable(self.blocks) else self.blocks:
            table = checked_counts(block, n_genes)
            n_genes = table.shape[1]
            yield table
        if n_genes is None:
            raise DataError(
                "gene selection found no slide. Give a list of count blocks, or a function that "
                "returns a fresh iterator (an exhausted generator cannot be read again)."
            )

    def with_graphs(self) -> Iterator[tuple[sparse.csr_matrix, SpotGraph]]:
        """A fresh stream of counts and their graphs."""
        if self.graphs is None:
            raise DataError(
                "selector 'svg' needs the spot graph of every slide, found none. Pass graphs=, "
                "e.g. KNNGraph(k=6).build(xy_um) for each block."
            )
        graphs = self.graphs() if callable(self.graphs) else self.graphs
        yield from zip(self.counts(), graphs, strict=True)


def select_genes(
    method: str,
    blocks: CountBlocks,
    k: int,
    *,
    graphs: Sequence[SpotGraph] | Callable[[], Iterable[SpotGraph]] | None = None,
    tfidf: TfidfReweighter | None = None,
    depth: int = 128,
    seed: int = 0,
    modality: str = RNA,
) -> NDArray[np.int64]:
    """Chooses k genes (64 to 2,000) by a method of SELECTORS; all else is a `Corpus` of training.

    Returns:
        (k,) int64 gene indices, rising. Genes without any count come last in every ranking; ties
        go to the lower index.

    Raises:
        DataError: unknown method or modality, k outside 1..G, no slides, or no graphs for `svg`.
    """
    if method not in SELECTORS:
        raise unknown_name("gene selector", method, SELECTORS)
    if modality not in MODALITIES:
        raise unknown_name("modality", modality, MODALITIES)
    corpus = Corpus(blocks, graphs, tfidf, depth, seed, modality)
    score = SELECTORS[method](corpus)
    if not 1 <= k <= score.size:
        raise DataError(
            f"gene selection: k is {k}, expected 1 to {score.size} (the genes given). Lower k."
        )
    return np.sort(np.argsort(-score, kind="stable")[:k])


@dataclass(frozen=True)
class KeywordOverlap:
    """How many of a spot's keyword genes are found again (docs/method.md 1).

    Attributes:
        k: keyword genes asked for.
        n_genes: among how many.
        half: share that two random halves of a spot's counts have in common, mean over spots.
        between: the same of halves of two different spots of a slide. Near `half`, the keywords
            are those of the slide and say nothing of a spot.
    """

    k: int
    n_genes: int
    half: float
    between: float

    @classmethod
    def mean(cls, found: Sequence[KeywordOverlap]) -> KeywordOverlap:
        """Over slides."""
        half, between = (
            float(np.mean([getattr(f, n) for f in found])) for n in ("half", "between")
        )
        return cls(found[0].k, found[0].n_genes, half, between)

    def __str__(self) -> str:
        text = (
            f"keyword genes: two halves of a spot's counts share {self.half:.0%} of {self.k} (of "
            f"{self.n_genes} genes), two spots {self.between:.0%}"
        )
        if self.half >= LEAST_OVERLAP:
            return text
        return (
            f"{text}. WARNING: below {LEAST_OVERLAP:.0%} they are mostly sampling noise; set "
            "genes.tfidf: shrunken, or ask for other genes.keyword_genes"
        )


def keyword_overlap(
    counts: Any, tfidf: TfidfReweighter, k: int, niche: NDArray[np.integer] | None, seed: int = 0
) -> KeywordOverlap:
    """Splits the counts of a slide at random in two, and compares the keyword genes of the halves.

    Args:
        counts: (S, G) integer counts.
        tfidf: fitted weighting.
        k: K, keyword genes of a spot.
        niche: (S, N) neighbours that it reads, -1 pads.
        seed: of the split, and of the pairs of spots.
    """
    rng = np.random.default_rng(seed)
    whole = checked_counts(counts)
    one = whole.copy()
    one.data = rng.binomial(whole.data.astype(np.int64), 0.5).astype(np.float64)
    first, second = (
        _membership(keyword_genes(tfidf.transform(half, niche), k)[0], whole.shape[1])
        for half in (one, whole - one)
    )
    order = rng.permutation(whole.shape[0])
    pairs = (first.multiply(second), first[order].multiply(second[np.roll(order, 1)]))
    half, between = (float(pair.sum()) / (k * whole.shape[0]) for pair in pairs)
    return KeywordOverlap(k, whole.shape[1], half, between)


def _membership(index: NDArray[np.int32], n_genes: int) -> sparse.csr_matrix:
    """(S, G) 1 where a gene is a keyword of the spot."""
    present = index < n_genes
    pointer = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
    parts = (np.ones(pointer[-1]), index[present], pointer)
    return sparse.csr_matrix(parts, shape=(len(index), n_genes))


def _by_tfidf(corpus: Corpus) -> NDArray[np.float64]:
    """Number of spots that have the gene as a keyword; ties by its mean TF-IDF weight."""
    tfidf = corpus.reweighter
    n_spots, often, weight = 0, np.zeros(tfidf.n_genes), np.zeros(tfidf.n_genes)
    for counts in corpus.counts():
        rows = tfidf.transform(counts)
        index = keyword_genes(rows, min(corpus.depth, tfidf.n_genes))[0]
        often += np.bincount(index.ravel(), minlength=tfidf.n_genes + 1)[:-1]
        weight += np.asarray(rows.sum(axis=0)).ravel()
        n_spots += rows.shape[0]
    return _detected_first(often + 0.5 * weight / n_spots, weight > 0)


def _by_variance(corpus: Corpus) -> NDArray[np.float64]:
    """Highly variable genes: dispersion of log1p CP10k (arcsinh) against genes of similar mean.

    The variance is within slides, so a batch effect is no variability.
    """
    n_spots: int = 0
    total: Any = 0.0
    within: Any = 0.0
    for counts in corpus.counts():
        log = frequencies(counts, corpus.value, 1.0)
        sums = np.asarray(log.sum(axis=0)).ravel()
        squares = np.asarray(log.multiply(log).sum(axis=0)).ravel()
        total = total + sums
        within = within + np.maximum(squares - sums**2 / log.shape[0], 0)
        n_spots += log.shape[0]
    return dispersion_scores(np.asarray(total) / n_spots, np.asarray(within) / n_spots)


def _by_moran(corpus: Corpus) -> NDArray[np.float64]:
    """Spatially variable genes: Moran's I of log1p CP10k, mean over slides by spots."""
    n_spots, total, seen = 0, 0.0, False
    for counts, graph in corpus.with_graphs():
        moran = morans_i(frequencies(counts, corpus.value, 1.0), graph)
        total = total + counts.shape[0] * moran
        seen = seen | (np.diff(counts.tocsc().indptr) > 0)
        n_spots += counts.shape[0]
    return _detected_first(np.asarray(total) / n_spots, np.asarray(seen))


def _by_rank(corpus: Corpus) -> NDArray[np.float64]:
    """Nicheformer-like: mean rank of share / corpus mean among the spot's first `depth` genes.

    The corpus mean is over spots that have the gene. First of the list scores 1, the last
    1 / depth, a gene outside it 0.
    """
    total, spots_with = _share_sums(corpus)
    inverse_mean = np.divide(spots_with, total, out=np.zeros_like(total), where=total > 0)
    n_spots, score = 0, np.zeros(total.size)
    points = (1 - np.arange(corpus.depth) / corpus.depth)[: total.size]
    for counts in corpus.counts():
        ratio = frequencies(counts, corpus.share, 1.0)
        ratio.data *= inverse_mean[ratio.indices]
        index = keyword_genes(ratio, points.size)[0]
        each = np.broadcast_to(points, index.shape).ravel()
        score += np.bincount(index.ravel(), each, minlength=total.size + 1)[:-1]
        n_spots += ratio.shape[0]
    return _detected_first(score / n_spots, total > 0)


def _by_mean(corpus: Corpus) -> NDArray[np.float64]:
    """Mean share of the spot's counts (protein: mean arcsinh)."""
    return _share_sums(corpus)[0]


def _at_random(corpus: Corpus) -> NDArray[np.float64]:
    """A random order of the genes that have any count: the control of the other selectors."""
    total = _share_sums(corpus)[0]
    return _detected_first(np.random.default_rng(corpus.seed).random(total.size), total > 0)


def _share_sums(corpus: Corpus) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of each gene's share of a spot, and the number of spots that have it, both (G,)."""
    total: Any = 0.0
    spots_with: Any = 0.0
    for counts in corpus.counts():
        total = total + np.asarray(frequencies(counts, corpus.share, 1.0).sum(axis=0)).ravel()
        spots_with = spots_with + np.bincount(counts.indices, minlength=counts.shape[1])
    return total, np.asarray(spots_with, dtype=np.float64)


def _detected_first(score: NDArray[np.float64], detected: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.where(detected, score, -np.inf)


SELECTORS: Mapping[str, Callable[[Corpus], NDArray[np.float64]]] = MappingProxyType(
    {
        "tfidf": _by_tfidf,
        "hvg": _by_variance,
        "svg": _by_moran,
        "rank": _by_rank,
        "top": _by_mean,
        "random": _at_random,
    }
)
