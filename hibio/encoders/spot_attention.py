"""Attention of a spot over its spatial neighbours, biased by distance (METHOD section 3).

Legend: S spots, N neighbours, H heads, D width, B distance bases.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPOTS_AT_A_TIME = 256  # whose neighbours are gathered together, without gradients


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
