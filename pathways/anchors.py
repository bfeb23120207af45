"""Pathway anchors: how well a spot's TF-IDF row matches every pathway (docs/method.md 2).

Shapes: S spots, G genes of the panel, M pathways. TF-IDF rows are L2-normalised.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse import csr_matrix

from pathways.database import PathwayDatabase
from pathways.errors import PathwayError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
FEW_SETS = 8  # for which no block of rows is laid out dense
BLOCK_SPOTS = 1024
FEW_SPOTS = 16  # whose scores of some thousand sets stay in the processor's cache
CACHED_SPOTS = 128  # whose rows, laid out dense, stay in the processor's cache
UNIT_TOLERANCE = 1e-3
CONSTANT_SD = 1e-6


def checked_idf(idf: npt.ArrayLike, n_genes: int) -> Doubles:
    """Inverse document frequencies (G,), finite and not negative, or an error."""
    values = np.asarray(idf, dtype=np.float64)
    if values.shape != (n_genes,) or not np.isfinite(values).all() or (values < 0).any():
        raise PathwayError(
            f"idf of shape {values.shape}; expected {n_genes} finite numbers >= 0, one a gene."
        )
    return values


def row_blocks(tfidf: csr_matrix, size: int = BLOCK_SPOTS) -> Iterable[csr_matrix]:
    """Rows in blocks, so that a dense (block, M) stays small."""
    for start in range(0, tfidf.shape[0], size):
        yield tfidf[start : start + size]


def cosine(tfidf: csr_matrix, matrix: csr_matrix) -> Floats:
    """Unit rows (S, G) times unit columns (G, M) -> dense (S, M).

    A block of rows is laid out dense, since a set has few genes and a spot many; for few sets the
    sets are.
    """
    tfidf = _unit_rows(tfidf, matrix.shape[0])
    if matrix.shape[1] <= FEW_SETS:
        return np.asarray(tfidf @ matrix.toarray(), dtype=np.float32)
    out = np.empty((tfidf.shape[0], matrix.shape[1]), dtype=np.float32)
    sets = csr_matrix(matrix.T)
    for number, part in enumerate(row_blocks(tfidf, CACHED_SPOTS)):
        rows = slice(number * CACHED_SPOTS, number * CACHED_SPOTS + part.shape[0])
        out[rows] = (sets @ part.toarray(order="F").T).T
    return out


def _unit_rows(tfidf: csr_matrix, n_genes: int) -> csr_matrix:
    """The rows (S, G), if each is of length 1 at most."""
    if not sparse.issparse(tfidf) or tfidf.shape[1] != n_genes:
        raise PathwayError(
            f"TF-IDF of shape {np.shape(tfidf)}; expected a CSR matrix with {n_genes} "
            "genes, in the order of the fitted panel."
        )
    tfidf = csr_matrix(tfidf)
    longest = _row_sums(tfidf, np.square(tfidf.data)).max(initial=0.0)
    if not longest <= (1 + UNIT_TOLERANCE) ** 2:
        raise PathwayError(
            f"a TF-IDF row has length {np.sqrt(longest):.3g}; expected L2-normalised rows (length "
            "1). Pass the output of TfidfReweighter.transform, not counts."
        )
    return tfidf


def moments(blocks: Iterable[Floats]) -> tuple[Doubles, Doubles]:
    """Mean and population sd over rows of a stream (pairwise update of Chan et al.)."""
    count, mean, square = 0, np.zeros(0), np.zeros(0)
    for block in blocks:
        values = block.astype(np.float64)
        n, block_mean = len(values), values.mean(axis=0)
        block_square = ((values - block_mean) ** 2).sum(axis=0)
        if count == 0:
            count, mean, square = n, block_mean, block_square
            continue
        shift = block_mean - mean
        square = square + block_square + shift**2 * (count * n / (count + n))
        mean = mean + shift * (n / (count + n))
        count += n
    if count == 0:
        raise PathwayError("no training spots; expected at least one block of TF-IDF rows.")
    sd = np.sqrt(square / count)
    sd[sd <= CONSTANT_SD * np.abs(mean)] = 0.0
    return mean, sd


def empty_rows(tfidf: csr_matrix) -> npt.NDArray[np.bool_]:
    """Spots (S,) without any value, which match nothing."""
    rows = csr_matrix(tfidf)
    empty: npt.NDArray[np.bool_] = _row_sums(rows, np.abs(rows.data)) == 0
    return empty


def _row_sums(tfidf: csr_matrix, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sums (S,) of other values at the places of its own; the places are not copied."""
    there = csr_matrix((values, tfidf.indices, tfidf.indptr), tfidf.shape, copy=False)
    return np.asarray(there @ np.ones(tfidf.shape[1], dtype=values.dtype))


