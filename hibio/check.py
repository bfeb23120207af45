"""``hibio check``: a checkpoint here, everything else in preprocessing."""

from __future__ import annotations

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
    return [finding for checkpoint in checkpoints for finding in check_checkpoint(checkpoint)]


def check_checkpoint(path: Path) -> list[Finding]:
    """Whether a checkpoint loads, whether it can be resumed and queried."""
    from hibio.model import HiBio
    from hibio.training.checkpoint import load_trainer_state

    name = str(path)
    try:
        model = HiBio.from_checkpoint(path)
    except ConfigError as error:
        return [Finding("FAIL", name, str(error), "train again, or use the .previous sibling")]
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    genes, sets = model.artifacts.n_genes, model.artifacts.n_pathways
    text = f"loads: {n_weights:,} weights, {genes:,} genes, {sets} pathways"
    findings = [Finding("PASS", name, text, "")]
    try:
        finished = load_trainer_state(path)["finished"]
        state = "training is finished" if finished else "training is not finished"
        fix = "" if finished else "hibio train --config CONFIG --resume RUN_FOLDER"
        findings.append(Finding("PASS" if finished else "WARN", name, state, fix))
    except ConfigError as error:
        findings.append(Finding("WARN", name, str(error), "it still embeds and evaluates"))
    return [*findings, _check_bank(path)]


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
