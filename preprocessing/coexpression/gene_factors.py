"""Gene factors and spot vectors: a truncated SVD of the training TF-IDF (docs/method.md 3).

The factors are the vocabulary-free identity of genes and the map that takes a spot to its vector.
Shapes: S spots, G genes, r factors, B columns of the search block.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.coexpression.slide_blocks import TfidfBlocks, check_genes, map_blocks
from preprocessing.errors import DataError

_OVERSAMPLE = 10  # extra search columns, which make the wanted ones converge
_RANK_TOLERANCE = 1e-6  # singular values below this share of the first are noise
_SD_FLOOR = 0.01  # a slide's sd never counts as less than this share of the training spread
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class GeneFactors:
    """Right singular vectors of the training TF-IDF and the statistics of its spot vectors.

    Attributes:
        components: (G, r) float32, orthonormal columns, largest |entry| positive.
        spread: (r,) float32, pooled within-slide sd of each component over training spots.
        mean: (r,) float32, mean of each component over training spots.
        sd: (r,) float32, sd of each component over all training spots.
        singular_values: (r,) float32, falling.
    """

    components: Floats
    spread: Floats
    mean: Floats
    sd: Floats
    singular_values: Floats

    def __post_init__(self) -> None:
        """Refuses statistics that do not fit the components."""
        rank = self.components.shape[-1]
        for field in fields(self)[1:]:
            shape = getattr(self, field.name).shape
            if shape != (rank,):
                raise DataError(
                    f"gene factors: {field.name} has shape {shape}, expected ({rank},) to fit "
                    f"components {self.components.shape}. Fit them again with fit_gene_factors."
                )

    @property
    def n_genes(self) -> int:
        """G."""
        return int(self.components.shape[0])

    @property
    def rank(self) -> int:
        """The number of factors r."""
        return int(self.components.shape[1])

    @property
    def weight(self) -> Doubles:
        """(r,) sqrt(spread / largest spread): how much a standardised component counts."""
        spread = self.spread.astype(np.float64)
        return np.asarray(np.sqrt(spread / np.maximum(spread.max(), 1e-30)))


@dataclass(frozen=True)
class _Moments:
    """Sums over spots of their projections z on a (G, B) basis.

    Attributes:
        n_spots: S.
        total: (B,) sum of z.
        square: (B, B) sum of z z'.
        within: (B, B) the same about each slide's own mean.
    """

    n_spots: int
    total: Doubles
    square: Doubles
    within: Doubles

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(
            self.n_spots + other.n_spots,
            self.total + other.total,
            self.square + other.square,
            self.within + other.within,
        )


def fit_gene_factors(
    blocks: TfidfBlocks,
    n_genes: int,
    rank: int = 20,
    *,
    drop_first: bool = True,
    n_iter: int = 8,
    seed: int = 0,
) -> GeneFactors:
    """Streams a truncated SVD over slides by block power iteration and Rayleigh-Ritz.

    The Ritz step uses the blocks of all iterations (block Krylov, Musco & Musco 2015), not only
    the last: spectra of real TF-IDF are flat, and plain power iteration is then far from done.
    Reads the slides n_iter + 1 times; memory grows with G x (r + 11) x n_iter, not with spots.

    Args:
        blocks: function that returns a fresh iterator over (S, G) TF-IDF CSR, one per slide;
            `ParallelBlocks` are worked on by several threads, to the same last bit.
        n_genes: G.
        rank: r, components kept.
        drop_first: compute r + 1 and leave the first out (it follows depth, not biology).
        n_iter: power iterations; 8 gave singular values to 4e-4 and the 20-dimensional space to a
            smallest cosine of 0.999 on DLPFC 151510.
        seed: of the random start.

    Returns:
        The factors and the statistics of the training spots.

    Raises:
        DataError: blocks cannot be read again, or the data have fewer than r (+ 1) dimensions.
    """
    wanted = rank + int(drop_first)
    if rank < 1 or wanted > n_genes:
        raise DataError(
            f"gene factors: rank {rank}{' (+ 1 dropped)' if drop_first else ''} for {n_genes} "
            f"genes; expected 1 to {n_genes - int(drop_first)}. Lower the rank."
        )
    width = min(n_genes, wanted + _OVERSAMPLE)
    start = np.random.default_rng(seed).standard_normal((n_genes, width))
    basis, sizes = _search(blocks, start, wanted, n_iter)
    moments = _project_moments(blocks, basis)
    sizes.add(moments.n_spots)
    if len(sizes) > 1:
        raise DataError(
            f"gene factors: passes over the slides gave {sorted(sizes)} spots. blocks must be a "
            "function that returns a fresh iterator on every call."
        )
    return _ritz(basis, moments, wanted, first=int(drop_first))


def _search(
    blocks: TfidfBlocks, start: Doubles, wanted: int, n_iter: int
) -> tuple[Doubles, set[int]]:
    """The best `wanted` directions (G, wanted) in the block Krylov space, and spots per pass."""
    basis = np.zeros((len(start), 0))
    image = np.zeros_like(basis)  # X'X basis, so that the Ritz step needs no further pass
    block, sizes = np.linalg.qr(start)[0], set()
    scale = 0.0
    for _ in range(n_iter):
        n_spots, product = _gram_product(blocks, block)
        sizes.add(n_spots)
        scale = scale or float(np.linalg.norm(product, 2))
        basis, image = np.hstack([basis, block]), np.hstack([image, product])
        rest = product - basis @ (basis.T @ product)
        directions, size, _ = np.linalg.svd(rest, full_matrices=False)
        block = directions[:, size > _RANK_TOLERANCE**2 * scale]
        if block.shape[1] == 0:  # nothing outside the space is left to find
            break
        block = np.linalg.qr(block - basis @ (basis.T @ block))[0]
    gram = basis.T @ image
    vectors = np.linalg.eigh((gram + gram.T) / 2)[1]
    return basis @ vectors[:, ::-1][:, :wanted], sizes


def _gram_product(blocks: TfidfBlocks, basis: Doubles) -> tuple[int, Any]:
    """Number of spots and X' X basis, (G, B), summed over slides."""
    n_spots, product = 0, np.zeros_like(basis)
    for size, part in map_blocks(blocks, len(basis), lambda x: (x.shape[0], x.T @ (x @ basis))):
        product += part
        n_spots += size
    return n_spots, product


