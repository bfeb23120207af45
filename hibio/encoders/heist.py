"""Reference mode ``variant: heist``: the published v2 model (docs/method.md 3).

Legend: S spots ("cells"), K keyword genes, N neighbours, H heads, D width, T gene graphs, G
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hibio.batch import SlideBatch
from hibio.config.files import ConfigError
from hibio.config.model import OmicsConfig
from hibio.encoders.base import OmicsContext
from hibio.encoders.genes import GeneGraphs, OmicsMask, RowLinear, relative_values

#: Gene tokens worked on at once: what fits the caches of a processor, what fills an accelerator.
#: It bounds the memory of a whole slide; a result differs by rounding only.
CPU_TOKENS, ACCELERATOR_TOKENS = 4096, 2**18


def spots_at_once(n_genes: int, device: torch.device) -> int:
    """Spots whose gene tokens are worked on together, for K genes a spot."""
    tokens = CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS
    return max(1, tokens // max(n_genes, 1))


def sinusoid(position: Tensor, rate_d: Tensor) -> Tensor:
    """Columns 2j and 2j + 1 are the sine and cosine of position * rate j, (..., 2 d)."""
    angle = position[..., None] * rate_d
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def rank_encoding(rank_SK: Tensor, n_ranks_S: Tensor, width: int, code: str) -> Tensor:
    """Sinusoid of the ranks of a spot's genes, (S, K, D), by one of the two published codes.

    ``fixed`` (published switch ``rank_pe_fixed``) has the rate 10000^(-2j/D) of the rank itself.
    ``released`` (published default, that of the released checkpoint) spreads the ranks of a spot
    over 0 to 1 and has the rate 10000 * 8j/D: a product where a power was meant, so neighbouring
    ranks are far apart and the code is rather a name of each rank.

    Args:
        rank_SK: 0 (the highest value), 1, ..., in the floating-point type of the result.
        n_ranks_S: ranks that each spot has; one rank alone stands at 0.
        width: D, even.
        code: fixed | released.
    """
    step_d = torch.arange(0, width, 2, device=rank_SK.device, dtype=rank_SK.dtype)
    if code == "released":
        scaled_SK = rank_SK / (n_ranks_S[:, None] - 1).clamp(min=1)
        return sinusoid(scaled_SK, 10000.0 * (step_d * 4 / width))
    rank_K = torch.arange(rank_SK.shape[1], device=rank_SK.device, dtype=rank_SK.dtype)
    return sinusoid(rank_K, torch.pow(10000.0, -step_d / width))[rank_SK.long()]


def place_encoding(place_S2: Tensor, width: int) -> Tensor:
    """Sinusoid of a place in the plane, (S, D): D/2 columns of x, then D/2 of y.

    Columns 2i and 2i + 1 of an axis with a = D/2 columns are the sine and cosine of
    x / 10000^(4i/a).

    Args:
        place_S2: standardised coordinates, no unit.
        width: D, a multiple of 4.
    """
    axis = width // 2
    step_d = torch.arange(axis // 2, device=place_S2.device, dtype=place_S2.dtype)
    return sinusoid(place_S2, torch.pow(10000.0, -4 * step_d / axis)).flatten(1)


def standardised_places(xy_um_S2: Tensor, slide_of_spot_S: Tensor) -> Tensor:
    """Coordinates with mean 0 and sd 1 on each axis of each slide, (S, 2), no unit.

    This is a published defect (physical scale and aspect ratio are lost), kept for the reference
    mode only. An axis on which all spots of a slide agree becomes 0.
    """
    _, slide_S = torch.unique(slide_of_spot_S, return_inverse=True)
    n_B1 = xy_um_S2.new_zeros(len(slide_S)).index_add(0, slide_S, torch.ones_like(xy_um_S2[:, 0]))
    n_B1 = n_B1.clamp(min=1.0)[:, None]
    mean_B2 = torch.zeros_like(xy_um_S2).index_add(0, slide_S, xy_um_S2) / n_B1
    centred_S2 = xy_um_S2 - mean_B2[slide_S]
    sd_B2 = (torch.zeros_like(xy_um_S2).index_add(0, slide_S, centred_S2**2) / n_B1).sqrt()
    one = torch.ones_like(sd_B2)
    flat_B2 = sd_B2 <= 1e-6 * (mean_B2.abs() + 1.0)  # rounding of equal coordinates
    scaled_S2 = centred_S2 / torch.where(flat_B2, one, sd_B2)[slide_S]
    return torch.where(flat_B2[slide_S], torch.zeros_like(scaled_S2), scaled_S2)


def gene_edges(graphs: GeneGraphs, gene_SK: Tensor, spot_group_S: Tensor) -> Tensor:
    """Which genes of a spot are connected in the graph of its group, (S, K, K) bool, symmetric.

    Args:
        graphs: the shared edge lists; an edge of weight above 0 counts, in both directions.
        gene_SK: vocabulary index of each gene; G is padding.
        spot_group_S: 0..T-1.
    """
    one_way = graphs.pairs(gene_SK, spot_group_S) > 0
    return one_way | one_way.transpose(1, 2)


@dataclass(frozen=True)
class HeistGraphs:
    """What the layers of one batch share.

    Attributes:
        neighbour_SN: index in the batch of each spatial neighbour; -1 is none.
        same_slide_SS: True where one spot sees another; None when all are of one slide.
        present_SK: False marks padding.
        edge_SKK: see `gene_edges`.
    """

    neighbour_SN: Tensor
    same_slide_SS: Tensor | None
    present_SK: Tensor
    edge_SKK: Tensor


class NeighbourSum(nn.Module):
    """Graph isomorphism convolution with a trained epsilon: W((1 + eps) x_i + sum_j x_j) + b.

    As published, the edges of a spot hold a loop to itself, so its own token enters the sum too.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(1))
        self.linear = RowLinear(width, width)

    def forward(self, spot_SD: Tensor, neighbour_SN: Tensor) -> Tensor:
        """Update of the spot tokens, (S, D)."""
        present_SN = (neighbour_SN >= 0).to(spot_SD.dtype)
        around_SD = torch.einsum("sn,snd->sd", present_SN, spot_SD[neighbour_SN.clamp(min=0)])
        return self.linear((2 + self.eps) * spot_SD + around_SD)


