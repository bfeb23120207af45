"""The error type of this package."""

from preprocessing.errors import DataError


class FoldError(DataError):
    """A fold lacks what a task needs, or its arrays do not fit together."""
