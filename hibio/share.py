"""A model to pass on: a folder without anybody's names, with a model card; on disk or on the hub.

A shared folder is a checkpoint without the state of its trainer: `HiBio.from_checkpoint` and every
command read it. Slides and patients have new names, of which the order is that of the old ones, so
that what is read out anew from the reference bank comes out the same to the last bit. Only
functions named ``fetch_`` and ``push_`` touch the network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hibio.artifacts import Artifacts, read_artifacts, write_artifacts
from hibio.checkpoint import (
    ARTIFACTS,
    BANK,
    CHECKSUMS,
    CONFIG,
    MODEL_FILES,
    READOUT,
    TRAINER,
    WEIGHTS,
    load_trainer_state,
    model_sha256,
    read_checksums,
    refuse_model_folder,
    verify_files,
    write_checksums,
)
from hibio.config.files import ConfigError, dump_config, load_saved, to_dict
from hibio.config.run import RunConfig
from hibio.data.splits import PATIENT
from hibio.model_card import CARD, write_card
from preprocessing.files import atomic_path, remove_abandoned
from preprocessing.hdf5 import datasets, hdf5_writer, open_guarded

HUB = "hf-hub:"
FILES = (*MODEL_FILES, BANK, READOUT)  # of a shared folder, beside its list and its card
SLIDE = "slide"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PATH = re.compile(r"/[^/\s]+/|[A-Za-z]:[\\/]|~[\\/]")
#: Parts of the HDF5 files whose texts are names of genes and sets.
_GENES = ("genes", "anchors", "database", "names", "ids", "kinds")


@dataclass(frozen=True)
class Names:
    """Old name -> new name of every slide and patient that a checkpoint knows of."""

    slides: Mapping[str, str]
    patients: Mapping[str, str]

    def fold(self, fold: str) -> str:
        """A fold under the new names of its patients."""
        return "+".join(self.patients.get(one, one) for one in fold.split("+"))


def share_checkpoint(
    checkpoint: Path | None,
    out: Path,
    *,
    keep_ids: bool = False,
    licence: str = "",
    results: Path | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint as a folder to pass on; see docs/share.md.

    Args:
        checkpoint: its folder; None for a model that was not loaded from one.
        out: a new or empty folder.
        keep_ids: leave the ids of slides and patients and all paths as they are.
        licence: of the weights, as the hub writes it (``apache-2.0``); "": not stated.
        results: results.json of `hibio eval`; None: that of the run, where it is of these weights.
        state: weights to write instead; where they differ, bank and read-out, which are of the old
            ones, are left out.

    Returns:
        ``out``.

    Raises:
        ConfigError: there is no checkpoint or a damaged one, ``out`` holds files, an id or a path
            is left somewhere (says where), ``licence`` is no id, or ``results`` are of another
            checkpoint.
    """
    checkpoint = _shareable(checkpoint, out, licence)
    names, changed = _files(checkpoint, state)
    run = load_saved(RunConfig, checkpoint / CONFIG)
    artifacts = read_artifacts(checkpoint / ARTIFACTS)
    told = measured(checkpoint, run, results) if not changed else []
    known = new_names(run, artifacts, checkpoint / BANK)
    remove_abandoned(out.parent)
    with atomic_path(out) as folder:
        folder.mkdir()
        if keep_ids:
            for name in names:
                shutil.copyfile(checkpoint / name, folder / name)
        else:
            run, artifacts = _renamed_run(run, known), _renamed(artifacts, known)
            dump_config(run, folder / CONFIG)
            write_artifacts(folder / ARTIFACTS, artifacts)
            for name in names[2:]:
                _copied(checkpoint / name, folder / name, known)
        if changed and state is not None:
            save_file({k: v.cpu().contiguous() for k, v in state.items()}, folder / WEIGHTS)
        write_checksums(folder)
        stopped = _unfinished(checkpoint)
        write_card(folder, run, artifacts, licence, told, name=out.name, unfinished=stopped)
        left = [] if keep_ids else leaks(folder, known)
        if left:
            raise ConfigError(
                f"{checkpoint} holds ids or paths that cannot be taken out: {'; '.join(left[:5])}; "
                "nothing was written. --keep-ids (keep_ids=True) shares it as it is"
            )
        if out.is_dir():
            out.rmdir()  # empty; one that somebody filled meanwhile is refused by the system
    return out


