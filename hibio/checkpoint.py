"""What a run leaves in a folder: provenance, log, checkpoint files with their checksums.

``checksums.json`` lists every file of a checkpoint with its size and SHA-256. It tells damage (a
torn write, a flipped bit), not malice: whoever can change a file can change its checksum too. What
a checkpoint may hold and what it may not is in ``docs/security.md``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hibio import __version__
from hibio.config.files import ConfigError
from preprocessing.files import atomic_path, file_sha256

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKAGES = ("torch", "timm", "numpy", "scipy", "scikit-learn", "anndata", "h5py")
#: Of a run folder: the newest checkpoint, and the one before it; the folder of its rehearsal.
NAME, PREVIOUS, REHEARSAL = "checkpoint", "checkpoint.previous", "rehearsal"
#: Files of a checkpoint; what a model needs comes first.
MODEL_FILES = CONFIG, ARTIFACTS, WEIGHTS = "config.yaml", "artifacts.h5", "model.safetensors"
TRAINER, BANK, CHECKSUMS = "trainer.pt", "bank.h5", "checksums.json"
READOUT = "readout.h5"  # see `hibio.readout`
PROVENANCE = "provenance.json"  # of the folder of a run or grid
UNVERIFIED = (
    f"no {CHECKSUMS} (written by an older HiBio), so damage cannot be told; resuming the run "
    "writes one"
)
#: Of the folder as a whole: which files there are and what they are called. 0 had no checksums.
SCHEMA_VERSION = 1
#: Of what ``trainer.pt`` holds. 0 is what the first versions wrote, without a number; it is read
#: to know whether a run is finished, and not trained on: their batches were drawn in another way.
#: 2: the neighbour term asks for the niche's genes.
STATE_VERSION = 2


def provenance() -> dict[str, Any]:
    """Versions of the packages that decide results, the machine, the commit and the command."""
    return {
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {"hibio": __version__, **{name: _version(name) for name in PACKAGES}},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "commit": _commit(),
    }


def _program() -> str:
    """What was called; `python -m hibio.cli` is `hibio`."""
    name = Path(sys.argv[0]).name
    return "hibio" if name == "__main__.py" else name


def write_provenance(path: Path) -> None:
    """Write :func:`provenance` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(provenance(), indent=2) + "\n")


def _version(package: str) -> str:
    """Installed version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Commit of the checkout this package lies in; "" for an installed copy."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a log; a torn last line (killed while writing) is left out.

    Raises:
        ConfigError: another line is no record.
    """
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            float(record.get("seconds", 0.0))
            records.append(record)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            if number != len(lines):
                raise ConfigError(
                    f"{path}: line {number} is no record ({error}); remove that line, or the file, "
                    "which only tells how the training went"
                ) from error
    return records


class DamagedError(ConfigError):
    """A file of a checkpoint is not what was saved.

    Attributes:
        problem: which file and what is wrong, without the remedy.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"{problem}; the checkpoint is torn or was changed: use its .previous sibling, or "
            f"train again (if you changed it yourself, remove {CHECKSUMS})"
        )
        self.problem = problem


@dataclass(frozen=True)
class FileSum:
    """What is known of one file: its size in bytes and its SHA-256, hexadecimal."""

    n_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """Of a file as it is now."""
        return cls(path.stat().st_size, file_sha256(path))


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder by name, or None; its bytes are not looked at."""
    for name in (NAME, PREVIOUS):
        if (folder / name / WEIGHTS).is_file():
            return folder / name
    return None


def refuse_model_folder(out: Path) -> None:
    """Refuse to write results where a model or its run lies.

    Raises:
        ConfigError: ``out`` lies in a checkpoint, or is the folder of a job or of a run.
    """
    full = out.resolve()
    below = (full / NAME, full / PREVIOUS, full, *full.parents)
    found = [one for one in below if all((one / name).is_file() for name in MODEL_FILES)]
    if found:
        raise ConfigError(
            f"{out} is of the checkpoint {found[0]}, which the next save replaces; "
            "results do not go there: give another --out"
        )
    if (full / CONFIG).is_file() and (full / PROVENANCE).is_file():
        raise ConfigError(
            f"{out} is the folder of a run, whose files results must not mix with; give a new one "
            f"in it, --out {out / 'NAME'}, or another"
        )


def model_sha256(checkpoint: Path) -> str:
    """Hash of a checkpoint's weights and artifacts: which model it is."""
    digest = hashlib.sha256()
    for name in (WEIGHTS, ARTIFACTS):
        digest.update((checkpoint / name).read_bytes())
    return digest.hexdigest()


