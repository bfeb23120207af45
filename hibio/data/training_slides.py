"""What the training stores have in common: genes, modality, patch width; and their counts.

Shapes: S spots of a slide, G genes of the vocabulary.
"""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from scipy import sparse

from hibio.config.files import ConfigError
from hibio.data.counts import align_columns, ordered_map, reading
from hibio.data.splits import SlideEntry
from preprocessing.store import SlideStore
from preprocessing.tfidf import TfidfReweighter

R = TypeVar("R")

CACHE_NONZEROS = 150_000_000  # about 1.2 GB of counts; the rest is re-read
MIN_GENES = 10  # fewer say too little about a spot to learn from


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
        return ordered_map(lambda path: function(self._block(path)), self.paths, self.threads)

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


@dataclass(frozen=True)
class TfidfStream:
    """The TF-IDF of training counts, made anew on every pass (`ParallelBlocks`).

    Attributes:
        counts: of the training slides.
        tfidf: fitted on them.
    """

    counts: CountBlocks
    tfidf: TfidfReweighter

    def __call__(self) -> Iterator[sparse.csr_matrix]:
        """TF-IDF (S, G) of every slide, in order."""
        return self.counts.map(self.tfidf.transform)

    def map(self, function: Callable[[sparse.csr_matrix], R]) -> Iterator[R]:
        """The function's value for the TF-IDF of every slide, in order."""
        return self.counts.map(lambda block: function(self.tfidf.transform(block)))


def fit_vocabulary(
    paths: Sequence[Path],
    min_slide_fraction: float,
    min_spots: int,
    exclude: Sequence[str] = (),
    threads: int = 1,
) -> np.ndarray:
    """Gene names that are on enough training slides and in enough training spots.

    Args:
        paths: training stores.
        min_slide_fraction: share of the slides whose panel must have the gene.
        min_spots: training spots that must have counts of it.
        exclude: genes left out, by name or by shell pattern ("MT-*").
        threads: that read stores.

    Raises:
        ConfigError: fewer than 10 genes are left, or an exclusion that fits no gene.
    """
    slides: dict[str, int] = {}
    spots: dict[str, int] = {}
    for names, seen in ordered_map(_detections, paths, threads):
        for name, count in zip(names, seen, strict=True):
            slides[name] = slides.get(name, 0) + 1
            spots[name] = spots.get(name, 0) + int(count)
    need = min_slide_fraction * len(paths) - 1e-9
    excluded = _excluded(slides, exclude)
    genes = sorted(
        name
        for name, n in slides.items()
        if n >= need and spots[name] >= min_spots and name not in excluded
    )
    if len(genes) < MIN_GENES:
        raise ConfigError(
            f"only {len(genes)} of {len(slides)} genes are on at least "
            f"{min_slide_fraction:.0%} of the {len(paths)} training slides and in "
            f"{min_spots} spots, and {MIN_GENES} are needed; lower genes.min_slide_fraction or "
            "genes.min_spots, or train on slides with larger panels that overlap"
        )
    return np.array(genes)


def _detections(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Gene names of one store, and the spots that have each."""
    with reading(path), SlideStore(path) as store:
        counts, names = store.counts(), store.gene_names
    return names, np.bincount(counts.indices[counts.data > 0], minlength=counts.shape[1])


def _excluded(names: Collection[str], exclude: Sequence[str]) -> set[str]:
    """The names that an entry of ``exclude`` is, or fits as a shell pattern."""
    found: set[str] = set()
    for entry in exclude:
        fitting = {entry} & set(names) if entry in names else set(fnmatch.filter(names, entry))
        if not fitting:
            raise ConfigError(
                f"genes.exclude: {entry!r} fits none of the {len(names)} genes of the training "
                "slides; check its spelling, or take it out"
            )
        found |= fitting
    return found


def common_modality(entries: Sequence[SlideEntry]) -> str:
    """Rna or protein, as all training stores say.

    Raises:
        ConfigError: they differ: counts and intensities have no scale in common.
    """
    found: dict[str, Path] = {}
    for entry in entries:
        found.setdefault(entry.modality, entry.path)
    if len(found) > 1:
        told = ", ".join(f"{modality} ({path.name})" for modality, path in found.items())
        raise ConfigError(f"training stores are of different modality: {told}; train one at a time")
    return next(iter(found))


def common_patch_um(entries: Sequence[SlideEntry]) -> float | None:
    """Patch width of the training stores with an image, in micrometres; None without any.

    Raises:
        ConfigError: they differ, so one image embedding would mean different things.
    """
    widths: dict[float, Path] = {}
    for entry in entries:
        if entry.patch_um is not None:
            widths.setdefault(round(entry.patch_um, 3), entry.path)
    if len(widths) > 1:
        found = ", ".join(f"{width:g} um ({path.name})" for width, path in widths.items())
        raise ConfigError(
            f"training stores have patches of different width: {found}; prepare "
            "all of them with one --patch-um"
        )
    return next(iter(widths), None)


def context_widths(entries: Sequence[SlideEntry]) -> list[float]:
    """The different widths of the training stores' context patches, micrometres; mostly one."""
    return sorted({round(e.context_um, 3) for e in entries if e.context_um is not None})
