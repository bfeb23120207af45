"""Splits by patient, never by slide or spot."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hibio.config import ConfigError
from hibio.data.slide_index import SlideEntry, indexed_entries
from preprocessing.plain_names import require_folder_part


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
            near = difflib.get_close_matches(patient, patients, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
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
    """The split with fewer training patients, for learning curves.

    Args:
        split: all of them.
        n_patients: how many stay: the first by name, so that more of them contain fewer.

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
