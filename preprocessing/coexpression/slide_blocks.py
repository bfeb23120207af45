"""Streams of one item a slide that can be read again, as TF-IDF blocks (S spots, G genes) are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
TfidfBlocks = Callable[[], Iterable[sparse.csr_matrix]]
_BLOCKS = "TF-IDF blocks"
_NO_SLIDE = (
    "TF-IDF blocks gave no slide. Give at least one training slide, and a function that "
    "returns a fresh iterator on every call."
)


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
    """A function of every slide, in their order, with their shapes checked as by `read_blocks`.

    `ParallelBlocks` are worked on by several threads, with the same result to the last bit.
    """

    def value(block: sparse.csr_matrix) -> R:
        return function(_checked(block, n_genes))

    if isinstance(blocks, ParallelBlocks):
        return read_stream(_BLOCKS, lambda: blocks.map(value), _NO_SLIDE)
    return map(value, read_stream(_BLOCKS, blocks, _NO_SLIDE))


def read_blocks(blocks: TfidfBlocks, n_genes: int) -> Iterator[sparse.csr_matrix]:
    """Reads the slides once, with their shapes checked.

    Raises:
        DataError: blocks is no function, gives no slide, a slide without spots, or another G.
    """
    for block in read_stream(_BLOCKS, blocks, _NO_SLIDE):
        yield _checked(block, n_genes)


def read_stream(
    what: str, stream: Callable[[], Iterable[T]], none_found: str = "", of: str = "over slides"
) -> Iterator[T]:
    """Reads a stream once.

    Args:
        what: the stream in words, for the message.
        stream: function that returns a fresh iterator on every call.
        none_found: the error of a stream that gives nothing; may be empty.
        of: what its iterator gives, for the message.

    Raises:
        DataError: it is no function, or gives nothing.
    """
    if not callable(stream):
        raise DataError(
            f"{what} must be a function that returns a fresh iterator {of}, found "
            f"{type(stream).__name__}. For a list, pass lambda: iter(the_list)."
        )
    empty = True
    for item in stream():
        empty = False
        yield item
    if empty and none_found:
        raise DataError(none_found)


def _checked(block: sparse.csr_matrix, n_genes: int) -> sparse.csr_matrix:
    check_genes(block, n_genes)
    if block.shape[0] == 0:
        raise DataError("a slide has no spots; drop empty slides before fitting.")
    return block


def check_genes(block: sparse.csr_matrix, n_genes: int) -> None:
    """Refuses TF-IDF rows whose width is not the number of fitted genes."""
    if block.ndim != 2 or block.shape[1] != n_genes:
        raise DataError(
            f"TF-IDF rows have shape {block.shape}, expected (S, {n_genes}). Align the columns "
            "with the fitted genes first."
        )


def even_quota(sizes: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """How many of each slide's spots to take: all of a small slide, equal shares of the others.

    Returns:
        int64 like `sizes`, no more than each and `total` together (fewer if there are not so many).
    """
    quota = np.zeros_like(sizes)
    order = np.argsort(sizes, kind="stable")
    left = total
    for place, slide in enumerate(order):
        quota[slide] = min(int(sizes[slide]), left // (len(order) - place))
        left -= int(quota[slide])
    return quota