def write_checksums(checkpoint: Path) -> None:
    """Write ``checksums.json`` for every file below a checkpoint folder, when all are there."""
    files = {
        path.relative_to(checkpoint).as_posix(): FileSum.of(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS and not path.name.startswith(".")
    }
    _write(checkpoint, files)


def add_checksum(path: Path) -> None:
    """Enter a file that came into a checkpoint after the save (the reference bank).

    A folder without checksums (of an older HiBio) stays without: its other files are unknown.
    """
    known = read_checksums(path.parent)
    if known is not None:
        _write(path.parent, {**known, path.name: FileSum.of(path)})


def read_checksums(checkpoint: Path) -> dict[str, FileSum] | None:
    """The checksums of a checkpoint by file name; None when an older HiBio wrote it without.

    Raises:
        DamagedError: the list is damaged.
        ConfigError: it is of a newer HiBio, or names a file outside the folder.
    """
    path = checkpoint / CHECKSUMS
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("sha256") != _seal(content):
            raise DamagedError(f"{path}: not what was saved")
        version = int(content["schema_version"])
        files = {
            str(name): FileSum(int(known["n_bytes"]), str(known["sha256"]))
            for name, known in content["files"].items()
        }
    except DamagedError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path}: cannot be read ({type(error).__name__})") from error
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{path}: checkpoint schema {version}, this HiBio reads up to {SCHEMA_VERSION}; "
            "update HiBio, or use the version that wrote it"
        )
    for name in files:
        _refuse_escape(path, name)
    return files


def _seal(content: Mapping[str, Any]) -> str:
    """SHA-256 of the list without its own entry; the same rule in every schema to come."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refuse_escape(path: Path, name: str) -> None:
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
        raise ConfigError(
            f"{path}: names the file {name!r}, which is outside its folder; HiBio writes no such "
            "list, so do not use this checkpoint"
        )


def verify_files(checkpoint: Path, names: Collection[str] | None = None) -> None:
    """Compare files of a checkpoint with their checksums (about 1 s for 1 GB).

    Args:
        checkpoint: its folder; one without checksums passes with a warning.
        names: which files; all that are listed when None.

    Raises:
        DamagedError: a file is missing, was changed, or is not listed.
        ConfigError: the checkpoint is of a newer HiBio.
    """
    damaged = damaged_files(checkpoint, names)
    if damaged is None:
        warnings.warn(f"{checkpoint}: {UNVERIFIED}", stacklevel=2)
    elif damaged:
        name = min(damaged)
        raise DamagedError(f"{checkpoint / name}: {damaged[name]}")


def damaged_files(checkpoint: Path, names: Collection[str] | None = None) -> dict[str, str] | None:
    """As `verify_files`: each file that is not what was saved -> what is wrong.

    None for a checkpoint without checksums.

    Raises:
        ConfigError: the list itself cannot be used, see :func:`read_checksums`.
    """
    known = read_checksums(checkpoint)
    if known is None:
        return None
    wanted = sorted(known if names is None else names)
    found = {name: _problem(checkpoint / name, known.get(name)) for name in wanted}
    return {name: problem for name, problem in found.items() if problem}


def verify_file(path: Path) -> None:
    """Compare one file with its checksum, where its folder has checksums (see `verify_files`)."""
    if (path.parent / CHECKSUMS).is_file():
        verify_files(path.parent, (path.name,))


def _problem(path: Path, known: FileSum | None) -> str | None:
    if not path.is_file():
        return "missing"
    if known is None:
        return f"not listed in {CHECKSUMS}"
    n_bytes = path.stat().st_size
    if n_bytes != known.n_bytes:
        return f"not what was saved ({n_bytes:,} bytes, {known.n_bytes:,} were written)"
    found = file_sha256(path)
    if found != known.sha256:
        return f"not what was saved (sha256 {found[:12]}..., expected {known.sha256[:12]}...)"
    return None


def _write(checkpoint: Path, files: Mapping[str, FileSum]) -> None:
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "files": {name: vars(files[name]) for name in sorted(files)},
    }
    text = json.dumps({**content, "sha256": _seal(content)}, indent=1)
    with atomic_path(checkpoint / CHECKSUMS) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """State of the trainer, compared with its checksum, without unpickling code.

    Raises:
        ConfigError: there is none, it is damaged, or of a newer HiBio.
    """
    import torch

    path = checkpoint / TRAINER
    if not path.is_file():
        raise ConfigError(f"{checkpoint}: no {TRAINER}, so this run cannot be resumed")
    verify_file(path)
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        version = int(state.get("schema_version", 0))
    except Exception as error:
        raise ConfigError(
            f"{path}: damaged ({type(error).__name__}), so this run cannot be resumed; use the "
            ".previous sibling, or remove the checkpoint and train again"
        ) from error
    if version > STATE_VERSION:
        raise ConfigError(
            f"{path}: trainer state {version}, this HiBio reads up to {STATE_VERSION}; update "
            "HiBio, or resume with the version that wrote it"
        )
    return {**state, "schema_version": version}


def steps_taken(checkpoint: Path) -> int | None:
    """Optimiser steps behind a checkpoint; None for one without the state of its trainer."""
    if not (checkpoint / TRAINER).is_file():
        return None
    return int(load_trainer_state(checkpoint)["step"])


def verdicts_on(checkpoint: Path) -> list[dict[str, Any]]:
    """What became of the judged stages, see `hibio.training.curriculum.Verdict`."""
    if not (checkpoint / TRAINER).is_file():
        return []
    return list(load_trainer_state(checkpoint).get("verdicts", ()))


def renewed(state: dict[str, Tensor], niche_head: nn.Module) -> dict[str, Tensor]:
    """Weights of a checkpoint; those of an older HiBio with a new head, which only training reads.

    Until 0.1 the neighbour term asked for the neighbours' mean vector (``around_head``).
    """
    if "around_head.weight" not in state:
        return state
    kept = {name: one for name, one in state.items() if not name.startswith("around_head.")}
    return {f"niche_head.{name}": one for name, one in niche_head.state_dict().items()} | kept
