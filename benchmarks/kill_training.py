"""Training under `kill -9`: `python benchmarks/kill_training.py [--kills 50 --seed 0]`.

A toy run of three jobs is trained once without interruption. Then it is trained in processes that
are killed one after the other at random moments: while they start (slides, artifacts, resuming),
between steps, while a checkpoint is written, around its renames, while the reference bank is
written. Then it is resumed once more, to the end. Prints where the kills fell, and whether
everything is the same to the last bit: weights, optimizer, regions, position, log, bank. Exits 1
when something differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from safetensors.torch import load_file

from hibio.bank import read_bank
from hibio.checkpoint import (
    BANK,
    CHECKSUMS,
    NAME,
    PREVIOUS,
    damaged_files,
    load_trainer_state,
    read_checksums,
    read_log,
)
from hibio.config.run import RunConfig
from hibio.config.training import StageConfig
from hibio.run import expand, train_all
from hibio.training.checkpoint import TEMPORARY
from pathways import load_pathways
from preprocessing.patches import PatchConfig
from preprocessing.run import prepare
from preprocessing.simulate import SimulateConfig, simulate_cohort
from tests.hibio.killed_training import in_child
from tests.hibio.toy import MASKED, REGION, run_config

#: What the killer waits for -> seconds after that, at most, until it kills.
MOMENTS = {"start": 1.5, "step": 0.8, "writing": 0.06, "renames": 0.003, "bank": 0.01}
SHARES = (0.15, 0.35, 0.25, 0.25, 0.0)  # the bank comes once a job: see Killer._bank_is_next
PATIENCE_S = 60.0


def make_stores(folder: Path) -> Path:
    """Three slides of 70 spots."""
    database = load_pathways("default")
    programmes = {name: list(database.genes_of(name)) for name in database.names}
    config = SimulateConfig(
        n_slides=3, n_patients=3, n_spots=70, n_genes=400, n_housekeeping=40, mpp=4.0
    )
    manifest = simulate_cohort(folder / "cohort", programmes, config)
    prepare(manifest, folder / "stores", patch=PatchConfig(patch_px=32))
    return folder / "stores"


def config_of(stores: Path, out: Path, epochs: int) -> RunConfig:
    """Three jobs (seeds), saved after every epoch of two steps, regions rebuilt every third."""
    stages = (
        StageConfig("omics", max(1, epochs // 3), MASKED),
        StageConfig("region", epochs, REGION, rebuild_every=3),
    )
    return run_config(stores, out, stages=stages, seeds=(0, 1, 2), checkpoint_every=2, threads=1)


def expected_steps(config: RunConfig) -> int:
    """Steps of one job: two an epoch, one a slide of the two that it trains on."""
    return 2 * sum(stage.epochs for stage in config.stages)


def in_fork(work: Callable[[], object]) -> int:
    """Run in a fork to its end; gives its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])


