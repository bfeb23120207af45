"""A linear map of many rows, at the speed of the best kernel of the machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ROWS = 256  # below this the call costs more than the product


class RowLinear(nn.Linear):
    """``nn.Linear`` on the last axis; same parameters, same result.

    On a CPU in float32 it calls oneDNN's 1x1 convolution instead of the BLAS that torch was built
    with: on AVX-512 machines that are not Intel's, it is about twice as fast in both directions.
    oneDNN keeps about a quarter of a megabyte of code for every new number of rows (of the last
    1024), so give it few different ones.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        n_rows = rows.numel() // self.in_features
        if n_rows < MIN_ROWS or not _by_convolution(rows, self.weight):
            return super().forward(rows)
        pixels = rows.reshape(1, n_rows, 1, self.in_features).permute(0, 3, 1, 2)
        # a dilation is nothing to one pixel, but with it torch asks oneDNN on one thread too
        result = F.conv2d(pixels, self.weight[:, :, None, None], self.bias, dilation=(1, 2))
        return result.permute(0, 2, 3, 1).reshape(*rows.shape[:-1], self.out_features)


def _by_convolution(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes these: float32 on a CPU, outside autocast."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )
