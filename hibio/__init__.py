"""HiBio: histology and spatial omics in one embedding space."""

from __future__ import annotations

from typing import Any

__all__ = ["HiBio", "SlideBatch"]

_HOMES = {"HiBio": "hibio.model", "SlideBatch": "hibio.batch"}


def __getattr__(name: str) -> Any:
    """Load the public classes when they are first asked for (torch takes seconds to import)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hibio' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
