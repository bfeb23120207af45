"""Frozen encoder to numbers: tasks, baselines, report. ``from eval import evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.run import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    """Load ``evaluate`` when it is first asked for (it brings torch)."""
    if name != "evaluate":
        raise AttributeError(f"module 'eval' has no attribute {name!r}")
    from eval.run import evaluate

    return evaluate
