"""Batches of whole regions, balanced over slides; a pure function of (seed, epoch).

An epoch is planned from the sizes of the slides alone. What a batch holds is worked out when it is
asked for, from the regions of its own slides, so that no slide is read before its turn.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class SamplerConfig:
    """How spots are drawn.

    Attributes:
        batch_spots: core spots of a batch, about (whole regions are never split).
        slides_per_batch: slides that share a batch; 1 keeps the slide shortcut out of the
            contrast (METHOD section 5).
        balance: slide (every slide gives the same number of batches) | spot (by its size).
        halo: hops of context round the core spots while training.
        window: slides whose batches are mixed with each other; the next ones follow when these are
            through. With data.cache_slides as large, a slide is read once an epoch.
        weights: column (technology, organism, tissue) -> value -> how many batches its slides
            give, relative to slides that no weight names (1); 0 leaves them out. A slide that
            several columns name has the product.
        batches_per_step: N batches make the global batch of one optimiser step, over which the
            losses compare and average, whatever number of processes shares them; what is left of
            an epoch after the last N is dropped.
    """

    batch_spots: int = 512
    slides_per_batch: int = 1
    balance: str = "slide"
    halo: int = 1
    window: int = 64
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    batches_per_step: int = 1

    def __post_init__(self) -> None:
        if self.batches_per_step < 1:
            raise ValueError(f"batches_per_step is {self.batches_per_step}, at least 1 is needed")
        if self.batch_spots < 2 or self.slides_per_batch < 1 or self.halo < 0:
            raise ValueError("batch_spots >= 2, slides_per_batch >= 1 and halo >= 0 are needed")
        if self.balance not in ("slide", "spot"):
            raise ValueError(f"balance is slide or spot, not {self.balance!r}")
        if self.window < self.slides_per_batch:
            raise ValueError(
                f"window is {self.window}, at least slides_per_batch ({self.slides_per_batch}) "
                "slides are needed; 64 is usual"
            )


#: One slide's share of a batch: (slide index, core spots).
Share = tuple[int, np.ndarray]

#: Sampling region of each spot (S,) of a slide, by its index.
RegionsOf = Callable[[int], np.ndarray]


def pack_regions(regions: np.ndarray, n_bins: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Put whole regions into ``n_bins`` bins of nearly equal size (largest first, random ties).

    Args:
        regions: (S,) region of each spot.
        n_bins: number of bins; empty bins are left out.
        rng: decides between bins of one load and the order of regions of one size.
    """
    ids, place, size = np.unique(regions, return_inverse=True, return_counts=True)
    shuffle = rng.permutation(len(ids))
    order = shuffle[np.argsort(-size[shuffle], kind="stable")]
    load = rng.random(n_bins) * 1e-3
    bin_of = np.empty(len(ids), dtype=np.int64)
    for region in order:
        chosen = int(np.argmin(load))
        bin_of[region] = chosen
        load[chosen] += size[region]
    bins = bin_of[place]
    grouped = np.split(np.argsort(bins, kind="stable"), np.bincount(bins).cumsum()[:-1])
    return [spots for spots in grouped if len(spots)]