@dataclass(frozen=True, eq=False)
class PathwayAnchors:
    """Gene-space anchors and the training statistics of their match.

    Attributes:
        names: Pathway names (M,).
        matrix: CSR float32 (G, M); column p is a_p = idf * weight, L2-normalised.
        mean: Mean raw match over the training spots (M,).
        sd: Its standard deviation (M,), population form; 0 for a pathway that never varies.
    """

    names: tuple[str, ...]
    matrix: csr_matrix
    mean: Doubles
    sd: Doubles

    def __post_init__(self) -> None:
        n = len(self.names)
        shapes = (self.matrix.shape[1], self.mean.shape, self.sd.shape)
        if shapes != (n, (n,), (n,)):
            raise PathwayError(
                f"{n} pathway names, but matrix columns, mean and sd have shapes {shapes}; "
                "expected the same number of pathways in all."
            )

    @property
    def varying(self) -> npt.NDArray[np.bool_]:
        """Pathways (M,) whose match varied over the training spots; the others never score."""
        return self.sd > 0

    def raw_match(self, tfidf: csr_matrix) -> Floats:
        """Cosine (S, M) of TF-IDF rows (S, G) with every pathway; genes ordered as in fitting."""
        return cosine(tfidf, self.matrix)

    def standardised(self, tfidf: csr_matrix) -> Floats:
        """Match in training standard deviations (S, M), not yet centred per spot."""
        raw = self.raw_match(tfidf)
        scale = np.where(self.varying, self.sd, 1.0)
        standard: Floats = ((raw - self.mean) / scale * self.varying).astype(np.float32)
        return standard

    def background(self, tfidf: csr_matrix) -> Floats:
        """Mean standardised match of each spot over the varying pathways (S,).

        It is mostly sequencing depth (docs/method.md 2), so it is taken off every score. A mean of
        cosines is the product with one mean direction, so no (S, M) is made; it and what is taken
        off it are large and close, hence in float64.
        """
        share = self.varying / np.where(self.varying, self.sd, 1.0) / self.varying.sum()
        direction = self.matrix.astype(np.float64) @ share
        mean = _unit_rows(tfidf, len(direction)) @ direction - self.mean @ share
        return np.asarray(mean, dtype=np.float32)

    def match(self, tfidf: csr_matrix) -> Floats:
        """Match m_ip: standardised per pathway, then centred per spot over pathways.

        A spot without counts matches nothing: its row is 0. So is the column of a pathway that did
        not vary in training. Each other row of the (S, M) has mean 0 over the varying pathways.
        """
        match = self.standardised(tfidf)
        match -= match[:, self.varying].mean(axis=1, keepdims=True)
        match[:, ~self.varying] = 0.0
        match[empty_rows(tfidf)] = 0.0
        return match

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Plain arrays for storage; ``from_arrays`` is the inverse. No pickled objects."""
        return {
            "names": np.array(self.names, dtype=np.str_),
            "data": self.matrix.data,
            "indices": self.matrix.indices,
            "indptr": self.matrix.indptr,
            "shape": np.array(self.matrix.shape, dtype=np.int64),
            "mean": self.mean,
            "sd": self.sd,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "PathwayAnchors":
        """Rebuild from ``to_arrays``; names may be str or UTF-8 bytes (as HDF5 gives them).

        Raises:
            PathwayError: An array is missing or does not fit the others.
        """
        missing = {"names", "data", "indices", "indptr", "shape", "mean", "sd"} - set(arrays)
        if missing:
            raise PathwayError(
                f"stored anchors lack {', '.join(sorted(missing))}; the file is incomplete. "
                "Train again, or take another checkpoint."
            )
        parts = tuple(np.asarray(arrays[key]) for key in ("data", "indices", "indptr"))
        shape = tuple(int(n) for n in np.asarray(arrays["shape"]))
        try:
            matrix = csr_matrix(parts, shape=shape)
            matrix.check_format(full_check=True)
        except ValueError as error:
            raise PathwayError(f"stored anchors are damaged ({error}).") from error
        names = tuple(
            n.decode() if isinstance(n, bytes) else str(n) for n in np.asarray(arrays["names"])
        )
        return cls(names, matrix, np.asarray(arrays["mean"]), np.asarray(arrays["sd"]))


def fit_anchors(
    database: PathwayDatabase,
    genes: Sequence[str],
    idf: npt.ArrayLike,
    blocks: Iterable[csr_matrix],
) -> PathwayAnchors:
    """Build anchors and the statistics of their match, streaming over training spots.

    Only a mean and a sum of squares per pathway are kept, so memory does not grow with the corpus.

    Args:
        database: Restricted to the panel (``PathwayDatabase.restrict``); at least two pathways,
            because a match is a contrast between pathways.
        genes: Panel (G,), the columns of the blocks.
        idf: Inverse document frequencies (G,), not negative.
        blocks: TF-IDF blocks (S, G) of training spots.

    Raises:
        PathwayError: A pathway without a gene in the panel, fewer than two pathways, no spots,
            rows that are not unit, or no pathway that varies.
    """
    names = database.names
    if len(names) < 2:
        raise PathwayError(
            f"{database.name} has {len(names)} pathway(s); expected at least 2, because a match is "
            "centred over pathways. Add a database with '+', for example default+my.gmt."
        )
    matrix = set_matrix(database, genes, idf)
    mean, sd = moments(cosine(part, matrix) for block in blocks for part in row_blocks(block))
    if not (sd > 0).any():
        raise PathwayError(
            "no pathway varies over the training spots; expected at least two different spots."
        )
    constant = [name for name, s in zip(names, sd, strict=True) if s == 0]
    if constant:
        warnings.warn(
            f"{len(constant)} of {len(names)} pathways never vary over the training spots and "
            f"will score 0: {', '.join(constant[:5])}.",
            stacklevel=2,
        )
    return PathwayAnchors(names, matrix, mean, sd)


def soft_targets(
    match: npt.ArrayLike, temperature: float = 0.5, top: int = 5, threshold: float = 0.0
) -> Floats:
    """Soft target q_i: softmax of match / temperature over the best pathways of a spot.

    Kept are the ``top`` best that lie above ``threshold``; the rest is 0 and the kept ones sum to 1
    (docs/method.md 2).

    Args:
        match: Match (S, M), from ``PathwayAnchors.match``.
        temperature: T_match > 0; small is sharp.
        top: Pathways kept per spot, k_p >= 1.
        threshold: A pathway must match better than this (standard deviations).

    Returns:
        float32 (S, M); rows sum to 1, or are all 0 where nothing is above the threshold.

    Raises:
        PathwayError: Wrong shape, not finite, or a setting out of range.
    """
    match = np.asarray(match, dtype=np.float32)
    if match.ndim != 2 or match.shape[1] == 0 or not np.isfinite(match).all():
        raise PathwayError(
            f"match of shape {match.shape}; expected finite numbers (spots, pathways)."
        )
    if not temperature > 0 or top < 1:
        raise PathwayError(
            f"temperature={temperature}, top={top}; expected temperature > 0 and top >= 1."
        )
    top = min(top, match.shape[1])
    best = np.argpartition(-match, top - 1, axis=1)[:, :top]
    value = np.take_along_axis(match, best, axis=1)
    kept = value > threshold
    weight = np.exp((value - value.max(axis=1, keepdims=True)) / temperature) * kept
    total = weight.sum(axis=1, keepdims=True)
    weight = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    target = np.zeros_like(match)
    np.put_along_axis(target, best, weight, axis=1)
    return target


def set_matrix(database: PathwayDatabase, genes: Sequence[str], idf: npt.ArrayLike) -> csr_matrix:
    """Anchors of gene sets, also ones never seen in training: weight times idf, unit columns.

    Args:
        database: Restricted to the panel.
        genes: Panel (G,).
        idf: Inverse document frequencies (G,).

    Returns:
        CSR float32 (G, M), columns in the order of ``database.names``.

    Raises:
        PathwayError: A set without a gene in the panel, or lengths differ.
    """
    weighted = sparse.diags_array(checked_idf(idf, len(genes))) @ database.matrix(genes)
    norm = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=0)).ravel())
    empty = [name for name, n in zip(database.names, norm, strict=True) if n == 0]
    if empty:
        raise PathwayError(
            f"{len(empty)} of {len(norm)} pathways of {database.name} have no gene in the panel: "
            f"{', '.join(empty[:5])}. Call database.restrict(genes) first."
        )
    return csr_matrix(weighted @ sparse.diags_array(1.0 / norm)).astype(np.float32)


def score_sets(
    tfidf: csr_matrix,
    matrix: csr_matrix,
    mean: npt.ArrayLike,
    sd: npt.ArrayLike,
    background: npt.ArrayLike,
    raw: Floats | None = None,
    empty: npt.NDArray[np.bool_] | None = None,
) -> Floats:
    """Scores of gene sets on the scale of ``PathwayAnchors.match``.

    Args:
        tfidf: TF-IDF rows (S, G).
        matrix: Unit columns (G, M) from ``set_matrix``.
        mean: Mean (M,) of their ``cosine`` over training spots.
        sd: Its standard deviation (M,), > 0.
        background: Per-spot mean of the database's standardised scores (S,), from
            ``PathwayAnchors.background``.
        raw: their ``cosine`` (S, M) where it is at hand.
        empty: their ``empty_rows`` (S,) where they are at hand.

    Returns:
        float32 (S, M); 0 for a spot without counts.

    Raises:
        PathwayError: an sd is not positive, or background or raw has another shape.
    """
    level = np.asarray(background, dtype=np.float64)
    spread = np.asarray(sd)
    if not (spread > 0).all() or level.shape != (tfidf.shape[0],):
        raise PathwayError(
            f"smallest sd={spread.min()}, background of shape {level.shape} for {tfidf.shape[0]} "
            "spots; expected sd > 0 (sets that vary over the training spots) and one background "
            "a spot."
        )
    found = cosine(tfidf, matrix) if raw is None else np.asarray(raw, dtype=np.float32)
    if found.shape != (shape := (tfidf.shape[0], matrix.shape[1])):
        raise PathwayError(
            f"raw of shape {found.shape}; expected {shape}, the cosine of every spot and set."
        )
    score: Floats = found if raw is None else np.empty_like(found)
    centre, wide = (np.asarray(x, dtype=np.float32) for x in (mean, spread))
    for start in range(0, len(score), FEW_SPOTS):
        rows = slice(start, start + FEW_SPOTS)
        np.subtract(found[rows], centre, out=score[rows])
        score[rows] /= wide
        score[rows] -= level[rows, None].astype(np.float32)
    score[empty_rows(tfidf) if empty is None else empty] = 0.0
    return score
