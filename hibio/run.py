"""build(): the one place where the parts of a training run are joined."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from hibio.artifacts import Artifacts
from hibio.bank import build_bank, write_bank
from hibio.config import ConfigError, dump_config
from hibio.data.dataset import SlideDataset
from hibio.data.fitting import GenesConfig, PathwaysConfig, fit_artifacts
from hibio.data.slide import PATCHES
from hibio.jobs import Job, expand, refuse_seen, split_of, start_of
from hibio.model import HiBio, ModelConfig
from hibio.provenance import write_provenance
from hibio.run_config import MAIN_VARIANT, DataConfig, RunConfig
from hibio.training.checkpoint import NAME, find_checkpoint, refuse_other_settings
from hibio.training.engine import TorchEngine
from hibio.training.objective import Objective
from hibio.training.region_state import RegionState
from hibio.training.trainer import Trainer

__all__ = [
    "MAIN_VARIANT",
    "DataConfig",
    "Job",
    "RunConfig",
    "build",
    "expand",
    "finish",
    "train_all",
]


@functools.lru_cache(maxsize=2)
def _fitted(
    paths: tuple[Path, ...],
    genes: GenesConfig,
    pathways: PathwaysConfig,
    start: Path | None,
) -> Artifacts:
    """Artifacts of one fold, shared by its variants and seeds."""
    source = None if start is None else HiBio.from_checkpoint(start).artifacts
    return fit_artifacts(paths, genes, pathways, start=source)


def build(job: Job, *, resume: bool = False) -> Trainer:
    """Join the parts of one job.

    Args:
        job: what to train.
        resume: continue from its checkpoint where there is one.
    """
    config = job.config
    torch.set_num_threads(config.threads or torch.get_num_threads())
    split = split_of(config, job.fold)
    train = split.train
    checkpoint = find_checkpoint(job.folder) if resume else None
    start = start_of(job)
    if checkpoint is not None:
        artifacts = HiBio.from_checkpoint(checkpoint).artifacts
    else:
        paths = tuple(entry.path for entry in train)
        artifacts = _fitted(paths, config.genes, config.pathways, start)
    refuse_seen(artifacts, split, start)
    dataset = SlideDataset(
        train, artifacts, config.data.image, config.data.cache_slides, config.data.shuffle_pairs
    )
    config = dataclasses.replace(config, model=_sized(config, dataset))
    if checkpoint is not None:
        refuse_other_settings(checkpoint, config)
    torch.manual_seed(job.seed)
    model = HiBio(config.model, artifacts)
    if start is not None and checkpoint is None:
        model.start_omics_from(HiBio.from_checkpoint(start))
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
