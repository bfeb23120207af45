"""Dotted config keys and their new values, put into the plain dict of a configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from hibio.config import ConfigError, merge

EVERY = "*"


def changed(data: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of ``data`` with other values under dotted keys.

    A number is a place in a list, ``*`` is every entry of a list that has the rest of the key
    (``stages.*.weights.pathway/kl: 0`` reaches the stages that have this term). A section is
    merged into the section that is there; everything else replaces what was there. Keys that no
    configuration has pass here and are refused, with the nearest valid key, when it is built.

    Args:
        data: plain values of a configuration.
        changes: dotted key -> new value.
        where: the row or section that asks, for messages.

    Raises:
        ConfigError: a key that is empty, goes through a plain value, or names no list entry.
    """
    result = copy.deepcopy(dict(data))
    for name, value in changes.items():
        key = tuple(str(name).split("."))
        if "" in key:
            raise ConfigError(f"{where}: {name!r} is no key; write it like model.omics.width")
        if not _put(result, key, value, f"{where}: {name}", known=False):
            raise ConfigError(f"{where}: {name}: no entry of the list has this key")
    return result


def _put(node: Any, key: tuple[str, ...], value: Any, asked: str, *, known: bool) -> int:
    """Put ``value`` below ``node``; returns at how many places.

    Args:
        node: a mapping or a list.
        key: what is left of the dotted key.
        value: the new value.
        asked: who asks for what, for messages.
        known: only where the key is there already (below ``*``).
    """
    part, rest = key[0], key[1:]
    place: int | str = part
    if isinstance(node, list):
        if part == EVERY and rest:
            return sum(_put(item, rest, value, asked, known=True) for item in node)
        place = _index(node, part, asked)
    elif isinstance(node, dict):
        if known and part not in node:
            return 0
        node.setdefault(part, {} if rest else None)
    else:
        raise ConfigError(f"{asked}: {part!r} lies below the plain value {node!r}; shorten the key")
    if rest:
        if node[place] is None:
            node[place] = {}
        return _put(node[place], rest, value, asked, known=known)
    old = node[place]
    both = isinstance(old, Mapping) and isinstance(value, Mapping)
    node[place] = merge(old, value) if both else copy.deepcopy(value)
    return 1


def _index(node: list[Any], part: str, asked: str) -> int:
    if not (part.isdecimal() and int(part) < len(node)):
        raise ConfigError(
            f"{asked}: {part!r} is no entry of a list of {len(node)}; entries are counted from 0, "
            "and * with a key behind it is every entry"
        )
    return int(part)
