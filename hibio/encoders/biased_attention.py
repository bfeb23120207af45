"""Attention with a bias that every head scales, in buffers that fit the cache, on a CPU.

What `torch.nn.functional.scaled_dot_product_attention` computes from the bias ``scale_H x edge``,
without ever holding a table of all spots and heads: neither the bias nor the weights. The weights
are computed again for the gradient.

Legend: S spots, H heads, K keyword genes, d = width / H.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hibio.encoders.scratch import Scratch

LOGIT_NUMBERS = 700_000  # logits held at a time: about the second-level cache
LOG2_E = math.log2(math.e)
SAFE_EXPONENT = 60.0  # 2^60 times the number of genes is far inside float32


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
