"""Stores to batches: fitting on training slides, prepared slides, samplers, collation, splits.

`SlideDataset` is for models of your own: pairs of patch and profile for a plain torch DataLoader.
"""

from __future__ import annotations

from typing import Any

__all__ = ["RegionBatches", "SlideDataset"]


def __getattr__(name: str) -> Any:
    """Load the public classes when they are first asked for (torch takes seconds to import)."""
    if name not in __all__:
        raise AttributeError(f"module 'hibio.data' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("hibio.data.pairs"), name)
