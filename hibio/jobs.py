"""The jobs of a run: variants x folds x seeds, and what each trains on and starts from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hibio.artifacts import Artifacts
from hibio.checkpoint_files import find_checkpoint, load_trainer_state
from hibio.config import ConfigError, merge, to_dict
from hibio.data.splits import (
    SlideEntry,
    Split,
    expand_folds,
    limited,
    read_entries,
    split_by_patient,
    with_counts,
)
from hibio.run_config import MAIN_VARIANT, RunConfig
from hibio.schema import SchemaError, build_section
from hibio.training.checkpoint import whole_checkpoint
from preprocessing.run import stores_in


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
    def started(self) -> bool:
        """Whether it has a checkpoint."""
        return find_checkpoint(self.folder) is not None

    @property
    def finished(self) -> bool:
        """Whether its newest checkpoint is whole and the end of the curriculum.

        Raises:
            ConfigError: there are checkpoints, and none is whole.
        """
        checkpoint, problem = whole_checkpoint(self.folder)
        if checkpoint is None or problem is not None:
            return False
        return bool(load_trainer_state(checkpoint)["finished"])


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
    split = split_by_patient(_entries(config.data.stores), fold)
    wanted = config.data.train_patients
    return split if wanted is None else limited(split, wanted)


def _entries(stores: Path, *, announce: bool = False) -> tuple[SlideEntry, ...]:
    """The slides with counts; what is left out is told once, when the jobs are listed."""
    return with_counts(read_entries(stores_in(stores)), "training", announce=announce)


def start_of(job: Job) -> Path | None:
    """The checkpoint whose omics tower a job starts from: ``model.omics.init_from``.

    ``{fold}`` and ``{seed}`` in it stand for the job's own, so that each fold starts from a
    checkpoint that has not seen its test patients.
    """
    named = job.config.model.omics.init_from
    if named is None:
        return None
    text = str(named).replace("{fold}", job.fold).replace("{seed}", str(job.seed))
    return find_checkpoint(Path(text)) or Path(text)


def refuse_seen(artifacts: Artifacts, split: Split, start: Path | None) -> None:
    """A warm start must not have been trained on this fold's test slides."""
    seen = set(artifacts.settings["pretrain_slides"]) & {entry.slide_id for entry in split.test}
    if seen:
        raise ConfigError(
            f"model.omics.init_from: {start} was trained on {len(seen)} test slides of fold "
            f"{split.name} ({', '.join(sorted(seen)[:4])}); give a checkpoint of the same fold, "
            "e.g. runs/heist/hibio/fold-{fold}/seed-{seed}/checkpoint"
        )


def refuse_other_slides(checkpoint: Path, artifacts: Artifacts, split: Split) -> None:
    """A resumed job goes on with the slides that it began with: its batches are drawn from them.

    Raises:
        ConfigError: training slides that came or went since.
    """
    began, now = set(artifacts.train_slides), {entry.slide_id for entry in split.train}
    changed = [
        f"{len(names)} {word} ({', '.join(sorted(names)[:4])})"
        for word, names in (("gone", began - now), ("new", now - began))
        if names
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint} was trained on other slides: {' and '.join(changed)} in data.stores; "
            "put back what was there, or train in another folder with --set out=DIR"
        )