class RegionSampler:
    """Deterministic batches of an epoch.

    Args:
        config: see :class:`SamplerConfig`.
        n_spots: spots of each slide, by index.
        seed: of every draw.
        weights: of each slide (`hibio.data.mixture.slide_weights`); None: all 1.

    Raises:
        ValueError: weights that are not one a slide, negative, or all 0.
    """

    def __init__(
        self,
        config: SamplerConfig,
        n_spots: Sequence[int],
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.config = config
        self.n_spots = np.asarray(n_spots, dtype=np.int64)
        self.seed = seed
        self.weights = np.ones(len(self.n_spots)) if weights is None else np.asarray(weights)
        if self.weights.shape != self.n_spots.shape or not (self.weights >= 0).all():
            raise ValueError(
                f"{self.weights.shape} weights for {len(self.n_spots)} slides; expected one of 0 "
                "or more for each"
            )
        if not self.weights.any():
            raise ValueError("every slide has weight 0; give at least one slide more")
        self._wanted = self._wanted_shares()

    def bins_of_slide(self, n_spots: int) -> int:
        """Shares that a slide of this size is cut into."""
        return max(1, math.ceil(n_spots * self.config.slides_per_batch / self.config.batch_spots))

    def _wanted_shares(self) -> np.ndarray:
        """Shares that each slide gives in the mean of many epochs, adding up to a whole number."""
        own = np.array([self.bins_of_slide(int(n)) for n in self.n_spots], dtype=np.float64)
        if self.config.balance == "slide":
            own[:] = max(1, round(own.sum() / len(own)))
        own *= self.weights
        return own * (max(1, round(own.sum())) / own.sum())

    def shares_per_slide(self, epoch: int) -> np.ndarray:
        """Shares that each slide gives in one epoch, int64.

        The wanted number, rounded up or down by systematic sampling, so that every epoch has as
        many shares and the mean over epochs is the wanted number.
        """
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self._wanted))
        start = rng.random()
        edge = np.cumsum(self._wanted[order]) + start
        edge[-1] = round(self._wanted.sum()) + start  # whatever the sum was rounded to
        shares = np.empty(len(order), dtype=np.int64)
        shares[order] = np.diff(np.floor(edge), prepend=0.0)
        return shares

    def n_batches(self) -> int:
        """Batches in an epoch, the same for every epoch."""
        return math.ceil(round(self._wanted.sum()) / self.config.slides_per_batch)

    def epoch(self, epoch: int, regions_of: RegionsOf) -> EpochBatches:
        """The batches of one epoch.

        Args:
            epoch: counts from 0.
            regions_of: gives the (S,) sampling region of each spot of a slide, by index; asked
                for a slide only when one of its batches is.
        """
        return EpochBatches(self, epoch, regions_of)


class EpochBatches:
    """The batches of one epoch, each worked out when it is asked for, in any order.

    Args:
        sampler: whose epoch.
        epoch: counts from 0.
        regions_of: see :meth:`RegionSampler.epoch`.
    """

    def __init__(self, sampler: RegionSampler, epoch: int, regions_of: RegionsOf) -> None:
        self.sampler = sampler
        self.number = epoch
        self.regions_of = regions_of
        self._slide_of_share, self._turn_of_share = self._plan()
        self._bins: OrderedDict[tuple[int, int], list[np.ndarray]] = OrderedDict()

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        """Slide of every share, and which of that slide's shares it is, in the order of use."""
        shares = self.sampler.shares_per_slide(self.number)
        rng = np.random.default_rng([self.sampler.seed, self.number, 1])
        order = rng.permutation(np.flatnonzero(shares))
        slides, turns = [], []
        for start in range(0, len(order), self.sampler.config.window):
            window = order[start : start + self.sampler.config.window]
            slide = np.repeat(window, shares[window])
            turn = np.concatenate([np.arange(shares[one]) for one in window])
            mixed = rng.permutation(len(slide))
            slides.append(slide[mixed])
            turns.append(turn[mixed])
        return np.concatenate(slides), np.concatenate(turns)

    def __len__(self) -> int:
        return self.sampler.n_batches()

    def __getitem__(self, batch: int) -> list[Share]:
        """The shares of one batch.

        Raises:
            IndexError: there are not so many batches.
        """
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of an epoch of {len(self)}")
        step = self.sampler.config.slides_per_batch
        shares = slice(batch * step, (batch + 1) * step)
        return [
            (int(slide), self._share(int(slide), int(turn)))
            for slide, turn in zip(
                self._slide_of_share[shares], self._turn_of_share[shares], strict=True
            )
        ]

    def _share(self, slide: int, turn: int) -> np.ndarray:
        """Core spots of a slide's share: its bins in random order, packed anew when used up."""
        again = 0
        while True:
            bins = self._packed(slide, again)
            if turn < len(bins):
                return bins[turn]
            turn -= len(bins)
            again += 1

    def _packed(self, slide: int, again: int) -> list[np.ndarray]:
        """The bins of a slide; those of the slides in use are kept."""
        key = (slide, again)
        if key not in self._bins:
            rng = np.random.default_rng([self.sampler.seed, self.number, 2, slide, again])
            regions = self.regions_of(slide)
            bins = pack_regions(regions, self.sampler.bins_of_slide(len(regions)), rng)
            self._bins[key] = [bins[i] for i in rng.permutation(len(bins))]
        self._bins.move_to_end(key)
        while len(self._bins) > self.sampler.config.window:
            self._bins.popitem(last=False)
        return self._bins[key]

    def __iter__(self) -> Iterator[list[Share]]:
        return (self[batch] for batch in range(len(self)))