def _shareable(checkpoint: Path | None, out: Path, licence: str) -> Path:
    if not re.fullmatch(r"[\w.-]*", licence):
        raise ConfigError(
            f"licence {licence!r}: expected an id as the hub writes it, such as apache-2.0 or other"
        )
    if checkpoint is None:
        raise ConfigError(
            "this model was not loaded from a checkpoint, so nothing is known of its run; share "
            "that checkpoint (genes are folded in after loading)"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there and not empty; give another --out, a new folder")
    if out.exists() and out.samefile("."):
        raise ConfigError(f"{out} is the working folder; give the name of a new folder as --out")
    refuse_model_folder(out)
    return checkpoint


def _files(checkpoint: Path, state: Mapping[str, torch.Tensor] | None) -> tuple[list[str], bool]:
    """What is passed on, whole, and whether the weights ``state`` take the place of its own."""
    names = [name for name in FILES if (checkpoint / name).is_file()]
    verify_files(checkpoint, names)
    changed = state is not None and _differs(state, load_file(checkpoint / WEIGHTS))
    if changed:
        warnings.warn(
            f"the weights are not those of {checkpoint}: {BANK} and {READOUT}, which are of its "
            "own, are left out, so the shared model embeds, and neither predicts nor is queried",
            stacklevel=4,
        )
        names = list(MODEL_FILES)
    return names, changed


def _differs(state: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> bool:
    return state.keys() != saved.keys() or any(
        not torch.equal(state[name].cpu(), saved[name]) for name in saved
    )


def _unfinished(checkpoint: Path) -> bool:
    there = (checkpoint / TRAINER).is_file()
    return there and not load_trainer_state(checkpoint)["finished"]


def new_names(run: RunConfig, artifacts: Artifacts, bank: Path) -> Names:
    """New names of all slides and patients: their rank, and a hash with a salt that is not kept."""
    slides = {*artifacts.train_slides, *artifacts.settings.pretrain_slides, *run.data.test}
    slides |= artifacts.seals.keys()
    patients = {seal[PATIENT] for seal in artifacts.seals.values() if PATIENT in seal}
    patients |= {one for fold in run.folds for one in fold.split("+")} - {"none", "each"}
    if bank.is_file():
        with open_guarded(bank) as file:
            slides |= set(file[SLIDE].asstr()[:].tolist())
            patients |= set(file[PATIENT].asstr()[:].tolist())
    salt = secrets.token_hex(16)
    return Names(_ranked(slides, SLIDE, salt), _ranked(patients, PATIENT, salt))


def _ranked(names: Iterable[str], kind: str, salt: str) -> dict[str, str]:
    ordered = sorted(names)
    digits = len(str(len(ordered)))
    codes = [hashlib.sha256(f"{salt}{name}".encode()).hexdigest()[:8] for name in ordered]
    return {
        name: f"{kind}-{number:0{digits}d}-{code}"
        for number, (name, code) in enumerate(zip(ordered, codes, strict=True), start=1)
    }


def _renamed_run(run: RunConfig, names: Names) -> RunConfig:
    """The settings of a run without names and places; none of them decides an embedding."""
    vision, omics = run.model.vision, run.model.omics
    weights = None if vision.weights is None else Path(vision.weights.name)
    return dataclasses.replace(
        run,
        out=Path("run"),
        data=dataclasses.replace(
            run.data, stores=Path("stores"), test=tuple(names.slides[one] for one in run.data.test)
        ),
        folds=tuple(names.fold(fold) for fold in run.folds),
        variants={},
        pathways=dataclasses.replace(run.pathways, source=_bare(run.pathways.source)),
        optim=dataclasses.replace(run.optim, deepspeed={}),
        model=dataclasses.replace(
            run.model,
            vision=dataclasses.replace(vision, weights=weights),
            omics=dataclasses.replace(omics, init_from=None),
        ),
    )


def _bare(source: str) -> str:
    """A source of gene sets, or several joined by "+", without the folders of its files."""
    if "+" in source:
        return "+".join(_bare(one) for one in source.split("+"))
    control, _, rest = source.rpartition(":") if ":" in source else ("", "", source)
    name = re.split(r"[\\/]", rest)[-1]
    return f"{control}:{name}" if control and not re.search(r"[\\/]", control) else name


def _renamed(artifacts: Artifacts, names: Names) -> Artifacts:
    """The artifacts under the new names; the checksums of the seals stay, no number changes."""
    settings = artifacts.settings
    seals = {
        names.slides[slide]: {
            part: names.patients[value] if part == PATIENT else value
            for part, value in seal.items()
        }
        for slide, seal in artifacts.seals.items()
    }
    database = artifacts.database
    if database is not None:
        database = dataclasses.replace(database, name=_bare(database.name))
    return dataclasses.replace(
        artifacts,
        database=database,
        train_slides=tuple(names.slides[one] for one in artifacts.train_slides),
        seals=seals,
        settings=dataclasses.replace(
            settings,
            pretrain_slides=tuple(names.slides[one] for one in settings.pretrain_slides),
            pathways=dataclasses.replace(settings.pathways, source=_bare(settings.pathways.source)),
        ),
    )


def _copied(source: Path, target: Path, names: Names) -> None:
    """A file as it is; of a bank, whose old names would stay in its bytes, a new one is written."""
    if source.name != BANK:
        shutil.copyfile(source, target)
        return
    renamed = {SLIDE: names.slides, PATIENT: names.patients}
    with open_guarded(source) as old, atomic_path(target) as part, hdf5_writer(part) as (new, _):
        new.attrs.update(old.attrs)
        for name, item in old.items():
            if name not in renamed:
                old.copy(item, new, name)
                continue
            texts = [renamed[name][one] for one in item.asstr()[:].tolist()]
            new[name] = np.array(texts).astype(h5py.string_dtype())


def leaks(folder: Path, names: Names) -> list[str]:
    """Where a folder still holds an old name, or an absolute path: ``file: place: text``."""
    old = {*names.slides, *names.patients}
    found = []
    for place, text in _texts(folder):
        parts = re.split(r"[\s/+,;:'\"()|`\\]+", text)
        if place == CARD:  # whose words and numbers are no ids
            parts = [one for one in parts if len(one) > 2 and not one.isdigit()]
        hits = [one for one in (text, *parts) if one in old]
        if hits or any(_PATH.match(word) for word in re.split(r"[\s'\"(=,`+:]+", text)):
            found.append(f"{place}: {(hits or [text])[0][:60]!r}")
    return found


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Every text of a shared folder but the names of genes and gene sets, and where it stands."""
    yield from _leaves(to_dict(load_saved(RunConfig, folder / CONFIG)), CONFIG)
    for path in sorted(folder.glob("*.h5")):
        with open_guarded(path) as file:
            for name, data in datasets(file):
                if h5py.check_string_dtype(data.dtype) and name.split("/")[0] not in _GENES:
                    for text in np.unique(data.asstr()[()]).tolist():
                        yield from _decoded(text, f"{path.name}: {name}")
            parts: list[h5py.Group] = [file]
            file.visititems(lambda _, item: parts.append(item))  # noqa: B023 - used at once
            for part in parts:
                for name, text in part.attrs.items():
                    if isinstance(text, str) and part.name.strip("/") not in _GENES:
                        yield from _decoded(text, f"{path.name}: {part.name}@{name}")
    for line in (folder / CARD).read_text(encoding="utf-8").splitlines():
        yield CARD, line


def _decoded(text: str, place: str) -> Iterator[tuple[str, str]]:
    try:
        yield from _leaves(json.loads(text), place)
    except ValueError:
        yield place, text


def _leaves(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield f"{place}: key", str(key)
            yield from _leaves(one, f"{place}: {key}")
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one, place)
    elif isinstance(value, str):
        yield place, value


def measured(checkpoint: Path, run: RunConfig, results: Path | None = None) -> list[list[str]]:
    """Rows [task, metric, row, role, mean, n, chance] of the headline of each task, on its fold.

    Args:
        checkpoint: its folder.
        run: its settings.
        results: results.json; None: that of the run (``eval`` in its folder, or beside it), where
            it is of these weights.

    Raises:
        ConfigError: the file named is missing, cannot be read, or is of other weights.
    """
    above = [*checkpoint.resolve().parents][3:5]
    beside = [place / "eval" / "results.json" for place in above]
    for path in [one for one in beside if one.is_file()] if results is None else [results]:
        try:
            tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
            made_of = json.loads((path.parent / "finished" / "made_of.json").read_text())
            own = made_of["checkpoints"].get(f"{run.variant}/{run.folds[0]}/{run.seeds[0]}")
            rows = [row for name, task in tasks.items() for row in _headline(name, task, run)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            if results is None:
                continue
            raise ConfigError(
                f"{path}: no results of `hibio eval` can be read ({error})"
            ) from error
        if own == model_sha256(checkpoint):
            return rows
    if results is not None:
        raise ConfigError(
            f"{results} is of other weights than {checkpoint}; measure these: hibio eval "
            f"--checkpoint {checkpoint} --data STORES --out DIR"
        )
    return []


def _headline(task: str, found: Mapping[str, Any], run: RunConfig) -> Iterator[list[str]]:
    """The first of a task's short metrics that this checkpoint has, for every row that has it."""
    own = found["models"].get(run.variant, {})
    metric = next((one for one in found["short"] if one in own), None)
    for row, metrics in found["models"].items() if metric is not None else ():
        held = metrics.get(metric, {"keys": [], "values": []})
        prefix = f"{run.folds[0]}/{run.seeds[0]}/"
        pairs = zip(held["keys"], held["values"], strict=True)
        values = [v for key, v in pairs if key.startswith(prefix) and v is not None]
        if values:
            chance = held.get("chance")
            yield [
                *(task, str(metric), row, found["rows"][row]["role"], f"{np.mean(values):.3f}"),
                *(str(len(values)), "" if chance is None else f"{chance:.3f}"),
            ]


def fetch_pretrained(name: str) -> Path:
    """The folder of a shared model in the hub's cache, downloaded where it is not there.

    Args:
        name: ``hf-hub:ORG/NAME``, with ``@REVISION`` for one that stays the same.

    Raises:
        ConfigError: a name of another form, no such model, no access, or no network.
    """
    asked, _, revision = name.partition("@")
    repo = require_hub_name(asked)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = [*FILES, CHECKSUMS]
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=files))
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{name} is not in the hub's cache and cannot be fetched (no network?); copy its "
            "folder here and give the path"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"{name}: the hub has no such model or revision that you may read "
            f"({type(error).__name__}); check ORG/NAME, or log in with `hf auth login`"
        ) from error
    if read_checksums(folder) is None:
        raise ConfigError(
            f"{name} has no {CHECKSUMS}, so it was not shared by `hibio share`; if you trust it, "
            "download it and give the folder"
        )
    return folder


