"""The training loop: stages, epochs, batches; stateless randomness, so that a resume is exact."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from hibio.batch import SlideBatch
from hibio.config.files import ConfigError
from hibio.config.training import StageConfig, stage_lr
from hibio.model import HiBio
from hibio.training.checkpoint import SavedRun, load_newest, save_checkpoint
from hibio.training.curriculum import Judge, Outcome, Verdict, judged_stages, mean_weights
from hibio.training.engine import Engine, NotFiniteError
from hibio.training.grad_cache import take_step
from hibio.training.log import RunLog
from hibio.training.objective import PREFIX, Objective
from hibio.training.plan import Plan, StepInput
from hibio.training.process_group import on_stop
from hibio.training.step_outputs import MicroBatch, read_micro_batch
from preprocessing.files import atomic_path

FEW_SPOTS = 32  # of one slide, to see what is connected; the values do not matter


class Snapshot(NamedTuple):
    """Weights by name, optimiser and regions as they were at one moment."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    regions: dict[str, torch.Tensor]


def broken_inputs(batches: Iterable[SlideBatch]) -> dict[str, dict[str, int]]:
    """Slide id -> field of the batch -> number of spots (halo too) with a NaN or an infinity."""
    found: dict[str, dict[str, int]] = {}
    for batch in batches:
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            wrong = ~torch.isfinite(value)
            if field.name == "distance_um_SN":  # infinite on purpose where there is no neighbour
                wrong &= batch.neighbour_SN >= 0
            rows_S = wrong.flatten(1).any(dim=1)
            for number in batch.slide_of_spot_S[rows_S].unique().tolist():
                slide = found.setdefault(batch.slide_ids[number], {})
                count = int((rows_S & (batch.slide_of_spot_S == number)).sum())
                slide[field.name] = slide.get(field.name, 0) + count
    return found


def _plain(value: float) -> float | str:
    """A number as JSON has it; NaN and infinities are words there."""
    return value if math.isfinite(value) else str(value)


