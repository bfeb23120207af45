"""Pathways as inputs of the omics branch, and their cache (docs/method.md 2).

Legend: M pathways, m pathways encoded anew in a step, K keyword genes, V gene factors, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from hibio.artifacts import Artifacts
from hibio.batch import SlideBatch, lone_spots
from hibio.config.files import ConfigError
from preprocessing.coexpression.spot_groups import SpotGroups


def set_batch(
    gene_MK: np.ndarray,
    value_MK: np.ndarray,
    vector_MV: np.ndarray,
    groups: SpotGroups | None = None,
) -> SlideBatch:
    """Gene sets as spots without neighbours.

    Args:
        gene_MK: vocabulary indices.
        value_MK: their values.
        vector_MV: spot vector of each set.
        groups: a set reads the gene graph of the spots that are most like it.
            None: the first gene graph.
    """
    group_M = np.zeros(len(gene_MK), np.int64) if groups is None else groups.assign(vector_MV)
    arrays = (gene_MK.astype(np.int64), value_MK, vector_MV, group_M)
    return _sets(*(torch.from_numpy(one) for one in arrays))


def _sets(gene_MK: Tensor, value_MK: Tensor, vector_MV: Tensor, group_M: Tensor) -> SlideBatch:
    """Each set is a slide of its own."""
    slide_M = torch.arange(len(gene_MK), device=gene_MK.device)
    names = {"slide_of_spot_S": slide_M, "slide_ids": ("gene sets",)}
    return lone_spots(gene_MK, value_MK.float(), vector_MV.float(), group_M, **names)


def sets_matrix(sets: Mapping[str, Sequence[str]], artifacts: Artifacts) -> sparse.csr_matrix:
    """Unit rows (M, G): idf of each set's genes that are in the vocabulary.

    Raises:
        ConfigError: a set shares no gene with the vocabulary.
    """
    position = {name: column for column, name in enumerate(artifacts.genes)}
    idf = np.asarray(artifacts.tfidf.idf)
    rows = sparse.lil_matrix((len(sets), artifacts.n_genes), dtype=np.float64)
    for row, (name, genes) in enumerate(sets.items()):
        columns = sorted({position[gene] for gene in genes if gene in position})
        if not columns:
            raise ConfigError(
                f"gene set {name!r}: none of its {len(genes)} genes ({', '.join(genes[:3])} ...) "
                f"is among the model's {artifacts.n_genes} ({', '.join(artifacts.genes[:3])} "
                "...); check the id type and the organism"
            )
        weight = idf[columns]
        rows[row, columns] = weight / np.linalg.norm(weight)
    return rows.tocsr()


class AnchorTable(nn.Module):
    """Anchor inputs and the cache of their embeddings.

    Args:
        artifacts: pathway matrix, factors, keyword settings.
        width: D.
        learned: hold a learned table instead (the baseline ``anchor: table``).
    """

    gene_MK: Tensor
    value_MK: Tensor
    vector_MV: Tensor
    group_M: Tensor
    cache_MD: Tensor

    def __init__(self, artifacts: Artifacts, width: int, *, learned: bool) -> None:
        super().__init__()
        n_sets = artifacts.n_pathways
        k = artifacts.settings.genes.keyword_genes
        gene, value, vector = artifacts.set_inputs(artifacts.anchors.matrix.T.tocsr(), k)
        inputs = {
            "gene_MK": gene.astype(np.int64),
            "value_MK": value,
            "vector_MV": vector,
            "group_M": artifacts.groups.assign(vector),
        }
        for name, array in inputs.items():
            self.register_buffer(name, torch.from_numpy(array), persistent=False)
        self.register_buffer("cache_MD", torch.zeros(n_sets, width))
        self.table_MD = nn.Parameter(torch.randn(n_sets, width)) if learned else None

    def embed(
        self, project: Callable[[SlideBatch], Tensor], fresh_m: Tensor | None = None
    ) -> Tensor:
        """Embeddings (M, D): rows ``fresh_m`` through ``project``, the rest from the cache.

        Args:
            project: the omics branch, (m, D) unit rows.
            fresh_m: rows to encode; all when None. What is encoded also enters the cache.
        """
        rows = torch.arange(len(self.gene_MK), device=self.gene_MK.device)
        rows = rows if fresh_m is None else fresh_m
        inputs = (self.gene_MK, self.value_MK, self.vector_MV, self.group_M)
        new_mD = project(_sets(*(one[rows] for one in inputs)))
        with torch.no_grad():
            self.cache_MD[rows] = new_mD.detach().to(self.cache_MD.dtype)
        return self.cache_MD.clone().to(new_mD.dtype).index_copy(0, rows, new_mD)
