"""Co-expression fitted on training counts: gene factors, spot vectors and the gene graph.

METHOD section 3. The two parts live in `gene_factors` and `gene_graph`.
"""

from preprocessing.gene_factors import (
    GeneFactors,
    fit_gene_factors,
    spot_vectors,
    standardise,
    standardise_global,
)
from preprocessing.gene_graph import GeneGraph, gene_graph, rank_normal_scores
from preprocessing.slide_blocks import TfidfBlocks

__all__ = [
    "GeneFactors",
    "GeneGraph",
    "TfidfBlocks",
    "fit_gene_factors",
    "gene_graph",
    "rank_normal_scores",
    "spot_vectors",
    "standardise",
    "standardise_global",
]
