"""Numbers as a reader sees them; a dash where there is none."""

from __future__ import annotations

import math
from numbers import Integral, Real

MISSING = "–"


def is_number(value: object) -> bool:
    """Whether a value is a finite real number (no bool, None, NaN or infinity)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))


def decimals_for(value: float) -> int:
    """Digits after the point that give about three significant ones for usual metrics."""
    size = abs(value)
    return 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0


def number(value: object, decimals: int | None = None) -> str:
    """A number for a table; a dash when it is missing or not finite.

    Args:
        value: Anything; numpy scalars included.
        decimals: Digits after the point; by size when None. A tiny value that would read as
            zero is written with an exponent.
    """
    if not is_number(value):
        return MISSING
    if isinstance(value, Integral):
        return f"{int(value):,}"
    plain = float(value)  # type: ignore[arg-type]
    digits = decimals_for(plain) if decimals is None else decimals
    if decimals is None and plain != 0 and abs(plain) < 0.5 * 10**-digits:
        return f"{plain:.1e}"
    shown = f"{plain:,.{digits}f}"
    return shown.lstrip("-") if float(shown.replace(",", "")) == 0 else shown


def exact(value: object) -> str:
    """A number with six significant digits, for the lists of single values."""
    return f"{float(value):.6g}" if is_number(value) else MISSING  # type: ignore[arg-type]
