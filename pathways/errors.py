"""The one error type of this package."""


class PathwayError(ValueError):
    """Something a user can fix: a gene-set file, a name, identifiers that do not match a panel.

    The message says what was found, what was expected and what to do next; the command line prints
    it as one line and exits with 1.
    """
