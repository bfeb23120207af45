"""Speed of the co-expression graph: `python benchmarks/coexpression.py [--genes G --spots S]`.

Times the plain way (SciPy ranks, np.corrcoef, full argsort) and our graph at one small size in
the same run, checks that both give the same weights, prints the ratio, and then times ours
alone at the size asked for: over every spot, and with `group_gene_graphs` one graph for each of
several groups of the same spots. Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
from scipy import sparse, stats
from timing import seconds

from preprocessing.coexpression import GeneGraph, group_gene_graphs
from preprocessing.coexpression.gene_graph import EdgeRule, graph_of_samples

PAIRS_GENES = 60  # for the per-pair loop, which is scaled up from this many genes


def draw(n_spots: int, n_genes: int, seed: int = 0) -> sparse.csr_matrix:
    """Sparse positive values of 20 programmes, about one third stored, (S, G) float32."""
    rng = np.random.default_rng(seed)
    programme = rng.gamma(0.3, 1, (20, n_genes)).astype(np.float32)
    blocks = []
    for start in range(0, n_spots, 1000):
        usage = rng.gamma(0.5, 1, (min(1000, n_spots - start), 20)).astype(np.float32)
        mean = usage @ programme
        counts = rng.poisson(mean * 0.15).astype(np.float32)
        blocks.append(sparse.csr_matrix(np.log1p(counts)))
    return sparse.vstack(blocks).tocsr()


def plain_graph(values: sparse.csr_matrix, n_neighbours: int) -> np.ndarray:
    """(G, E) weights by np.corrcoef over every gene at once."""
    scores = stats.norm.ppf(stats.rankdata(values.toarray(), axis=0) / (values.shape[0] + 1))
    square = np.corrcoef(scores.T) ** 2
    np.fill_diagonal(square, 0)
    strongest = np.sort(square, axis=1)[:, ::-1][:, :n_neighbours]
    return np.asarray(-0.5 * np.log1p(-strongest))


def pair_seconds(values: sparse.csr_matrix) -> float:
    """Seconds of a loop over gene pairs at the full number of genes, from a small part of it."""
    dense = values[:, :PAIRS_GENES].toarray()
    n_genes: int = values.shape[1]

    def loop() -> None:
        for a in range(PAIRS_GENES):
            for b in range(a):
                stats.spearmanr(dense[:, a], dense[:, b])

    return seconds(loop) * n_genes * (n_genes - 1) / (PAIRS_GENES * (PAIRS_GENES - 1))


def run(values: sparse.csr_matrix) -> GeneGraph:
    """The graph over every spot, all genes allowed."""
    rule = EdgeRule(min_information=0, min_detected=1)
    return graph_of_samples([values], values.shape[1], rule)


def run_groups(values: sparse.csr_matrix, n_groups: int) -> list[GeneGraph]:
    """The graphs of groups as large as each other, over every spot."""
    spots, genes = values.shape
    group = np.random.default_rng(0).integers(0, n_groups, spots)
    return group_gene_graphs(
        lambda: iter([values]), lambda: iter([group]), genes, n_groups, max_spots=spots
    )


def main() -> None:
    """Prints one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--spots", type=int, default=20_000)
    parser.add_argument("--small-genes", type=int, default=1000)
    parser.add_argument("--small-spots", type=int, default=2000)
    parser.add_argument("--groups", type=int, default=8)
    given = parser.parse_args()
    print(f"cores {os.cpu_count()}, numpy {np.__version__}")
    small = draw(given.small_spots, given.small_genes)
    graph = run(small)  # threads and caches warm
    n_edges = graph.weight.shape[1]
    wanted = plain_graph(small, n_edges)
    ours, plain = seconds(lambda: run(small)), seconds(lambda: plain_graph(small, n_edges))
    np.testing.assert_allclose(graph.weight, wanted, atol=1e-3)
    size = f"{given.small_genes} genes x {given.small_spots} spots"
    print(f"{size}: our graph {ours:.2f} s, corrcoef {plain:.2f} s, ratio {plain / ours:.1f}")
    pairs = pair_seconds(small)
    print(f"{size}: per-pair loop about {pairs:.0f} s (scaled), ratio {pairs / ours:.0f}")
    large = draw(given.spots, given.genes)
    whole = seconds(lambda: run(large))
    filled = large.nnz / np.prod(large.shape)
    size = f"{given.genes} genes x {given.spots} spots"
    print(f"{size} ({filled:.0%} stored): our graph {whole:.2f} s")
    split = seconds(lambda: run_groups(large, given.groups))
    print(f"{size}: group_gene_graphs, {given.groups} groups, {split:.2f} s")


if __name__ == "__main__":
    main()
