"""RunConfig and build(): the one place where the parts of a training run are joined."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hibio.artifacts import Artifacts
from hibio.bank import build_bank, write_bank
from hibio.config import ConfigError, dump_config, merge, to_dict
from hibio.data.dataset import SlideDataset
from hibio.data.fitting import GenesConfig, PathwaysConfig, fit_artifacts
from hibio.data.sampler import SamplerConfig
from hibio.data.slide import PATCHES
from hibio.data.splits import (
    SlideEntry,
    Split,
    expand_folds,
    read_entries,
    split_by_patient,
    with_counts,
)
from hibio.model import HiBio, ModelConfig
from hibio.provenance import write_provenance
from hibio.schema import SchemaError, build_section
from hibio.slide_regions import RegionsConfig
from hibio.training.checkpoint import (
    NAME,
    find_checkpoint,
    load_trainer_state,
    refuse_other_settings,
)
from hibio.training.engine import OptimConfig, TorchEngine
from hibio.training.objective import Objective, ObjectiveConfig
from hibio.training.region_state import RegionState
from hibio.training.stages import StageConfig
from hibio.training.trainer import Trainer
from preprocessing.run import stores_in

MAIN_VARIANT = "hibio"


@dataclass(frozen=True)
class DataConfig:
    """Where the stores are and how an image is read.

    Attributes:
        stores: folder of ``<slide_id>.h5``.
        image: stored feature key, ``patches`` (timm tower), or null for counts only.
        shuffle_pairs: the control that gives every spot another spot's image.
        cache_slides: prepared slides kept in memory.
    """

    stores: Path
    image: str | None = "handcrafted"
    shuffle_pairs: bool = False
    cache_slides: int = 64


@dataclass(frozen=True)
class RunConfig:
    """A training run: every variant on every fold with every seed.

    Attributes:
        out: run folder; each job writes ``<variant>/fold-<fold>/seed-<seed>`` below it.
        data: see :class:`DataConfig`.
        folds: held-out patients ("A", "P1+P2"), ``each`` for every patient with an image, or
            ``none`` to train on all.
        seeds: one job each.
        variants: name -> settings that differ from the main run, for baselines trained by the
            same code ("flat_clip", "shuffled"). The main run is called ``hibio``.
        genes, pathways, sampler, regions, model, objective, optim: see their classes.
        stages: the curriculum.
        device: auto | cpu | cuda.
        threads: CPU threads of torch; null leaves its default. 1 does not suffer from other work.
        checkpoint_every: epochs between checkpoints.
        bank: write the reference bank at the end.
        variant: name of this job's variant (filled in by :func:`expand`).
    """

    out: Path
    data: DataConfig
    stages: tuple[StageConfig, ...]
    folds: tuple[str, ...] = ("each",)
    seeds: tuple[int, ...] = (0,)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    genes: GenesConfig = field(default_factory=GenesConfig)
    pathways: PathwaysConfig = field(default_factory=PathwaysConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    regions: RegionsConfig = field(default_factory=RegionsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    device: str = "auto"
    threads: int | None = None
    checkpoint_every: int = 5
    bank: bool = True
    variant: str = MAIN_VARIANT

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty; give at least one stage")
        if not self.folds or not self.seeds:
            raise ValueError("folds and seeds need at least one entry each")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device is auto, cpu or cuda, not {self.device!r}")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every is {self.checkpoint_every}, at least 1 is needed")


@dataclass(frozen=True)
class Job:
    """One training: a variant on a fold with a seed."""

    config: RunConfig
    fold: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """variant/fold-X/seed-N."""
        return "/".join(self.folder.parts[-3:])

    @property
    def finished(self) -> bool:
        """Whether its last checkpoint is the end of the curriculum."""
        checkpoint = find_checkpoint(self.folder)
        return checkpoint is not None and load_trainer_state(checkpoint)["finished"]


def expand(config: RunConfig) -> list[Job]:
    """Every job of a run, fold by fold, so that the fitted artifacts of a fold are shared."""
    configs = [config] + [_variant(config, name) for name in config.variants]
    folds = expand_folds(_entries(config.data.stores, announce=True), config.folds)
    return [
        Job(
            dataclasses.replace(one, folds=(fold,), seeds=(seed,), variants={}),
            fold,
            seed,
            config.out / one.variant / f"fold-{fold}" / f"seed-{seed}",
        )
        for fold in folds
        for seed in config.seeds
        for one in configs
    ]


def _variant(config: RunConfig, name: str) -> RunConfig:
    if name == MAIN_VARIANT or not name.replace("_", "").replace("-", "").isalnum():
        allowed = f"letters, digits, - and _, and not {MAIN_VARIANT!r}"
        raise ConfigError(f"variants.{name}: a variant's name is {allowed}")
    base = {**to_dict(config), "variants": {}, "variant": name}
    try:
        return build_section(RunConfig, merge(base, config.variants[name]), ("variants", name))
    except SchemaError as problem:
        raise ConfigError(f"variants.{name}: {problem}") from problem


def split_of(config: RunConfig, fold: str) -> Split:
    """The split of one fold of a run."""
    return split_by_patient(_entries(config.data.stores), fold)


def _entries(stores: Path, *, announce: bool = False) -> tuple[SlideEntry, ...]:
    """The slides with counts; what is left out is told once, when the jobs are listed."""
    return with_counts(read_entries(stores_in(stores)), "training", announce=announce)


@functools.lru_cache(maxsize=2)
def _fitted(
    paths: tuple[Path, ...], genes: GenesConfig, pathways: PathwaysConfig, seed: int
) -> Artifacts:
    """Artifacts of one fold, shared by its variants and seeds."""
    return fit_artifacts(paths, genes, pathways, seed)


def build(job: Job, *, resume: bool = False) -> Trainer:
    """Join the parts of one job.

    Args:
        job: what to train.
        resume: continue from its checkpoint where there is one.
    """
    config = job.config
    torch.set_num_threads(config.threads or torch.get_num_threads())
    train = split_of(config, job.fold).train
    checkpoint = find_checkpoint(job.folder) if resume else None
    if checkpoint is not None:
        artifacts = HiBio.from_checkpoint(checkpoint).artifacts
    else:
        paths = tuple(entry.path for entry in train)
        artifacts = _fitted(paths, config.genes, config.pathways, 0)
    dataset = SlideDataset(
        train, artifacts, config.data.image, config.data.cache_slides, config.data.shuffle_pairs
    )
    config = dataclasses.replace(config, model=_sized(config, dataset))
    if checkpoint is not None:
        refuse_other_settings(checkpoint, config)
    torch.manual_seed(job.seed)
    model = HiBio(config.model, artifacts)
    trainer = Trainer(
        model=model,
        engine=TorchEngine(model, config.optim, config.device),
        objective=Objective(model, config.objective, config.regions.levels),
        dataset=dataset,
        regions=RegionState(config.regions, dataset),
        stages=config.stages,
        sampler=config.sampler,
        folder=job.folder,
        write_config=lambda path: dump_config(config, path),
        seed=job.seed,
        checkpoint_every=config.checkpoint_every,
    )
    if resume:
        trainer.resume()
    return trainer


def finish(job: Job, trainer: Trainer) -> Path:
    """After training: write the reference bank into the checkpoint; returns the checkpoint."""
    checkpoint = job.folder / NAME
    if job.config.bank:
        entries = trainer.dataset.entries
        dataset = SlideDataset(entries, trainer.model.artifacts, job.config.data.image)
        bank = build_bank(trainer.model, dataset)
        if bank is not None:
            write_bank(checkpoint / "bank.h5", bank)
    return checkpoint


def _lacks_bank(job: Job) -> bool:
    """Whether a finished job was stopped before its reference bank was written."""
    paired = any(entry.has_image for entry in split_of(job.config, job.fold).train)
    wanted = job.config.bank and job.config.data.image is not None and paired
    return wanted and not (job.folder / NAME / "bank.h5").is_file()


def _sized(config: RunConfig, dataset: SlideDataset) -> ModelConfig:
    """The model section with the vision input size read from the stores."""
    vision = config.model.vision
    paired: Sequence[int] = [i for i, e in enumerate(dataset.entries) if e.has_image]
    if config.data.image is None or not paired:
        vision = dataclasses.replace(vision, name="none")
    elif config.data.image != PATCHES:
        features = dataset[paired[0]].features_SF
        assert features is not None
        vision = dataclasses.replace(vision, feature_dim=features.shape[1])
    return dataclasses.replace(config.model, vision=vision)


def train_all(config: RunConfig, *, resume: bool = False) -> list[Path]:
    """Train every job of a run that is not finished yet; returns the checkpoints.

    Args:
        config: what to train.
        resume: continue in a folder that already holds jobs.

    Raises:
        ConfigError: the folder holds checkpoints and ``resume`` is off, or there is no such folder
            and it is on.
        InterruptedError: stopped by a signal; everything is saved.
    """
    if resume and not config.out.is_dir():
        raise ConfigError(
            f"{config.out}: no such folder, so there is nothing to resume; give the run's folder "
            "(its 'out'), or leave --resume out to begin"
        )
    jobs = expand(config)
    started = [job for job in jobs if find_checkpoint(job.folder) is not None]
    if started and not resume:
        raise ConfigError(
            f"{config.out} already holds {len(started)} checkpoint(s), e.g. {started[0].name}; "
            f"continue with --resume {config.out}, or choose another folder with --set out=DIR"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    dump_config(config, config.out / "config.yaml")
    write_provenance(config.out / "provenance.json")
    checkpoints = []
    for number, job in enumerate(jobs, start=1):
        if not job.finished:
            print(f"[{number}/{len(jobs)}] {job.name}", flush=True)
            trainer = build(job, resume=resume)
            if not trainer.fit():
                raise InterruptedError(
                    f"stopped at step {trainer.step} of {trainer.n_steps()} of {job.name}; saved. "
                    f"Continue with: hibio train --config {config.out / 'config.yaml'} "
                    f"--resume {config.out}"
                )
            finish(job, trainer)
        elif _lacks_bank(job):
            finish(job, build(job, resume=True))
        checkpoints.append(job.folder / NAME)
    return checkpoints
