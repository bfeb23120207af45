"""Batches of whole regions, balanced over slides; a pure function of (seed, epoch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """

    batch_spots: int = 512
    slides_per_batch: int = 1
    balance: str = "slide"
    halo: int = 1

    def __post_init__(self) -> None:
        if self.batch_spots < 2 or self.slides_per_batch < 1 or self.halo < 0:
            raise ValueError("batch_spots >= 2, slides_per_batch >= 1 and halo >= 0 are needed")
        if self.balance not in ("slide", "spot"):
            raise ValueError(f"balance is slide or spot, not {self.balance!r}")


#: One slide's share of a batch: (slide index, core spots).
Share = tuple[int, np.ndarray]


def pack_regions(regions: np.ndarray, n_bins: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Put whole regions into ``n_bins`` bins of nearly equal size (largest first, random ties).

    Args:
        regions: (S,) region of each spot.
        n_bins: number of bins; empty bins are left out.
        rng: decides between bins of one load and the order of regions of one size.
    """
    ids, size = np.unique(regions, return_counts=True)
    shuffle = rng.permutation(len(ids))
    order = shuffle[np.argsort(-size[shuffle], kind="stable")]
    load = rng.random(n_bins) * 1e-3
    bin_of = np.empty(len(ids), dtype=np.int64)
    for region in order:
        chosen = int(np.argmin(load))
        bin_of[region] = chosen
        load[chosen] += size[region]
    bins = bin_of[np.searchsorted(ids, regions)]
    return [np.flatnonzero(bins == b) for b in range(n_bins) if np.any(bins == b)]


class RegionSampler:
    """Deterministic batches of an epoch.

    Args:
        config: see :class:`SamplerConfig`.
        n_spots: spots of each slide, by index.
        seed: of every draw.
    """

    def __init__(self, config: SamplerConfig, n_spots: Sequence[int], seed: int) -> None:
        self.config = config
        self.n_spots = list(n_spots)
        self.seed = seed

    def batches_per_slide(self) -> list[int]:
        """How many shares each slide gives in an epoch."""
        share = self.config.batch_spots / self.config.slides_per_batch
        own = [max(1, math.ceil(n / share)) for n in self.n_spots]
        if self.config.balance == "spot":
            return own
        return [max(1, round(sum(own) / len(own)))] * len(own)

    def n_batches(self) -> int:
        """Batches in an epoch, the same for every epoch."""
        return math.ceil(sum(self.batches_per_slide()) / self.config.slides_per_batch)

    def epoch(self, epoch: int, regions: Mapping[int, np.ndarray]) -> list[list[Share]]:
        """The batches of one epoch.

        Args:
            epoch: counts from 0.
            regions: (S,) sampling region of each spot, by slide index.
        """
        rng = np.random.default_rng([self.seed, epoch])
        shares: list[Share] = []
        for slide, wanted in enumerate(self.batches_per_slide()):
            shares += self._slide_shares(slide, regions[slide], wanted, rng)
        order = rng.permutation(len(shares))
        step = self.config.slides_per_batch
        groups = [order[i : i + step] for i in range(0, len(order), step)]
        return [[shares[i] for i in group] for group in groups]

    def _slide_shares(
        self, slide: int, regions: np.ndarray, wanted: int, rng: np.random.Generator
    ) -> list[Share]:
        """``wanted`` shares of one slide: its bins, over again where it has too few."""
        own = max(
            1, math.ceil(len(regions) * self.config.slides_per_batch / self.config.batch_spots)
        )
        shares: list[Share] = []
        while len(shares) < wanted:
            bins = pack_regions(regions, own, rng)
            shares += [(slide, bins[i]) for i in rng.permutation(len(bins))]
        return shares[:wanted]
