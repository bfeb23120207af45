"""The public names of ``preprocessing``, whose own name other projects take too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import preprocessing

if TYPE_CHECKING:
    from preprocessing import *  # noqa: F403

__all__ = preprocessing.__all__


def __getattr__(name: str) -> Any:
    """Load a name when it is first asked for."""
    return getattr(preprocessing, name)
