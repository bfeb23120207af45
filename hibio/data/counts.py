"""Counts on the model's vocabulary, read as they are asked for: of one slide, or of many in turn.

Legend: S spots, P genes of the slide's panel, G genes of the vocabulary.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from scipy import sparse

from preprocessing.errors import DataError
from preprocessing.store import SlideStore

CACHE_NONZEROS = 150_000_000  # about 1.2 GB of counts; the rest is re-read

I = TypeVar("I")  # noqa: E741  an input
R = TypeVar("R")


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


def ordered_map(
    function: Callable[[I], R], inputs: Iterable[I], threads: int = 1, ahead: int | None = None
) -> Generator[R, None, None]:
    """Like `map`, a few inputs ahead: what is summed in this order is the same to the last bit.

    Memory does not grow with the number of inputs. The first error is raised where its result would
    have come; what has not begun by then, or when the iterator is closed, is not begun.

    Args:
        function: called in any thread; sparse products, numpy and HDF5 let the others run.
        inputs: read as they are needed.
        threads: that call the function.
        ahead: results made before they are asked for; 0 calls the function here. As many as there
            are threads when None, and 0 with one thread.

    Yields:
        The results.

    Raises:
        DataError: threads below 1.
    """
    if threads < 1:
        raise DataError(f"threads is {threads}, expected at least 1")
    if ahead is None:
        ahead = 0 if threads == 1 else threads
    if ahead == 0:
        yield from map(function, inputs)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="slide")
    waiting: deque[Future[R]] = deque()
    try:
        for one in inputs:
            waiting.append(pool.submit(function, one))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class CountSource(Protocol):
    """Raw counts by row; the columns are the vocabulary."""

    @property
    def n_spots(self) -> int:
        """S."""
        ...

    def rows(self, spots: slice | np.ndarray) -> sparse.csr_matrix:
        """Counts (n, G) of these spots, in their order."""
        ...


@dataclass(frozen=True)
class PanelMap:
    """Where the genes of a slide's panel stand in the vocabulary.

    Attributes:
        pick: (P, G) 0/1 matrix; a gene outside the vocabulary has an empty row.
        matched: vocabulary genes that the panel measures (and that are not hidden).
        folded_in: how many of these were folded in after training.
        measured: P, the genes of the panel that are not hidden.
    """

    pick: sparse.csr_matrix
    matched: int
    measured: int
    folded_in: int = 0

    @classmethod
    def between(
        cls,
        names: np.ndarray,
        vocabulary: np.ndarray,
        hidden: Collection[str] = (),
        n_folded_in: int = 0,
    ) -> PanelMap:
        """The map of a panel.

        Args:
            names: (P,) gene names of the slide.
            vocabulary: (G,) gene names of the model.
            hidden: genes to leave out as if they had not been measured.
            n_folded_in: the last so many genes of the vocabulary were folded in.
        """
        unseen = set(hidden)
        position = {name: column for column, name in enumerate(vocabulary)}
        target = np.array(
            [-1 if name in unseen else position.get(name, -1) for name in names], dtype=np.int64
        )
        kept = np.flatnonzero(target >= 0)
        pick = sparse.csr_matrix(
            (np.ones(len(kept), dtype=np.float32), (kept, target[kept])),
            shape=(len(names), len(vocabulary)),
        )
        n_hidden = sum(name in unseen for name in names)
        late = int((target[kept] >= len(vocabulary) - n_folded_in).sum())
        return cls(pick, len(kept), len(names) - n_hidden, late)

    def align(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Counts (n, P) on the vocabulary, (n, G) of the same kind of number."""
        by_gene = counts.tocsc() @ self.pick.astype(counts.dtype).tocsc()
        return sparse.csr_matrix(by_gene)  # whose rows come out sorted, in linear time


def align_columns(
    counts: sparse.csr_matrix, names: np.ndarray, vocabulary: np.ndarray
) -> sparse.csr_matrix:
    """Counts (S, P) on the columns of ``vocabulary``, (S, G); a gene not measured stays 0."""
    return PanelMap.between(names, vocabulary).align(counts)


@dataclass(frozen=True)
class ArrayCounts:
    """Counts in memory, already on the vocabulary, (S, G)."""

    counts: sparse.csr_matrix

    @property
    def n_spots(self) -> int:
        """S."""
        return int(self.counts.shape[0])

    def rows(self, spots: slice | np.ndarray) -> sparse.csr_matrix:
        """See :class:`CountSource`."""
        return self.counts[spots]


@dataclass(frozen=True)
class StoreCounts:
    """Counts of a store; only the rows asked for are read.

    Attributes:
        path: the store.
        panel: its genes on the vocabulary.
        n_spots: S.
    """

    path: Path
    panel: PanelMap
    n_spots: int

    def rows(self, spots: slice | np.ndarray) -> sparse.csr_matrix:
        """See :class:`CountSource`."""
        with reading(self.path), SlideStore(self.path) as store:
            return self.panel.align(store.counts(spots))


class CountBlocks:
    """Training counts, one CSR block a slide on the vocabulary, re-readable.

    Slides are read and worked on by several threads; results come in the order of the slides, so
    that sums are the same to the last bit whatever the number of threads. In memory at a time: one
    slide more than there are threads, and a cache of bounded size.

    Args:
        paths: training stores.
        genes: (G,) vocabulary.
        threads: that read and work.
    """

    def __init__(self, paths: Sequence[Path], genes: np.ndarray, threads: int = 1) -> None:
        self.paths = list(paths)
        self.genes = genes
        self.threads = threads
        self._cache: dict[Path, sparse.csr_matrix] = {}
        self._cached = 0
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[sparse.csr_matrix]:
        return self.map(lambda block: block)

    def map(self, function: Callable[[sparse.csr_matrix], R]) -> Iterator[R]:
        """The function's value for the counts (S, G) of every slide, in order.

        Raises:
            DataError: a store that cannot be read any more; names the slide.
        """
        return self.map_slides(lambda block, _: function(block))

    def map_slides(self, function: Callable[[sparse.csr_matrix, Path], R]) -> Iterator[R]:
        """`map` with a function that also takes the store of the slide."""
        return ordered_map(lambda path: function(self._block(path), path), self.paths, self.threads)

    def _block(self, path: Path) -> sparse.csr_matrix:
        if path in self._cache:
            return self._cache[path]
        with reading(path), SlideStore(path) as store:
            block = align_columns(store.counts(), store.gene_names, self.genes)
        with self._lock:
            if self._cached + block.nnz <= CACHE_NONZEROS:
                self._cache[path] = block
                self._cached += block.nnz
        return block
