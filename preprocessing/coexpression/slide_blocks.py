"""A stream of TF-IDF blocks, one per slide, that can be read again and again.

Shapes: S spots, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.errors import DataError

TfidfBlocks = Callable[[], Iterable[sparse.csr_matrix]]
R = TypeVar("R")


@runtime_checkable
class ParallelBlocks(Protocol):
    """Blocks that can be reduced where they are read, by several threads at a time."""

    def __call__(self) -> Iterable[sparse.csr_matrix]:
        """A fresh iterator over (S, G) TF-IDF CSR, one per slide."""
        ...

    def map(self, function: Callable[[sparse.csr_matrix], R]) -> Iterator[R]:
        """The function's value for every slide, in the order of the slides."""
        ...


def map_blocks(
    blocks: TfidfBlocks, n_genes: int, function: Callable[[sparse.csr_matrix], R]
) -> Iterator[R]:
    """A function of every slide, in their order, with their shapes checked.

    Args:
        blocks: function that returns a fresh iterator over (S, G) TF-IDF CSR; `ParallelBlocks` are
            worked on by several threads, with the same result to the last bit.
        n_genes: G.
        function: of one block.

    Yields:
        One value per slide.

    Raises:
        DataError: see `read_blocks`.
    """
    if not isinstance(blocks, ParallelBlocks):
        yield from map(function, read_blocks(blocks, n_genes))
        return
    empty = True
    for value in blocks.map(lambda block: function(_checked(block, n_genes))):
        empty = False
        yield value
    if empty:
        raise _no_slide()


def read_blocks(blocks: TfidfBlocks, n_genes: int) -> Iterator[sparse.csr_matrix]:
    """Reads the slides once, with their shapes checked.

    Args:
        blocks: function that returns a fresh iterator over (S, G) TF-IDF CSR.
        n_genes: G.

    Yields:
        One block per slide.

    Raises:
        DataError: blocks is no function, gives no slide, a slide without spots, or another G.
    """
    if not callable(blocks):
        raise DataError(
            "TF-IDF blocks must be a function that returns a fresh iterator over slides, found "
            f"{type(blocks).__name__}. For a list, pass lambda: iter(the_list)."
        )
    empty = True
    for block in blocks():
        yield _checked(block, n_genes)
        empty = False
    if empty:
        raise _no_slide()


def _checked(block: sparse.csr_matrix, n_genes: int) -> sparse.csr_matrix:
    check_genes(block, n_genes)
    if block.shape[0] == 0:
        raise DataError("a slide has no spots; drop empty slides before fitting.")
    return block


def _no_slide() -> DataError:
    return DataError(
        "TF-IDF blocks gave no slide. Give at least one training slide, and a function that "
        "returns a fresh iterator on every call."
    )


def check_genes(block: sparse.csr_matrix, n_genes: int) -> None:
    """Refuses TF-IDF rows whose width is not the number of fitted genes."""
    if block.ndim != 2 or block.shape[1] != n_genes:
        raise DataError(
            f"TF-IDF rows have shape {block.shape}, expected (S, {n_genes}). Align the columns "
            "with the fitted genes first."
        )


def even_quota(sizes: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """How many of each slide's spots to take: all of a small slide, equal shares of the others.

    Args:
        sizes: spots of each slide.
        total: spots wanted in all.

    Returns:
        int64 like `sizes`, no more than each and `total` together (fewer when there are not so
        many).
    """
    quota = np.zeros_like(sizes)
    order = np.argsort(sizes, kind="stable")
    left = total
    for place, slide in enumerate(order):
        quota[slide] = min(int(sizes[slide]), left // (len(order) - place))
        left -= int(quota[slide])
    return quota
