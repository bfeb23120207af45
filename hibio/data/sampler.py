"""Batches of whole regions, balanced over slides; a pure function of (seed, epoch).

An epoch is planned from the sizes of the slides alone. What a batch holds is worked out when it is
asked for, from the regions of its own slides, so that no slide is read before its turn.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from hibio.config.files import ConfigError
from hibio.config.training import SamplerConfig
from hibio.data.splits import SlideEntry
from preprocessing.errors import did_you_mean

COLUMNS = ("technology", "organism", "tissue")
#: One slide's share of a batch: (slide index, core spots).
Share = tuple[int, np.ndarray]
#: Sampling region of each spot (S,) of a slide, by its index.
RegionsOf = Callable[[int], np.ndarray]


def slide_weights(
    weights: Mapping[str, Mapping[str, float]], entries: Sequence[SlideEntry]
) -> list[float]:
    """Weight of each slide: the product over columns of what its value is given, 1 if nothing.

    Args:
        weights: column -> value -> weight of 0 or more (``sampler.weights``); values are compared
            without regard to case.
        entries: the training slides.

    Raises:
        ConfigError: an unknown column, a value that no training slide has or that is named twice,
            a weight that is no number of 0 or more, or nothing left with a weight above 0.
    """
    found = [1.0] * len(entries)
    for column, of_value in weights.items():
        if column not in COLUMNS:
            raise ConfigError(
                f"sampler.weights.{column}: no such column{did_you_mean(column, COLUMNS)}; choose "
                f"from {', '.join(COLUMNS)}"
            )
        told = _checked(column, of_value, entries)
        for number, entry in enumerate(entries):
            found[number] *= told.get(_value(entry, column), 1.0)
    if not any(found):
        raise ConfigError(
            f"sampler.weights gives each of the {len(entries)} training slides weight 0; leave at "
            "least one of their values above 0"
        )
    return found


def _checked(
    column: str, of_value: Mapping[str, float], entries: Sequence[SlideEntry]
) -> dict[str, float]:
    """The weights of one column by value in lower case."""
    present = {_value(entry, column): getattr(entry, column) for entry in entries}
    told: dict[str, float] = {}
    for value, weight in of_value.items():
        where, key = f"sampler.weights.{column}.{value}", value.casefold()
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"{where} is {weight}, expected a number of 0 or more")
        if key not in present:
            listed = ", ".join(sorted(repr(name) for name in present.values()))
            raise ConfigError(
                f"{where}: no training slide has this {column}"
                f"{did_you_mean(key, list(present))} (found: {listed}); correct or remove it"
            )
        if key in told:
            raise ConfigError(f"{where}: named twice, values differ in more than case; remove one")
        told[key] = weight
    return told


def _value(entry: SlideEntry, column: str) -> str:
    return str(getattr(entry, column)).casefold()


def pack_regions(regions: np.ndarray, n_bins: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Put whole regions into ``n_bins`` bins of nearly equal size (largest first, random ties).

    Args:
        regions: (S,) region of each spot; -1 for one that is left out.
        n_bins: number of bins; empty bins are left out.
        rng: decides between bins of one load and the order of regions of one size.
    """
    spots = np.flatnonzero(regions >= 0)
    ids, place, size = np.unique(regions[spots], return_inverse=True, return_counts=True)
    shuffle = rng.permutation(len(ids))
    order = shuffle[np.argsort(-size[shuffle], kind="stable")]
    load = rng.random(n_bins) * 1e-3
    bin_of = np.empty(len(ids), dtype=np.int64)
    for region in order:
        chosen = int(np.argmin(load))
        bin_of[region] = chosen
        load[chosen] += size[region]
    bins = bin_of[place]
    grouped = np.split(spots[np.argsort(bins, kind="stable")], np.bincount(bins).cumsum()[:-1])
    return [one for one in grouped if len(one)]


class RegionSampler:
    """Deterministic batches of an epoch.

    Args:
        config: see :class:`SamplerConfig`.
        n_spots: spots of each slide, by index.
        seed: of every draw.
        weights: of each slide (`slide_weights`); None: all 1.

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
    """See :meth:`RegionSampler.epoch`; each batch is worked out when asked for, in any order."""

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
