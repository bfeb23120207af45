"""What is kept of a step whose loss or gradient was not finite: ``not_finite.json``.

Nothing was updated by such a step. The file holds what is needed to look at it: where it was in
the run, the terms, and the slides with their spots and what is wrong with their input, if anything.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hibio.batch import SlideBatch
from preprocessing.atomic import atomic_path

#: Fields of a batch that may be infinite on purpose: the distance to no neighbour.
_PADDED = "distance_um_SN"


def write_not_finite(
    folder: Path,
    *,
    reason: str,
    position: Mapping[str, Any],
    terms: Mapping[str, float],
    shares: Iterable[tuple[str, np.ndarray]],
    batches: Sequence[SlideBatch],
    rank: int = 0,
) -> tuple[Path, tuple[str, ...]]:
    """Write ``not_finite.json`` (``not_finite-rank<N>.json`` of process N > 0) into a run folder.

    Args:
        folder: of the run.
        reason: what was not finite.
        position: step, stage, epoch, batch, seeds, learning rate: plain values.
        terms: the loss terms of the step.
        shares: slide id and core spots (n,) of each part of the step.
        batches: what the model was given on this process.
        rank: of this process.

    Returns:
        The file, and the offending slides: those with an input that is not finite, or all of the
        step where the inputs are fine.
    """
    broken = broken_inputs(batches)
    slides = [
        {
            "slide_id": slide_id,
            "inputs_not_finite": broken.get(slide_id, {}),
            "spots": [int(spot) for spot in spots],
        }
        for slide_id, spots in shares
    ]
    offending = tuple(sorted(broken) or dict.fromkeys(str(one["slide_id"]) for one in slides))
    content = {
        "reason": reason,
        **position,
        "terms": {name: _plain(value) for name, value in terms.items()},
        "offending_slides": list(offending),
        "slides": slides,
    }
    path = folder / ("not_finite.json" if rank == 0 else f"not_finite-rank{rank}.json")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path, offending


def broken_inputs(batches: Iterable[SlideBatch]) -> dict[str, dict[str, int]]:
    """Slide id -> field of the batch -> number of spots (halo too) with a NaN or an infinity."""
    found: dict[str, dict[str, int]] = {}
    for batch in batches:
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            wrong = ~torch.isfinite(value)
            if field.name == _PADDED:
                wrong &= batch.neighbour_SN >= 0
            rows_S = wrong.flatten(1).any(dim=1)
            for number in batch.slide_of_spot_S[rows_S].unique().tolist():
                slide = found.setdefault(batch.slide_ids[number], {})
                count = int((rows_S & (batch.slide_of_spot_S == number)).sum())
                slide[field.name] = slide.get(field.name, 0) + count
    return found


def _plain(value: float) -> float | str:
    """A number as JSON has it; NaN and infinities are words there."""
    return value if math.isfinite(value) else str(value)