class SlideAttention(nn.Module):
    """Dense multi-head attention over all spots of the batch that lie on the same slide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = RowLinear(width, 3 * width)
        self.out = RowLinear(width, width)

    def forward(self, spot_SD: Tensor, same_slide_SS: Tensor | None) -> Tensor:
        """Update of the spot tokens, (S, D)."""
        n_spots, width = spot_SD.shape
        packed = self.query_key_value(spot_SD).view(n_spots, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(1, 2, 0, 3)[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=same_slide_SS)
        return self.out(mixed[0].transpose(0, 1).reshape(n_spots, width))


class GeneGraphConvolution(nn.Module):
    """Transformer convolution: attention over the edges of a gene, heads side by side, root skip.

    W_skip x_i + b + [sum_j softmax_j(<q_i, k_j> / sqrt(D/H)) v_j of every head]; a gene without an
    edge keeps the skip alone.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value_skip = RowLinear(width, 4 * width)

    def forward(self, gene_SKD: Tensor, edge_SKK: Tensor) -> Tensor:
        """Update of the gene tokens, (S, K, D)."""
        n_spots, n_genes, width = gene_SKD.shape
        packed, skip_SKD = self.query_key_value_skip(gene_SKD).split([3 * width, width], dim=2)
        packed = packed.view(n_spots, n_genes, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        has_edge_SK1 = edge_SKK.any(dim=2, keepdim=True)
        seen_S1KK = (edge_SKK | ~has_edge_SK1)[:, None]  # no row is empty: that would be NaN
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_S1KK)
        mixed_SKD = mixed.transpose(1, 2).reshape(n_spots, n_genes, width)
        return skip_SKD + mixed_SKD * has_edge_SK1


