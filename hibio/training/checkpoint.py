"""Checkpoint directories: written beside the last good one, renamed, the one before is kept.

A run folder holds ``checkpoint`` (the newest) and ``checkpoint.previous`` (the one before it), each
with the checksums of its files. A kill at any moment leaves at least one of them whole; a damaged
``checkpoint`` is set aside as ``checkpoint.damaged`` on resume, and the one before is used.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hibio.artifacts import Artifacts, read_artifacts, write_artifacts
from hibio.checkpoint import (
    ARTIFACTS,
    BANK,
    CONFIG,
    MODEL_FILES,
    NAME,
    PREVIOUS,
    READOUT,
    STATE_VERSION,
    TRAINER,
    WEIGHTS,
    DamagedError,
    find_checkpoint,
    load_trainer_state,
    read_checksums,
    verify_files,
    write_checksums,
)
from hibio.config.files import RENAMED, ConfigError, load_saved, outdated, to_dict
from hibio.config.model import ImageInput
from hibio.config.run import UNSETTLED_DATA
from hibio.config.schema import dotted
from hibio.config.training import LAYOUT
from hibio.data.splits import Split, refuse_copies, refuse_replaced
from hibio.model import HiBio
from preprocessing.files import fsync, remove_abandoned

DAMAGED = "checkpoint.damaged"
TEMPORARY = "checkpoint.tmp"
LEAVING = "checkpoint.old"  # what was .previous, on its way out
#: Sections of a run's configuration that a resumed job must share with its checkpoint ...
SETTLED = (
    "data",
    "genes",
    "pathways",
    "sampler",
    "regions",
    "model",
    "objective",
    "optim",
    "stages",
    "curriculum",
)
UNSETTLED = {"data": UNSETTLED_DATA, "optim": LAYOUT}  # ... but for these keys


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint read once, for a run that goes on.

    Attributes:
        path: its folder.
        artifacts: what was fitted.
        weights: state dict of the model, on the CPU.
        trainer: what :meth:`Trainer.save` gave.
    """

    path: Path
    artifacts: Artifacts
    weights: dict[str, Tensor]
    trainer: dict[str, Any]


