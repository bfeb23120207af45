"""A layer of the graph-hierarchy encoder: genes, spots, messages across (docs/method.md 3).

On a CPU, attention among genes is written by hand (`benchmarks/attention.py` says what it brings):
what `scaled_dot_product_attention` computes from the bias ``scale_H x edge``, without ever holding
a table of all spots and heads: neither the bias nor the weights, which are computed again for the
gradient.

Legend: S spots, K keyword genes, N neighbours, H heads, D width, d = D / H, B distance bases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hibio.encoders.base import even_out
from hibio.encoders.genes import RowLinear, Scratch

LOGIT_NUMBERS = 700_000  # logits held at a time: about the second-level cache
LOG2_E = math.log2(math.e)
SAFE_EXPONENT = 60.0  # 2^60 times the number of genes is far inside float32
#: Arguments and results of `HierarchyLayer.forward`.
LayerInputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]
LayerOutputs = tuple[Tensor, Tensor]
SPOTS_AT_A_TIME = 256  # whose neighbours are gathered together, without gradients


@dataclass(frozen=True)
class BiasedAttention:
    """Queries, keys and values of some spots, and what the softmax over them needs.

    Powers of two are cheaper than those of e, and the row maximum is taken off only when the
    logits could overflow without (the lengths of queries and keys bound them).

    Attributes:
        packed: (3, S, H, K, d) contiguous: queries, keys, values.
        seen_SK: False for what nobody attends to; no spot has False alone.
        edge_SKK: bias before scaling, not negative, or None.
        scale_H: factor of each head.
        scratch: buffers.
    """

    packed: Tensor
    seen_SK: Tensor
    edge_SKK: Tensor | None
    scale_H: Tensor
    scratch: Scratch

    def mix(self) -> Tensor:
        """Weighted means of the values, (S, K, H, d)."""
        n_spots, heads, n_genes, d = self.packed.shape[1:]
        out = self.scratch.take("mixed", (n_spots, n_genes, heads, d), self.packed)
        for part, weight in self._weights():
            value = self.packed[2, part].flatten(0, 1)
            mixed = torch.bmm(weight.flatten(0, 1), value).view(-1, heads, n_genes, d)
            total = weight.sum(dim=3, keepdim=True)
            torch.div(mixed, total, out=out[part].transpose(1, 2))
        return out

    def gradients(self, grad_SKHd: Tensor, mixed_SKHd: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``packed`` and of ``scale_H``, from those of the means."""
        scale = 1.0 / math.sqrt(self.packed.shape[4])
        result = torch.empty_like(self.packed)
        scale_grad_H = torch.zeros_like(self.scale_H)
        inner_SHK = (grad_SKHd * mixed_SKHd).sum(dim=3).transpose(1, 2)
        grad_SHKd = grad_SKHd.transpose(1, 2).contiguous()
        for part, weight in self._weights():
            weight.div_(weight.sum(dim=3, keepdim=True))
            grad = grad_SHKd[part].flatten(0, 1)
            query, key, value = (one.flatten(0, 1) for one in self.packed[:, part].unbind(0))
            to_query, to_key, to_value = (one.flatten(0, 1) for one in result[:, part].unbind(0))
            square = weight.flatten(0, 1)
            torch.bmm(square.transpose(1, 2), grad, out=to_value)
            logit = self.scratch.take("logit gradients", tuple(square.shape), square)
            torch.bmm(grad, value.transpose(1, 2), out=logit)
            logit.sub_(inner_SHK[part].flatten(0, 1)[:, :, None]).mul_(square)
            torch.baddbmm(to_query, logit, key, beta=0, alpha=scale, out=to_query)
            torch.baddbmm(to_key, logit.transpose(1, 2), query, beta=0, alpha=scale, out=to_key)
            if self.edge_SKK is not None:
                torch.mul(logit.view_as(weight), self.edge_SKK[part, None], out=weight)
                scale_grad_H += weight.sum(dim=(0, 2, 3))
        return result, scale_grad_H

    def _weights(self) -> Iterator[tuple[slice, Tensor]]:
        """Some spots and their softmax weights (n, H, K, K) before division by the row sums."""
        n_spots, heads, n_genes, d = self.packed.shape[1:]
        scale, scale_H = LOG2_E / math.sqrt(d), self.scale_H * LOG2_E
        safe, padded = self._is_safe(scale, scale_H), not bool(self.seen_SK.all())
        size = max(1, LOGIT_NUMBERS // (heads * n_genes**2))
        for start in range(0, n_spots, size):
            part = slice(start, min(start + size, n_spots))
            shape = (part.stop - start, heads, n_genes, n_genes)
            logit = self.scratch.take("logits", shape, self.packed)
            if self.edge_SKK is not None:
                torch.mul(self.edge_SKK[part, None], scale_H[:, None, None], out=logit)
            square = logit.flatten(0, 1)
            torch.baddbmm(
                square,
                self.packed[0, part].flatten(0, 1),
                self.packed[1, part].flatten(0, 1).transpose(1, 2),
                beta=0 if self.edge_SKK is None else 1,
                alpha=scale,
                out=square,
            )
            if padded:
                logit.masked_fill_(~self.seen_SK[part, None, None, :], -torch.inf)
            if not safe:
                logit.sub_(logit.amax(dim=3, keepdim=True))
            yield part, logit.exp2_()

    def _is_safe(self, scale: float, scale_H: Tensor) -> bool:
        """Whether no logit can be as large as `SAFE_EXPONENT`."""
        length = self.packed[:2].norm(dim=4).amax(dim=3)
        bound = scale * (length[0] * length[1]).amax()
        if self.edge_SKK is not None:
            bound = bound + scale_H.abs().amax() * self.edge_SKK.amax()
        return bool(bound < SAFE_EXPONENT)


class LearnedMix(torch.autograd.Function):
    """`BiasedAttention.mix` with gradients of queries, keys, values and scales."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, seen_SK: Tensor, edge_SKK: Tensor | None, scale_H: Tensor
    ) -> Tensor:
        """(S, K, H, d)."""
        attention = BiasedAttention(packed.contiguous(), seen_SK, edge_SKK, scale_H, Scratch())
        mixed = attention.mix()
        ctx.save_for_backward(attention.packed, seen_SK, edge_SKK, scale_H, mixed)
        return mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        """Of the four inputs."""
        packed, seen_SK, edge_SKK, scale_H, mixed = ctx.saved_tensors
        attention = BiasedAttention(packed, seen_SK, edge_SKK, scale_H, Scratch())
        packed_grad, scale_grad = attention.gradients(grad, mixed)
        return packed_grad, None, None, None if edge_SKK is None else scale_grad


class GeneAttention(nn.Module):
    """Attention among the keyword genes of one spot, biased by co-expression.

    Args:
        width: D.
        heads: H.
        dropout: on the output.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = RowLinear(width, 3 * width)
        self.out = RowLinear(width, width)
        self.bias_scale_H = nn.Parameter(torch.ones(heads))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        gene_SKD: Tensor,
        present_SK: Tensor,
        edge_SKK: Tensor | None,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """Update of the gene tokens, (S, K, D).

        Args:
            gene_SKD: gene tokens.
            present_SK: False marks padding, which nobody attends to (in a spot of padding alone,
                everybody does; its tokens are finite and not read).
            edge_SKK: gene-graph weight of each pair, or None for no gene graph.
            scratch: buffers of earlier calls, for inference.
        """
        n_spots, n_genes, width = gene_SKD.shape
        packed = self.query_key_value(self.norm(gene_SKD))
        packed = packed.view(n_spots, n_genes, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen_SK = present_SK | ~present_SK.any(dim=1, keepdim=True)
        if packed.device.type != "cpu" or packed.dtype.itemsize < 4:
            mixed = self._on_device(packed, seen_SK, edge_SKK)
        elif torch.is_grad_enabled():
            mixed = LearnedMix.apply(packed, seen_SK, edge_SKK, self.bias_scale_H)
        else:
            scratch = scratch or Scratch()
            packed = scratch.take("packed", tuple(packed.shape), packed).copy_(packed)
            scale_H = self.bias_scale_H
            mixed = BiasedAttention(packed, seen_SK, edge_SKK, scale_H, scratch).mix()
        return self.dropout(self.out(mixed.reshape(n_spots, n_genes, width)))

    def logits(self, gene_SKD: Tensor) -> Tensor:
        """Attention logits without the bias, (S, H, K, K); for a look inside, not for training."""
        n_spots, n_genes, _ = gene_SKD.shape
        packed = self.query_key_value(self.norm(gene_SKD))
        packed = packed.view(n_spots, n_genes, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return packed[0] @ packed[1].transpose(2, 3) / math.sqrt(packed.shape[4])

    @torch.no_grad()
    def calibrate(self, gene_SKD: Tensor, present_SK: Tensor, edge_SKK: Tensor | None) -> None:
        """Let the bias of each head spread over a gene's partners as far as the logits do."""
        if edge_SKK is None:
            return
        pair_SKK = present_SK[:, :, None] & present_SK[:, None, :]
        pair_SKK = pair_SKK & ~torch.eye(
            pair_SKK.shape[1], dtype=torch.bool, device=pair_SKK.device
        )
        n_SK1 = pair_SKK.sum(dim=2, keepdim=True).clamp(min=1)

        def spread(value_SKK: Tensor) -> Tensor:
            mean_SK1 = (value_SKK * pair_SKK).sum(dim=2, keepdim=True) / n_SK1
            return (value_SKK - mean_SK1)[pair_SKK].square().mean().sqrt()

        of_edges = spread(edge_SKK) if pair_SKK.any() else torch.zeros(())
        if of_edges > 1e-6:
            by_head = self.logits(gene_SKD).unbind(1)
            self.bias_scale_H.copy_(torch.stack([spread(one) for one in by_head]) / of_edges)

    def _on_device(self, packed: Tensor, seen_SK: Tensor, edge_SKK: Tensor | None) -> Tensor:
        """The same attention by torch's kernels, (S, K, H, d); on a GPU, and in half precision."""
        dtype = packed.dtype
        bias = torch.zeros_like(seen_SK, dtype=dtype).masked_fill(~seen_SK, -1e4)[:, None, None, :]
        if edge_SKK is not None:
            scale_H11 = self.bias_scale_H.to(dtype)[:, None, None]
            bias = bias + scale_H11 * edge_SKK[:, None].to(dtype)
        query, key, value = packed.unbind(0)
        return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2)


class SpotAttention(nn.Module):
    """Attention of each spot over itself and its spatial neighbours, biased by distance.

    The bias is a learned function of the distance in micrometres (Gaussian bases, log-spaced),
    so nothing depends on where on the slide a spot lies. The update is gated and starts small:
    the spot vector already holds the neighbours' mean, and more smoothing costs retrieval.

    Args:
        width: D.
        heads: H.
        dropout: on the output.
    """

    centre_B: Tensor

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        centre_B = torch.linspace(math.log(5.0), math.log(1000.0), 8)
        self.register_buffer("centre_B", centre_B, persistent=False)
        self.gate = nn.Parameter(torch.full((width,), 0.1))
        self.distance_bias = nn.Linear(8, heads, bias=False)
        nn.init.zeros_(self.distance_bias.weight)

    def forward(self, spot_SD: Tensor, neighbour_SN: Tensor, distance_um_SN: Tensor) -> Tensor:
        """Update of the first ``len(neighbour_SN)`` spot tokens, (that many, D).

        Args:
            spot_SD: tokens; those behind the updated ones are only read.
            neighbour_SN: indices into them, -1 is none.
            distance_um_SN: in micrometres, inf where none.
        """
        n_spots = len(neighbour_SN)
        normed_SD = self.norm(spot_SD)
        own_S1 = torch.arange(n_spots, device=spot_SD.device)[:, None]
        index_SN = torch.cat([own_S1, neighbour_SN], dim=1)
        key_value_SD = self.key_value(normed_SD)
        query_SD = self.query(normed_SD[:n_spots])
        size = max(n_spots, 1) if torch.is_grad_enabled() else SPOTS_AT_A_TIME
        mixed = [
            self._mix(query_SD[part], key_value_SD, index_SN[part], distance_um_SN[part])
            for part in (slice(start, start + size) for start in range(0, n_spots, size))
        ]
        return self.gate * self.dropout(self.out(torch.cat(mixed)))

    def _mix(
        self, query_SD: Tensor, key_value_SD: Tensor, index_SN: Tensor, distance_um_SN: Tensor
    ) -> Tensor:
        """Mean of the values at ``index_SN``, weighted by attention; (S, D)."""
        n_spots, width = query_SD.shape
        packed = key_value_SD[index_SN.clamp(min=0)]
        packed = packed.view(n_spots, -1, 2, self.heads, width // self.heads)
        key, value = packed.unbind(2)
        query = query_SD.view(n_spots, self.heads, -1)
        logit_SHN = torch.einsum("shd,snhd->shn", query, key) / math.sqrt(width // self.heads)
        logit_SHN = logit_SHN + self._bias(distance_um_SN)
        logit_SHN = logit_SHN.masked_fill((index_SN < 0)[:, None, :], -1e4)
        mixed = torch.einsum("shn,snhd->shd", logit_SHN.softmax(dim=-1), value)
        return mixed.reshape(n_spots, width)

    def _bias(self, distance_um_SN: Tensor) -> Tensor:
        """Bias (S, H, 1 + N): 0 for the spot itself."""
        finite = torch.isfinite(distance_um_SN)
        log_distance = torch.where(finite, distance_um_SN, 1.0).clamp(min=1.0).log()
        bases = torch.exp(-2.0 * (log_distance[..., None] - self.centre_B) ** 2)
        bias_SHN = self.distance_bias(bases).transpose(1, 2)
        return F.pad(bias_SHN, (1, 0))


def feed_forward(width: int, dropout: float, linear: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """Position-wise perceptron of factor 2."""
    return nn.Sequential(
        linear(width, 2 * width),
        nn.GELU(),
        nn.Dropout(dropout),
        linear(2 * width, width),
        nn.Dropout(dropout),
    )


class CrossMessages(nn.Module):
    """Spot <- attention pooling over its genes; genes <- their spot (gated addition).

    Args:
        width: D.
        dropout: on both messages.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm_gene = nn.LayerNorm(width)
        self.norm_spot = nn.LayerNorm(width)
        self.score = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.to_gene = nn.Linear(width, width)
        self.gate_up = nn.Parameter(torch.full((width,), 0.1))
        self.gate_down = nn.Parameter(torch.full((width,), 0.1))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, spot_SD: Tensor, gene_SKD: Tensor, present_SK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Updated spot (S, D) and gene (S, K, D) tokens.

        The value map is linear, so it acts on the pooled gene token instead of on every one.
        """
        pooled_SD = self.pooled(spot_SD, gene_SKD, present_SK)
        up_SD = self.value(pooled_SD) * present_SK.any(dim=1, keepdim=True)
        spot_SD = spot_SD + self.gate_up * self.dropout(up_SD)
        down_SD = self.to_gene(self.norm_spot(spot_SD))
        return spot_SD, gene_SKD + (self.gate_down * self.dropout(down_SD))[:, None, :]

    @torch.no_grad()
    def calibrate(
        self, spot_SD: Tensor, gene_SKD: Tensor, present_SK: Tensor, variance: float
    ) -> None:
        """Open both gates, and let each message start with this variance over the spots."""
        some_S = present_SK.any(dim=1)
        if not some_S.any():
            return
        self.gate_up.fill_(1.0)
        self.gate_down.fill_(1.0)
        pooled_SD = self.pooled(spot_SD, gene_SKD, present_SK)[some_S]
        even_out(self.value, self.value(pooled_SD), variance)
        spot_SD = spot_SD[some_S] + self.value(pooled_SD)
        even_out(self.to_gene, self.to_gene(self.norm_spot(spot_SD)), variance)

    def pooled(self, spot_SD: Tensor, gene_SKD: Tensor, present_SK: Tensor) -> Tensor:
        """Mean of a spot's normed gene tokens, weighted by attention of the spot, (S, D)."""
        normed_SKD = self.norm_gene(gene_SKD)
        query_SD = self.score(self.norm_spot(spot_SD)) / math.sqrt(spot_SD.shape[1])
        logit_SK = torch.bmm(normed_SKD, query_SD.to(normed_SKD.dtype)[:, :, None]).squeeze(2)
        weight_SK = logit_SK.masked_fill(~present_SK, -1e4).softmax(dim=-1)
        return torch.bmm(weight_SK[:, None, :].to(normed_SKD.dtype), normed_SKD).squeeze(1)


class HierarchyLayer(nn.Module):
    """One layer: genes, then spots, then messages between them; pre-norm, residuals everywhere.

    The spots do not wait for the genes of their own layer, so a layer is `move_spots` on all
    spots, then `move_genes` on any part of them.

    Args:
        width: D.
        heads: H.
        dropout: everywhere.
        spatial_graph: attend over neighbours (False: the spot alone).
        cross: exchange messages between the levels.
    """

    def __init__(
        self, width: int, heads: int, dropout: float, *, spatial_graph: bool, cross: bool
    ) -> None:
        super().__init__()
        self.gene_attention = GeneAttention(width, heads, dropout)
        self.gene_forward = nn.Sequential(
            nn.LayerNorm(width), feed_forward(width, dropout, RowLinear)
        )
        self.spot_attention = SpotAttention(width, heads, dropout) if spatial_graph else None
        self.spot_forward = nn.Sequential(nn.LayerNorm(width), feed_forward(width, dropout))
        self.cross = CrossMessages(width, dropout) if cross else None

    def forward(
        self,
        spot_SD: Tensor,
        gene_SKD: Tensor,
        present_SK: Tensor,
        edge_SKK: Tensor | None,
        neighbour_SN: Tensor,
        distance_um_SN: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Updated spot (S, D) and gene (S, K, D) tokens."""
        spot_SD = self.move_spots(spot_SD, neighbour_SN, distance_um_SN)
        return self.move_genes(spot_SD, gene_SKD, present_SK, edge_SKK)

    def move_spots(self, spot_SD: Tensor, neighbour_SN: Tensor, distance_um_SN: Tensor) -> Tensor:
        """The first ``len(neighbour_SN)`` spot tokens after attention and feed-forward."""
        moved_SD = spot_SD[: len(neighbour_SN)]
        if self.spot_attention is not None:
            moved_SD = moved_SD + self.spot_attention(spot_SD, neighbour_SN, distance_um_SN)
        return moved_SD + self.spot_forward(moved_SD)

    def move_genes(
        self,
        spot_SD: Tensor,
        gene_SKD: Tensor,
        present_SK: Tensor,
        edge_SKK: Tensor | None,
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gene tokens after attention and feed-forward, then the messages; spots and genes.

        Args:
            spot_SD: tokens of these spots after `move_spots`.
            gene_SKD: their gene tokens.
            present_SK: False marks padding.
            edge_SKK: gene-graph weight of each pair, or None.
            scratch: buffers of earlier calls, for inference.
        """
        gene_SKD = self._mixed_genes(gene_SKD, present_SK, edge_SKK, scratch)
        if self.cross is None:
            return spot_SD, gene_SKD
        return self.cross(spot_SD, gene_SKD, present_SK)

    def _mixed_genes(
        self,
        gene_SKD: Tensor,
        present_SK: Tensor,
        edge_SKK: Tensor | None,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """Gene tokens after attention and feed-forward, (S, K, D)."""
        gene_SKD = gene_SKD + self.gene_attention(gene_SKD, present_SK, edge_SKK, scratch)
        return gene_SKD + self.gene_forward(gene_SKD)

    @torch.no_grad()
    def calibrate(self, inputs: LayerInputs, core_S: Tensor, variance: float) -> LayerOutputs:
        """`forward`, after gene-graph bias and messages were scaled on some spots.

        Args:
            inputs: of `forward`.
            core_S: the spots that are measured.
            variance: of each message, see `CrossMessages.calibrate`.
        """
        spot_SD, gene_SKD, present_SK, edge_SKK, neighbour_SN, distance_um_SN = inputs
        edge_CKK = None if edge_SKK is None else edge_SKK[core_S]
        self.gene_attention.calibrate(gene_SKD[core_S], present_SK[core_S], edge_CKK)
        spot_SD = self.move_spots(spot_SD, neighbour_SN, distance_um_SN)
        gene_SKD = self._mixed_genes(gene_SKD, present_SK, edge_SKK)
        if self.cross is None:
            return spot_SD, gene_SKD
        self.cross.calibrate(spot_SD[core_S], gene_SKD[core_S], present_SK[core_S], variance)
        return self.cross(spot_SD, gene_SKD, present_SK)
