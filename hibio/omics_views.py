"""Changed views of a batch for the omics branch: fewer genes, thinned counts, genes to be guessed.

Legend: S spots, K keyword genes, Q query genes, V spot-vector length, G vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hibio.artifacts import Artifacts
from hibio.batch import SlideBatch


def padded_factors(artifacts: Artifacts) -> Tensor:
    """Gene factors with a row of zeros for the padding index, (G + 1, V) float32."""
    factors = torch.from_numpy(artifacts.factors.components).float()
    return torch.cat([factors, torch.zeros(1, factors.shape[1])])


def mean_value(value_SK: Tensor, present_SK: Tensor) -> Tensor:
    """Mean value of a spot's present genes, (S, 1), at least 1e-8."""
    shown = present_SK.to(value_SK.dtype)
    total_S1 = (value_SK * shown).sum(dim=1, keepdim=True)
    return (total_S1 / shown.sum(dim=1, keepdim=True).clamp(min=1.0)).clamp(min=1e-8)


def dropped_view(batch: SlideBatch, factors_GV: Tensor, n_genes: int, share: float) -> SlideBatch:
    """The batch as if a share of each spot's keyword genes had not been seen.

    Args:
        batch: the spots.
        factors_GV: (G + 1, V) of :func:`padded_factors`; the dropped genes leave the spot vector.
        n_genes: G, the padding index.
        share: chance of a gene to be dropped; draws come from torch's global generator.
    """
    drop_SK = torch.rand(batch.gene_SK.shape, device=batch.gene_SK.device) < share
    removed_SV = torch.einsum("sk,skv->sv", batch.value_SK * drop_SK, factors_GV[batch.gene_SK])
    return dataclasses.replace(
        batch,
        gene_SK=batch.gene_SK.masked_fill(drop_SK, n_genes),
        value_SK=batch.value_SK.masked_fill(drop_SK, 0.0),
        vector_SV=batch.vector_SV - removed_SV * batch.vector_scale_SV,
    )


def thinned_view(batch: SlideBatch) -> SlideBatch:
    """The batch with the keyword genes and the spot vector of its thinned counts."""
    assert batch.thinned_gene_SK is not None
    assert batch.thinned_value_SK is not None
    assert batch.thinned_vector_SV is not None
    return dataclasses.replace(
        batch,
        gene_SK=batch.thinned_gene_SK,
        value_SK=batch.thinned_value_SK,
        vector_SV=batch.thinned_vector_SV,
        thinned_gene_SK=None,
        thinned_value_SK=None,
        thinned_vector_SV=None,
    )


def with_queries(batch: SlideBatch) -> SlideBatch:
    """The batch with its query genes behind its keyword genes, (S, K + Q)."""
    assert batch.query_gene_SQ is not None
    assert batch.query_value_SQ is not None
    return dataclasses.replace(
        batch,
        gene_SK=torch.cat([batch.gene_SK, batch.query_gene_SQ], dim=1),
        value_SK=torch.cat([batch.value_SK, batch.query_value_SQ], dim=1),
        query_gene_SQ=None,
        query_value_SQ=None,
    )
