"""Temperature-scaled cosine similarity, the one quantity that all contrastive terms share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def full_precision(value: Tensor) -> Tensor:
    """The tensor in float32 (float64 stays): logits in half precision lose the loss."""
    return value if value.dtype == torch.float64 else value.float()


def unit_rows(value_ND: Tensor) -> Tensor:
    """Rows (N, D) of length 1 in full precision; a row of zeros stays 0."""
    with torch.autocast(value_ND.device.type, enabled=False):
        return functional.normalize(full_precision(value_ND), dim=1)


def check_embeddings(left_ND: Tensor, right_MD: Tensor) -> None:
    """Refuse what is not (N, D) and (M, D) with one D.

    Raises:
        ValueError: shapes that do not fit.
    """
    if left_ND.ndim != 2 or right_MD.ndim != 2 or left_ND.shape[1] != right_MD.shape[1]:
        raise ValueError(
            f"embeddings are {tuple(left_ND.shape)} and {tuple(right_MD.shape)}, expected (N, D) "
            "and (M, D) with one D; project both towers to the same width"
        )


def checked_temperature(temperature: Tensor | float) -> Tensor | float:
    """The temperature as a number or a full-precision scalar tensor.

    Raises:
        ValueError: not positive, or not one number.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            shape = tuple(temperature.shape)
            raise ValueError(f"temperature has shape {shape}, expected one number")
        return full_precision(temperature.reshape(()))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0; try 0.07")
    return temperature


def cosine_logits(left_ND: Tensor, right_MD: Tensor, temperature: Tensor | float) -> Tensor:
    """Cosine of every row with every row, over the temperature; never in half precision.

    Args:
        left_ND: (N, D) embeddings, any scale (a zero row has cosine 0 with everything).
        right_MD: (M, D) embeddings.
        temperature: positive number or one-element tensor, typically 0.05 to 0.2.

    Returns:
        (N, M) float32 logits (float64 for float64 input).

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive or not one number.
    """
    check_embeddings(left_ND, right_MD)
    temperature = checked_temperature(temperature)
    with torch.autocast(left_ND.device.type, enabled=False):
        return unit_rows(left_ND) @ unit_rows(right_MD).T / temperature


def mean_of_rows(value_S: Tensor, used_S: Tensor) -> Tensor:
    """Mean over the used rows; 0 (with a graph) when there are none. No device synchronisation.

    Args:
        value_S: (S,) one value a row; left-out rows must be finite.
        used_S: (S,) bool.
    """
    total = torch.where(used_S, value_S, torch.zeros_like(value_S)).sum()
    return total / used_S.sum().clamp(min=1)
