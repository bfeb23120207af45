"""A straightforward message-passing version of the graph-hierarchy encoder, to compare speed with.

Same weights, same results, other arithmetic: a list of edges under every spot (each pair of its
genes), one over the spots, and for every edge of every layer its two ends are gathered
(`index_select`) and its message scattered (`index_add_`).

Legend: S spots, g genes of all the spots at hand, N neighbours, D width, H heads, E edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hibio.batch import SlideBatch
from hibio.encoders.layers import CrossMessages, HierarchyLayer
from hibio.encoders.omics import GraphHierarchyEncoder


@dataclass(frozen=True)
class SpotGraphs:
    """The gene graphs of some spots as one graph without edges between spots.

    Attributes:
        spots: which spots.
        spot_g: which of them each gene token belongs to.
        token_g: flat index (spot * K + place) of each.
        source_E: gene that speaks, of each edge.
        target_E: gene that listens.
        weight_E: co-expression of the two.
    """

    spots: slice
    spot_g: Tensor
    token_g: Tensor
    source_E: Tensor
    target_E: Tensor
    weight_E: Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, edge: tuple[Tensor, Tensor], bias: Tensor):
    """Softmax-weighted mean of the values that reach each target, (targets, H, d)."""
    source_E, target_E = edge
    key_EHd = key.index_select(0, source_E)
    query_EHd = query.index_select(0, target_E)
    logit_EH = (query_EHd * key_EHd).sum(dim=2) / math.sqrt(query.shape[2]) + bias
    index_EH = target_E[:, None].expand_as(logit_EH)
    top = logit_EH.new_full(query.shape[:2], -torch.inf)
    top.scatter_reduce_(0, index_EH, logit_EH, "amax")
    weight_EH = (logit_EH - top.index_select(0, target_E)).exp()
    total = torch.zeros_like(top).index_add_(0, target_E, weight_EH)
    weight_EH = weight_EH / total.index_select(0, target_E)
    message_EHd = weight_EH[:, :, None] * value.index_select(0, source_E)
    return torch.zeros_like(query).index_add_(0, target_E, message_EHd)


class MessagePassing:
    """The encoder's forward pass over edge lists.

    Args:
        encoder: whose weights to use, in evaluation mode.
        at_a_time: spots whose gene graphs are joined into one; 1 is spot by spot.
    """

    def __init__(self, encoder: GraphHierarchyEncoder, at_a_time: int = 1) -> None:
        self.encoder = encoder
        self.at_a_time = at_a_time

    @torch.no_grad()
    def __call__(self, batch: SlideBatch) -> Tensor:
        """Spot embeddings (S, D)."""
        encoder = self.encoder
        gene_SKD = encoder._gene_tokens(batch.gene_SK, batch.value_SK, None)
        spot_SD = encoder._spot_tokens(batch, None)
        graphs = self._graphs(batch)
        flat_gD = gene_SKD.flatten(0, 1)
        token = [flat_gD[graph.token_g] for graph in graphs]
        for layer in encoder.layers:
            spot_SD = self._spots(layer, spot_SD, batch)
            moved = spot_SD.clone()
            for number, graph in enumerate(graphs):
                token[number] = self._genes(layer, token[number], graph)
                if layer.cross is not None:
                    moved[graph.spots], token[number] = self._cross(
                        layer.cross, spot_SD[graph.spots], token[number], graph
                    )
            spot_SD = moved
        return encoder.norm_spot(spot_SD)

    def _graphs(self, batch: SlideBatch) -> list[SpotGraphs]:
        n_genes = self.encoder.n_genes
        graphs = []
        for start in range(0, batch.n_spots, self.at_a_time):
            spots = slice(start, min(start + self.at_a_time, batch.n_spots))
            gene_SK = batch.gene_SK[spots]
            spot_g, place_g = (gene_SK < n_genes).nonzero(as_tuple=True)
            offset = torch.cat([spot_g.new_zeros(1), spot_g.bincount().cumsum(0)[:-1]])
            token_g = (start + spot_g) * gene_SK.shape[1] + place_g
            weight_SKK = self.encoder.pair_weights(gene_SK, batch.spot_group_S[spots])
            source, target, weight = [], [], []
            for spot, first in enumerate(offset.tolist()):
                place = place_g[spot_g == spot]
                local = torch.arange(len(place), device=place.device)
                pair = torch.cartesian_prod(local, local)
                target.append(first + pair[:, 0])
                source.append(first + pair[:, 1])
                if weight_SKK is not None:
                    weight.append(weight_SKK[spot][place[pair[:, 0]], place[pair[:, 1]]])
            weight_E = torch.cat(weight) if weight else torch.zeros(len(torch.cat(source)))
            graphs.append(
                SpotGraphs(spots, spot_g, token_g, torch.cat(source), torch.cat(target), weight_E)
            )
        return graphs

    def _genes(self, layer: HierarchyLayer, token_gD: Tensor, graph: SpotGraphs) -> Tensor:
        part = layer.gene_attention
        packed = part.query_key_value(part.norm(token_gD)).view(len(token_gD), 3, part.heads, -1)
        bias_EH = graph.weight_E[:, None] * part.bias_scale_H
        edge = (graph.source_E, graph.target_E)
        mixed = attend(packed[:, 0], packed[:, 1], packed[:, 2], edge, bias_EH)
        token_gD = token_gD + part.out(mixed.flatten(1))
        return token_gD + layer.gene_forward(token_gD)

    def _spots(self, layer: HierarchyLayer, spot_SD: Tensor, batch: SlideBatch) -> Tensor:
        part = layer.spot_attention
        if part is not None:
            n_spots = len(spot_SD)
            own = torch.arange(n_spots, device=spot_SD.device)
            spot_E, place_E = (batch.neighbour_SN >= 0).nonzero(as_tuple=True)
            source_E = torch.cat([own, batch.neighbour_SN[spot_E, place_E]])
            bias_SHN = part._bias(batch.distance_um_SN)[:, :, 1:]
            bias_EH = bias_SHN[spot_E, :, place_E]
            bias_EH = torch.cat([bias_EH.new_zeros(n_spots, part.heads), bias_EH])
            normed = part.norm(spot_SD)
            query = part.query(normed).view(n_spots, part.heads, -1)
            packed = part.key_value(normed).view(n_spots, 2, part.heads, -1)
            edge = (source_E, torch.cat([own, spot_E]))
            mixed = attend(query, packed[:, 0], packed[:, 1], edge, bias_EH)
            spot_SD = spot_SD + part.gate * part.out(mixed.flatten(1))
        return spot_SD + layer.spot_forward(spot_SD)

    def _cross(
        self, part: CrossMessages, spot_SD: Tensor, token_gD: Tensor, graph: SpotGraphs
    ) -> tuple[Tensor, Tensor]:
        normed_gD = part.norm_gene(token_gD)
        query_SD = part.score(part.norm_spot(spot_SD))
        logit_g = (query_SD.index_select(0, graph.spot_g) * normed_gD).sum(dim=1)
        logit_g = logit_g / math.sqrt(spot_SD.shape[1])
        top_S = spot_SD.new_full((len(spot_SD),), -torch.inf)
        top_S.scatter_reduce_(0, graph.spot_g, logit_g, "amax")
        weight_g = (logit_g - top_S.index_select(0, graph.spot_g)).exp()
        total_S = torch.zeros_like(top_S).index_add_(0, graph.spot_g, weight_g)
        weight_g = weight_g / total_S.index_select(0, graph.spot_g)
        message_gD = weight_g[:, None] * part.value(normed_gD)
        up_SD = torch.zeros_like(spot_SD).index_add_(0, graph.spot_g, message_gD)
        spot_SD = spot_SD + part.gate_up * up_SD
        down_SD = part.gate_down * part.to_gene(part.norm_spot(spot_SD))
        return spot_SD, token_gD + down_SD.index_select(0, graph.spot_g)
