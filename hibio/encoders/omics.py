"""The omics towers, gene graphs under a spatial graph (docs/method.md 3), and gene sets as spots.

Legend: S spots, K keyword genes, G vocabulary, V gene factors, N neighbours, D width, M pathways, m
pathways encoded anew in a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hibio.artifacts import Artifacts
from hibio.batch import SlideBatch, lone_spots
from hibio.config.files import ConfigError
from hibio.config.model import OmicsConfig
from hibio.encoders.base import (
    NO_VARIANCE,
    OmicsContext,
    build_encoder,
    even_out,
    mlp,
    neighbour_mean,
)
from hibio.encoders.genes import GeneGraphs, OmicsMask, Scratch, relative_values
from hibio.encoders.layers import HierarchyLayer
from preprocessing.coexpression.spot_groups import SpotGroups

PART_NUMBERS = {"cpu": 6_400_000, "gpu": 400_000_000}  # held at a time, of one part of the spots
PART_TENSORS = 8  # of the size of a part's gene tokens: in, normed, query, key, value, hidden


class GraphHierarchyEncoder(nn.Module):
    """Gene tokens under spot tokens; see docs/method.md 3 for each part."""

    factors_GV: Tensor
    identity_GV: Tensor

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
        self.gene_graphs = GeneGraphs(context) if config.gene_graph else None
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

    @staticmethod
    def _identity(config: OmicsConfig, context: OmicsContext, n_factors: int) -> nn.Module | None:
        if config.identity == "factors":
            return nn.Linear(n_factors, config.width)
        if config.identity == "table":
            return nn.Embedding(context.n_genes + 1, config.width, padding_idx=context.n_genes)
        return None

    def forward(self, batch: SlideBatch) -> Tensor:
        """Spot embeddings (S, D).

        In evaluation mode without gradients only what the core spots depend on is computed: layer
        by layer the halo shrinks, and rows of halo spots are not brought up to date. In training
        mode the same dropout is drawn with and without gradients.
        """
        if torch.is_grad_enabled() or self.training:
            return self.encode(batch)[0]
        return self.norm_spot(self._run_in_parts(batch, None, self._needed(batch))[0])

    def encode(self, batch: SlideBatch, mask: OmicsMask | None = None) -> tuple[Tensor, Tensor]:
        """Spot (S, D) and gene (S, K, D) embeddings, of the masked view when ``mask`` is given."""
        if torch.is_grad_enabled() or self.training:
            spot_SD, gene_SKD = self._run(batch, mask)
        else:
            every = [batch.n_spots] * (len(self.layers) + 1)
            spot_SD, gene_SKD = self._run_in_parts(batch, mask, every)
        return self.norm_spot(spot_SD), self.norm_gene(gene_SKD)

    def _run(self, batch: SlideBatch, mask: OmicsMask | None) -> tuple[Tensor, Tensor]:
        """Spot (S, D) and gene (S, K, D) tokens after the layers, for training."""
        present_SK = batch.gene_SK < self.n_genes
        gene_SKD = self._gene_tokens(batch.gene_SK, batch.value_SK, mask)
        spot_SD = self._spot_tokens(batch, mask)
        edge_SKK = self.pair_weights(batch.gene_SK, batch.spot_group_S)
        near = (batch.neighbour_SN, batch.distance_um_SN)
        again = self.config.checkpoint and torch.is_grad_enabled()
        for layer in self.layers:
            inputs = (spot_SD, gene_SKD, present_SK, edge_SKK, *near)
            if again:
                spot_SD, gene_SKD = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                spot_SD, gene_SKD = layer(*inputs)
        return spot_SD, gene_SKD

    def _run_in_parts(
        self, batch: SlideBatch, mask: OmicsMask | None, needed: list[int]
    ) -> tuple[Tensor, Tensor]:
        """The same without gradients, genes in parts of spots that fit the cache.

        Args:
            batch: spots, those that matter longest first.
            mask: what the masked view hides.
            needed: how many spots each layer updates, and how many enter the first.
        """
        scratch, first = Scratch(), slice(0, needed[0])
        spot_SD = self._spot_tokens(batch, mask).clone()
        gene_SKD = spot_SD.new_empty(needed[0], batch.gene_SK.shape[1], self.embed_dim)
        present_SK = batch.gene_SK[first] < self.n_genes
        pairs = None
        if self.gene_graphs is not None:
            pairs = self.gene_graphs.pairs(batch.gene_SK[first], batch.spot_group_S[first])
        for part in self._parts(*gene_SKD.shape[:2]):
            shown = None if mask is None else OmicsMask(mask.gene_SK[part], mask.spot_S[part])
            gene_SKD[part] = self._gene_tokens(batch.gene_SK[part], batch.value_SK[part], shown)
        for module, n_spots in zip(self.layers, needed[1:], strict=True):
            layer = cast(HierarchyLayer, module)
            near_SN, um_SN = batch.neighbour_SN[:n_spots], batch.distance_um_SN[:n_spots]
            spot_SD[:n_spots] = layer.move_spots(spot_SD, near_SN, um_SN)
            for part in self._parts(n_spots, present_SK.shape[1]):
                spot_SD[part], gene_SKD[part] = layer.move_genes(
                    spot_SD[part],
                    gene_SKD[part],
                    present_SK[part],
                    None if pairs is None else pairs[part],
                    scratch,
                )
        return spot_SD, gene_SKD

    def _parts(self, n_spots: int, n_genes: int) -> list[slice]:
        """Runs of spots whose gene tokens and attention weights fit the cache together.

        Their lengths are powers of two: oneDNN keeps the code that it makes for every new size.
        """
        numbers = n_genes * (PART_TENSORS * self.embed_dim + self.config.heads * n_genes)
        device = "gpu" if self.spot_start_D.is_cuda else "cpu"
        size = 2 ** int(math.log2(max(1, PART_NUMBERS[device] // numbers)))
        parts, start = [], 0
        while start < n_spots:
            while size > n_spots - start:
                size //= 2
            parts.append(slice(start, start + size))
            start += size
        return parts

    def _needed(self, batch: SlideBatch) -> list[int]:
        """How many spots (core first, then by hops) each layer must update; see `_run_in_parts`.

        Every spot in every layer when the batch is not in that order.
        """
        n_layers = len(self.layers)
        hop_S = torch.where(batch.core_S, 0, n_layers + 1)
        for hop in range(n_layers if self.config.spatial_graph else 0):
            near = batch.neighbour_SN[hop_S == hop]
            near = near[near >= 0]
            hop_S[near] = hop_S[near].clamp(max=hop + 1)
        if bool((hop_S.diff() < 0).any()):
            return [batch.n_spots] * (n_layers + 1)
        depth = torch.arange(n_layers - 1, -1, -1, device=hop_S.device)
        if not self.config.spatial_graph:
            depth = depth * 0
        needed: list[int] = (hop_S[:, None] <= depth).sum(dim=0).tolist()
        return [*needed[:1], *needed] if needed else [0]

    def pair_weights(self, gene_SK: Tensor, spot_group_S: Tensor) -> Tensor | None:
        """Gene-graph weight of every pair of a spot's genes, (S, K, K); None without gene graph."""
        if self.gene_graphs is None:
            return None
        return self.gene_graphs.pairs(gene_SK, spot_group_S)

    def gene_summands(
        self, gene_SK: Tensor, value_SK: Tensor, hidden_SK: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What a gene token is the sum of, by name, (S, K, D) each.

        Args:
            gene_SK: vocabulary indices; G is padding.
            value_SK: TF-IDF values.
            hidden_SK: genes that take no part in the ranks and in the mean value; none when None.
        """
        present_SK = gene_SK < self.n_genes
        shown_SK = present_SK if hidden_SK is None else present_SK & ~hidden_SK
        relative_SK = relative_values(value_SK, shown_SK)
        rank_SK = (shown_SK.cumsum(dim=1) - 1).clamp(min=0)
        summands = {"value": self.value(relative_SK[..., None]), "rank": self.rank(rank_SK)}
        if isinstance(self.identity, nn.Embedding):
            summands["identity"] = self.identity(gene_SK)
        elif self.identity is not None:
            summands["identity"] = self.identity(F.embedding(gene_SK, self.identity_GV))
        return summands

    def _gene_tokens(self, gene_SK: Tensor, value_SK: Tensor, mask: OmicsMask | None) -> Tensor:
        hidden_SK = None if mask is None else mask.gene_SK
        summands = self.gene_summands(gene_SK, value_SK, hidden_SK)
        token_SKD = summands["value"] + summands["rank"]
        if hidden_SK is not None:
            token_SKD = torch.where(hidden_SK[..., None], self.masked_gene_D, token_SKD)
        if "identity" in summands:
            token_SKD = token_SKD + summands["identity"]
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

    def spot_summands(self, batch: SlideBatch) -> dict[str, Tensor]:
        """What a spot token is the sum of before the layers, by name, (S, D) each."""
        if self.spot_vector is None:
            return {}
        own_DV, around_DV = self.spot_vector.weight.chunk(2, dim=1)
        around_SV = neighbour_mean(batch.vector_SV, batch.neighbour_SN)
        return {
            "own vector": F.linear(batch.vector_SV, own_DV),
            "neighbours' mean": F.linear(around_SV, around_DV),
        }

    @torch.no_grad()
    def calibrate(self, batch: SlideBatch) -> None:
        """Let all that a token is the sum of start with a like share (docs/method.md 3).

        For an untrained encoder: maps are shifted and scaled until, on these spots, the summands
        of a gene token have one variance and a sum of variances of 1; so have the two halves of
        the spot vector and the messages from the genes of all layers together. Messages to the
        genes start like those from them, the gene graph's bias like the logits that it is added to.

        Args:
            batch: some typical training spots; their halo is not measured.
        """
        was_training, core = self.training, batch.core_S
        self.eval()
        self._calibrate_genes(batch.gene_SK[core], batch.value_SK[core])
        summands = self.spot_summands(batch)
        share = 1 / (1 + len(summands))
        if self.spot_vector is not None:
            self.spot_vector.bias.zero_()
            halves_DV = self.spot_vector.weight.chunk(2, dim=1)
            for half_DV, token_SD in zip(halves_DV, summands.values(), strict=True):
                found = token_SD[core].var(dim=0, correction=0).mean()
                half_DV.mul_((share / found.clamp(min=NO_VARIANCE)).sqrt())
        spot_SD = self._spot_tokens(batch, None)
        gene_SKD = self._gene_tokens(batch.gene_SK, batch.value_SK, None)
        present_SK = batch.gene_SK < self.n_genes
        edge_SKK = self.pair_weights(batch.gene_SK, batch.spot_group_S)
        near = (batch.neighbour_SN, batch.distance_um_SN)
        for layer in self.layers:
            inputs = (spot_SD, gene_SKD, present_SK, edge_SKK, *near)
            one = cast(HierarchyLayer, layer)
            spot_SD, gene_SKD = one.calibrate(inputs, core, share / len(self.layers))
        self.train(was_training)

    def _calibrate_genes(self, gene_SK: Tensor, value_SK: Tensor) -> None:
        """The gene half of `calibrate`; the value enters its perceptron standardised."""
        present_SK = gene_SK < self.n_genes
        relative = relative_values(value_SK, present_SK)[present_SK]
        spread = relative.std() if len(relative) > 1 else relative.new_tensor(0.0)
        if spread > 1e-6:
            first = cast(nn.Linear, self.value[0])
            first.weight.div_(spread)
            first.bias.sub_(first.weight[:, 0] * relative.mean())
        summands = self.gene_summands(gene_SK, value_SK)
        last = {"value": self.value[-1], "rank": self.rank, "identity": self.identity}
        for name, token_SKD in summands.items():
            module = cast(nn.Linear | nn.Embedding, last[name])
            even_out(module, token_SKD[present_SK], 1 / len(summands))

    def visible_vector(self, batch: SlideBatch, mask: OmicsMask) -> Tensor:
        """The spot vector without the masked genes (no leak), (S, V); 0 for a masked spot."""
        hidden_SK = batch.parts_SK * mask.gene_SK
        removed_SV = torch.einsum("sk,skv->sv", hidden_SK, self.factors_GV[batch.gene_SK])
        own_SV = batch.vector_SV - removed_SV * batch.vector_scale_SV
        return own_SV * (~mask.spot_S)[:, None]


class MlpOmicsEncoder(nn.Module):
    """Perceptron on the spot vector and its neighbours' mean: the flat baseline."""

    hops = 1

    def __init__(self, config: OmicsConfig, context: OmicsContext) -> None:
        super().__init__()
        width, n_factors = config.width, context.factors_GV.shape[1]
        self.embed_dim = width
        self.layers = mlp(2 * n_factors, 2 * width, width, config.dropout)

    def forward(self, batch: SlideBatch) -> Tensor:
        """Embeddings (S, width)."""
        around_SV = neighbour_mean(batch.vector_SV, batch.neighbour_SN)
        return self.layers(torch.cat([batch.vector_SV, around_SV], dim=1))


OMICS_ENCODERS: Mapping[str, Any] = {
    "graph_hierarchy": GraphHierarchyEncoder,
    "mlp": MlpOmicsEncoder,
}


def build_omics_encoder(config: OmicsConfig, context: OmicsContext) -> nn.Module:
    """The omics tower that ``config.name`` and ``config.variant`` name."""
    if config.name == "graph_hierarchy" and config.variant == "heist":
        from hibio.encoders.heist import HeistEncoder

        return HeistEncoder(config, context)
    return build_encoder(
        config.name, OMICS_ENCODERS, "omics", config.settings, config=config, context=context
    )


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
        groups: a set reads the gene graph of the spots that are most like it; None: the first.
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
