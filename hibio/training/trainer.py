"""The training loop: stages, epochs, batches; stateless randomness, so that a resume is exact."""

from __future__ import annotations

import signal
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hibio.config import ConfigError
from hibio.data.collate import collate
from hibio.data.dataset import SlideDataset
from hibio.data.sampler import RegionSampler, SamplerConfig, Share
from hibio.model import HiBio
from hibio.training.checkpoint import find_checkpoint, load_trainer_state, save_checkpoint
from hibio.training.engine import NotFiniteError, TorchEngine
from hibio.training.log import RunLog
from hibio.training.objective import Objective
from hibio.training.region_state import RegionState
from hibio.training.stages import StageConfig, stage_lr


class Trainer:
    """Runs the stages on one split.

    Args:
        model: in training.
        engine: optimiser and precision.
        objective: terms of a stage on a batch.
        dataset: training slides.
        regions: their region trees.
        stages: the curriculum.
        sampler: batch composition.
        folder: run folder; the checkpoint and the log go there.
        write_config: writes the resolved configuration.
        seed: of every random draw.
        checkpoint_every: epochs between checkpoints.
    """

    def __init__(
        self,
        *,
        model: HiBio,
        engine: TorchEngine,
        objective: Objective,
        dataset: SlideDataset,
        regions: RegionState,
        stages: Sequence[StageConfig],
        sampler: SamplerConfig,
        folder: Path,
        write_config: Callable[[Path], None],
        seed: int,
        checkpoint_every: int,
    ) -> None:
        # parts
        self.model = model
        self.engine = engine
        self.objective = objective
        self.dataset = dataset
        self.regions = regions
        # plan
        self.stages = tuple(stages)
        objective.check(self.stages)
        self.sampler = sampler
        self.folder = folder
        self.write_config = write_config
        self.seed = seed
        self.checkpoint_every = checkpoint_every
        # position: the next batch to train on
        self.step = 0
        self.stage = 0
        self.epoch = 0
        self.batch = 0
        self._interrupted = False

    # ------------------------------------------------------------------ the loop
    def fit(self, until_step: int | None = None) -> bool:
        """Train to the end; True when finished, False when stopped early (and resumable).

        Args:
            until_step: stop and save after this many steps in all.
        """
        self._interrupted = False
        self.model.train()
        log = RunLog(self.folder, after_step=self.step)
        bar = tqdm(total=self.n_steps(), initial=self.step, desc=self.folder.name, disable=None)
        try:
            with self._signals():
                finished = self._run(log, bar, until_step)
        finally:
            log.close()
            bar.close()
        self.save()
        return finished

    def _run(self, log: RunLog, bar: tqdm, until_step: int | None) -> bool:
        while self.stage < len(self.stages):
            for batch in self._epoch_batches():
                log.write(self._train_step(batch))
                bar.update()
                if self._interrupted or self.step == until_step:
                    return self._position_done()
            self._end_epoch()
        return True

    def _epoch_batches(self) -> Iterator[list[Share]]:
        """Batches of the current epoch from the current position on; regions are kept current."""
        stage = self.stages[self.stage]
        slides = self._slides(stage)
        first = self.batch == 0
        if (
            first
            and self.epoch > 0
            and stage.rebuild_every
            and self.epoch % stage.rebuild_every == 0
        ):
            self.regions.rebuild(self.model, slides)
        sampler = self._sampler(stage)
        local = self.regions.sampling(slides)
        batches = sampler.epoch(self.epoch, {i: local[s] for i, s in enumerate(slides)})
        for batch in batches[self.batch :]:
            yield [(slides[i], core) for i, core in batch]

    def _train_step(self, shares: list[Share]) -> dict[str, Any]:
        started = time.perf_counter()
        stage = self.stages[self.stage]
        torch.manual_seed(self._step_seed())
        parts = [(self.dataset[i], self.regions.current(i), core) for i, core in shares]
        views = self.objective.views(stage, np.random.default_rng(self._step_seed()))
        batch = collate(parts, self.sampler.halo, views).to(self.engine.device)
        with self.engine.precision():
            loss = self.objective(batch, stage)
        done = self.epoch * self._sampler(stage).n_batches() + self.batch
        lr = stage_lr(stage, done, stage.epochs * self._sampler(stage).n_batches())
        try:
            norm = self.engine.step(loss.total, lr)
        except NotFiniteError as error:
            terms = {name: float(value) for name, value in loss.terms.items()}
            raise NotFiniteError(
                f"{error} (step {self.step}, stage {stage.name!r}, slides "
                f"{', '.join(batch.slide_ids)}, terms {terms}); the last checkpoint is good: "
                "lower the stage's lr, or check these slides with `hibio check`"
            ) from error
        record = {
            "step": self.step,
            "stage": stage.name,
            "epoch": self.epoch,
            "total": float(loss.total.detach()),
            "terms": {name: float(value) for name, value in loss.terms.items()},
            "n": loss.n,
            "lr": lr,
            "gradient_norm": norm,
            "temperature": float(self.model.temperature.detach()),
            "seconds": time.perf_counter() - started,
        }
        self.step += 1
        self.batch += 1
        return record

    def _end_epoch(self) -> None:
        self.batch = 0
        self.epoch += 1
        due = self.epoch % self.checkpoint_every == 0
        if self.epoch == self.stages[self.stage].epochs:
            self.stage, self.epoch = self.stage + 1, 0
        if due and self.stage < len(self.stages):
            self.save()

    def _position_done(self) -> bool:
        """Whether the step just taken was the last of all."""
        stage = self.stages[self.stage]
        if self.batch == self._sampler(stage).n_batches():
            self.batch, self.epoch = 0, self.epoch + 1
        if self.epoch == stage.epochs:
            self.stage, self.epoch = self.stage + 1, 0
        return self.stage == len(self.stages)

    # ------------------------------------------------------------------ plan
    def n_steps(self) -> int:
        """Steps of the whole curriculum."""
        return sum(stage.epochs * self._sampler(stage).n_batches() for stage in self.stages)

    def _slides(self, stage: StageConfig) -> list[int]:
        entries = self.dataset.entries
        slides = [i for i, e in enumerate(entries) if e.has_image or not stage.needs_image]
        if not slides:
            raise ConfigError(
                f"stage {stage.name!r} needs images, and no training slide has one; remove the "
                "stage, or hold out another patient"
            )
        return slides

    def _sampler(self, stage: StageConfig) -> RegionSampler:
        sizes = [self.dataset.entries[i].n_spots for i in self._slides(stage)]
        return RegionSampler(
            self.sampler, sizes, seed=zlib.crc32(f"{self.seed}/{stage.name}".encode())
        )

    def _step_seed(self) -> int:
        return int(np.random.SeedSequence([self.seed, self.step]).generate_state(1)[0])

    # ------------------------------------------------------------------ state
    def save(self) -> Path:
        """Write the checkpoint."""
        state = {
            "step": self.step,
            "stage": self.stage,
            "epoch": self.epoch,
            "batch": self.batch,
            "finished": self.stage == len(self.stages),
            "optimizer": self.engine.state(),
            "regions": self.regions.state(),
        }
        return save_checkpoint(self.folder, self.model, self.write_config, state)

    def resume(self) -> bool:
        """Continue from the run folder's checkpoint; False when there is none."""
        checkpoint = find_checkpoint(self.folder)
        if checkpoint is None:
            return False
        state = load_trainer_state(checkpoint)
        saved = HiBio.from_checkpoint(checkpoint)
        self.model.load_state_dict(saved.state_dict())
        self.engine.load_state(state["optimizer"])
        self.regions.load_state(state["regions"])
        for name in ("step", "stage", "epoch", "batch"):
            setattr(self, name, state[name])
        return True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM: finish the step, save, stop; a second Ctrl-C stops at once."""

        def stop(number: int, frame: object) -> None:
            self._interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller's signals are its own
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
