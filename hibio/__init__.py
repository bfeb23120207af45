"""HiBio: histology and spatial omics in one embedding space."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["HiBio", "SlideBatch", "__version__"]

__version__ = "0.2.0"

_BESIDE = ("pathways", "preprocessing", "eval")  # packages that come with this one


def _refuse_hidden() -> None:
    """Say which file of the user's stands before a package of ours.

    Raises:
        ImportError: one does; names it.
    """
    ours = Path(__file__).resolve().parent.parent
    for name in _BESIDE:
        loaded = sys.modules.get(name)
        found = getattr(loaded, "__spec__", None) if loaded else find_spec(name)
        if found is None or found.origin is None or not (ours / name).is_dir():
            continue
        origin = Path(found.origin)
        if origin.resolve().parent != ours / name:
            raise ImportError(
                f"{origin} hides the package {name!r} that HiBio needs (Python looks beside the "
                "script and in the working folder first); rename or move that file"
            )


_refuse_hidden()

_HOMES = {"HiBio": "hibio.model", "SlideBatch": "hibio.batch"}


def __getattr__(name: str) -> Any:
    """Load public classes and doors when they are first asked for (torch takes seconds)."""
    import importlib

    if name in _BESIDE:
        return importlib.import_module(f"hibio.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'hibio' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
