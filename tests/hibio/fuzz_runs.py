"""Damaged stores and files of checkpoints, with right checksums: what `hibio` makes of them.

A case is one change of one part of one file. `check` and the commands that read that file are
asked, each in a process of its own with bounds on memory and time.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from eval.embed import load_checkpoint
from eval.predict import readout_of
from hibio.checkpoint import ARTIFACTS, BANK, CONFIG, READOUT, WEIGHTS, write_checksums
from hibio.cli import main
from hibio.run import train_all
from preprocessing.hdf5 import datasets
from tests.hibio.toy import run_config

STORE = "store"
MODEL = ("embed", "query", "predict")
#: What is damaged -> the commands that read it.
READERS = {
    STORE: (*MODEL, "eval"),
    BANK: ("query", "predict"),
    ARTIFACTS: MODEL,
    CONFIG: MODEL,
    WEIGHTS: MODEL,
    READOUT: ("predict",),
}
OPTIONS = {"query": ("--gene-set", "default"), "eval": ("--tasks", "retrieval")}
BAD = ("unexpected error", "crash", "hung", "not finite", "passed by check")
SECONDS, GIGABYTES = 60, 8
PLAIN = (None, -1, 0, 1e9, 1e300, "x", "", [], {}, float("nan"), True, "2026-11-30", "../x\0")
Values = np.ndarray


@dataclass(frozen=True)
class Lab:
    """Stores and a checkpoint that was trained on them."""

    stores: Path
    checkpoint: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a case: a word, the damage, and the last line of each command."""

    word: str
    damage: str
    said: tuple[str, ...]


def make_lab(stores: Path, folder: Path) -> Lab:
    """A short training on the stores, read-out included."""
    (checkpoint,) = train_all(run_config(stores, folder, threads=1))
    readout_of(load_checkpoint(checkpoint))
    return Lab(stores, checkpoint)


def _one(values: Values, rng: np.random.Generator, new: Any) -> Values:
    changed = values.astype("f8") if isinstance(new, float) else values.copy()
    if changed.size:
        changed.flat[rng.integers(changed.size)] = new
    return changed


#: Changes of the numbers of a dataset.
CHANGES: dict[str, Callable[[Values, np.random.Generator], Any]] = {
    "one value NaN": lambda v, rng: _one(v, rng, float("nan")),
    "one value inf": lambda v, rng: _one(v, rng, float("inf")),
    "one value 1e30": lambda v, rng: _one(v, rng, 1e30),
    "one value -1": lambda v, rng: _one(v, rng, -1 if v.dtype.kind != "u" else 255),
    "one value 1e6": lambda v, rng: _one(v.astype("i8"), rng, 10**6),
    "all zero": lambda v, _: np.zeros_like(v),
    "reversed": lambda v, _: v[::-1],
    "shorter": lambda v, rng: v[: len(v) - 1 - int(rng.integers(3))],
    "longer": lambda v, _: np.concatenate([v, v[-1:]]),
    "empty": lambda v, _: v[:0],
    "flat": lambda v, _: v.ravel(),
    "deeper": lambda v, _: v[..., None],
    "turned": lambda v, _: v.T,
    "float64": lambda v, _: v.astype("f8"),
    "int8": lambda v, _: v.astype("i1"),
    "complex": lambda v, _: v.astype("c8"),
    "one number": lambda v, _: v.ravel()[0] if v.size else 0,
    "words": lambda v, _: np.full(v.shape, "x", dtype=object),
}
ATTRIBUTES = (-1, 0, 1e300, float("nan"), "x", "[", [], [1, 2, 3], 10**15, True)


def damage_hdf5(path: Path, rng: np.random.Generator) -> str:
    """Change one dataset or attribute of a file, whichever; returns what was done."""
    with h5py.File(path, "r+") as file:
        names = [name for name, _ in datasets(file)]
        owners = [name for name in ("/", *names, "counts", "tfidf") if name in file]
        attributes = [(o, key) for o in owners for key in file[o].attrs if "sha256" not in key]
        if attributes and rng.random() < 0.25:
            owner, key = attributes[rng.integers(len(attributes))]
            new = [*ATTRIBUTES, None][rng.integers(len(ATTRIBUTES) + 1)]
            del file[owner].attrs[key]
            if new is not None:
                file[owner].attrs[key] = new
            return f"attribute {owner}@{key} = {new!r}"
        name = names[rng.integers(len(names))]
        kind = [*CHANGES, "removed", "a group"][rng.integers(len(CHANGES) + 2)]
        _change(file, name, kind, rng)
        return f"{name}: {kind}"


def _change(file: h5py.File, name: str, kind: str, rng: np.random.Generator) -> None:
    old, attrs = file[name][()], dict(file[name].attrs)
    del file[name]
    if kind == "removed":
        return
    if kind == "a group":
        file.create_group(name)
        return
    values = np.asarray(old)
    with suppress(TypeError, ValueError, IndexError):  # a change of numbers, and these are words
        values = np.asarray(CHANGES[kind](values, rng))
    words = h5py.string_dtype() if values.dtype == object else None
    if words is not None:  # some of them are numbers now
        told = [one if isinstance(one, bytes) else str(one) for one in values.flat]
        values = np.array([*told, None], dtype=object)[:-1].reshape(values.shape)
    file.create_dataset(name, data=values, dtype=words).attrs.update(attrs)


