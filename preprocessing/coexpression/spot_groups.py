"""Label-free groups of spots, and one gene graph for each (docs/method.md 3).

Groups never come from annotated labels, otherwise the graph would tell the label.
Shapes: S spots, G genes, T groups, r components of a spot vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from preprocessing.coexpression.gene_graph import (
    EdgeRule,
    GeneGraph,
    graph_of_samples,
)
from preprocessing.coexpression.slide_blocks import (
    TfidfBlocks,
    even_quota,
    read_blocks,
    read_stream,
)
from preprocessing.errors import DataError

#: A fresh pass over slides, one array of each: spot vectors (S, r), or the group (S,) of each spot.
SpotArrays = Callable[[], Iterable[NDArray[Any]]]
_NO_SLIDE = (
    "spot groups: there is no training slide. Give at least one, and a function that returns a "
    "fresh iterator on every call."
)
_ROWS = 65_536  # spots whose distances are held at once
_STARTS = 4  # k-means restarts
_GROUPS = "groups of spots"
_CORPUS = -1  # "group" of every spot
_NOISE = 5.0  # an edge of n spots has at least 5 / n nats: chance gives that to 1 pair in 600


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
        """The nearest group (S,), 0 to T - 1, of standardised spot vectors (S, r).

        Ties go to the lower index. It depends on nothing but the spot's own vector.

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
    blocks: SpotArrays, n_groups: int, seed: int = 0, *, max_spots: int = 20_000
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
    blocks: SpotArrays, sizes: NDArray[np.int64], max_spots: int, seed: int
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


def _read(blocks: SpotArrays) -> Iterator[NDArray[Any]]:
    """The slides once, with their shapes checked."""
    width: int | None = None
    for block in read_stream("spot vectors", blocks, _NO_SLIDE):
        values = _checked(block, width)
        if len(values) == 0:
            raise DataError("spot groups: a slide has no spots; drop empty slides before fitting.")
        width = values.shape[1]
        yield values


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


def group_gene_graphs(
    blocks: TfidfBlocks,
    groups: SpotArrays,
    n_genes: int,
    n_groups: int,
    rule: EdgeRule | None = None,
    *,
    max_spots: int = 2000,
    min_group_spots: int = 200,
    seed: int = 0,
) -> list[GeneGraph]:
    """Fits the co-expression graph of each group; the sign of a correlation is ignored.

    Reads the groups twice and the slides once. Holds T x max_spots sparse rows, and the dense
    scores of one group at a time. In a group of n sampled spots an edge also needs 5 / n nats,
    because the noise of r^2 is 1 / n; one group alone is the corpus and has the rule as it is, so
    below some 200 spots raise its min_information. A gene that does not vary, or is too rare, has
    no edge.

    Args:
        blocks: function that returns a fresh iterator over (S, G) TF-IDF CSR, one per slide.
        groups: function that returns a fresh iterator over the (S,) group of each spot.
        n_genes: G.
        n_groups: T.
        rule: which edges are kept; None: the usual ones.
        max_spots: spots sampled in each group, spread evenly over slides.
        min_group_spots: a group with fewer spots takes the graph of all spots, with a warning.
        seed: of the samples.

    Returns:
        T graphs, in the order of the groups.

    Raises:
        DataError: settings out of range, groups that do not fit the slides, or fewer than 3 spots.
    """
    if min(n_groups, max_spots) < 1:
        raise DataError(
            f"gene graphs: n_groups is {n_groups} and max_spots {max_spots}; both must be at least "
            "1 (2000 spots are usual)."
        )
    rule = rule or EdgeRule()
    quota = _plan(groups, n_groups, max_spots, min_group_spots)
    samples = _draw(blocks, groups, n_genes, quota, seed)
    graphs = {
        group: graph_of_samples(sample, n_genes, _own_rule(rule, group, sample))
        for group, sample in samples.items()
    }
    return [graphs[group if group in graphs else _CORPUS] for group in range(n_groups)]


def _plan(
    groups: SpotArrays, n_groups: int, max_spots: int, min_group_spots: int
) -> dict[int, NDArray[np.int64]]:
    """Spots to draw from each slide, for every group with a graph of its own and the corpus."""
    sizes = np.array([_sizes(one, n_groups) for one in read_stream(_GROUPS, groups)])
    sizes = sizes.reshape(-1, n_groups)
    spots = sizes.sum(axis=0)
    small = np.flatnonzero(spots < min_group_spots) if n_groups > 1 else np.arange(1)
    quota = {
        group: even_quota(sizes[:, group], max_spots)
        for group in range(n_groups)
        if group not in small
    }
    if small.size:
        quota[_CORPUS] = even_quota(sizes.sum(axis=1), max_spots)
    if n_groups > 1 and small.size:
        told = ", ".join(f"group {group}: {spots[group]} spots" for group in small)
        warnings.warn(
            f"{small.size} of {n_groups} groups have fewer than {min_group_spots} training spots "
            f"and take the gene graph of all spots ({told}); fewer groups, or more slides, would "
            "give each its own.",
            stacklevel=3,
        )
    return quota


def _own_rule(rule: EdgeRule, group: int, sample: list[sparse.csr_matrix]) -> EdgeRule:
    """The rule with the noise of this many spots as its floor; the corpus has the rule as it is."""
    if group == _CORPUS:
        return rule
    floor = _NOISE / max(sum(rows.shape[0] for rows in sample), 1)
    return replace(rule, min_information=max(rule.min_information, floor))


def _sizes(group: NDArray[Any], n_groups: int) -> NDArray[np.int64]:
    """(T,) spots of one slide in each group."""
    group = np.asarray(group)
    known = group.dtype.kind in "iu" and bool(((group >= 0) & (group < n_groups)).all())
    if group.ndim != 1 or not known:
        raise DataError(
            f"groups of spots: found shape {group.shape} of {group.dtype}"
            f"{f' up to {group.max()}' if group.size else ''}, expected (S,) integers from 0 to "
            f"{n_groups - 1}. Compute them with SpotGroups.assign of these n_groups."
        )
    return np.bincount(group, minlength=n_groups).astype(np.int64)


def _draw(
    blocks: TfidfBlocks,
    groups: SpotArrays,
    n_genes: int,
    quota: dict[int, NDArray[np.int64]],
    seed: int,
) -> dict[int, list[sparse.csr_matrix]]:
    """The sampled rows of every group, by slide; each group has its own random numbers."""
    rngs = {group: np.random.default_rng(seed) for group in quota}
    samples: dict[int, list[sparse.csr_matrix]] = {group: [] for group in quota}
    slides = zip_longest(read_blocks(blocks, n_genes), read_stream(_GROUPS, groups))
    number = -1
    for number, slide in enumerate(slides):
        found = [None if one is None else one.shape[0] for one in slide]
        if len(set(found)) > 1:
            raise DataError(
                f"gene graphs: one slide has {found} spots in TF-IDF rows and groups. Both must "
                "come from the same slides in the same order."
            )
        rows, group_of_spots = slide
        for group, take in quota.items():
            if not take[number]:
                continue
            mine = np.flatnonzero((group_of_spots == group) | (group == _CORPUS))
            drawn = rngs[group].choice(len(mine), size=int(take[number]), replace=False)
            samples[group].append(rows[mine[np.sort(drawn)]])
    if number + 1 != len(next(iter(quota.values()))):
        raise DataError(
            f"gene graphs: the second pass over the groups gave {number + 1} slides, the first "
            "more. groups must be a function that returns a fresh iterator on every call."
        )
    return samples
