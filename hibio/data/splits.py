"""The stores of a run as entries, and their splits: by patient, never by slide or spot.

Ten thousand stores take minutes to open one by one on a network file system. What they said the
first time stands in one file beside them, `.slides.json`: a store that is the same file still, of
the same size and time of change, is not opened again. It is a cache: it may be deleted at any time,
and where it cannot be written (or there are few stores) every store is opened, as without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from tqdm import tqdm

from hibio.config.files import ConfigError
from preprocessing.errors import did_you_mean
from preprocessing.files import atomic_path, require_folder_part
from preprocessing.spot_table import RNA
from preprocessing.store import SlideStore

INDEX_NAME = ".slides.json"
INDEX_FROM = 64  # so many stores must have been opened for the index to be worth a file
_VERSION = 2  # 1 did not know which file it was


@dataclass(frozen=True)
class SlideEntry:
    """One store as splits, sampler and fits see it before they read it.

    Attributes:
        path: the store.
        slide_id: unique in a run.
        patient_id: splits are made by it.
        has_image: whether it holds patches.
        n_spots: S.
        has_counts: False for an image alone.
        modality: rna | protein.
        technology: free text of the manifest, as are organism and tissue; "" unknown.
        organism: see technology.
        tissue: see technology.
        patch_um: width of its patches in micrometres; None without image.
        context_um: width of its context patches in micrometres; None without any.
    """

    path: Path
    slide_id: str
    patient_id: str
    has_image: bool
    n_spots: int
    has_counts: bool = True
    modality: str = RNA
    technology: str = ""
    organism: str = ""
    tissue: str = ""
    patch_um: float | None = None
    context_um: float | None = None


_KINDS = {name: kind for name, kind in get_type_hints(SlideEntry).items() if name != "path"}


def indexed_entries(paths: Sequence[Path]) -> list[SlideEntry]:
    """The entry of each store, from the index of its folder where that still holds.

    Args:
        paths: stores; the index of a folder is written anew when `INDEX_FROM` of its stores had to
            be opened and the folder can be written to.

    Raises:
        DataError: a store that is missing or cannot be read.
    """
    known = {folder: _read_index(folder) for folder in {path.parent for path in paths}}
    opened: dict[Path, dict[str, list[Any]]] = {folder: {} for folder in known}
    entries = []
    for path in tqdm(paths, desc="slides", unit="store", disable=None, leave=False, delay=2):
        stamp = _stamp(path)
        entry = _kept(path, known[path.parent], stamp)
        if entry is None:
            entry = read_entry(path)
            plain = {name: getattr(entry, name) for name in _KINDS}
            opened[path.parent][path.name] = [stamp, plain]
        entries.append(entry)
    for folder, new in opened.items():
        if len(new) >= INDEX_FROM:
            _write_index(folder, known[folder] | new)
    return entries


def read_entry(path: Path) -> SlideEntry:
    """Open one store and ask it.

    Raises:
        DataError: it is missing or cannot be read.
    """
    with SlideStore(path) as store:
        return SlideEntry(
            path=path,
            slide_id=store.slide_id,
            patient_id=store.patient_id,
            has_image=store.has_image,
            n_spots=store.n_spots,
            has_counts=store.has_counts,
            modality=store.modality,
            technology=str(store.attrs.get("technology", "")),
            organism=str(store.attrs.get("organism", "")),
            tissue=str(store.attrs.get("tissue", "")),
            patch_um=float(store.attrs["patch_um"]) if store.has_image else None,
            context_um=store.context_um,
        )


def _stamp(path: Path) -> list[int] | None:
    """Number, size and time of change; None for a file that is not there (opening it says so).

    The number (inode) tells a store that was replaced within one tick of the file system's clock.
    """
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return [state.st_ino, state.st_size, state.st_mtime_ns]


def _kept(path: Path, index: Mapping[str, Any], stamp: list[int] | None) -> SlideEntry | None:
    """The entry of an index; None when the store has changed or the entry is not one of ours."""
    kept = index.get(path.name)
    if stamp is None or not isinstance(kept, list) or len(kept) != 2 or kept[0] != stamp:
        return None
    values = kept[1]
    if not isinstance(values, dict) or values.keys() != _KINDS.keys():
        return None
    if not all(isinstance(value, _KINDS[name]) for name, value in values.items()):
        return None
    return SlideEntry(path, **values)


def _read_index(folder: Path) -> dict[str, Any]:
    """File name -> [stamp, values]; empty where there is no index that can be used."""
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        tqdm.write(f"{path}: cannot be used ({error}); every store is opened instead")
        return {}
    if not isinstance(index, dict) or index.get("version") != _VERSION:
        return {}
    stores = index.get("stores")
    return stores if isinstance(stores, dict) else {}


def _write_index(folder: Path, stores: Mapping[str, Any]) -> None:
    """Write the index of the stores that are there; in a folder of others it is left out."""
    if not os.access(folder, os.W_OK):
        return
    present = {name: values for name, values in stores.items() if (folder / name).is_file()}
    text = json.dumps({"version": _VERSION, "stores": present}, sort_keys=True)
    try:
        with atomic_path(folder / INDEX_NAME) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:  # read-only mounts say that a folder can be written to
        tqdm.write(f"{folder / INDEX_NAME}: not written ({error}); the next start takes as long")


@dataclass(frozen=True)
class Split:
    """Training and test slides of one fold; no patient is on both sides."""

    name: str
    train: tuple[SlideEntry, ...]
    test: tuple[SlideEntry, ...]


def read_entries(paths: Sequence[Path]) -> tuple[SlideEntry, ...]:
    """Id, patient and size of each store, opened only where the folder's index does not know it.

    Raises:
        ConfigError: no store, or two stores with one slide id.
    """
    entries = indexed_entries(paths)
    if not entries:
        raise ConfigError("no store found; run `hibio prepare MANIFEST --out DIR` first")
    _check_patients(entries)
    seen: dict[str, Path] = {}
    for entry in entries:
        if entry.slide_id in seen:
            raise ConfigError(
                f"slide id {entry.slide_id!r} is in {seen[entry.slide_id]} and in {entry.path}; "
                "remove one of them or rename it in the manifest and prepare again"
            )
        seen[entry.slide_id] = entry.path
    return tuple(entries)


def with_counts(
    entries: Sequence[SlideEntry], use: str, *, announce: bool = True
) -> tuple[SlideEntry, ...]:
    """The slides that can be trained or measured on: those with counts.

    Args:
        entries: every slide.
        use: what the others are left out of, for the message.
        announce: print how many are left out.

    Raises:
        ConfigError: no slide has counts.
    """
    counted = tuple(entry for entry in entries if entry.has_counts)
    if not counted:
        raise ConfigError(
            f"none of the {len(entries)} slides has counts, which {use} needs; prepare slides with "
            "spatial transcriptomics too (slides of format image are for `hibio embed` and "
            "`hibio query`)"
        )
    if announce and len(counted) < len(entries):
        names = [entry.slide_id for entry in entries if not entry.has_counts]
        shown = ", ".join(names[:4]) + ", ..." * (len(names) > 4)
        print(f"{use}: {len(names)} of {len(entries)} slides skipped, image only: {shown}")
    return counted


def _check_patients(entries: Sequence[SlideEntry]) -> None:
    """A patient id names folds and folders, so it may not look like either."""
    for entry in entries:
        patient = entry.patient_id
        require_folder_part(f"{entry.path}: patient id", patient)
        if patient in ("none", "each") or set(patient) & set("+/\\"):
            raise ConfigError(
                f"{entry.path}: patient id {patient!r} cannot name a fold ('none', 'each', '+', "
                "'/' have a meaning there); rename it in the manifest and prepare again"
            )


def split_by_patient(entries: Sequence[SlideEntry], fold: str) -> Split:
    """The split that holds out one group of patients.

    Args:
        entries: every slide.
        fold: held-out patients joined by ``+`` ("A", "P1+P2"), or ``none`` to train on all.

    Raises:
        ConfigError: an unknown patient, or nothing left to train on.
    """
    if fold == "none":
        return Split("none", tuple(entries), ())
    held_out = fold.split("+")
    patients = sorted({entry.patient_id for entry in entries})
    for patient in held_out:
        if patient not in patients:
            hint = did_you_mean(patient, patients)
            raise ConfigError(
                f"fold {fold!r} holds out patient {patient!r}, which is not in the data{hint} "
                f"(patients: {', '.join(patients)})"
            )
    train = tuple(entry for entry in entries if entry.patient_id not in held_out)
    test = tuple(entry for entry in entries if entry.patient_id in held_out)
    if not train:
        raise ConfigError(f"fold {fold!r} leaves no patient to train on; hold out fewer")
    return Split(fold, train, test)


def limited(split: Split, n_patients: int) -> Split:
    """The split with the first training patients by name alone, so that more contain fewer.

    Raises:
        ConfigError: there are not so many.
    """
    patients = sorted({entry.patient_id for entry in split.train})
    if n_patients > len(patients):
        raise ConfigError(
            f"data.train_patients is {n_patients}, but fold {split.name} leaves {len(patients)} "
            "patients to train on; ask for fewer, or hold out fewer"
        )
    kept = set(patients[:n_patients])
    train = tuple(entry for entry in split.train if entry.patient_id in kept)
    return Split(split.name, train, split.test)


def expand_folds(entries: Sequence[SlideEntry], folds: Sequence[str]) -> list[str]:
    """Fold names, with ``each`` replaced by every patient that has a slide with an image.

    Where no slide has an image (omics-only training), every patient is a fold.
    """
    if list(folds) != ["each"]:
        return list(folds)
    paired = sorted({entry.patient_id for entry in entries if entry.has_image})
    return paired or sorted({entry.patient_id for entry in entries})
