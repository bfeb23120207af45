"""Errors and warnings of this package, and the hint for a name that is not there."""

from collections.abc import Iterable
from difflib import get_close_matches


class PathwayError(ValueError):
    """Something a user can fix: a gene-set file, a name, identifiers that do not match a panel.

    The message says what was found, what was expected and what to do next; the command line prints
    it as one line and exits with 1.
    """


class GeneSetWarning(UserWarning):
    """Gene sets that were read but may not be what they should be; the arguments: what, the fix."""

    def __str__(self) -> str:
        """Return both as one sentence."""
        return "; ".join(map(str, self.args))


def did_you_mean(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """The sentence that names the choice most like ``name``, or nothing where none is alike."""
    near = get_close_matches(name, list(choices), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
