"""The weighted sum of all terms of a stage: weights are data, there is no balance to learn."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hibio.batch import LossOutput


def combine(terms: Mapping[str, Tensor], weights: Mapping[str, float], n: int = 0) -> LossOutput:
    """Join loss terms.

    Args:
        terms: name -> scalar, for example ``spot/contrastive``.
        weights: name -> weight, the same names; a term of weight 0 is reported but takes no part
            in the total (not even when it is NaN).
        n: number of items (core spots) the terms were computed from, for averaging in the log.

    Returns:
        The total, and every unweighted term, detached.

    Raises:
        ValueError: names that do not pair up, a bad weight, a term that is no scalar, or nothing
            with a weight above 0.
    """
    _check_names(terms, weights)
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight of '{name}' is {weight}, expected a number of 0 or more")
        if terms[name].numel() != 1:
            shape = tuple(terms[name].shape)
            raise ValueError(f"term '{name}' has shape {shape}, expected one number")
    weighted = [weights[name] * term.reshape(()) for name, term in terms.items() if weights[name]]
    if not weighted:
        listed = ", ".join(sorted(terms)) or "none"
        raise ValueError(f"no term has a weight above 0 (terms: {listed}); nothing to train")
    reported = {name: term.detach().reshape(()) for name, term in terms.items()}
    return LossOutput(total=torch.stack(weighted).sum(), terms=reported, n=n)


def _check_names(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
    """Every term has a weight and every weight a term."""
    pairs = (("weight", weights, "term", terms), ("term", terms, "weight", weights))
    for kind, names, other, known in pairs:
        for name in sorted(set(names) - set(known)):
            near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
            remedy = f"; nearest: {', '.join(near)}" if near else ""
            listed = ", ".join(sorted(known)) or "none"
            raise ValueError(
                f"{kind} '{name}' has no {other} of that name{remedy}. All {other}s: {listed}"
            )
