"""Two tables joined by the names of their rows, also where one of them spells them otherwise.

Shapes: R rows of one table, n of the other, S of both.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from preprocessing.errors import DataError

_ENDING = re.compile(r"-\d+$")  # the GEM well, which 10x writes behind a barcode
_DOT = re.compile(r"\.(?=\d+$)")
_NUMBER = re.compile(r"0*(\d+)(?:\.0+)?")
_ENOUGH = 0.5  # of the names of the smaller table must join by another spelling


def match_rows(
    keys: Any, known: Any, nothing: str, notes: list[str], left_out: str, unused: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Join two tables by their keys; what is in one only is left out and noted.

    Args:
        keys: (R,) of the first table.
        known: (n,) of the second, unique.
        nothing: the error where no key is in both.
        notes: gets the number of rows left out.
        left_out: what the rows of the first table are that the second lacks.
        unused: the same of the second table; "": not noted.

    Returns:
        (S,) row numbers of the first and of the second table.

    Raises:
        DataError: no key is in both, by no spelling.
    """
    keys, known, how = alike(keys, known)
    found = pd.Index(known).get_indexer(pd.Index(keys))
    rows = np.flatnonzero(found >= 0)
    if len(rows) == 0:
        raise DataError(f"{nothing}{_other_endings(keys, known)}")
    notes.extend(how)
    for count, what in ((len(keys), left_out), (len(known), unused)):
        if what and count > len(rows):
            notes.append(f"{count - len(rows)} {what}")
    return rows, found[rows]


def alike(keys: Any, known: Any) -> tuple[Any, Any, list[str]]:
    """Both keys spelled alike, where no name is in both and so they join.

    Tried: without the one ending (mostly "-1") that only one table has, numbers without ".0" and
    leading zeros, "." for "-" before the ending (R), small letters, and without what
    all names of only one table begin with. Names that another spelling makes equal stay.

    Returns:
        (R,) and (n,) keys, and notes on what was changed.
    """
    if pd.Index(keys).isin(known).any():
        return keys, known, []
    begins = [_begin(keys), _begin(known)]
    spellings: list[tuple[str, Callable[[str], str]]] = [
        ("", lambda name: name),
        ("with numbers as numbers", _plain_number),
        ("with '-' for '.' before the last number", lambda name: _DOT.sub("-", name)),
        ("whatever the case", str.lower),
    ]
    if sum(map(bool, begins)) == 1:
        begin = "".join(begins)
        told = f"without {begin!r}, with which all names of one of the tables begin"
        spellings.append((told, lambda name: name.removeprefix(begin)))
    for told, spell in spellings:
        new = [np.array([spell(str(n)) for n in one], dtype=object) for one in (keys, known)]
        first, second, how = _without_one_ending(*new)
        least = 1 if not told else _ENOUGH * min(len(first), len(second))
        unique = pd.Index(first).is_unique and pd.Index(second).is_unique
        if (not told or unique) and pd.Index(first).isin(second).sum() >= least:
            return first, second, ([f"joined {told}"] if told else []) + how
    return keys, known, []


def _plain_number(name: str) -> str:
    found = _NUMBER.fullmatch(name)
    return name if found is None else found[1]


def _begin(names: Any) -> str:
    """What all names begin with, up to a character that joins words; "" where that is nothing."""
    texts = [str(name) for name in names]
    first, last = min(texts, default=""), max(texts, default="")  # all others lie between
    same = next((i for i, c in enumerate(first) if last[i : i + 1] != c), len(first))
    return first[: max(first.rfind(mark, 0, same) for mark in "_:#/|") + 1]


def _without_one_ending(keys: Any, known: Any) -> tuple[Any, Any, list[str]]:
    """Both keys without the one ending (mostly "-1") that only one of them has, where so they join.

    Two different endings stay: they are sections of one matrix.

    Returns:
        (R,) and (n,) keys, and a note where the ending was removed.
    """
    ends = sorted([*_endings(keys), *_endings(known)])
    if len(ends) != 2 or ends[0] or not ends[1] or pd.Index(keys).isin(known).any():
        return keys, known, []
    short = [_without_ending(one) for one in (keys, known)]
    if not (pd.Index(short[1]).is_unique and pd.Index(short[0]).isin(short[1]).any()):
        return keys, known, []
    return (
        short[0],
        short[1],
        [f"joined without the ending '{ends[1]}', which one of the tables lacks"],
    )


def _endings(names: Any) -> set[str]:
    found = [_ENDING.search(name) for name in names if isinstance(name, str) and name]
    return {"" if match is None else match[0] for match in found}


def _without_ending(names: Any) -> np.ndarray:
    return np.array([_ENDING.sub("", str(name)) for name in names], dtype=object)


def _other_endings(keys: Any, known: Any) -> str:
    """What to add to the error where the names differ in their endings only."""
    short = [pd.Index(_without_ending(one)) for one in (keys, known)]
    numbered = any(2 * one.nunique() < len(one) for one in short)  # such as cell-1, cell-2, ...
    if numbered or not short[0].isin(short[1]).any():
        return ""
    told = [", ".join(sorted(_endings(one))[:3]) or "none" for one in (keys, known)]
    return (
        f". Without their endings the names would join ({told[0]} here, {told[1]} there): another "
        "ending is another section of a matrix of several; give both tables of one section, with "
        "the same endings"
    )


def first_names(names: Any) -> str:
    """The first two names, for a message."""
    return ", ".join(map(str, names[:2]))
