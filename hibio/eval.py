"""The public names of ``eval``, whose own name other projects take too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import eval

if TYPE_CHECKING:
    from eval import *  # noqa: F403

__all__ = eval.__all__


def __getattr__(name: str) -> Any:
    """Load a name when it is first asked for."""
    return getattr(eval, name)
