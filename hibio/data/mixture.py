"""Mixture weights: how often the slides of an organ, organism or technology are drawn."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

from hibio.config import ConfigError
from hibio.data.slide_index import SlideEntry

COLUMNS = ("technology", "organism", "tissue")


def slide_weights(
    weights: Mapping[str, Mapping[str, float]], entries: Sequence[SlideEntry]
) -> list[float]:
    """Weight of each slide: the product over columns of what its value is given, 1 if nothing.

    Args:
        weights: column -> value -> weight of 0 or more (``sampler.weights``); values are compared
            without regard to case.
        entries: the training slides.

    Raises:
        ConfigError: an unknown column, a value that no training slide has or that is named twice,
            a weight that is no number of 0 or more, or nothing left with a weight above 0.
    """
    found = [1.0] * len(entries)
    for column, of_value in weights.items():
        if column not in COLUMNS:
            raise ConfigError(
                f"sampler.weights.{column}: no such column{_nearest(column, COLUMNS)}; choose "
                f"from {', '.join(COLUMNS)}"
            )
        told = _checked(column, of_value, entries)
        for number, entry in enumerate(entries):
            found[number] *= told.get(_value(entry, column), 1.0)
    if not any(found):
        raise ConfigError(
            f"sampler.weights gives each of the {len(entries)} training slides weight 0; leave at "
            "least one of their values above 0"
        )
    return found


def _checked(
    column: str, of_value: Mapping[str, float], entries: Sequence[SlideEntry]
) -> dict[str, float]:
    """The weights of one column by value in lower case."""
    present = {_value(entry, column): getattr(entry, column) for entry in entries}
    told: dict[str, float] = {}
    for value, weight in of_value.items():
        where, key = f"sampler.weights.{column}.{value}", value.casefold()
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"{where} is {weight}, expected a number of 0 or more")
        if key not in present:
            listed = ", ".join(sorted(repr(name) for name in present.values()))
            raise ConfigError(
                f"{where}: no training slide has this {column}"
                f"{_nearest(key, list(present))} (found: {listed}); correct or remove it"
            )
        if key in told:
            raise ConfigError(f"{where}: named twice, values differ in more than case; remove one")
        told[key] = weight
    return told


def _value(entry: SlideEntry, column: str) -> str:
    return str(getattr(entry, column)).casefold()


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
