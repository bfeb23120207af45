"""Every command under signals: `python benchmarks/kill_commands.py [--moments 3 --seed 0]`.

Each command runs once to its end. Then, for `kill -9` and SIGTERM, it is started in an empty place
and gets the signal at random moments of that time. Whatever has its name by then must be readable
to its end, no process may go on, and the same command given again (with what it asks for in its
error, such as --resume) must end well, with the same files and none of the killed one's; so must
`demo`, with a small cohort and a short training. Prints what became of each; exits 1 when something
did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np
import pandas as pd
import yaml
from PIL import Image
from safetensors.torch import load_file

from benchmarks.kill_training import in_fork, make_stores
from hibio.checkpoint import CONFIG, NAME, READOUT, damaged_files
from hibio.cli import demo
from hibio.config.files import dump_config
from preprocessing.hdf5 import datasets
from tests.eval.hest_bench.bench_folder import write_bench
from tests.hibio.ablation_grids import write_grid
from tests.hibio.fuzz_runs import Lab, make_lab, start
from tests.hibio.test_demo import SMALL
from tests.hibio.test_features import write_weights
from tests.hibio.toy import run_config

OFTEN, SECONDS, ENDS_S = 0.002, 600, 15.0
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM}


def commands(inputs: Path, lab: Lab) -> dict[str, Callable[[Path], list[object]]]:
    """The command lines, by name; each works in a place that is new and in its ``out``."""
    trained = ["--checkpoint", lab.checkpoint, "--data", lab.stores]
    manifest, weights = inputs / "cohort" / "manifest.csv", inputs / "vit.safetensors"
    size = ["--slides", 2, "--patients", 2, "--spots", 60, "--genes", 200]

    def copied(source: Path, out: Path) -> Path:
        return out if out.exists() else Path(shutil.copytree(source, out))

    def fitting(out: Path) -> list[object]:
        fresh = not out.exists()
        checkpoint = copied(lab.checkpoint, out / NAME)
        if fresh:
            (checkpoint / READOUT).unlink()
        return ["predict", "--checkpoint", checkpoint, "--data", lab.stores, "--out", out / "x"]

    def grid(out: Path) -> list[object]:
        out.parent.mkdir(exist_ok=True)
        return ["ablate", "--config", write_grid(out.parent, lab.stores, draws=100), "--out", out]

    return {
        "simulate": lambda out: ["simulate", "--out", out, *size],
        "prepare": lambda out: ["prepare", manifest, "--out", out],
        "prepare --workers 2": lambda out: ["prepare", manifest, "--out", out, "--workers", 2],
        "prepare --layout hest": lambda out: [
            "prepare",
            manifest,
            "--out",
            out,
            "--layout",
            "hest",
        ],
        "features": lambda out: [
            *["features", copied(lab.stores, out), "--encoder", "test_vit", "--weights", weights],
            *["--device", "cpu"],
        ],
        "qc": lambda out: ["qc", lab.stores, "--out", out],
        "train": lambda out: ["train", "--config", inputs / "run.yaml", "--set", f"out={out}"],
        "embed": lambda out: ["embed", *trained, "--out", out],
        "query": lambda out: ["query", *trained, "--out", out, "--gene-set", "default"],
        "predict": lambda out: ["predict", *trained, "--out", out],
        "predict, fitting": fitting,
        "eval": lambda out: ["eval", *trained, "--out", out, "--tasks", "retrieval", "regions"],
        "export": lambda out: ["export", "regions", "--data", inputs / "embedded", "--out", out],
        "hest-bench": lambda out: ["hest-bench", inputs / "bench", "--out", out],
        "ablate": grid,
        "index": lambda out: ["index", *trained, "--out", out],
        "demo": lambda out: ["demo", "--out", out],
    }


def make_demo_small(config: Path) -> None:
    """The demo of this process and its forks is that of tests/hibio/test_demo.py, of one minute."""
    steps = demo.steps

    def small(out: Path) -> list[tuple[str, list[str]]]:
        found = [(text, [*line, *SMALL.get(line[0], [])]) for text, line in steps(out)]
        return [(t, [str(config) if a == "demo" else a for a in line]) for t, line in found]

    demo.steps = small


def make_inputs(folder: Path) -> None:
    """Stores, a checkpoint with its read-out, and what else the commands read."""
    make_lab(make_stores(folder), folder / "run")
    dump_config(run_config(folder / "stores", folder, checkpoint_every=2), folder / "run.yaml")
    write_weights(folder / "vit.safetensors", "test_vit")
    write_bench(folder / "stores", folder / "bench")


def _read_hdf5(path: Path) -> None:
    with h5py.File(path) as file:
        for _, data in datasets(file):
            data[()]


def _ends(word: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        if not path.read_text().rstrip().endswith(word):
            raise ValueError(f"does not end in {word!r}")

    return read


READ: dict[str, Callable[[Path], object]] = {
    ".h5": _read_hdf5,
    ".h5ad": _read_hdf5,
    ".json": lambda path: json.loads(path.read_text()),
    ".geojson": lambda path: json.loads(path.read_text()),
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".csv": pd.read_csv,
    ".html": _ends("</html>"),
    ".png": lambda path: Image.open(path).load(),
    ".tif": lambda path: Image.open(path).load(),
    ".safetensors": load_file,
}


def torn(out: Path) -> list[str]:
    """Files that have their names and cannot be read, or are not what was saved."""
    found = []
    for path in (p for p in files(out) if p.suffix in READ):
        try:
            READ[path.suffix](path)
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            found.append(f"{path.relative_to(out)}: {str(error)[:80]}")
    for config in out.rglob(f"{NAME}/{CONFIG}"):
        found += [f"{name}: {told}" for name, told in (damaged_files(config.parent) or {}).items()]
    return found


def files(out: Path) -> list[Path]:
    """Files with their names: no hidden ones, nor those in a folder that is being written."""
    found = (p for p in out.rglob("*") if p.is_file())
    return sorted(p for p in found if not any(s[0] == "." for s in p.relative_to(out).parts))


def names(out: Path) -> set[str]:
    """What a finished command leaves, hidden files included; logs of tensorboard by their kind."""
    found = (str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    return {name.partition("tfevents")[0] for name in found}


def group_runs(leader: int) -> bool:
    """Whether a process of a group is there that is no zombie."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = status.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(group) == leader and state != "Z":
            return True
    return False