def _project_moments(blocks: TfidfBlocks, basis: Doubles) -> _Moments:
    """The moments of all slides, added up in their order."""
    return reduce(operator.add, map_blocks(blocks, len(basis), lambda x: _slide_moments(x @ basis)))


def _slide_moments(projected: Doubles) -> _Moments:
    """Moments of one slide's projections (S, B)."""
    centred = projected - projected.mean(axis=0)
    return _Moments(
        len(projected),
        projected.sum(axis=0),
        projected.T @ projected,
        centred.T @ centred,
    )


def _ritz(basis: Doubles, moments: _Moments, wanted: int, first: int) -> GeneFactors:
    """Turns the basis into singular vectors and keeps the columns first..wanted."""
    values, vectors = np.linalg.eigh(moments.square)
    singular = np.sqrt(np.maximum(values[::-1], 0))[:wanted]
    rank = int(np.sum(singular > np.maximum(_RANK_TOLERANCE * singular[0], 1e-30)))
    if rank < wanted:
        raise DataError(
            f"gene factors: the {moments.n_spots} training spots span only {rank} dimensions, "
            f"{wanted} are needed. Lower the rank to at most {rank - first}, or give more spots."
        )
    turn = vectors[:, ::-1][:, :wanted]
    components = basis @ turn
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=0)[None], axis=0)
    sign = np.where(largest < 0, -1.0, 1.0)
    components, turn = components * sign, turn * sign
    mean = moments.total @ turn / moments.n_spots
    second = np.einsum("br,bc,cr->r", turn, moments.square, turn) / moments.n_spots
    within = np.einsum("br,bc,cr->r", turn, moments.within, turn) / moments.n_spots
    sd = np.sqrt(np.maximum(second - mean**2, 0))
    parts = (components, np.sqrt(np.maximum(within, 0)), mean, sd, singular)
    return GeneFactors(*(part[..., first:].astype(np.float32) for part in parts))


def spot_vectors(tfidf: sparse.csr_matrix, factors: GeneFactors) -> Floats:
    """Projects TF-IDF rows (S, G) on the factors: raw spot vectors (S, r), not standardised.

    Raises:
        DataError: another number of genes than fitted.
    """
    check_genes(tfidf, factors.n_genes)
    return np.asarray(tfidf @ factors.components, dtype=np.float32)


def standardise(raw: Floats, factors: GeneFactors) -> tuple[Floats, Floats, Floats]:
    """Standardises the spot vectors of one slide by its own statistics.

    vector = (raw - slide mean) x slide scale, slide scale = sqrt(spread / max spread) / slide sd.
    The slide sd never counts as less than 1 % of the training spread. A slide of one spot has no
    statistics of its own, so it takes the training mean and sd, as `standardise_global` does.

    Returns:
        vectors (S, r), slide mean (r,) and slide scale (r,), all float32.
    """
    if len(raw) == 1:
        return _scaled(raw, factors.mean, factors.sd, factors)
    mean, sd = raw.mean(axis=0, dtype=np.float64), raw.std(axis=0, dtype=np.float64)
    return _scaled(raw, mean, sd, factors)


def standardise_global(raw: Floats, factors: GeneFactors) -> Floats:
    """Standardises by training mean and sd: for pathway weights and others that have no slide."""
    return _scaled(raw, factors.mean, factors.sd, factors)[0]


def _scaled(
    raw: Floats, mean: NDArray[Any], sd: NDArray[Any], factors: GeneFactors
) -> tuple[Floats, Floats, Floats]:
    if raw.ndim != 2 or raw.shape[1] != factors.rank or len(raw) == 0:
        raise DataError(
            f"spot vectors have shape {raw.shape}, expected (S, {factors.rank}) with S at least "
            "1. Compute them with spot_vectors and these factors."
        )
    mean, sd = mean.astype(np.float64), sd.astype(np.float64)
    floor = np.maximum(_SD_FLOOR * factors.spread, np.finfo(np.float32).eps)
    scale = factors.weight / np.maximum(sd, floor)
    vectors = ((raw - mean) * scale).astype(np.float32)
    return vectors, mean.astype(np.float32), scale.astype(np.float32)
