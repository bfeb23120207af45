"""The public names of ``pathways``, whose own name other projects take too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pathways

if TYPE_CHECKING:
    from pathways import *  # noqa: F403

__all__ = pathways.__all__


def __getattr__(name: str) -> Any:
    """Load a name when it is first asked for."""
    return getattr(pathways, name)
