"""Term frequency as an estimate: rates shrunken to the spot's niche (docs/method.md 1, `shrunken`).

What a spot has of a gene is a gamma-Poisson rate: Poisson counts around it, and rates that vary
about the training mean, partly together with the neighbours. How much is fitted on training slides
from second moments; within slides, so that a batch effect is no variability.
Shapes: S spots, n of them asked for, G genes, N neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.graphs import SpotGraph, neighbour_weights
from preprocessing.tfidf.weights import (
    Doubles,
    FitSums,
    Integers,
    LogTf,
    SmoothIdf,
    fixed_point,
    spot_depth,
)

_UNIT = 2.0**16  # of a dispersion times the counts that it was seen on
_MOST = 1000.0  # 10^9 counts of such a gene fit in 63 bits
_LEAST = 0.01  # dispersion of a gene that varies no more than Poisson counts do
_BLOCK_ENTRIES = 1 << 18  # counts at a time, dense


@dataclass(frozen=True)
class ShrunkenTf(LogTf):
    """ln(1 + scale r) - centre ln(1 + scale m), r the spot's estimated and m the mean rate.

    Attributes:
        scale: counts per spot after depth correction.
        centre: 0 is the level of a gene alone, 1 its excess over the training mean alone.
    """

    centre: float = 0.5


@dataclass(frozen=True)
class ReliableIdf(SmoothIdf):
    """Smooth idf x n m v / (1 + n m v): the share of a gene's variance that is not sampling noise.

    n is the mean depth, m the gene's mean rate and v its dispersion. A rare gene has a large idf
    and is hardly ever counted twice; this share takes the noise out of the weight.
    """

    n_sums = 3

    def observe(
        self, counts: sparse.csr_matrix, graph: SpotGraph | None, depth: Doubles | None = None
    ) -> Integers:
        """(G, 3): counts, counts x dispersion, counts x what of it neighbours share.

        Without a graph nothing is shared, and a spot is shrunken to the training mean alone.
        """
        counts = counts.astype(np.float64)
        depth = spot_depth(counts) if depth is None else depth
        total = _gene_sums(counts)
        mean = total / max(depth.sum(), 1.0)
        square = _gene_sums(counts.multiply(counts)) - 2 * mean * (counts.T @ depth)
        own = _ratio(square - total, mean**2 * (depth @ depth)) + (total > 0)
        shared = np.zeros_like(own)
        if graph is not None and graph.indices.size:
            adjacency = graph.matrix()
            around = adjacency @ depth
            product = _gene_sums(counts.multiply(adjacency @ counts)) - 2 * mean * (
                counts.T @ around
            )
            shared = _ratio(product, mean**2 * (depth @ around)) + (total > 0)
        columns = [fixed_point(total * np.clip(part, 0, _MOST), _UNIT) for part in (own, shared)]
        return np.stack([np.rint(total).astype(np.int64), *columns], axis=1)

    def weight(self, sums: FitSums) -> Doubles:
        """See InverseDocumentFrequency."""
        prior = RatePrior.of(sums)
        signal = prior.mean * prior.dispersion * (sums.depth / sums.n_spots)
        return np.asarray(super().weight(sums) * signal / (1 + signal))


@dataclass(frozen=True)
class RatePrior:
    """What is known of a gene's rate before a spot is read.

    Attributes:
        mean: (G,) share of all training counts.
        dispersion: (G,) variance of the rate over spots, over the squared mean; at least 0.01.
        shared: (G,) its part that is common to neighbours, 0 to `dispersion`.
    """

    mean: Doubles
    dispersion: Doubles
    shared: Doubles

    @classmethod
    def of(cls, sums: FitSums) -> RatePrior:
        """From the sums of `ReliableIdf`."""
        total = sums.extra[:, 0].astype(np.float64)
        own, shared = (_ratio(sums.extra[:, part] / _UNIT, total) for part in (1, 2))
        dispersion = np.maximum(own, _LEAST)
        return cls(total / max(sums.depth, 1.0), dispersion, np.clip(shared, 0, dispersion))

    def __str__(self) -> str:
        return (
            f"rates of {self.mean.size} genes: median dispersion {np.median(self.dispersion):.2g}, "
            f"of which neighbours share {self.shared.sum() / self.dispersion.sum():.0%}"
        )

    def rates(
        self, own: tuple[Doubles, Doubles], around: tuple[Doubles, Doubles, Doubles]
    ) -> Doubles:
        """Posterior mean rates: spot to niche to training mean.

        Args:
            own: counts of the spots (n, G), and their depths (n,).
            around: counts of their neighbours together (n, G), those depths (n,), and the sum of
                squares of these over its square (1 / N for N neighbours of equal depth; any where
                there are none).

        Returns:
            (n, G) rates.
        """
        count, depth, spread = around[0], around[1][:, None], around[2][:, None]
        expected = depth * self.mean
        slope = self.shared * expected
        slope /= slope + (self.dispersion - self.shared) * spread * expected + 1
        niche = count * _ratio(np.ones_like(depth), depth)
        niche -= self.mean
        niche *= slope
        niche += self.mean
        left = np.maximum(self.dispersion - slope * self.shared, _LEAST)
        rate = left * own[0]
        rate += 1
        rate *= niche
        left *= niche
        left *= own[1][:, None]
        left += 1
        rate /= left
        return rate


def shrunken_blocks(
    table: sparse.csr_matrix,
    neighbours: NDArray[np.integer] | None,
    tf: ShrunkenTf,
    prior: RatePrior,
    depth: Doubles | None = None,
) -> Iterator[sparse.csr_matrix]:
    """Term frequencies of spots, some rows at a time.

    Genes that neither the spot nor a neighbour has stay 0, so rows stay sparse.

    Args:
        table: (S, G) checked counts.
        neighbours: (n, N) rows of `table` around its first n, -1 pads; None: no niche, n = S.
        tf: its arguments.
        prior: fitted on training slides.
        depth: (S,) depth of the spots; None is the sum of these counts.

    Yields:
        (some, G) float64 CSR, together n rows; a spot without counts gives none.
    """
    n_spots = table.shape[0]
    depth = spot_depth(table) if depth is None else depth
    if neighbours is None:
        neighbours = np.full((n_spots, 1), -1)
    step = max(1, _BLOCK_ENTRIES // table.shape[1])
    for start in range(0, len(neighbours), step):
        near = neighbours[start : start + step]
        rows = slice(start, start + len(near))
        yield _block(table, rows, near, depth, tf, prior)


def _block(
    table: sparse.csr_matrix,
    rows: slice,
    near: NDArray[np.integer],
    depth: Doubles,
    tf: ShrunkenTf,
    prior: RatePrior,
) -> sparse.csr_matrix:
    beside = np.unique(near[near >= 0])  # of a large table few rows: all would be read every time
    local = np.where(near >= 0, np.searchsorted(beside, near), -1)
    adjacency = neighbour_weights(local, len(beside))
    adjacency.data[:] = 1.0
    around = adjacency @ depth[beside]
    spread = _ratio(adjacency @ depth[beside] ** 2, around**2)
    own = table[rows].toarray().astype(np.float64)
    niche = adjacency @ table[beside].toarray().astype(np.float64)
    value = prior.rates((own, depth[rows]), (niche, around, spread))
    value *= tf.scale
    np.log1p(value, out=value)
    value -= tf.centre * np.log1p(tf.scale * prior.mean)
    seen = (own + niche > 0) & (value > 0) & (depth[rows] > 0)[:, None]
    bounds = np.append(0, np.cumsum(seen.sum(axis=1)))
    return sparse.csr_matrix((value[seen], np.nonzero(seen)[1], bounds), shape=own.shape)


def _gene_sums(table: sparse.spmatrix) -> Doubles:
    return np.asarray(table.sum(axis=0), dtype=np.float64).ravel()


def _ratio(above: Doubles, below: Doubles) -> Doubles:
    return np.divide(above, below, out=np.zeros_like(below), where=below > 0)
