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
from hibio.config import ConfigError
from hibio.model import HiBio

NAME = "checkpoint"
PREVIOUS = "checkpoint.previous"
TEMPORARY = "checkpoint.tmp"


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
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
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


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """State of the trainer, without unpickling code.

    Raises:
        ConfigError: there is none.
    """
    path = checkpoint / "trainer.pt"
    if not path.is_file():
        raise ConfigError(f"{checkpoint}: no trainer.pt, so this run cannot be resumed")
    return torch.load(path, map_location="cpu", weights_only=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
