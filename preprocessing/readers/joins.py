"""Two tables joined by the names of their rows, with and without the ending "-1" of barcodes.

Shapes: R rows of one table, n of the other, S of both.
"""

import re
from typing import Any

import numpy as np
import pandas as pd

from preprocessing.errors import DataError

_ENDING = re.compile(r"-\d+$")  # the GEM well, which 10x writes behind a barcode


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
        DataError: no key is in both, also without an ending "-1" that one of them lacks.
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
