"""The one error type of the preprocessing package, and hints for a name that is not there.

The message of a `DataError` stands alone: it names the file and the row, says what was found and
what was expected, and gives the remedy. The command line shows it as one line.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class DataError(ValueError):
    """The data that the user gave cannot be used as they are."""


def did_you_mean(
    name: str,
    choices: Iterable[str],
    question: str = "; did you mean",
    otherwise: str = "",
    cutoff: float = 0.6,
    n: int = 1,
) -> str:
    """The part of a message that names the choices most like ``name``.

    Args:
        name: what the user wrote; upper and lower case are alike.
        choices: what there is.
        question: goes before the choices found.
        otherwise: the text where nothing is alike.
        cutoff: least likeness, 0 to 1 (`difflib.SequenceMatcher.ratio`).
        n: most choices named.
    """
    folded: dict[str, str] = {}
    for choice in choices:
        folded.setdefault(choice.casefold(), choice)
    found = get_close_matches(name.casefold(), list(folded), n=n, cutoff=cutoff)
    near = [folded[one] for one in found]
    return f"{question} {' or '.join(map(repr, near))}?" if near else otherwise


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> DataError:
    """The error for a name that is not in a table: it lists the choices and the nearest one."""
    listed = sorted(choices)
    hint = did_you_mean(name, listed, " Did you mean")
    return DataError(f"unknown {kind} '{name}'; choose one of {', '.join(listed)}.{hint}")
