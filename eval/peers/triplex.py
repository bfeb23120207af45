"""TRIPLEX-like: the patch, its neighbours and the whole slide, each a branch, fused.

Source: Chung et al., Accurate spatial gene expression prediction by integrating multi-resolution
features, CVPR 2024 (TRIPLEX).

Same: three branches (target, neighbours, global), each with a prediction of its own; the fused
prediction is the answer; loss = MSE of the fused one + for each branch 0.7 MSE to the truth
+ 0.3 MSE to the fused prediction (distillation).
Differs: all branches read stored features (no trained ResNet18, no second view of the neighbours);
neighbours are the spatial graph's, attended by the target with one head, not a 5 x 5 grid; the
whole slide is up to 36 block means that the target attends to by content and relative place,
instead of all spots with a convolutional position encoding, so the cost stays linear in spots;
fusion is an MLP on the three instead of cross-attention layers; labels are not smoothed over
neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from eval.peers.regression import Output, RegressionPeer, SlideStack
from hibio.config.schema import Dropout, Share, Size


@dataclass(frozen=True, kw_only=True)
class Triplex(RegressionPeer):
    """Three resolutions, fused.

    Args:
        width: of the branches.
        dropout: before the output layers.
        distillation: share of the fused prediction in the target of a branch.
    """

    width: Size = 128
    dropout: Dropout = 0.2
    distillation: Share = 0.3
    name: str = "triplex"
    source: str = "TRIPLEX, Chung et al. 2024"

    def build(self, n_features: int, n_genes: int) -> nn.Module:
        """The three branches and their fusion."""
        return TriplexNetwork(n_features, n_genes, self)

    def loss(self, output: Output, target_NH: Tensor) -> Tensor:
        """See `distilled_error`."""
        return distilled_error(output, target_NH, self.distillation)


class TriplexNetwork(nn.Module):
    """Target, neighbour and global branch; the fused vector is the embedding."""

    def __init__(self, n_features: int, n_genes: int, config: Triplex) -> None:
        super().__init__()
        width, dropout = config.width, config.dropout
        self.target = nn.Sequential(nn.Linear(n_features, width), nn.LayerNorm(width), nn.ReLU())
        self.near = Attention(n_features, width)
        self.whole = Attention(n_features, width)
        self.closeness = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
        self.fuse = nn.Sequential(
            nn.Linear(3 * width, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(dropout)
        )
        self.drop = nn.Dropout(dropout)
        self.branch_heads = nn.ModuleList(nn.Linear(width, n_genes) for _ in range(3))
        self.head = nn.Linear(width, n_genes)

    def forward(self, inputs: SlideStack, items: Tensor) -> Output:
        """Fused vectors (N, W), fused predictions (N, H) and those of the branches."""
        own_NW = self.target(inputs.feature_NF[items])
        parts = (own_NW, self._near(inputs, items, own_NW), self._whole(inputs, items, own_NW))
        fused_NW = self.fuse(torch.cat(parts, dim=1))
        branches = tuple(
            head(self.drop(part)) for head, part in zip(self.branch_heads, parts, strict=True)
        )
        return Output(fused_NW, self.head(fused_NW), branches)

    def _near(self, inputs: SlideStack, items: Tensor, own_NW: Tensor) -> Tensor:
        """The target attends to itself and its neighbours."""
        near_Nk = torch.cat([items[:, None], inputs.near_Nk[items]], dim=1)
        key_NkW, value_NkW = self.near.read(inputs.feature_NF[near_Nk.clamp(min=0)])
        attended: Tensor = self.near(own_NW, key_NkW, value_NkW, near_Nk >= 0)
        return attended

    def _whole(self, inputs: SlideStack, items: Tensor, own_NW: Tensor) -> Tensor:
        """The target attends to the blocks of its slide, with a score for their relative place."""
        slide_N = inputs.slide_N[items]
        key_LBW, value_LBW = self.whole.read(inputs.block_LBF)
        offset_NB2 = inputs.block_place_LB2[slide_N] - inputs.place_N2[items][:, None]
        present_NB = inputs.filled_LB[slide_N]
        closeness_NB = self.closeness(offset_NB2)[..., 0]
        attended: Tensor = self.whole(
            own_NW, key_LBW[slide_N], value_LBW[slide_N], present_NB, closeness_NB
        )
        return attended


class Attention(nn.Module):
    """One head: a query a spot over the keys of a short list, added to the query's own vector."""

    def __init__(self, n_features: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(n_features, width)
        self.value = nn.Linear(n_features, width)

    def read(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., W) of features (..., F)."""
        return self.key(feature), self.value(feature)

    def forward(
        self,
        own_NW: Tensor,
        key_NkW: Tensor,
        value_NkW: Tensor,
        present_Nk: Tensor,
        score_Nk: Tensor | float = 0.0,
    ) -> Tensor:
        """Own vectors plus what they attend to, (N, W).

        Args:
            own_NW: the spots.
            key_NkW: of the list of each spot.
            value_NkW: of the same.
            present_Nk: places of the list that are filled; at least one a spot.
            score_Nk: added to the scaled products.
        """
        product_Nk = torch.einsum("nw,nkw->nk", self.query(own_NW), key_NkW)
        scaled_Nk = product_Nk / own_NW.shape[1] ** 0.5 + score_Nk
        weight_Nk = scaled_Nk.masked_fill(~present_Nk, float("-inf")).softmax(dim=1)
        return own_NW + torch.einsum("nk,nkw->nw", weight_Nk, value_NkW)


def distilled_error(output: Output, target_NH: Tensor, distillation: float) -> Tensor:
    """MSE of the fused prediction, and of every branch to the truth and to the fused prediction.

    Args:
        output: of the network.
        target_NH: truth.
        distillation: weight of the fused prediction in a branch's target; no gradient flows
            through it.
    """
    total = mse_loss(output.prediction, target_NH)
    for branch_NH in output.branches:
        to_truth = mse_loss(branch_NH, target_NH)
        to_fused = mse_loss(branch_NH, output.prediction.detach())
        total = total + (1 - distillation) * to_truth + distillation * to_fused
    return total
