"""Attention pooling of spots into regions, the same module for both towers (METHOD section 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AttentionPool(nn.Module):
    """Softmax-weighted mean of the members of each group.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, 1)
        )

    def forward(self, spot_SD: Tensor, group_S: Tensor, n_groups: int) -> Tensor:
        """Group embeddings (R, D); spots of group -1 are left out.

        Args:
            spot_SD: member embeddings.
            group_S: 0..R-1, or -1.
            n_groups: R.
        """
        used = group_S >= 0
        member_SD, group = spot_SD[used], group_S[used]
        score_S = self.score(member_SD).squeeze(1)
        top_R = score_S.new_full((n_groups,), -1e4).scatter_reduce(
            0, group, score_S.detach(), "amax"
        )
        weight_S = torch.exp(score_S - top_R[group])
        total_R = weight_S.new_zeros(n_groups).index_add(0, group, weight_S)
        weighted_SD = member_SD * (weight_S / total_R[group].clamp(min=1e-8))[:, None]
        return weighted_SD.new_zeros(n_groups, spot_SD.shape[1]).index_add(0, group, weighted_SD)
