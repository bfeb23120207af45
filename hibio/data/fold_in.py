"""Artifacts that also know genes never seen in training (docs/method.md 3, fold-in).

Legend: S spots, G known genes, U new genes, M pathways, E edges a gene, T gene graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from hibio.artifacts import Artifacts
from hibio.config.files import ConfigError
from hibio.data.counts import align_columns
from pathways import PathwayAnchors
from preprocessing.coexpression import GeneGraph
from preprocessing.coexpression.bridge import BridgeSlide
from preprocessing.coexpression.fold_in import (
    FoldInReport,
    extend_factors,
    fold_in,
    new_gene_sums,
)
from preprocessing.graphs import spatial_graph
from preprocessing.store import SlideStore


def panel_genes(paths: Sequence[Path]) -> set[str]:
    """Every gene that at least one of the stores measures."""
    genes: set[str] = set()
    for path in paths:
        with SlideStore(path) as store:
            genes.update(store.gene_names.tolist())
    return genes


def fold_in_genes(
    artifacts: Artifacts, bridge: Sequence[Path], wanted: Collection[str] | None = None
) -> tuple[Artifacts, FoldInReport]:
    """Fold new genes into a fitted vocabulary, by their co-expression with known ones.

    Args:
        artifacts: fitted on training slides.
        bridge: stores that measure known genes and the new ones; no labels are read. To measure a
            model on test slides, the bridge must not be among them.
        wanted: genes of interest; all that the bridge measures when None.

    Returns:
        Artifacts with the new genes behind the known ones, and what became of each gene.

    Raises:
        ConfigError: the bridge measures no new gene of those wanted, or another modality.
    """
    _check_modality(bridge, artifacts.modality)
    new = sorted(panel_genes(bridge) - set(artifacts.genes.tolist()))
    if wanted is not None:
        new = [name for name in new if name in set(wanted)]
    if not new:
        raise ConfigError(
            f"the {len(bridge)} bridge slides measure no gene that the model lacks; leave the "
            "fold-in out, or give slides that measure the genes of your panel beside the model's"
        )
    names = np.array(new)
    fitted = artifacts.settings.genes

    def blocks() -> Iterator[BridgeSlide]:
        for path in bridge:
            with SlideStore(path) as store:
                counts, genes, xy_um = store.counts(), store.gene_names, store.xy_um
            yield BridgeSlide(
                align_columns(counts, genes, artifacts.genes),
                align_columns(counts, genes, names),
                spatial_graph(fitted.graph, fitted.neighbours, xy_um),
            )

    vector_tfidf = artifacts.vector_tfidf
    folded, report = fold_in(blocks, new, vector_tfidf, artifacts.factors)
    n_new = len(folded.genes)
    longer = tfidf = vector_tfidf.with_genes(folded.df, folded.extra)
    if artifacts.tfidf is not vector_tfidf:
        kept = np.isin(names, folded.genes)
        sums = new_gene_sums(blocks, len(new), artifacts.tfidf)
        tfidf = artifacts.tfidf.with_genes(sums.df[kept], sums.extra[kept])
    extended = dataclasses.replace(
        artifacts,
        genes=np.concatenate([artifacts.genes, folded.genes]),
        tfidf=tfidf,
        vector_tfidf=longer,
        factors=extend_factors(artifacts.factors, folded),
        gene_graphs=tuple(_with_lone_genes(graph, n_new) for graph in artifacts.gene_graphs),
        anchors=_with_absent_genes(artifacts.anchors, n_new),
        n_folded_in=artifacts.n_folded_in + n_new,
        scales=None if artifacts.scales is None else artifacts.scales.with_genes(n_new),
    )
    return extended, report


def _check_modality(bridge: Sequence[Path], modality: str) -> None:
    for path in bridge:
        with SlideStore(path) as store:
            if store.modality != modality:
                raise ConfigError(
                    f"bridge slide {path}: modality {store.modality}, the model's is {modality}"
                )


def _with_lone_genes(graph: GeneGraph, n_new: int) -> GeneGraph:
    """The graph with genes that have no edge; its padding index moves along."""
    n_genes, n_edges = graph.neighbour.shape
    padding = n_genes + n_new
    neighbour = np.full((padding, n_edges), padding, dtype=graph.neighbour.dtype)
    neighbour[:n_genes] = np.where(graph.neighbour == n_genes, padding, graph.neighbour)
    weight = np.zeros((padding, n_edges), dtype=graph.weight.dtype)
    weight[:n_genes] = graph.weight
    return GeneGraph(neighbour, weight)


def _with_absent_genes(anchors: PathwayAnchors, n_new: int) -> PathwayAnchors:
    """The same pathways; the new genes belong to none."""
    empty = sparse.csr_matrix((n_new, anchors.matrix.shape[1]), dtype=anchors.matrix.dtype)
    matrix = sparse.csr_matrix(sparse.vstack([anchors.matrix, empty]))
    return dataclasses.replace(anchors, matrix=matrix)
