"""Expression prediction from the image tower (METHOD section 5, weight 1.0 throughout).

Legend: S spots, H target genes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hibio.losses.masked import masked_mse


def expression_mse(
    prediction_SH: Tensor, target_SH: Tensor, used_S: Tensor | None = None
) -> Tensor:
    """Mean squared error of predicted expression over spots and genes.

    Args:
        prediction_SH: (S, H) predicted expression.
        target_SH: (S, H) log-normalised expression, standardised per slide.
        used_S: (S,) bool; False rows (halo) take no part. All rows when left out.

    Returns:
        Scalar; 0 (with a graph) when no row is used.

    Raises:
        ValueError: shapes that do not fit.
    """
    if used_S is None:
        used_S = torch.ones(len(prediction_SH), dtype=torch.bool, device=prediction_SH.device)
    if prediction_SH.ndim != 2 or used_S.shape != prediction_SH.shape[:1]:
        raise ValueError(
            f"prediction is {tuple(prediction_SH.shape)}, used {tuple(used_S.shape)}; expected "
            "(S, H) and (S,)"
        )
    return masked_mse(prediction_SH, target_SH, used_S[:, None].expand_as(prediction_SH))