class NormedPerceptron(nn.Module):
    """LN_post(u + f(LN_pre(u))) with f a three-layer ReLU perceptron (D, 4D, 4D, D).

    Args:
        width: D.
        dropout: on the input and on f; 0 is the published arithmetic.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm_pre = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            RowLinear(width, 4 * width),
            nn.ReLU(inplace=True),
            RowLinear(4 * width, 4 * width),
            nn.ReLU(inplace=True),
            RowLinear(4 * width, width),
        )
        self.norm_post = nn.LayerNorm(width)

    def forward(self, token: Tensor) -> Tensor:
        """Tokens (..., D)."""
        token = self.dropout(token)
        return self.norm_post(token + self.dropout(self.layers(self.norm_pre(token))))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse the weights of the block as it was before it was the published one."""
        if f"{prefix}norm_in.weight" in state_dict:
            raise ConfigError(
                "this checkpoint of variant 'heist' was trained by an older HiBio, whose blocks "
                "were LN(LN(u) + f(LN(u))) and not the published LN(u + f(LN(u))); its weights "
                "mean nothing in the published arithmetic. Train it again, or read it with the "
                "HiBio that wrote it"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


class CrossGate(nn.Module):
    """Message between the levels: (<t W_q, s W_k> / sqrt(D)) * (t W_v) for target t and source s.

    One number for each target; no softmax, and the value is the target's own (as published: the
    source only scales the target, or turns its sign).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = RowLinear(width, width, bias=False)
        self.key = RowLinear(width, width, bias=False)
        self.value = RowLinear(width, width, bias=False)

    def forward(self, target_SKD: Tensor, source_SD: Tensor) -> Tensor:
        """Gated targets (S, K, D); the source belongs to all K targets of its row."""
        # <W_q t, W_k s> = <t, W_q' W_k s>: one product a source, not one a target
        turned_SD = F.linear(self.key(source_SD), self.query.weight.T)
        gate_SK1 = torch.matmul(target_SKD, turned_SD[:, :, None])
        return gate_SK1 / math.sqrt(source_SD.shape[1]) * self.value(target_SKD)


class HeistLayer(nn.Module):
    """One layer: spots, genes, then the cross messages; the residual around it is the encoder's.

    Args:
        width: D.
        heads: H, of both attentions.
        dropout: see :class:`NormedPerceptron`.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.neighbour_sum = NeighbourSum(width)
        self.slide_attention = SlideAttention(width, heads)
        self.gene_convolution = GeneGraphConvolution(width, heads)
        self.spot_forward = NormedPerceptron(width, dropout)
        self.gene_forward = NormedPerceptron(width, dropout)
        self.spot_gate = CrossGate(width)
        self.gene_gate = CrossGate(width)

    def forward(
        self, spot_SD: Tensor, gene_SKD: Tensor, graphs: HeistGraphs
    ) -> tuple[Tensor, Tensor]:
        """Spot (S, D) and gene (S, K, D) tokens after the layer."""
        spot_SD = self.spot_forward(
            self.neighbour_sum(spot_SD, graphs.neighbour_SN)
            + self.slide_attention(spot_SD, graphs.same_slide_SS)
        )
        size = spots_at_once(gene_SKD.shape[1], gene_SKD.device)
        pieces = zip(
            *(x.split(size) for x in (spot_SD, gene_SKD, graphs.present_SK, graphs.edge_SKK)),
            strict=True,
        )
        parts = [self._genes(*piece) for piece in pieces]
        return torch.cat([spot for spot, _ in parts]), torch.cat([gene for _, gene in parts])

    def _genes(
        self, spot_SD: Tensor, gene_SKD: Tensor, present_SK: Tensor, edge_SKK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gene level and both cross messages of some spots; no spot needs another here."""
        gene_SKD = self.gene_forward(self.gene_convolution(gene_SKD, edge_SKK))
        pooled_SD = mean_of_genes(gene_SKD, present_SK)
        crossed_SD = self.spot_gate(spot_SD[:, None], pooled_SD)[:, 0]
        return F.gelu(crossed_SD), F.gelu(self.gene_gate(gene_SKD, spot_SD))


def mean_of_genes(gene_SKD: Tensor, present_SK: Tensor) -> Tensor:
    """Mean of a spot's gene tokens without padding, (S, D); 0 for a spot without genes."""
    weight_SK = present_SK.to(gene_SKD.dtype)
    weight_SK = weight_SK / weight_SK.sum(dim=1, keepdim=True).clamp(min=1.0)
    return torch.einsum("sk,skd->sd", weight_SK, gene_SKD)


class HeistEncoder(nn.Module):
    """What the published model computes, to be checked and compared with; not what to train first.

    Input: a spot is its standardised place spread over D columns plus the sinusoid of that place;
    a gene is its value spread over D columns plus the sinusoid of its rank (0 is the highest, by
    ``rank_code``); each through a linear map and GELU. Then the layers, a residual around each from
    the second on, and one LayerNorm that both levels share.

    Kept although they are defects, because they are the published arithmetic: places lose their
    micrometres (standardised per axis and slide), attention reaches every spot of a slide that is
    in the batch, so a result depends on the batch: ``hops`` is -1 (a slide is embedded in one
    piece), and in training the batch is all that a spot sees.

    With equal weights and inputs in float64 the tokens are those of the published code to 1e-5
    (golden values in tests/hibio/test_heist_published.py). Chosen by us: biases start at 0.

    Different on purpose: spatial edges are the batch's neighbour lists plus the loop (published:
    Delaunay triangles); gene edges are ours, of label-free groups; values are relative TF-IDF
    values (published: smoothed log values), since every encoder here reads these; hidden genes
    and spots are learned tokens (published: 0, which is a real value); ``dropout`` is applied if
    above 0 (published: none in the encoder). The projection head behind the published losses is
    `hibio.model.HiBio`'s own.

    Embeddings are 2 D wide. A spot's is [spot | mean of its genes], the published downstream
    embedding; a gene's is [gene | its spot], so that the decoder of `hibio.model.HiBio` finds one
    width at both levels.

    Args:
        config: width (a multiple of 4), layers, heads, dropout, rank_code. The
            reference mode has no gene identity, no skip and no switches.
        context: gene graphs from the artifacts; the factors are not read.

    Raises:
        ConfigError: settings that the reference mode does not have.
    """

    def __init__(self, config: OmicsConfig, context: OmicsContext) -> None:
        super().__init__()
        _check(config)
        width = config.width
        self.config = config
        self.embed_dim = 2 * width
        self.hops = -1
        self.n_genes = context.n_genes
        self.gene_graphs = GeneGraphs(context)
        self.spot_input = nn.Sequential(RowLinear(width, width), nn.GELU())
        self.gene_input = nn.Sequential(RowLinear(width, width), nn.GELU())
        self.layers = nn.ModuleList(
            HeistLayer(width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.apply(_xavier)
        self.masked_gene_D = nn.Parameter(torch.randn(width) * 0.02)
        self.masked_spot_D = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, batch: SlideBatch) -> Tensor:
        """Spot embeddings (S, 2 D)."""
        return self._embedded(*self._run(batch, None))

    def encode(self, batch: SlideBatch, mask: OmicsMask | None = None) -> tuple[Tensor, Tensor]:
        """Spot (S, 2 D) and gene (S, K, 2 D) embeddings, of the masked view with ``mask``."""
        spot_SD, gene_SKD, present_SK = self._run(batch, mask)
        beside_SKD = spot_SD[:, None, :].expand_as(gene_SKD)
        return self._embedded(spot_SD, gene_SKD, present_SK), torch.cat([gene_SKD, beside_SKD], 2)

    @staticmethod
    def _embedded(spot_SD: Tensor, gene_SKD: Tensor, present_SK: Tensor) -> Tensor:
        return torch.cat([spot_SD, mean_of_genes(gene_SKD, present_SK)], dim=1)

    def _run(self, batch: SlideBatch, mask: OmicsMask | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normed spot (S, D) and gene (S, K, D) tokens after the layers, and which are present."""
        graphs = HeistGraphs(
            neighbour_SN=batch.neighbour_SN,
            same_slide_SS=_same_slide(batch.slide_of_spot_S),
            present_SK=batch.gene_SK < self.n_genes,
            edge_SKK=gene_edges(self.gene_graphs, batch.gene_SK, batch.spot_group_S),
        )
        spot_SD = self._spot_tokens(batch, mask)
        gene_SKD = self._gene_tokens(batch, graphs.present_SK, mask)
        for depth, layer in enumerate(self.layers):
            new_SD, new_SKD = layer(spot_SD, gene_SKD, graphs)
            spot_SD = spot_SD + new_SD if depth else new_SD
            gene_SKD = gene_SKD + new_SKD if depth else new_SKD
        return self.norm(spot_SD), self.norm(gene_SKD), graphs.present_SK

    def _spot_tokens(self, batch: SlideBatch, mask: OmicsMask | None) -> Tensor:
        width = self.config.width
        place_S2 = standardised_places(batch.xy_um_S2, batch.slide_of_spot_S)
        spread_SD = place_S2.repeat_interleave(width // 2, dim=1)
        token_SD = self.spot_input(spread_SD + place_encoding(place_S2, width))
        if mask is None:
            return token_SD
        return torch.where(mask.spot_S[:, None], self.masked_spot_D, token_SD)

    def _gene_tokens(self, batch: SlideBatch, present_SK: Tensor, mask: OmicsMask | None) -> Tensor:
        shown_SK = present_SK if mask is None else present_SK & ~mask.gene_SK
        relative_SK = relative_values(batch.value_SK, shown_SK)
        rank_SK = (shown_SK.cumsum(dim=1) - 1).clamp(min=0).to(relative_SK.dtype)  # values fall
        code_SKD = rank_encoding(
            rank_SK, shown_SK.sum(dim=1), self.config.width, self.config.rank_code
        )
        token_SKD = self.gene_input(relative_SK[..., None] + code_SKD)
        if mask is None:
            return token_SKD
        return torch.where(mask.gene_SK[..., None], self.masked_gene_D, token_SKD)


def _same_slide(slide_of_spot_S: Tensor) -> Tensor | None:
    """Pairs of spots of one slide (S, S), or None when there is only one slide."""
    if bool((slide_of_spot_S == slide_of_spot_S[:1]).all()):
        return None
    return slide_of_spot_S[:, None] == slide_of_spot_S[None, :]


def _xavier(module: nn.Module) -> None:
    """Xavier-uniform weights, biases of 0; what is packed into one matrix is drawn on its own."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, GeneGraphConvolution):  # comes after its linear map
        for block in module.query_key_value_skip.weight.chunk(4):
            nn.init.xavier_uniform_(block)


def _check(config: OmicsConfig) -> None:
    """Refuse what the published arithmetic does not have, rather than ignore it."""
    if config.width % 4:
        raise ConfigError(
            f"model.omics.width is {config.width}; variant 'heist' encodes x and y by sine and "
            "cosine, so it must be a multiple of 4"
        )
    wanted = {
        "identity": "none",
        "skip": False,
        "gene_graph": True,
        "spatial_graph": True,
        "cross": True,
    }
    wrong = [name for name, value in wanted.items() if getattr(config, name) != value]
    if wrong:
        found = ", ".join(f"{name} is {getattr(config, name)!r}" for name in wrong)
        remedy = ", ".join(f"model.omics.{name}: {str(wanted[name]).lower()}" for name in wrong)
        raise ConfigError(
            f"variant 'heist' is the published arithmetic without switches, and {found}; set "
            f"{remedy}, or variant: hibio"
        )
