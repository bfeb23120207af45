"""The gene-gene graph: Gaussian-copula mutual information (docs/method.md 3).

MI = -0.5 ln(1 - r^2) with r the correlation of rank-normal scores. Ranks and centring are within
slide, so neither depth nor stain nor batch differences between slides make an edge; scores of all
slides are then concatenated. `group_gene_graphs` fits one graph for each group of spots.
Shapes: S spots, G genes, E edges listed per gene.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import ndtri

from preprocessing.errors import DataError

_CEILING = 1 - 1e-6  # of r^2: copies of a gene get MI 6.9 instead of infinity
MAX_EDGES = 4_000_000  # listed in all graphs of a corpus together: 32 MB on disk
FEW_EDGES = 16  # a gene, even in the largest corpus


def rank_normal_scores(values: sparse.csr_matrix) -> NDArray[np.float32]:
    """Normal scores (S, G) of average ranks, gene by gene: Phi^-1(rank / (S + 1)), centred.

    `values` (S, G) are those of one slide. Zeros share one rank, so only stored values are sorted,
    all genes in one sort.

    Raises:
        DataError: a negative or non-finite value.
    """
    table = sparse.csc_matrix(values, dtype=np.float32, copy=True)
    table.sum_duplicates()
    table.eliminate_zeros()
    if not (np.isfinite(table.data) & (table.data > 0)).all():
        raise DataError("rank scores: a value is negative or not finite; give TF-IDF rows.")
    n_spots, n_genes = table.shape
    stored = np.diff(table.indptr).astype(np.int64)
    gene = np.repeat(np.arange(n_genes, dtype=np.uint64), stored)
    key = (gene << np.uint64(32)) | table.data.view(np.uint32)
    order = np.argsort(key)  # equal keys get one rank, so their order is free
    rank = average_places(key[order]) - table.indptr[gene[order].astype(np.int64)]
    zeros = n_spots - stored
    gene_sorted = gene[order].astype(np.int64)
    score = ndtri((zeros[gene_sorted] + rank + 1) / (n_spots + 1))
    floor = ndtri(np.maximum(zeros + 1, 2) / 2 / (n_spots + 1))
    mean = (np.bincount(gene_sorted, score, minlength=n_genes) + floor * zeros) / n_spots
    dense = np.broadcast_to((floor - mean).astype(np.float32), (n_spots, n_genes)).copy()
    dense[table.indices[order], gene_sorted] = score - mean[gene_sorted]
    return dense


def average_places(ordered: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Places (n,) from 0 of n sorted keys; equal keys share the mean of theirs."""
    if ordered.size == 0:
        return np.zeros(0)
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    length = np.diff(np.append(first, ordered.size))
    return np.repeat(first + (length - 1) / 2, length)


