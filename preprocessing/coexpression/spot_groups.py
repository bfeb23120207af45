"""Label-free groups of spots: k-means on standardised spot vectors (METHOD section 3).

A gene graph is fitted for each group. Groups never come from annotated labels, otherwise the graph
would tell the label. Shapes: S spots, r components, T groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from preprocessing.coexpression.slide_blocks import even_quota
from preprocessing.errors import DataError

VectorBlocks = Callable[[], Iterable[NDArray[Any]]]
_ROWS = 65_536  # spots whose distances are held at once
_STARTS = 4  # k-means restarts


@dataclass(frozen=True)
class SpotGroups:
    """Centroids of spot vectors; a spot belongs to the nearest.

    Attributes:
        centroids: (T, r) float32, the group of most training spots first.
    """

    centroids: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Refuses centroids that are no finite table."""
        shape = self.centroids.shape
        if len(shape) != 2 or min(shape) < 1 or not np.isfinite(self.centroids).all():
            raise DataError(
                f"spot groups: centroids of shape {shape}, expected finite (T, r) with at least "
                "one group. Fit them with fit_spot_groups."
            )

    @property
    def n_groups(self) -> int:
        """T."""
        return int(self.centroids.shape[0])

    def assign(self, vectors: NDArray[Any]) -> NDArray[np.int64]:
        """The nearest group of each spot; ties go to the lower index.

        Args:
            vectors: (S, r) standardised spot vectors.

        Returns:
            (S,) int64, 0 to T - 1. It depends on nothing but the spot's own vector.

        Raises:
            DataError: another width than fitted, or a value that is not finite.
        """
        values = _checked(vectors, self.centroids.shape[1])
        group = np.zeros(len(values), np.int64)
        if self.n_groups == 1:
            return group
        centres = self.centroids.astype(np.float64)
        for start in range(0, len(values), _ROWS):
            part = values[start : start + _ROWS].astype(np.float64)
            # einsum: BLAS may round a row differently by the rows beside it
            cross = np.einsum("sr,tr->st", part, centres)
            group[start : start + _ROWS] = (np.square(centres).sum(axis=1) - 2 * cross).argmin(1)
        return group


def fit_spot_groups(
    blocks: VectorBlocks, n_groups: int, seed: int = 0, *, max_spots: int = 20_000
) -> SpotGroups:
    """Fits k-means on a bounded sample of the training spots, spread evenly over slides.

    Args:
        blocks: function that returns a fresh iterator over (S, r) standardised spot vectors, one
            per slide.
        n_groups: T; 1 gives one group with the mean of all spots as its centroid.
        seed: of the sample and the starts; the same seed gives the same groups.
        max_spots: spots in the sample.

    Returns:
        The groups, that of most sampled spots first.

    Raises:
        DataError: settings below 1, no slide, more groups than different spots, or another width
            or value that is not finite.
    """
    if n_groups < 1 or max_spots < n_groups:
        raise DataError(
            f"spot groups: n_groups {n_groups} and max_spots {max_spots}; expected at least 1 "
            "group and at least as many spots (8 and 20000 are usual)."
        )
    sizes: list[int] = []
    total = np.zeros(0)
    for block in _read(blocks):
        total = block.sum(axis=0, dtype=np.float64) + (total if sizes else 0)
        sizes.append(len(block))
    if n_groups == 1:
        return SpotGroups((total / sum(sizes))[None].astype(np.float32))
    sample = _sample(blocks, np.array(sizes, dtype=np.int64), max_spots, seed)
    different = len(np.unique(sample, axis=0))
    if different < n_groups:
        raise DataError(
            f"spot groups: {n_groups} groups of {different} different spots. Lower n_groups to at "
            f"most {different}, or give more slides."
        )
    with threadpool_limits(limits=1):  # sums of several threads differ in their last bits
        fit = KMeans(n_groups, n_init=_STARTS, random_state=seed).fit(sample)
    order = np.argsort(-np.bincount(fit.labels_, minlength=n_groups), kind="stable")
    return SpotGroups(fit.cluster_centers_[order].astype(np.float32))


def _sample(
    blocks: VectorBlocks, sizes: NDArray[np.int64], max_spots: int, seed: int
) -> NDArray[np.float64]:
    """(at most max_spots, r) spots, evenly over slides."""
    rng = np.random.default_rng(seed)
    parts = []
    for block, size, take in zip(_read(blocks), sizes, even_quota(sizes, max_spots), strict=True):
        if len(block) != size:
            raise DataError(
                f"spot groups: a slide had {size} spots in the first pass and {len(block)} in the "
                "second. blocks must be a function that returns a fresh iterator on every call."
            )
        parts.append(block[np.sort(rng.choice(len(block), size=int(take), replace=False))])
    return np.concatenate(parts).astype(np.float64)


def _read(blocks: VectorBlocks) -> Iterator[NDArray[Any]]:
    """The slides once, with their shapes checked."""
    if not callable(blocks):
        raise DataError(
            "spot vectors must be a function that returns a fresh iterator over slides, found "
            f"{type(blocks).__name__}. For a list, pass lambda: iter(the_list)."
        )
    width: int | None = None
    for block in blocks():
        values = _checked(block, width)
        if len(values) == 0:
            raise DataError("spot groups: a slide has no spots; drop empty slides before fitting.")
        width = values.shape[1]
        yield values
    if width is None:
        raise DataError(
            "spot groups: there is no training slide. Give at least one, and a function that "
            "returns a fresh iterator on every call."
        )


def _checked(vectors: NDArray[Any], width: int | None) -> NDArray[Any]:
    values = np.asarray(vectors)
    if values.ndim != 2 or values.shape[1] != (width or values.shape[-1]):
        raise DataError(
            f"spot vectors have shape {values.shape}, expected (S, {width or 'r'}). Compute them "
            "with spot_vectors and standardise, all with one set of gene factors."
        )
    if not np.isfinite(values).all():
        raise DataError(
            f"{int((~np.isfinite(values)).any(axis=1).sum())} spot vectors are not finite. Compute "
            "them again with spot_vectors and standardise."
        )
    return values
