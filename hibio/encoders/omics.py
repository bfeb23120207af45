"""The graph-hierarchy omics encoder: a gene graph under every node of a spatial graph (METHOD 3).

Legend: S spots, K keyword genes, V gene factors, N neighbours, E edges a gene, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hibio.batch import SlideBatch
from hibio.encoders.base import OmicsContext, resolve_encoder
from hibio.encoders.graph_layers import HierarchyLayer
from hibio.encoders.mlp import MlpOmicsEncoder, mlp, neighbour_mean


@dataclass(frozen=True)
class OmicsConfig:
    """The omics tower.

    Attributes:
        name: graph_hierarchy | mlp (baseline) | package.module:Class.
        width: d.
        layers: L.
        heads: attention heads; divides width.
        dropout: everywhere.
        identity: what tells genes apart: factors (vocabulary-free) | table (learned, bound to the
            vocabulary) | none.
        skip: the spot vector enters the spot token (METHOD section 3).
        gene_graph: co-expression as attention bias.
        spatial_graph: attention over the spatial neighbours.
        cross: messages between genes and spots.
    """

    name: str = "graph_hierarchy"
    width: int = 192
    layers: int = 4
    heads: int = 6
    dropout: float = 0.1
    identity: Literal["factors", "table", "none"] = "factors"
    skip: bool = True
    gene_graph: bool = True
    spatial_graph: bool = True
    cross: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True)
class OmicsMask:
    """What the masked view hides: keyword genes (S, K) and whole spots (S,), True = hidden."""

    gene_SK: Tensor
    spot_S: Tensor


class GraphHierarchyEncoder(nn.Module):
    """Gene tokens under spot tokens; see METHOD section 3 for each part.

    Args:
        config: sizes and switches.
        context: gene factors and gene graph from the artifacts.
    """

    factors_GV: Tensor
    identity_GV: Tensor
    edge_GE: Tensor
    weight_GE: Tensor

    def __init__(self, config: OmicsConfig, context: OmicsContext) -> None:
        super().__init__()
        width = config.width
        n_factors = context.factors_GV.shape[1]
        self.config = config
        self.embed_dim = width
        self.hops = 1 + (config.layers if config.spatial_graph else 0)
        self.n_genes = context.n_genes
        factors = torch.zeros(context.n_genes + 1, n_factors)
        factors[:-1] = torch.from_numpy(context.factors_GV)
        self.register_buffer("factors_GV", factors, persistent=False)
        length = factors.norm(dim=1, keepdim=True).clamp(min=1e-8)
        self.register_buffer("identity_GV", factors / length, persistent=False)
        self._register_gene_graph(context)
        self.value = mlp(1, width, width, 0.0)
        self.rank = nn.Embedding(context.keyword_genes, width)
        self.identity = self._identity(config, context, n_factors)
        self.spot_vector = nn.Linear(2 * n_factors, width) if config.skip else None
        self.spot_start_D = nn.Parameter(torch.zeros(width))
        self.masked_gene_D = nn.Parameter(torch.randn(width) * 0.02)
        self.masked_spot_D = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleList(
            HierarchyLayer(
                width,
                config.heads,
                config.dropout,
                spatial_graph=config.spatial_graph,
                cross=config.cross,
            )
            for _ in range(config.layers)
        )
        self.norm_spot = nn.LayerNorm(width)
        self.norm_gene = nn.LayerNorm(width)

    def _register_gene_graph(self, context: OmicsContext) -> None:
        n_edges = context.edge_GE.shape[1]
        edge = torch.full((context.n_genes + 1, n_edges), context.n_genes, dtype=torch.long)
        weight = torch.zeros(context.n_genes + 1, n_edges)
        edge[:-1] = torch.from_numpy(context.edge_GE)
        weight[:-1] = torch.from_numpy(context.weight_GE)
        self.register_buffer("edge_GE", edge, persistent=False)
        self.register_buffer("weight_GE", weight, persistent=False)

    @staticmethod
    def _identity(config: OmicsConfig, context: OmicsContext, n_factors: int) -> nn.Module | None:
        if config.identity == "factors":
            return nn.Linear(n_factors, config.width)
        if config.identity == "table":
            return nn.Embedding(context.n_genes + 1, config.width, padding_idx=context.n_genes)
        return None

    def forward(self, batch: SlideBatch) -> Tensor:
        """Spot embeddings (S, D)."""
        return self.encode(batch)[0]

    def encode(self, batch: SlideBatch, mask: OmicsMask | None = None) -> tuple[Tensor, Tensor]:
        """Spot (S, D) and gene (S, K, D) embeddings, of the masked view when ``mask`` is given."""
        present_SK = batch.gene_SK < self.n_genes
        gene_SKD = self._gene_tokens(batch, present_SK, mask)
        spot_SD = self._spot_tokens(batch, mask)
        edge_SKK = self.pair_weights(batch.gene_SK) if self.config.gene_graph else None
        for layer in self.layers:
            spot_SD, gene_SKD = layer(
                spot_SD, gene_SKD, present_SK, edge_SKK, batch.neighbour_SN, batch.distance_um_SN
            )
        return self.norm_spot(spot_SD), self.norm_gene(gene_SKD)

    def pair_weights(self, gene_SK: Tensor) -> Tensor:
        """Gene-graph weight of every pair of a spot's keyword genes, (S, K, K).

        Read from the padded edge lists of the one corpus graph: the position of each gene in the
        spot is looked up, so no edge is copied per spot ahead of time.
        """
        n_spots, n_genes = gene_SK.shape
        rows = torch.arange(n_spots, device=gene_SK.device)
        position = gene_SK.new_full((n_spots, self.n_genes + 1), n_genes)
        places = torch.arange(n_genes, device=gene_SK.device).expand(n_spots, -1)
        position.scatter_(1, gene_SK, places)
        position[:, self.n_genes] = n_genes  # padding has no place
        partner_SKE = self.edge_GE[gene_SK]
        place_SKE = position[rows[:, None, None], partner_SKE]
        weight_SKE = self.weight_GE[gene_SK]
        pair = weight_SKE.new_zeros(n_spots, n_genes, n_genes + 1)
        pair.scatter_(2, place_SKE, weight_SKE)
        return pair[:, :, :n_genes]

    def _gene_tokens(self, batch: SlideBatch, present_SK: Tensor, mask: OmicsMask | None) -> Tensor:
        shown_SK = present_SK if mask is None else present_SK & ~mask.gene_SK
        relative_SK = relative_values(batch.value_SK, shown_SK)
        rank_SK = (shown_SK.cumsum(dim=1) - 1).clamp(min=0)
        token_SKD = self.value(relative_SK[..., None]) + self.rank(rank_SK)
        if mask is not None:
            token_SKD = torch.where(mask.gene_SK[..., None], self.masked_gene_D, token_SKD)
        if isinstance(self.identity, nn.Embedding):
            token_SKD = token_SKD + self.identity(batch.gene_SK)
        elif self.identity is not None:
            token_SKD = token_SKD + self.identity(self.identity_GV[batch.gene_SK])
        return token_SKD

    def _spot_tokens(self, batch: SlideBatch, mask: OmicsMask | None) -> Tensor:
        n_spots = batch.n_spots
        if self.spot_vector is None:
            token_SD = self.spot_start_D.expand(n_spots, -1)
        else:
            own_SV, usable_S = batch.vector_SV, None
            if mask is not None:
                own_SV, usable_S = self.visible_vector(batch, mask), ~mask.spot_S
            around_SV = neighbour_mean(own_SV, batch.neighbour_SN, usable_S)
            token_SD = self.spot_vector(torch.cat([own_SV, around_SV], dim=1)) + self.spot_start_D
        if mask is None:
            return token_SD
        return torch.where(mask.spot_S[:, None], self.masked_spot_D, token_SD)

    def visible_vector(self, batch: SlideBatch, mask: OmicsMask) -> Tensor:
        """The spot vector without the masked genes (no leak), (S, V); 0 for a masked spot."""
        hidden_SK = batch.value_SK * mask.gene_SK
        removed_SV = torch.einsum("sk,skv->sv", hidden_SK, self.factors_GV[batch.gene_SK])
        own_SV = batch.vector_SV - removed_SV * batch.vector_scale_SV
        return own_SV * (~mask.spot_S)[:, None]


def relative_values(value_SK: Tensor, shown_SK: Tensor) -> Tensor:
    """Values over the mean of the spot's shown ones: the scale of depth and set size cancels."""
    shown = shown_SK.to(value_SK.dtype)
    total_S1 = (value_SK * shown).sum(dim=1, keepdim=True)
    mean_S1 = total_S1 / shown.sum(dim=1, keepdim=True).clamp(min=1.0)
    return value_SK * shown / mean_S1.clamp(min=1e-8)


OMICS_ENCODERS: Mapping[str, Any] = {
    "graph_hierarchy": GraphHierarchyEncoder,
    "mlp": MlpOmicsEncoder,
}


def build_omics_encoder(config: OmicsConfig, context: OmicsContext) -> nn.Module:
    """The omics tower that ``config.name`` names."""
    return resolve_encoder(config.name, OMICS_ENCODERS, "omics")(config, context)