@dataclass(frozen=True)
class GeneGraph:
    """The strongest co-expression edges of every gene, as `group_gene_graphs` fits them.

    Attributes:
        neighbour: (G, E) int32 other genes by falling weight, padded with G. An edge is listed
            under each gene that has it among its E strongest, so it may be listed once or twice.
        weight: (G, E) float32 mutual information in nats, padded with 0.
    """

    neighbour: NDArray[np.int32]
    weight: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Refuses arrays that do not fit together."""
        if self.neighbour.ndim != 2 or self.neighbour.shape != self.weight.shape:
            raise DataError(
                f"a gene graph needs neighbour and weight of one shape (G, E); found "
                f"{self.neighbour.shape} and {self.weight.shape}. Fit it with group_gene_graphs."
            )

    @property
    def n_genes(self) -> int:
        """G."""
        return int(self.neighbour.shape[0])

    def matrix(self) -> sparse.csr_matrix:
        """(G, G) symmetric CSR float32 of weights; an edge listed by either gene is in it."""
        row, place = np.nonzero(self.neighbour < self.n_genes)
        parts = (self.weight[row, place], (row, self.neighbour[row, place]))
        listed = sparse.csr_matrix(parts, shape=(self.n_genes, self.n_genes))
        return listed.maximum(listed.T).tocsr()


@dataclass(frozen=True)
class EdgeRule:
    """Which edges of a gene graph are kept.

    Attributes:
        n_neighbours: E, edges listed per gene.
        min_information: weakest edge kept, nats; 0.005 is |r| = 0.1.
        min_detected: a gene found in fewer of the sampled spots gets no edge: two genes that share
            one spot by chance would look perfectly correlated.
        block: genes per matrix product.
        among: (G,) bool, genes that may have edges; None: all.
    """

    n_neighbours: int = 16
    min_information: float = 0.005
    min_detected: int = 10
    block: int = 1024
    among: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        """Refuses sizes below 1."""
        if min(self.n_neighbours, self.block) < 1:
            raise DataError(
                f"gene graph: n_neighbours {self.n_neighbours} and block {self.block} must be at "
                "least 1 (16 and 1024 are usual)."
            )


def edge_limit(n_genes: int, n_listed: int, n_graphs: int = 1) -> int:
    """How many edges a gene may list where nobody says: 8 sqrt(genes), within a bounded memory.

    Args:
        n_genes: that may have edges.
        n_listed: G, rows of each graph.
        n_graphs: T.
    """
    bounded = min(round(8 * math.sqrt(n_genes)), MAX_EDGES // max(n_listed * n_graphs, 1))
    return max(bounded, FEW_EDGES)


def edge_correlation(information: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """|r| of edges, 0 to 1, from their mutual information in nats; any shape.

    Information has a long tail (copies of a gene have 6.9 nats, half of all edges some hundredths).
    """
    return np.sqrt(-np.expm1(-2.0 * np.asarray(information, np.float64)))


def pair_edges(
    graphs: Sequence[GeneGraph], gene: NDArray[np.int64], group: NDArray[np.int64]
) -> tuple[float, float]:
    """What the graphs say about pairs of genes of one spot.

    Args:
        graphs: T, one a group of spots.
        gene: (S, K) genes of each spot, padded with G.
        group: (S,) graph that each spot reads.

    Returns:
        Share of the pairs (i, j) with an edge that i lists, and the spread (standard deviation
        over the partners of a gene in its spot, root of the mean square) of |r|, 0 without edge.
    """
    pairs, edges, square = 0, 0, 0.0
    for one, number in zip(gene, group, strict=True):
        graph = graphs[number]
        own = one[one < graph.n_genes]
        if len(own) < 2:
            continue
        place = np.full(graph.n_genes + 1, -1)
        place[own] = np.arange(len(own))
        place_KE = place[graph.neighbour[own]]
        row, column = np.nonzero(place_KE >= 0)
        weight = np.zeros((len(own), len(own)))
        weight[row, place_KE[row, column]] = edge_correlation(graph.weight[own])[row, column]
        others = weight[~np.eye(len(own), dtype=bool)].reshape(len(own), -1)
        pairs += others.size
        edges += int((others > 0).sum())
        square += float(others.var(axis=1).sum()) * others.shape[1]
    return edges / max(pairs, 1), float(np.sqrt(square / max(pairs, 1)))


def graph_of_samples(
    samples: Sequence[sparse.csr_matrix], n_genes: int, rule: EdgeRule
) -> GeneGraph:
    """The graph of sampled rows (S, G) of each slide; ranks and centring are within each of them.

    Raises:
        DataError: fewer than 3 spots, or a negative or non-finite value.
    """
    scores, genes = _pooled_scores(samples, n_genes, rule)
    n_edges = min(rule.n_neighbours, len(genes) - 1)
    neighbour = np.full((n_genes, rule.n_neighbours), n_genes, np.int32)
    weight = np.zeros((n_genes, rule.n_neighbours), np.float32)
    name = np.append(genes, n_genes).astype(np.int32)
    for start in range(0, len(genes) if n_edges > 0 else 0, rule.block):
        rows = genes[start : start + rule.block]
        partner, weight[rows, :n_edges] = _strongest(
            scores, start, rule.block, n_edges, rule.min_information
        )
        neighbour[rows, :n_edges] = name[partner]
    return GeneGraph(neighbour, weight)


def _strongest(
    scores: NDArray[np.float32], start: int, block: int, n_edges: int, min_information: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The n_edges strongest partners of genes start..start + block, and their information."""
    n_genes = scores.shape[1]
    square = scores[:, start : start + block].T @ scores
    np.square(square, out=square)
    rows = np.arange(square.shape[0])
    square[rows, start + rows] = -1  # never its own neighbour
    top = np.argpartition(square, n_genes - n_edges, axis=1)[:, n_genes - n_edges :]
    top.sort(axis=1)  # ties by gene index
    strength = np.take_along_axis(square, top, axis=1)
    order = np.argsort(-strength, axis=1, kind="stable")
    partner: NDArray[np.int32] = np.take_along_axis(top, order, axis=1).astype(np.int32)
    strength = np.take_along_axis(strength, order, axis=1).astype(np.float64)
    information = -0.5 * np.log1p(-np.clip(strength, 0, _CEILING))
    weak = (information < min_information) | (information <= 0)
    partner[weak] = n_genes
    information[weak] = 0
    return partner, information.astype(np.float32)


def _pooled_scores(
    samples: Sequence[sparse.csr_matrix], n_genes: int, rule: EdgeRule
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores (sampled S, U) of all slides, columns of unit length, and the U genes with edges."""
    n_spots = sum(sample.shape[0] for sample in samples)
    if n_spots < 3:
        raise DataError(
            f"gene graph: {n_spots} training spots, expected at least 3 (some 200 for edges "
            "that mean something). Give more slides or raise max_spots."
        )
    detected = np.zeros(n_genes, np.int64)
    for sample in samples:
        detected += np.bincount(sample.indices, minlength=n_genes)
    scores = np.concatenate([rank_normal_scores(sample) for sample in samples])
    length = np.sqrt(np.einsum("sg,sg->g", scores, scores, dtype=np.float64))
    varies = (length > 1e-4 * np.sqrt(len(scores))) & (detected >= rule.min_detected)
    varies &= True if rule.among is None else rule.among
    genes = np.flatnonzero(varies)
    return scores[:, genes] * (1 / length[genes]).astype(np.float32), genes