def save_checkpoint(
    folder: Path,
    model: HiBio,
    write_config: Callable[[Path], None],
    trainer_state: dict[str, Any] | None = None,
) -> Path:
    """Write ``folder/checkpoint``; what was there becomes ``checkpoint.previous``.

    Args:
        folder: run folder.
        model: weights and artifacts.
        write_config: writes the resolved configuration to the path it is given.
        trainer_state: tensors and plain values only, see :func:`load_trainer_state`.

    Raises:
        ConfigError: it cannot be written (a full disk); the checkpoints that were there stay.
    """
    temporary = folder / TEMPORARY
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    try:
        for name in (TEMPORARY, LEAVING):  # of a save that was killed
            shutil.rmtree(folder / name, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_config(temporary / CONFIG)
        write_artifacts(temporary / ARTIFACTS, model.artifacts)
        save_file(weights, temporary / WEIGHTS)
        if trainer_state is not None:
            state = {"schema_version": STATE_VERSION, **trainer_state}
            torch.save(state, temporary / TRAINER)
        write_checksums(temporary)
        for path in [*sorted(temporary.rglob("*")), temporary]:
            fsync(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(_not_written(folder, error)) from error
    _swap(folder)
    return folder / NAME


def _swap(folder: Path) -> None:
    """Give the new checkpoint its name; at every moment a whole one has a name that is looked for.

    When there is no ``checkpoint`` (a kill between the renames, or a damaged one set aside), then
    ``.previous`` is the only good one, and it stays until the new one has its name.
    """
    target, previous = folder / NAME, folder / PREVIOUS
    if target.exists():
        if previous.exists():
            previous.rename(folder / LEAVING)
        target.rename(previous)
    (folder / TEMPORARY).rename(target)
    fsync(folder)
    shutil.rmtree(folder / LEAVING, ignore_errors=True)


def _not_written(folder: Path, error: Exception) -> str:
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    kept = find_checkpoint(folder)
    good = "there is no earlier one" if kept is None else f"{kept.name} is whole, as it was"
    return (
        f"{folder}: the checkpoint could not be written ({error}); {good}. "
        f"{free / 2**20:,.0f} MiB are free on this disk: make room or check your quota, then resume"
    )


def whole_checkpoint(folder: Path) -> tuple[Path | None, str | None]:
    """The newest checkpoint of a run folder whose every file has its checksum; nothing is changed.

    Returns:
        The checkpoint, None where there is none at all; and what is wrong with a newer one.

    Raises:
        ConfigError: there are checkpoints, and none is whole; or one is of a newer HiBio.
    """
    problems: list[str] = []
    for name in (NAME, PREVIOUS):
        if not (folder / name).is_dir():
            continue
        problem = _problem(folder / name)
        if problem is None:
            return folder / name, problems[0] if problems else None
        problems.append(problem)
    if problems:
        raise ConfigError(
            f"no checkpoint is whole in {folder} ({'; '.join(problems)}); bring one back from a "
            "backup, or remove them to begin anew, and check the disk"
        )
    return None, None


def recover_checkpoint(folder: Path) -> Path | None:
    """:func:`whole_checkpoint` for a run that goes on; several processes may call it at once.

    A damaged ``checkpoint`` becomes ``checkpoint.damaged``, with a warning that names the file.

    Raises:
        ConfigError: there are checkpoints, and none is whole; or one is of a newer HiBio.
    """
    for place in (folder, folder / NAME):
        remove_abandoned(place)  # files that a killed process was writing
    checkpoint, problem = whole_checkpoint(folder)
    if problem is not None and _set_aside(folder / NAME):
        warnings.warn(
            f"{problem}. Going on from {checkpoint}, the checkpoint before it; the damaged one is "
            f"now {DAMAGED}: remove it, and check the disk if this comes again",
            stacklevel=2,
        )
    return checkpoint


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when they are whole."""
    missing = [name for name in MODEL_FILES if not (checkpoint / name).is_file()]
    if missing:
        return f"{checkpoint / missing[0]}: missing"
    try:  # the bank can be written anew, so a damaged one condemns nothing
        verify_files(checkpoint, (read_checksums(checkpoint) or {}).keys() - {BANK, READOUT})
    except DamagedError as error:
        return error.problem
    return None


def _set_aside(checkpoint: Path) -> bool:
    """Rename a damaged checkpoint; False when another process was faster."""
    own = checkpoint.with_name(f"{DAMAGED}.{os.getpid()}")
    try:
        checkpoint.rename(own)
    except FileNotFoundError:
        return False
    damaged = checkpoint.with_name(DAMAGED)  # what lies there is of an earlier time
    shutil.rmtree(damaged, ignore_errors=True)
    own.rename(damaged)
    return True


def load_newest(folder: Path) -> SavedRun | None:
    """Read the newest whole checkpoint of a run folder, see :func:`recover_checkpoint`.

    Raises:
        ConfigError: there are checkpoints and none is whole, or it is of another schema.
    """
    checkpoint = recover_checkpoint(folder)
    if checkpoint is None:
        return None
    try:
        weights = load_file(checkpoint / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{checkpoint / WEIGHTS}: cannot be read ({error}); use the .previous sibling, or "
            "remove the checkpoint and train again"
        ) from error
    trainer = load_trainer_state(checkpoint)
    if trainer["schema_version"] < STATE_VERSION:
        raise ConfigError(
            f"{checkpoint}: of a run that an older HiBio began, whose batches or terms were "
            "others, so it cannot be trained on to the same end. It embeds and evaluates as "
            "it is; train again in another folder (--set out=DIR), or resume with the version "
            "that began it (provenance.json of the run)"
        )
    return SavedRun(checkpoint, read_artifacts(checkpoint / ARTIFACTS), weights, trainer)


def refuse_other_settings(checkpoint: Path, config: Any) -> None:
    """A resumed job goes on with the settings that it began with.

    Raises:
        ConfigError: a section that decides results has changed.
    """
    saved, now = to_dict(load_saved(type(config), checkpoint / CONFIG)), to_dict(config)
    old = outdated(checkpoint / CONFIG)
    if old:
        key, value = next(iter(old.items()))
        raise ConfigError(f"{checkpoint}: {dotted(key)}: {value}: {RENAMED[key]}")
    for section, names in UNSETTLED.items():
        for name in names:
            saved[section].pop(name), now[section].pop(name)
    changed = [line for name in SETTLED for line in _changes(name, saved[name], now[name])]
    if changed:
        more = f" and {len(changed) - 4} more" * (len(changed) > 4)
        raise ConfigError(
            f"{checkpoint} was trained with other settings in: {'; '.join(changed[:4])}{more}; "
            "resume with the config.yaml of its run, or train in another folder with --set out=DIR"
        )


def _changes(key: str, saved: Any, now: Any) -> list[str]:
    """Every value that differs, as ``a.b.0.c (1 there, 2 now)``."""
    if saved == now:
        return []
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        saved, now = dict(enumerate(saved)), dict(enumerate(now))
    if isinstance(saved, dict) and isinstance(now, dict):
        names = dict.fromkeys([*saved, *now])
        return [
            line
            for name in names
            for line in _changes(f"{key}.{name}", saved.get(name), now.get(name))
        ]
    whole = isinstance(saved, list) or isinstance(now, list)
    return [key if whole else f"{key} ({saved} there, {now} now)"]


def refuse_seen(artifacts: Artifacts, split: Split, start: Path | None) -> None:
    """A warm start must not have been trained on this fold's test slides, under whatever ids."""
    seen = set(artifacts.settings.pretrain_slides) & {entry.slide_id for entry in split.test}
    if seen:
        raise ConfigError(
            f"model.omics.init_from: {start} was trained on {len(seen)} test slides of fold "
            f"{split.name} ({', '.join(sorted(seen)[:4])}); give a checkpoint of the same fold, "
            "e.g. runs/heist/hibio/fold-{fold}/seed-{seed}/checkpoint"
        )
    refuse_copies(artifacts.trained_seals, split.test, f"fold {split.name}, {start}")


def refuse_other_slides(
    checkpoint: Path, artifacts: Artifacts, split: Split, image: ImageInput | None
) -> None:
    """A resumed job goes on with the slides that it began with: its batches are drawn from them.

    Raises:
        ConfigError: training slides that came or went since, or whose content is another.
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
    refuse_replaced(checkpoint, artifacts, split.train, image)