def _leaves(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield above
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in pairs:
        if isinstance(one, dict | list):
            yield from _leaves(one, (*above, key))
        else:
            yield (*above, key)


def damage_config(path: Path, rng: np.random.Generator) -> str:
    """Give one key another value."""
    content = yaml.safe_load(path.read_text())
    keys = [key for key in _leaves(content) if key]
    key, new = keys[rng.integers(len(keys))], PLAIN[rng.integers(len(PLAIN))]
    section = content
    for name in key[:-1]:
        section = section[name]
    section[key[-1]] = new
    path.write_text(yaml.safe_dump(content))
    return f"{'.'.join(map(str, key))} = {new!r}"


def damage_weights(path: Path, rng: np.random.Generator) -> str:
    """Change one tensor."""
    state = load_file(path)
    name = sorted(state)[rng.integers(len(state))]
    old = state.pop(name)
    made: dict[str, Callable[[], torch.Tensor | None]] = {
        "removed": lambda: None,
        "NaN": lambda: torch.full_like(old.float(), float("nan")),
        "inf": lambda: torch.full_like(old.float(), float("inf")),
        "1e30": lambda: torch.full_like(old.float(), 1e30),
        "empty": lambda: old.reshape(-1)[:0].clone(),
        "deeper": lambda: old[None].clone(),
        "int": lambda: old.long(),
        "half": lambda: old.half(),
    }
    kind = list(made)[rng.integers(len(made))]
    new = made[kind]()
    save_file(state if new is None else {**state, name: new.contiguous()}, path)
    return f"{name}: {kind}"


def damaged(base: str, lab: Lab, rng: np.random.Generator) -> str:
    """Damage the store of the held-out slide, or a file of the checkpoint; returns how."""
    if base == STORE:
        return damage_hdf5(lab.stores / "sim003.h5", rng)
    path = lab.checkpoint / base
    how = {CONFIG: damage_config, WEIGHTS: damage_weights}.get(base, damage_hdf5)(path, rng)
    write_checksums(lab.checkpoint)
    return how


def run_case(number: int, seed: int, lab: Lab, folder: Path) -> tuple[str, Outcome]:
    """Case ``number`` of a seed: its base, and what became of it."""
    rng = np.random.default_rng([seed, number])
    base = list(READERS)[number % len(READERS)]
    copy = Lab(folder / "stores", folder / "checkpoint")
    shutil.copytree(lab.checkpoint, copy.checkpoint)
    shutil.copytree(lab.stores, copy.stores)
    how = damaged(base, copy, rng)
    calls = [["check", str(copy.stores / "sim003.h5" if base == STORE else copy.checkpoint)]]
    for command in READERS[base]:
        given = ("--checkpoint", copy.checkpoint, "--data", copy.stores, "--out", folder / command)
        calls.append([command, *map(str, given), *OPTIONS.get(command, ())])
    told = [call(arguments, folder / "said.txt") for arguments in calls]
    words = [word for word, _ in told]
    if not all(map(_finite, folder.glob("*/*.h5ad"))):
        words.append("not finite")
    # of weights only what they make of a slide tells whether they make sense
    if base != WEIGHTS and words[0] == "worked" and "refused" in words:
        words.append("passed by check")
    bad = next((word for word in words if word in BAD), None)
    word = bad or ("refused" if "refused" in words else "worked")
    shutil.rmtree(folder)
    return base, Outcome(word, how, tuple(said for _, said in told))


def _finite(path: Path) -> bool:
    data = anndata.read_h5ad(path)
    arrays = [one for name, one in data.obsm.items() if name.startswith("X_")]
    arrays += [data.X] if path.name.endswith((".query.h5ad", ".predict.h5ad")) else []
    return all(np.isfinite(one).all() for one in arrays)


def call(arguments: list[str], log: Path) -> tuple[str, str]:
    """One command line in a process of its own: a word, and the last line that it said."""
    status = os.waitpid(start(arguments, log), 0)[1]
    lines = log.read_text(errors="replace").splitlines() or [""]
    said = lines[-1]
    if os.WIFSIGNALED(status):
        killed = signal.Signals(os.WTERMSIG(status))
        hung = killed in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM)
        return ("hung" if hung else "crash"), f"{killed.name}: {said}"
    code = os.WEXITSTATUS(status)
    if "unexpected " in said or code > 2:
        return "unexpected error", said
    return ("worked" if code == 0 else "refused"), said


def start(
    arguments: list[str], log: Path, seconds: int = SECONDS, file_bytes: int | None = None
) -> int:
    """Start one command line in a fork that leads a group of processes; its id.

    ``file_bytes`` is the most that it may write to a file, as on a full disk.
    """
    child = os.fork()
    if child:
        return child
    code = 9
    try:
        os.setsid()
        torch.set_num_threads(1)  # a fork has none of the threads that there were
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        limit = GIGABYTES << 30
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20 * seconds)  # one that waits
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 9
    except BaseException:  # noqa: BLE001 - told by its exit code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
