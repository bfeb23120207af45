"""The one error type of the preprocessing package.

The message of a `DataError` stands alone: it names the file and the row, says what was found and
what was expected, and gives the remedy. The command line shows it as one line.
"""


class DataError(ValueError):
    """The data that the user gave cannot be used as they are."""
