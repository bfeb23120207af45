"""What the training stores have in common: genes, modality, patch width; and their counts.

Shapes: S spots of a slide, G genes of the vocabulary.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from hibio.config import ConfigError
from hibio.data.counts import align_columns
from preprocessing.store import SlideStore

CACHE_NONZEROS = 150_000_000  # about 1.2 GB of counts; the rest is re-read
MIN_GENES = 10  # fewer say too little about a spot to learn from


class CountBlocks:
    """Training counts, one CSR block a slide on the vocabulary, re-readable.

    Args:
        paths: training stores.
        genes: (G,) vocabulary.
    """

    def __init__(self, paths: Sequence[Path], genes: np.ndarray) -> None:
        self.paths = list(paths)
        self.genes = genes
        self._cache: dict[Path, sparse.csr_matrix] = {}
        self._cached = 0

    def __iter__(self) -> Iterator[sparse.csr_matrix]:
        for path in self.paths:
            yield self._block(path)

    def _block(self, path: Path) -> sparse.csr_matrix:
        if path in self._cache:
            return self._cache[path]
        with SlideStore(path) as store:
            block = align_columns(store.counts(), store.gene_names, self.genes)
        if self._cached + block.nnz <= CACHE_NONZEROS:
            self._cache[path] = block
            self._cached += block.nnz
        return block


def fit_vocabulary(
    paths: Sequence[Path],
    min_slide_fraction: float,
    min_spots: int,
    exclude: Sequence[str] = (),
) -> np.ndarray:
    """Gene names that are on enough training slides and in enough training spots.

    Args:
        paths: training stores.
        min_slide_fraction: share of the slides whose panel must have the gene.
        min_spots: training spots that must have counts of it.
        exclude: genes left out, by name or by shell pattern ("MT-*").

    Raises:
        ConfigError: fewer than 10 genes are left, or an exclusion that fits no gene.
    """
    slides: dict[str, int] = {}
    spots: dict[str, int] = {}
    for path in paths:
        with SlideStore(path) as store:
            seen = np.asarray((store.counts() > 0).sum(axis=0)).ravel()
            for name, count in zip(store.gene_names, seen, strict=True):
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


def common_modality(paths: Sequence[Path]) -> str:
    """Rna or protein, as all training stores say.

    Raises:
        ConfigError: they differ: counts and intensities have no scale in common.
    """
    found: dict[str, Path] = {}
    for path in paths:
        with SlideStore(path) as store:
            found.setdefault(store.modality, path)
    if len(found) > 1:
        told = ", ".join(f"{modality} ({path.name})" for modality, path in found.items())
        raise ConfigError(f"training stores are of different modality: {told}; train one at a time")
    return next(iter(found))


def common_patch_um(paths: Sequence[Path]) -> float | None:
    """Patch width of the training stores with an image, in micrometres; None without any.

    Raises:
        ConfigError: they differ, so one image embedding would mean different things.
    """
    widths: dict[float, Path] = {}
    for path in paths:
        with SlideStore(path) as store:
            if store.has_image:
                widths.setdefault(round(float(store.attrs["patch_um"]), 3), path)
    if len(widths) > 1:
        found = ", ".join(f"{width:g} um ({path.name})" for width, path in widths.items())
        raise ConfigError(
            f"training stores have patches of different width: {found}; prepare "
            "all of them with one --patch-um"
        )
    return next(iter(widths), None)


def slide_id(path: Path) -> str:
    """Id of the slide in a store."""
    with SlideStore(path) as store:
        return store.slide_id
