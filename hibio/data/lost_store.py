"""A store that cannot be read in the middle of a run: which slide it was, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preprocessing.errors import DataError


@contextmanager
def reading(path: Path, slide_id: str | None = None) -> Iterator[None]:
    """Say of an error in the block which slide it met, and how to go on.

    Args:
        path: the store that is read.
        slide_id: its slide; None: by the name of the file.

    Raises:
        DataError: instead of any `DataError` or `OSError` of the block.
    """
    try:
        yield
    except (DataError, OSError) as error:
        raise DataError(
            f"slide {slide_id or path.stem!r} cannot be read from {path}: {error}. Put the store "
            "back or prepare the slide again, and start again (a training that had begun goes on "
            "from its last checkpoint with --resume); to do without the slide, take its store out "
            "of the folder and begin anew"
        ) from error
