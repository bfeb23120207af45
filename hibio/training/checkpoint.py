"""Checkpoint directories: written beside the last good one, then renamed over it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hibio.artifacts import write_artifacts
from hibio.config import ConfigError, load_config, to_dict
from hibio.model import HiBio

NAME = "checkpoint"
PREVIOUS = "checkpoint.previous"
TEMPORARY = "checkpoint.tmp"

#: Sections of a run's configuration that a resumed job must share with its checkpoint.
SETTLED = ("genes", "pathways", "sampler", "regions", "model", "objective", "optim", "stages")


def save_checkpoint(
    folder: Path,
    model: HiBio,
    write_config: Callable[[Path], None],
    trainer_state: dict[str, Any] | None = None,
) -> Path:
    """Write ``folder/checkpoint``; the one before survives until the new one is whole.

    Args:
        folder: run folder.
        model: weights and artifacts.
        write_config: writes the resolved configuration to the path it is given.
        trainer_state: tensors and plain values only, see :func:`load_trainer_state`.
    """
    temporary = folder / TEMPORARY
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_config(temporary / "config.yaml")
    write_artifacts(temporary / "artifacts.h5", model.artifacts)
    state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(state, temporary / "model.safetensors")
    if trainer_state is not None:
        torch.save(trainer_state, temporary / "trainer.pt")
    for path in temporary.iterdir():
        _fsync(path)
    _fsync(temporary)
    target, previous = folder / NAME, folder / PREVIOUS
    if target.exists():  # else .previous may be the only good one: a kill between the two renames
        shutil.rmtree(previous, ignore_errors=True)
        target.rename(previous)
    temporary.rename(target)
    _fsync(folder)
    shutil.rmtree(previous, ignore_errors=True)
    return target


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None."""
    for name in (NAME, PREVIOUS):
        if (folder / name / "model.safetensors").is_file():
            return folder / name
    return None


def refuse_other_settings(checkpoint: Path, config: Any) -> None:
    """A resumed job goes on with the settings that it began with.

    Args:
        checkpoint: what is resumed.
        config: the run's configuration now.

    Raises:
        ConfigError: a section that decides results has changed.
    """
    saved, now = to_dict(load_config(type(config), checkpoint / "config.yaml")), to_dict(config)
    changed = [name for name in SETTLED if saved[name] != now[name]]
    if changed:
        raise ConfigError(
            f"{checkpoint} was trained with other settings in: {', '.join(changed)}; resume with "
            "the config.yaml of its run, or train in another folder with --set out=DIR"
        )


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """State of the trainer, without unpickling code.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = checkpoint / "trainer.pt"
    if not path.is_file():
        raise ConfigError(f"{checkpoint}: no trainer.pt, so this run cannot be resumed")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"{path}: damaged ({type(error).__name__}), so this run cannot be resumed; use the "
            ".previous sibling, or remove the checkpoint and train again"
        ) from error
    return dict(state)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