def train(config: RunConfig) -> None:
    """Begin or go on, without a word."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train_all(config, resume=config.out.exists())


class Killer:
    """Kills one run after the other, and keeps what the kills left behind."""

    def __init__(self, config: RunConfig, seed: int) -> None:
        self.config = config
        self.rng = np.random.default_rng(seed)
        self.folders = [job.folder for job in expand(config)]
        self.fell: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.kills = 0

    def kill_one(self) -> None:
        """Go on with the run and kill it; a run that came to its end loses its last bank."""
        moment = str(self.rng.choice(list(MOMENTS), p=SHARES))
        if self._bank_is_next():
            moment = str(self.rng.choice([moment, "bank"], p=[0.2, 0.8]))
        lines = self.lines + int(self.rng.integers(1, 8))
        old = self._writing()
        child = in_child(lambda: train(self.config))
        deadline = time.monotonic() + PATIENCE_S
        while not self._reached(moment, lines, old) and time.monotonic() < deadline:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.0005)
        time.sleep(float(self.rng.uniform(0.0, MOMENTS[moment])))
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == -signal.SIGKILL:
            self.kills += 1
            self.fell[moment] += 1
            self.left[self._state()] += 1
        elif code == 0:
            (self.folders[-1] / NAME / BANK).unlink()
        else:
            raise SystemExit(f"a resumed run failed, after {self.kills} kills: see above")

    def _bank_is_next(self) -> bool:
        """Whether the job in work has only a few steps left, or none."""
        total = expected_steps(self.config)
        for folder in self.folders:
            if not (folder / NAME / BANK).exists():
                log = folder / "log.jsonl"
                return log.exists() and log.read_bytes().count(b"\n") > total - 8
        return False

    def _reached(self, moment: str, lines: int, old: set[tuple[str, int]]) -> bool:
        """Whether the killer's moment has come: some steps on, and what it waits for."""
        if moment == "start":
            return True
        if moment == "bank":
            return any(list((f / NAME).glob(f".{Path(BANK).stem}.*")) for f in self.folders)
        if self.lines < lines:
            return False
        wanted = {"writing": "config.yaml", "renames": CHECKSUMS}.get(moment)
        return wanted is None or any(name == wanted for name, _ in self._writing() - old)

    def _writing(self) -> set[tuple[str, int]]:
        """Name and time of every file of a checkpoint that has not taken its name."""
        found = set()
        for folder in self.folders:
            for path in (folder / TEMPORARY).glob("*"):
                with contextlib.suppress(FileNotFoundError):  # it has its name now
                    found.add((path.name, path.stat().st_ctime_ns))
        return found

    @property
    def lines(self) -> int:
        """Lines of the logs, whole or torn."""
        logs = [folder / "log.jsonl" for folder in self.folders]
        return sum(log.read_bytes().count(b"\n") for log in logs if log.exists())

    def _state(self) -> str:
        """What a kill left in the folder of the job that it met."""
        for folder in self.folders:
            if (folder / TEMPORARY).exists():
                names = {p.name for p in (folder / TEMPORARY).iterdir()}
                whole = "whole" if CHECKSUMS in names else f"{len(names)} files"
                kept = next((n for n in (NAME, PREVIOUS) if (folder / n).exists()), "no other")
                return f"a new checkpoint without its name ({whole}), beside {kept}"
            if (folder / NAME / BANK).exists():
                if BANK not in (read_checksums(folder / NAME) or {}):
                    return "a bank without its checksum"
            elif list((folder / NAME).glob(f".{Path(BANK).stem}.*")):
                return "a part of a bank"
        return "whole checkpoints"

    @property
    def steps(self) -> int:
        """Steps that are in the logs."""
        return sum(len(read_log(folder / "log.jsonl")) for folder in self.folders)


def differences(one: Path, other: Path) -> list[str]:
    """Names of what is not the same to the last bit in two job folders."""
    found = [f"damaged {told}" for p in (one, other) if (told := damaged_files(p / NAME))]
    weights = [load_file(folder / NAME / "model.safetensors") for folder in (one, other)]
    states = [load_trainer_state(folder / NAME) for folder in (one, other)]
    banks = [read_bank(folder / NAME / BANK) for folder in (one, other)]
    logs = [read_log(folder / "log.jsonl") for folder in (one, other)]
    logs = [[{k: r[k] for k in r if "seconds" not in k} for r in log] for log in logs]
    pairs = {
        "weights": weights,
        "trainer": states,
        "log": logs,
        "bank": [(b.image, b.tfidf.toarray(), b.slide.tolist(), b.patient.tolist()) for b in banks],
    }
    return found + [name for name, (left, right) in pairs.items() if not same(left, right)]


def same(left: object, right: object) -> bool:
    """Equality to the last bit of nested values, tensors and arrays."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return np.array_equal(left, right)
    return left == right


def run(folder: Path, kills: int, seed: int, epochs: int) -> int:
    """Train, kill, resume, compare and print; gives the exit code."""
    begin = time.monotonic()
    if in_fork(lambda: make_stores(folder)):
        return 1
    whole, killed = (config_of(folder / "stores", folder / n, epochs) for n in ("whole", "killed"))
    if in_fork(lambda: train(whole)):
        return 1
    killer = Killer(killed, seed)
    while killer.kills < kills:
        killer.kill_one()
        print(f"\r{killer.kills} kills, step {killer.steps}", end="", file=sys.stderr, flush=True)
    reached = killer.steps
    if in_fork(lambda: train(killed)):
        return 1
    print(file=sys.stderr)
    for name, table in (("killed", killer.fell), ("left behind", killer.left)):
        print(f"| {name} | times |\n|---|---|")
        print("".join(f"| {what} | {n} |\n" for what, n in table.most_common()))
    pairs = zip(expand(whole), expand(killed), strict=True)
    found = {b.name: told for a, b in pairs if (told := differences(b.folder, a.folder))}
    result = f"DIFFERENT {found}" if found else "the same as without a kill, to the last bit"
    print(
        f"{kills} kills in a row (seed {seed}), the last at step {reached} of {killer.steps}, "
        f"{time.monotonic() - begin:.0f} s: {result}"
    )
    return int(bool(found))


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=40, help="of the longer stage of a job")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hibio_kill_") as folder:
        return run(Path(folder), options.kills, options.seed, options.epochs)


if __name__ == "__main__":
    sys.exit(main())
