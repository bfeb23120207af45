"""Which spots every step trains on, read ahead and seeded: the same plan whatever the layout.

A step's global batch is N micro-batches of the sampler (``sampler.batches_per_step``), numbered
0..N-1. Of W processes, process r takes the numbers r, r + W, ... Every draw is seeded by (seed,
step, number), never by the process, so that who computes what makes no difference.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from hibio import keys
from hibio.config.files import ConfigError
from hibio.config.run import AugmentConfig
from hibio.config.training import SamplerConfig, StageConfig
from hibio.data.collate import Augment, Views
from hibio.data.counts import ordered_map
from hibio.data.dataset import PreparedSlides
from hibio.data.sampler import RegionSampler, Share, slide_weights
from hibio.training.objective import Objective
from hibio.training.process_group import ProcessGroup
from hibio.training.region_state import RegionState
from hibio.training.step_outputs import MicroBatch, read_micro_batch
from preprocessing.store import SlideStore


@dataclass(frozen=True)
class StepInput:
    """What this process gets of one step: its micro-batches, and the spots they were made of.

    Attributes:
        micros: own micro-batches, on the CPU.
        shares: (slide, core spots) of each of their parts.
        seed: of the draws for the whole step.
    """

    micros: list[MicroBatch]
    shares: list[Share]
    seed: int


class Plan:
    """The steps of a run.

    Args:
        stages: the curriculum.
        sampler: batch composition.
        dataset: training slides.
        regions: their region trees.
        objective: names the views that its terms need.
        seed: of every random draw.
        group: the processes.
        prefetch: micro-batches read ahead.
        pin: put them into page-locked memory (for a GPU).
        augment: how patches are changed.

    Raises:
        ConfigError: N is no multiple of the number of processes, or larger than an epoch.
    """

    def __init__(
        self,
        stages: Sequence[StageConfig],
        sampler: SamplerConfig,
        dataset: PreparedSlides,
        regions: RegionState,
        objective: Objective,
        seed: int,
        group: ProcessGroup,
        *,
        prefetch: int = 2,
        pin: bool = False,
        augment: AugmentConfig | None = None,
    ) -> None:
        self.stages = tuple(stages)
        self.config = sampler
        self.dataset = dataset
        self.regions = regions
        self.objective = objective
        self.seed = seed
        self.group = group
        self.prefetch = prefetch
        self.pin = pin
        self.augment = augment or AugmentConfig()
        self._samplers: dict[str, RegionSampler] = {}
        own_micro_batches(sampler.batches_per_step, group)

    def n_steps(self) -> int:
        """Steps of the whole curriculum."""
        return sum(self.length(stage) for stage in self.stages)

    def length(self, stage: StageConfig) -> int:
        """Steps of a stage, however its length is given."""
        if stage.steps is not None:
            return stage.steps
        assert stage.epochs is not None  # StageConfig has one of them
        return stage.epochs * self.steps(stage)

    def end(self, stage: StageConfig, epoch: int) -> int:
        """Steps that a stage takes of one of its epochs; of the last one perhaps not all."""
        per_epoch = self.steps(stage)
        return max(0, min(per_epoch, self.length(stage) - epoch * per_epoch))

    def rebuilds(self, stage: StageConfig, epoch: int) -> bool:
        """Whether the region trees are built anew before an epoch: the first after they are due."""
        if epoch == 0 or stage.rebuild_every == 0:
            return False
        if stage.steps is None:
            return epoch % stage.rebuild_every == 0
        now, before = (number * self.steps(stage) for number in (epoch, epoch - 1))
        return now // stage.rebuild_every > before // stage.rebuild_every

    def steps(self, stage: StageConfig) -> int:
        """Steps of an epoch; batches that are left over are others in every epoch.

        Raises:
            ConfigError: an epoch has fewer batches than a step needs.
        """
        n_batches, n = self.sampler(stage).n_batches(), self.config.batches_per_step
        if n_batches < n:
            raise ConfigError(
                f"stage {stage.name!r}: an epoch has {n_batches} batches, and sampler."
                f"batches_per_step is {n}; set it to at most {n_batches}, or lower "
                "sampler.batch_spots"
            )
        return n_batches // n

    def step_seed(self, step: int, index: int) -> int:
        """Seed of micro-batch ``index`` of a step; index N is the step as a whole."""
        return int(np.random.SeedSequence([self.seed, step, index]).generate_state(1)[0])

    def slides(self, stage: StageConfig) -> list[int]:
        """Numbers of the slides that a stage trains on.

        Raises:
            ConfigError: there are none.
        """
        entries = self.dataset.entries
        slides = [i for i, e in enumerate(entries) if e.has_image or not stage.needs_image]
        if not slides:
            raise ConfigError(
                f"stage {stage.name!r} needs images, and no training slide has one; remove the "
                "stage, or hold out another patient"
            )
        return slides

    def check_radius(self) -> None:
        """Refuse a spatial contrast within whose radius no slide has two spots: it cannot act.

        Raises:
            ConfigError: tells how far the nearest spots are.
        """
        radius, nearest = self.objective.config.contrast_um, np.inf
        if radius == 0 or not any(keys.TERM_SPATIAL in stage.active for stage in self.stages):
            return
        for entry in self.dataset.entries:
            with SlideStore(entry.path) as store:
                xy_um = store.xy_um
            apart = cKDTree(xy_um).query(xy_um, k=2)[0][:, 1]
            nearest = min(nearest, float(apart.min()))
            if nearest < radius:
                return
        raise ConfigError(
            f"the term {keys.TERM_SPATIAL} has a weight, and no slide has two spots within "
            f"objective.contrast_um, {radius:g} um: the nearest are {nearest:.4g} um apart; set it "
            f"to about {1.5 * nearest:.0f}, or to 0 if only the two views of a spot are meant"
        )

    def mixed_stages(self) -> list[str]:
        """Stages that read images where there are any, of slides with and without."""
        kinds = {entry.has_image for entry in self.dataset.entries}
        return [
            stage.name
            for stage in self.stages
            if len(kinds) == 2 and keys.TERM_PATHWAY in stage.active and not stage.needs_image
        ]

    def sampler(self, stage: StageConfig) -> RegionSampler:
        """The sampler of a stage's slides."""
        if stage.name not in self._samplers:
            slides, entries = self.slides(stage), self.dataset.entries
            weight = slide_weights(self.config.weights, entries)
            self._samplers[stage.name] = RegionSampler(
                self.config,
                [entries[i].n_spots for i in slides],
                seed=zlib.crc32(f"{self.seed}/{stage.name}".encode()),
                weights=[weight[i] for i in slides],
            )
        return self._samplers[stage.name]

    def epoch(
        self, stage: StageConfig, epoch: int, first: int, step: int
    ) -> Generator[StepInput, None, None]:
        """The steps of an epoch, read ahead in another thread.

        Args:
            stage: of the curriculum.
            epoch: of the stage.
            first: the first step of the epoch that is wanted.
            step: its number in the whole run.
        """
        slides, n = self.slides(stage), self.config.batches_per_step
        batches = self.sampler(stage).epoch(epoch, lambda place: self._sampling(slides[place]))
        own = range(self.group.rank, n, self.group.size)
        wanted = [(one, index) for one in range(first, self.steps(stage)) for index in own]

        def read(place: tuple[int, int]) -> tuple[MicroBatch, list[Share]]:
            one, index = place
            shares = [(slides[i], core) for i, core in batches[one * n + index]]
            return self._read(stage, shares, step + one - first, index), shares

        micros: list[MicroBatch] = []
        shares: list[Share] = []
        with closing(ordered_map(read, wanted, ahead=self.prefetch)) as read_in:
            for (one, _), (micro, parts) in zip(wanted, read_in, strict=True):
                micros.append(micro)
                shares += parts
                if len(micros) == len(own):
                    yield StepInput(micros, shares, self.step_seed(step + one - first, n))
                    micros, shares = [], []

    def _sampling(self, slide: int) -> np.ndarray:
        """Regions (S,) that batches are made of."""
        with self._naming([slide]):
            return self.regions.sampling(slide)

    def _read(
        self, stage: StageConfig, shares: Sequence[Share], step: int, index: int
    ) -> MicroBatch:
        """One micro-batch."""
        seed = self.step_seed(step, index)
        with self._naming([i for i, _ in shares]):
            micro = read_micro_batch(
                [i for i, _ in shares],
                [(self.dataset[i], self.regions.current(i), core) for i, core in shares],
                self.config.halo,
                self._views(stage, step, seed),
                index=index,
                seed=seed,
            )
        return micro.pinned() if self.pin else micro

    def _views(self, stage: StageConfig, step: int, seed: int) -> Views | None:
        rng = np.random.default_rng(seed)
        views, augment = self.objective.views(stage, rng), self.augment
        if not augment.active:
            return views
        changes = Augment(augment.turns, augment.stain, self.seed, step)
        return dataclasses.replace(views or Views(rng), augment=changes)

    @contextmanager
    def _naming(self, slides: Sequence[int]) -> Iterator[None]:
        """An error in the block names the slides that were read."""
        try:
            yield
        except Exception as error:
            names = ", ".join(self.dataset.entries[i].slide_id for i in slides)
            raise ConfigError(f"reading slides {names} failed: {error}") from error


def own_micro_batches(batches_per_step: int, group: ProcessGroup) -> int:
    """Micro-batches of a process in a step, A = N / W.

    Raises:
        ConfigError: N is no multiple of W.
    """
    if batches_per_step % group.size:
        below = batches_per_step // group.size * group.size
        valid = [str(n) for n in (below, below + group.size) if n]
        raise ConfigError(
            f"sampler.batches_per_step is {batches_per_step}, which {group.size} processes cannot "
            f"share evenly; set it to a multiple of {group.size}, for example "
            f"{' or '.join(valid)}, or start another number of processes"
        )
    return batches_per_step // group.size
