"""Frozen encoder to numbers and maps. ``from eval import evaluate, query_folder``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.predict import predict_folder
    from eval.query import query_folder
    from eval.run import evaluate

__all__ = ["evaluate", "predict_folder", "query_folder"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for (it brings torch)."""
    if name == "evaluate":
        from eval.run import evaluate

        return evaluate
    if name == "query_folder":
        from eval.query import query_folder

        return query_folder
    if name == "predict_folder":
        from eval.predict import predict_folder

        return predict_folder
    raise AttributeError(f"module 'eval' has no attribute {name!r}")
