"""Attention among the keyword genes of a spot, biased by co-expression (METHOD section 3).

Legend: S spots, K keyword genes, H heads, D width, d = D / H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hibio.encoders.biased_attention import BiasedAttention, LearnedMix
from hibio.encoders.row_linear import RowLinear
from hibio.encoders.scratch import Scratch


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

    def _on_device(self, packed: Tensor, seen_SK: Tensor, edge_SKK: Tensor | None) -> Tensor:
        """The same attention by torch's kernels, (S, K, H, d); on a GPU, and in half precision."""
        dtype = packed.dtype
        bias = torch.zeros_like(seen_SK, dtype=dtype).masked_fill(~seen_SK, -1e4)[:, None, None, :]
        if edge_SKK is not None:
            scale_H11 = self.bias_scale_H.to(dtype)[:, None, None]
            bias = bias + scale_H11 * edge_SKK[:, None].to(dtype)
        query, key, value = packed.unbind(0)
        return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2)