def parameter_use(module: Objective, plan: Plan) -> Mapping[str, tuple[bool, ...]]:
    """Name of each trained parameter -> whether each stage gives it a gradient.

    The module, with its model whole, is as it was afterwards. Every process finds the same.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    device = next(module.parameters()).device
    before = {name: value.clone() for name, value in module.named_buffers()}
    was_training = module.training
    module.eval()
    used: dict[str, list[bool]] = {name: [] for name in trained}
    for stage in plan.stages:
        total = module.terms(module.outputs(_few_spots(plan, stage).to(device), stage), stage).total
        found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, found, strict=True):
            used[name].append(gradient is not None)
    module.train(was_training)
    for name, value in module.named_buffers():
        value.copy_(before[name])
    return {name: tuple(stages) for name, stages in used.items()}


def _few_spots(plan: Plan, stage: StageConfig) -> MicroBatch:
    """Neighbouring spots of the first slide, of one with an image where there is one."""
    slides: Sequence[int] = plan.slides(stage)
    entries = plan.dataset.entries
    index = next((i for i in slides if entries[i].has_image), slides[0])
    slide = plan.dataset[index]
    core = np.arange(min(FEW_SPOTS, slide.n_spots))
    views = plan.objective.views(stage, np.random.default_rng(0))
    part = (slide, plan.regions.current(index), core)
    return read_micro_batch([index], [part], plan.config.halo, views, index=0, seed=0)


class Trainer:
    """Runs the stages on one split; every process of a run has one and does the same.

    Args:
        model: in training.
        engine: of the model and its objective; holds optimiser, precision and processes.
        plan: what every step trains on.
        folder: run folder; the checkpoint and the log go there.
        write_config: writes the resolved configuration.
        checkpoint_every: steps between checkpoints.
        verdicts: of the stages, where a rehearsal has judged them.
        judge: of a rehearsal.
        log_to: trackers beside ``log.jsonl``, see `RunLog`.
        settings: plain values of the configuration, for them.
    """

    def __init__(
        self,
        *,
        model: HiBio,
        engine: Engine,
        plan: Plan,
        folder: Path,
        write_config: Callable[[Path], None],
        checkpoint_every: int,
        verdicts: Sequence[Verdict] = (),
        judge: Judge | None = None,
        log_to: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.engine = engine
        self.group = engine.group
        self.plan = plan
        self.regions = plan.regions
        self.stages = plan.stages
        plan.objective.check(self.stages)
        self.folder = folder
        self.write_config = write_config
        self.checkpoint_every = checkpoint_every
        self.verdicts = list(verdicts)
        self.judge = judge
        self.log_to, self.settings = log_to, settings
        self._before: Snapshot | None = None  # the stage that may be undone or mixed
        # position: the next step to take
        self.step = 0
        self.stage = 0
        self.epoch = 0
        self.batch = 0
        self._asked = False  # here, by a signal
        self.interrupted = False  # the last fit, anywhere, as all processes know

    def fit(self, until_step: int | None = None) -> bool:
        """Train to the end; True when finished, False when stopped early (and resumable).

        Args:
            until_step: stop and save after this many steps in all.
        """
        self._asked = self.interrupted = False
        self.model.train()
        first = self.group.is_first
        log = RunLog(self.folder, self.step, self.log_to, self.settings) if first else None
        bar = tqdm(
            total=self.plan.n_steps(),
            initial=self.step,
            desc=self.folder.name,
            disable=None if first else True,
        )
        try:
            with on_stop(self._ask_to_stop):
                finished = self._run(log, bar, until_step)
                self.save()
                self.interrupted = self.group.any(self._asked)
        finally:
            if log is not None:
                log.close()
            bar.close()
        return finished

    def _run(self, log: RunLog | None, bar: tqdm, until_step: int | None) -> bool:
        while self.stage < len(self.stages):
            self.engine.begin_stage(self.stage)
            self._remember()
            with closing(self._epoch_steps()) as steps:
                started = time.perf_counter()
                for step in steps:
                    record = self._train_step(step, time.perf_counter() - started)
                    record["seconds"] = time.perf_counter() - started
                    if log is not None:
                        log.write(record)
                    bar.update()
                    ended = self.batch == self.plan.end(self.stages[self.stage], self.epoch)
                    if ended:
                        self._end_epoch()
                    self.interrupted = self.group.any(self._asked)
                    if self.interrupted or self.step == until_step:
                        return self.stage == len(self.stages)
                    if self.step % self.checkpoint_every == 0 and self.stage < len(self.stages):
                        self.save()
                    if ended:
                        break
                    started = time.perf_counter()
        return True

    def _epoch_steps(self) -> Generator[StepInput, None, None]:
        """Steps of the current epoch from the current position on; regions are kept current."""
        stage = self.stages[self.stage]
        if self.batch == 0 and self.plan.rebuilds(stage, self.epoch):
            self.regions.rebuild(self.whole_model(), self.plan.slides(stage), self.group)
        return self.plan.epoch(stage, self.epoch, self.batch, self.step)

    def _train_step(self, step: StepInput, seconds_reading: float) -> dict[str, Any]:
        stage = self.stages[self.stage]
        done = self.epoch * self.plan.steps(stage) + self.batch
        lr = stage_lr(stage, done, self.plan.length(stage))
        try:
            result = take_step(self.engine, stage, step.micros, step.seed, lr, weigh=self._is_due())
        except NotFiniteError as error:
            raise self._not_finite(error, lr, step) from error
        record = {
            "step": self.step,
            "stage": stage.name,
            "epoch": self.epoch,
            "total": result.total,
            "terms": result.terms,
            "n": result.n,
            "lr": lr,
            "gradient_norm": result.gradient_norm,
            "temperature": result.temperature,
            "seconds_reading": seconds_reading,
        }
        if result.gradient_shares is not None:
            record["gradient_shares"] = result.gradient_shares
        self.step += 1
        self.batch += 1
        return record

    def _is_due(self) -> bool:
        """Whether this step looks at each term's share of the gradient."""
        every = self.engine.config.shares_every
        return every > 0 and self.step % every == 0

    def _end_epoch(self) -> None:
        """Go on to the next epoch or stage."""
        self.batch, self.epoch = 0, self.epoch + 1
        if self.plan.end(self.stages[self.stage], self.epoch) == 0:
            self._end_stage(self.stages[self.stage])
            self.stage, self.epoch = self.stage + 1, 0

    def _remember(self) -> None:
        """At the start of a stage that may be undone or mixed: what there was before it."""
        if self.judge is None:
            mixed = {one.stage for one in self.verdicts if one.outcome == "mixed"}
            watched = self.stages[self.stage].name in mixed
        else:
            watched = self.stage in judged_stages(self.stages)
        if watched and self._before is None:
            self._before = self._snapshot()

    def _snapshot(self) -> Snapshot:
        """All processes call it."""
        weights = {name: value.clone() for name, value in self.engine.weights().items()}
        return Snapshot(weights, copy.deepcopy(self.engine.state()), self.regions.state())

    def _end_stage(self, stage: StageConfig) -> None:
        """The verdict on a stage, given now or by a rehearsal, is carried out."""
        before, self._before = self._before, None
        if before is None:
            return
        mixed = mean_weights(before.weights, self.engine.weights())
        outcome: Outcome = "mixed"
        if self.judge is not None:
            candidates = (before.weights, mixed, self.engine.weights())
            scores = [self._score(weights) for weights in candidates]
            self.verdicts.append(Verdict.of(stage.name, scores, self.judge.inner.name))
            outcome = self.verdicts[-1].outcome
            if self.group.is_first:
                tqdm.write(f"{self.folder.name}: {self.verdicts[-1]}")
        if outcome == "mixed":
            self.engine.load(mixed, self.engine.state())
        elif outcome == "undone":
            self.engine.load(before.weights, before.optimizer)
            self.regions.load_state(before.regions)

    def _score(self, weights: Mapping[str, torch.Tensor]) -> float:
        """What the judge says of weights; the first process's word, on all."""
        assert self.judge is not None
        model = self.model.empty_copy()
        model.load_state_dict({name.removeprefix(PREFIX): one for name, one in weights.items()})
        score = torch.tensor([self.judge.score(model.to(self.engine.device).eval())])
        return float(self.group.copy_from(0, score.double()))

    def whole_model(self) -> HiBio:
        """The model in training, or a copy where its parameters lie somewhere else.

        All processes call it.
        """
        if self.engine.holds_whole_model:
            return self.model
        model = self.model.empty_copy()
        weights = self.engine.weights()
        model.load_state_dict({name.removeprefix(PREFIX): one for name, one in weights.items()})
        return model.to(self.engine.device).train(self.model.training)

    def save(self) -> None:
        """Write the checkpoint; a signal waits until it is whole. All processes call it."""
        state = {
            "step": self.step,
            "stage": self.stage,
            "epoch": self.epoch,
            "batch": self.batch,
            "finished": self.stage == len(self.stages),
            "n_steps": self.plan.n_steps(),
            "optimizer": self.engine.state(),
            "regions": self.regions.state(),
            "verdicts": [verdict.plain() for verdict in self.verdicts],
            "before": None if self._before is None else self._before._asdict(),
        }
        model = self.whole_model()
        with on_stop(self._ask_to_stop):
            self.group.on_first(
                lambda: save_checkpoint(self.folder, model, self.write_config, state)
            )

    def resume(self, saved: SavedRun | None = None) -> bool:
        """Continue from the run folder's newest whole checkpoint; False when there is none.

        Args:
            saved: that checkpoint, where it was read already.

        Raises:
            ConfigError: no checkpoint is whole, or its weights do not fit this model.
        """
        saved = saved or load_newest(self.folder)
        if saved is None:
            return False
        try:
            weights = {PREFIX + name: value for name, value in saved.weights.items()}
            self.engine.load(weights, saved.trainer["optimizer"])
        except RuntimeError as error:
            raise ConfigError(f"{saved.path}: its weights do not fit ({error})") from error
        self.regions.load_state(saved.trainer["regions"])
        for name in ("step", "stage", "epoch", "batch"):
            setattr(self, name, saved.trainer[name])
        self.verdicts = [Verdict(**one) for one in saved.trainer.get("verdicts", ())]
        before = saved.trainer.get("before")
        self._before = None if before is None else Snapshot(**before)
        return True

    def _not_finite(self, error: NotFiniteError, lr: float, step: StepInput) -> NotFiniteError:
        """Keep what the step was made of; gives the error that names the file and the slides.

        ``not_finite.json`` (``not_finite-rank<N>.json`` of process N > 0) of the run folder holds
        what is needed to look at the step: where it was in the run, the terms, and the slides with
        their spots and what is wrong with their input, if anything.
        """
        broken = broken_inputs(micro.batch for micro in step.micros)
        parts = [(self.plan.dataset.entries[i].slide_id, core) for i, core in step.shares]
        offending = sorted(broken) or list(dict.fromkeys(slide_id for slide_id, _ in parts))
        stage = self.stages[self.stage].name
        content = {
            "reason": str(error),
            "step": self.step,
            "stage": stage,
            "epoch": self.epoch,
            "batch": self.batch,
            "lr": lr,
            "seed": self.plan.seed,
            "step_seed": self.plan.step_seed(self.step, 0),
            "terms": {name: _plain(value) for name, value in error.terms.items()},
            "offending_slides": offending,
            "slides": [
                {
                    "slide_id": slide_id,
                    "inputs_not_finite": broken.get(slide_id, {}),
                    "spots": core.tolist(),
                }
                for slide_id, core in parts
            ],
        }
        rank = self.group.rank
        path = self.folder / ("not_finite.json" if rank == 0 else f"not_finite-rank{rank}.json")
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        return NotFiniteError(
            f"{error} (step {self.step}, stage {stage!r}, slides {', '.join(offending)}, terms "
            f"{error.terms}); the spots and seeds are in {path}. The last checkpoint is good: "
            "check these slides with `hibio check` and prepare them again, then resume; or train "
            "anew with a lower lr of the stage"
        )

    def _ask_to_stop(self) -> None:
        """On Ctrl-C and SIGTERM: finish the step, save, stop; a second Ctrl-C stops at once."""
        self._asked = True