def interrupted(line: list[object], place: Path, how: int, after: float) -> tuple[str, list[str]]:
    """Start a command and send it a signal: how it ended, and what was wrong with that."""
    log = place / "said.txt"
    log.touch()  # the signal may come first
    child = start([*map(str, line)], log, SECONDS)
    time.sleep(after)
    os.kill(child, how)
    began, ended = time.monotonic(), 0
    while not ended and time.monotonic() < began + ENDS_S:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(OFTEN)
    wrong = []
    if not ended:
        os.killpg(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        wrong.append(f"still running {ENDS_S:g} s after the signal")
    while group_runs(child) and time.monotonic() < began + ENDS_S:
        time.sleep(0.05)
    if group_runs(child):
        os.killpg(child, signal.SIGKILL)
        wrong.append("a process of it goes on")
    said = log.read_text(errors="replace")
    if said.count("Traceback") > said.count("Exception ignored"):
        wrong.append(f"traceback: {said[-150:]}")
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return "had ended", wrong
    return ("died" if code < 0 else f"exit code {code}"), wrong


def goes_on(line: list[object], place: Path, out: Path) -> tuple[int, str]:
    """Give a command again, and once more with --resume where it asks for that."""
    log = place / "again.txt"
    for more in ([], ["--resume", str(out)]):
        status = os.waitpid(start([*map(str, line), *more], log, SECONDS), 0)[1]
        code, said = os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        if code == 0 or "--resume" not in said:
            break
    return code, " ".join(said.split())[-200:]


def attempt(
    make: Callable[[Path], list[object]], place: Path, how: int, after: float, whole: set[str]
) -> tuple[str, list[str]]:
    """One signal to one command; how it ended, and all that was wrong."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    out = place / "out"
    ended, wrong = interrupted(make(out), place, how, after)
    if out.exists():
        wrong += [f"torn {told}" for told in torn(out)]
    code, said = goes_on(make(out), place, out)
    if code:
        wrong.append(f"does not go on (exit code {code}): {said}")
    elif names(out) != whole:
        wrong.append(f"other files: {sorted(names(out) ^ whole)[:4]}")
    return ended, wrong


def run(folder: Path, options: argparse.Namespace) -> int:
    """Make the inputs, send the signals and print; gives the exit code."""
    inputs, place = folder / "inputs", folder / "place"
    inputs.mkdir()
    if in_fork(lambda: make_inputs(inputs)):
        return 1
    make_demo_small(inputs / "run.yaml")
    (checkpoint,) = (inputs / "run").glob(f"**/{NAME}")
    table = commands(inputs, Lab(inputs / "stores", checkpoint))
    given = table["embed"](inputs / "embedded")
    os.waitpid(start([*map(str, given)], folder / "said.txt"), 0)
    rng, faults, begun = np.random.default_rng(options.seed), [], time.monotonic()
    print("| command | seconds | sent | ended |\n|---|---|---|---|")
    for name, make in table.items():
        if options.commands and name.split()[0].strip(",") not in options.commands:
            continue
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        began = time.monotonic()
        code, said = goes_on(make(place / "out"), place, place / "out")
        seconds = time.monotonic() - began
        if code:
            raise SystemExit(f"{name} fails by itself: {said}")
        whole = names(place / "out")
        for what, how in SIGNALS.items():
            ends: Counter[str] = Counter()
            for moment in rng.uniform(0.0, 1.0, options.moments):
                ended, wrong = attempt(make, place, how, moment * seconds, whole)
                ends[ended] += 1
                faults += [f"{name}, {what} at {moment:.2f} of it: {told}" for told in wrong]
            told = ", ".join(f"{n} {word}" for word, n in ends.most_common())
            print(f"| {name} | {seconds:.1f} | {options.moments} x {what} | {told} |", flush=True)
    print("\n".join(["", *(faults or ["nothing torn, all went on"])]))
    print(f"\nseed {options.seed}, {time.monotonic() - begun:.0f} s")
    return int(bool(faults))


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=3, help="of each signal a command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", metavar="NAME", help="default: all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hibio_kill_") as folder:
        return run(Path(folder), options)


if __name__ == "__main__":
    sys.exit(main())
