"""``hibio check``: a checkpoint here, everything else in preprocessing."""

from __future__ import annotations

import warnings
from pathlib import Path

from hibio.config import ConfigError
from preprocessing.check import check_path
from preprocessing.findings import Finding


def check_any(path: Path) -> list[Finding]:
    """Findings on a store, a folder of stores, a manifest, or a checkpoint or run folder."""
    if not path.is_dir():
        return check_path(path)
    checkpoints = sorted(p.parent for p in path.glob("**/config.yaml") if _is_checkpoint(p.parent))
    if not checkpoints:
        return check_path(path)
    return [finding for one in checkpoints for finding in _check_one(one, path)]


def _check_one(checkpoint: Path, asked: Path) -> list[Finding]:
    """A checkpoint; in a run folder, of what is not the newest only whether it is whole."""
    from hibio.training.checkpoint import DAMAGED, LEAVING, NAME, PREVIOUS, TEMPORARY

    if checkpoint == asked or checkpoint.name not in (DAMAGED, LEAVING, PREVIOUS, TEMPORARY):
        return check_checkpoint(checkpoint)
    if checkpoint.name == DAMAGED:
        text = "a damaged checkpoint that a resumed run set aside"
        return [Finding("WARN", str(checkpoint), text, "remove it, and check the disk")]
    if checkpoint.name == PREVIOUS and not checkpoint.with_name(NAME).is_dir():
        return check_checkpoint(checkpoint)
    return _check_files(checkpoint) if checkpoint.name == PREVIOUS else []


def check_checkpoint(path: Path) -> list[Finding]:
    """Whether a checkpoint is what was saved and loads; whether it can be resumed and queried."""
    try:
        findings = _check_files(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no checksums: told by the finding
            findings.append(_check_model(path))
    except ConfigError as error:
        fix = "train again, or use the .previous sibling"
        return [Finding("FAIL", str(path), str(error), fix)]
    return [*findings, _check_trainer(path), _check_bank(path)]


def _check_files(path: Path) -> list[Finding]:
    """One finding for every damaged file, or one for all."""
    from hibio.checkpoint_files import (
        BANK,
        CHECKSUMS,
        UNVERIFIED,
        damaged_files,
        read_checksums,
    )
    from hibio.training.checkpoint import PREVIOUS

    damaged = damaged_files(path)
    if damaged is None:
        return [Finding("WARN", str(path), UNVERIFIED, "hibio train --config CONFIG --resume DIR")]
    if not damaged:
        n_files = len(read_checksums(path) or {})
        return [Finding("PASS", str(path), f"{n_files} files are what was saved ({CHECKSUMS})", "")]
    back = "resume the run, which goes on from the .previous sibling; or use that sibling"
    if path.name == PREVIOUS:
        back = "nothing is lost while the newer one is whole; the next save takes its place"
    anew = "resume the run, which writes it anew"
    return [
        Finding("FAIL", str(path / name), text, anew if name == BANK else back)
        for name, text in damaged.items()
    ]


def _check_model(path: Path) -> Finding:
    from hibio.model import HiBio

    model = HiBio.from_checkpoint(path)
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    genes, sets = model.artifacts.n_genes, model.artifacts.n_pathways
    text = f"loads: {n_weights:,} weights, {genes:,} genes, {sets} pathways"
    return Finding("PASS", str(path), text, "")


def _check_trainer(path: Path) -> Finding:
    from hibio.checkpoint_files import load_trainer_state

    try:
        finished = load_trainer_state(path)["finished"]
    except ConfigError as error:
        return Finding("WARN", str(path), str(error), "it still embeds and evaluates")
    if finished:
        return Finding("PASS", str(path), "training is finished", "")
    fix = "hibio train --config CONFIG --resume RUN_FOLDER"
    return Finding("WARN", str(path), "training is not finished", fix)


def _check_bank(path: Path) -> Finding:
    from hibio.bank import read_bank

    fix = "train to the end on slides with images, with bank: true"
    if not (path / "bank.h5").is_file():
        return Finding("WARN", str(path), "no reference bank: it cannot be queried", fix)
    try:
        n_spots = len(read_bank(path / "bank.h5").image)
    except ConfigError as error:
        return Finding("WARN", str(path), str(error), f"remove bank.h5 and resume, or {fix}")
    return Finding("PASS", str(path), f"reference bank of {n_spots:,} spots", "")


def _is_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("model.safetensors", "artifacts.h5"))
