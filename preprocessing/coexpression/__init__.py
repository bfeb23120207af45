"""Co-expression of training counts: gene factors, spot vectors, gene graphs (docs/method.md 3)."""

from preprocessing.coexpression.gene_factors import (
    GeneFactors,
    fit_gene_factors,
    spot_vectors,
    standardise,
    standardise_global,
)
from preprocessing.coexpression.gene_graph import GeneGraph, rank_normal_scores
from preprocessing.coexpression.slide_blocks import TfidfBlocks
from preprocessing.coexpression.spot_groups import group_gene_graphs

__all__ = [
    "GeneFactors",
    "GeneGraph",
    "TfidfBlocks",
    "fit_gene_factors",
    "group_gene_graphs",
    "rank_normal_scores",
    "spot_vectors",
    "standardise",
    "standardise_global",
]
