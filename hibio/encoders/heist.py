"""Reference mode ``variant: heist``: the layer arithmetic of the published v2 model (METHOD 3).

Legend: S spots ("cells"), K keyword genes, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hibio.batch import SlideBatch
from hibio.config import ConfigError
from hibio.encoders.base import OmicsContext
from hibio.encoders.gene_pairs import GeneGraphs
from hibio.encoders.heist_layers import (
    GeneGraphConvolution,
    HeistGraphs,
    HeistLayer,
    gene_edges,
    mean_of_genes,
    place_encoding,
    rank_encoding,
    standardised_places,
)
from hibio.encoders.omics import OmicsMask, relative_values
from hibio.encoders.row_linear import RowLinear

if TYPE_CHECKING:
    from hibio.encoders.omics import OmicsConfig


class HeistEncoder(nn.Module):
    """What the published model computes, to be checked and compared with; not what to train first.

    Input: a spot is its standardised place spread over D columns plus the sinusoid of that place;
    a gene is its value spread over D columns plus the sinusoid of its rank (0 is the highest);
    each through a linear map and GELU. Then the layers (`hibio.encoders.heist_layers`), a residual
    around each from the second on, and one LayerNorm that both levels share.

    Kept although they are defects, because they are the published arithmetic: places lose their
    micrometres (standardised per axis and slide), attention reaches every spot of a slide that is
    in the batch, so a result depends on the batch: ``hops`` is -1 (a slide is embedded in one
    piece), and in training the batch is all that a spot sees.

    Chosen where the report on the published model is silent: spot sum and spot attention are
    added; the perceptron's residual starts behind the first norm; both cross messages read the
    tokens before either; sine and cosine alternate; biases start at 0; no positional term is added
    again after the input.

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
        config: width (a multiple of 4), layers, heads, dropout. The reference mode has no gene
            identity, no skip and no switches.
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
        rank_SK = (shown_SK.cumsum(dim=1) - 1).clamp(min=0)  # values fall along K
        table_KD = rank_encoding(shown_SK.shape[1], self.config.width, shown_SK.device)
        token_SKD = self.gene_input(relative_SK[..., None] + table_KD[rank_SK])
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
