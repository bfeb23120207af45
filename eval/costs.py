"""What every fitted model of an evaluation took: parameters and wall time, a row a model."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from eval.embed import Checkpoint
from eval.fold import Cost, Fold
from hibio.training_log import read_log


def cost_table(checkpoints: Sequence[Checkpoint], folds: Iterable[Fold]) -> list[dict[str, Any]]:
    """Rows of the models table of the report.

    Args:
        checkpoints: trained models of this run, all folds and seeds.
        folds: with the peers in them.

    Returns:
        One mapping a model with ``model``, ``source``, ``n_parameters``, ``fits`` (folds x seeds)
        and ``seconds`` (mean wall time of a fit on the machine that ran it, or None).
    """
    found: dict[str, list[Cost]] = {}
    for checkpoint in checkpoints:
        found.setdefault(checkpoint.variant, []).append(checkpoint_cost(checkpoint))
    for fold in folds:
        for model in (*fold.models, *fold.per_slide):
            if model.cost is not None:
                found.setdefault(model.name, []).append(model.cost)
    return [_row(model, costs) for model, costs in found.items()]


def checkpoint_cost(checkpoint: Checkpoint) -> Cost:
    """Parameters of a checkpoint, and the seconds of the steps in its training log, if kept."""
    steps = read_log(checkpoint.path.parent / "log.jsonl")
    seconds = [float(step["seconds"]) for step in steps if "seconds" in step]
    size = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    return Cost("this run", size, sum(seconds) if seconds else None)


def _row(model: str, costs: Sequence[Cost]) -> dict[str, Any]:
    timed = [cost.seconds for cost in costs if cost.seconds is not None]
    return {
        "model": model,
        "source": costs[0].source,
        "n_parameters": max(cost.n_parameters for cost in costs),
        "fits": len(costs),
        "seconds": float(np.mean(timed)) if timed else None,
    }
