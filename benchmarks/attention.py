"""Attention among genes on a CPU, written by hand or plain: `python benchmarks/attention.py`.

The gene half of one `HierarchyLayer` (attention, feed-forward, messages) as it is, with
`BiasedAttention`, `RowLinear` and scratch buffers, against the same weights with
`scaled_dot_product_attention` and `nn.Linear`: inference, and forward and backward of a training
step, in turn in one run; the best of the rounds counts. Both give the same to rounding (checked).
Sizes are those of configs/her2st.yaml and of the default tower, on 1 and on 2 threads.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from types import MethodType
from typing import NamedTuple

import torch
from timing import in_turn
from torch import Tensor, nn

from hibio.encoders.genes import RowLinear, Scratch
from hibio.encoders.layers import GeneAttention, HierarchyLayer


class Size(NamedTuple):
    """Of a batch and a layer."""

    spots: int
    keyword_genes: int
    width: int
    heads: int


SIZES = {"configs/her2st.yaml": Size(350, 48, 64, 4), "default": Size(128, 128, 192, 6)}


def plain_attention(
    self: GeneAttention,
    gene_SKD: Tensor,
    present_SK: Tensor,
    edge_SKK: Tensor | None,
    scratch: Scratch | None = None,
) -> Tensor:
    """`GeneAttention.forward` by torch's kernels."""
    n_spots, n_genes, width = gene_SKD.shape
    packed = self.query_key_value(self.norm(gene_SKD))
    packed = packed.view(n_spots, n_genes, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
    mixed = self._on_device(packed, present_SK, edge_SKK)
    return self.dropout(self.out(mixed.reshape(n_spots, n_genes, width)))


def plain_layer(layer: HierarchyLayer) -> HierarchyLayer:
    """The same weights without anything written by hand."""
    plain = copy.deepcopy(layer)
    for module in plain.modules():
        if isinstance(module, RowLinear):
            module.__class__ = nn.Linear
        if isinstance(module, GeneAttention):
            module.forward = MethodType(plain_attention, module)  # type: ignore[method-assign]
    return plain


def inputs(size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spot and gene tokens, which genes are there (some padding), and a sparse gene graph."""
    torch.manual_seed(0)
    spots, genes, width, _ = size
    present_SK = torch.arange(genes) < torch.randint(genes // 2, 2 * genes, (spots, 1))
    edge_SKK = torch.rand(spots, genes, genes) * (torch.rand(spots, genes, genes) < 0.1)
    return torch.randn(spots, width), torch.randn(spots, genes, width), present_SK, edge_SKK


def inference(layer: HierarchyLayer, given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """The layer without gradients, its buffers used again."""
    scratch = Scratch()

    @torch.inference_mode()
    def run() -> Tensor:
        return layer.move_genes(*given, scratch)[1]

    return run


def training(layer: HierarchyLayer, given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """Forward and backward; gives the gradient of the gene tokens."""
    spot_SD, gene_SKD, *rest = given
    leaf = gene_SKD.clone().requires_grad_()

    def run() -> Tensor:
        layer.zero_grad()
        leaf.grad = None
        spot, gene = layer.move_genes(spot_SD, leaf, *rest)
        (spot.square().mean() + gene.square().mean()).backward()
        assert leaf.grad is not None
        return leaf.grad

    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print("| size | threads | what | by hand, ms | plain, ms | plain / by hand |")
    print("|---|---|---|---|---|---|")
    for name, size in SIZES.items():
        given = inputs(size)
        hand = HierarchyLayer(size.width, size.heads, 0.0, spatial_graph=False, cross=True)
        plain = plain_layer(hand)
        for threads in options.threads:
            torch.set_num_threads(threads)
            for what in (inference, training):
                actions = {"by hand": what(hand, given), "plain": what(plain, given)}
                present = given[2]
                found, wanted = (action()[present] for action in actions.values())
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
                taken = in_turn(actions, options.rounds)
                one, other = (1e3 * min(every) for every in taken.values())
                row = f"| {name} | {threads} | {what.__name__} | {one:.1f} | {other:.1f} "
                print(f"{row}| {other / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