def push_folder(folder: Path, name: str, *, private: bool = True) -> str:
    """Upload a shared folder as the model ``ORG/NAME``, made where there is none.

    Returns:
        ``hf-hub:ORG/NAME@REVISION``, which always means these files.

    Raises:
        ConfigError: no such organisation, nobody is logged in, or no network.
    """
    repo = require_hub_name(name)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    card = (folder / CARD).read_text(encoding="utf-8")
    placed = re.sub(rf"{HUB}ORG/[\w.-]+", lambda _: HUB + repo, card)
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        files = [one for one in (*FILES, CHECKSUMS) if (folder / one).is_file()]
        done = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files)
        api.upload_file(repo_id=repo, path_or_fileobj=placed.encode(), path_in_repo=CARD)
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"{repo}: not uploaded ({type(error).__name__}: {str(error).splitlines()[0][:160]}); "
            f"log in with `hf auth login` and check ORG/NAME. {folder} is whole"
        ) from error
    return f"{HUB}{repo}@{done.oid}"


def require_hub_name(name: str) -> str:
    """Return ``ORG/NAME`` of it, without the ``hf-hub:`` before it.

    Raises:
        ConfigError: it is of another form, or huggingface_hub is not installed.
    """
    if find_spec("huggingface_hub") is None:
        raise ConfigError(f"{name}: the hub needs huggingface_hub: pip install 'hibio[hub]'")
    repo = name.removeprefix(HUB)
    if not _HUB_NAME.fullmatch(repo):
        raise ConfigError(f"{name!r}: expected ORG/NAME, or {HUB}ORG/NAME[@REVISION]")
    return repo
