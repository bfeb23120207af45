"""The stores of a run as entries, and their splits: by patient, never by slide or spot.

Ten thousand stores take minutes to open one by one on a network file system. What they said the
first time stands in one file beside them, `.slides.json`: a store that is the same file still, of
the same size and time of change, is not opened again. It is a cache: it may be deleted at any time,
and where it cannot be written (or there are few stores) every store is opened, as without it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from tqdm import tqdm

from hibio.artifacts import Artifacts
from hibio.config.files import ConfigError
from hibio.config.model import PATCHES, ImageInput
from preprocessing.errors import did_you_mean
from preprocessing.files import atomic_path, require_folder_part
from preprocessing.slide_row import TEST, TRAIN
from preprocessing.spot_table import RNA
from preprocessing.store import SlideStore

INDEX_NAME = ".slides.json"
INDEX_FROM = 64  # so many stores must have been opened for the index to be worth a file
_VERSION = 3  # 1 did not know which file it was, 2 neither its role nor its parts
SEALED = ("counts", "genes", "coordinates")  # of a store, what every run reads
PATIENT = "patient"  # key of a seal beside the parts
Seals = Mapping[str, Mapping[str, str]]


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
        role: train | test as the manifest says it, "" as the folds say.
        parts: checksum of every part of its content, see `SlideStore.parts`.
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
    role: str = ""
    parts: dict[str, str] = field(default_factory=dict, hash=False, repr=False)

    @property
    def seal(self) -> dict[str, str]:
        """What a run keeps to know the slide again: its patient, and the checksums of its parts."""
        return {PATIENT: self.patient_id, **self.parts}


_KINDS = {
    name: dict if get_origin(kind) is dict else kind
    for name, kind in get_type_hints(SlideEntry).items()
    if name != "path"
}


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
            role=store.role,
            parts=store.parts(),
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
    """Training and test slides of one fold; a patient is on both sides only where roles say so."""

    name: str
    train: tuple[SlideEntry, ...]
    test: tuple[SlideEntry, ...]

    @property
    def seen_patients(self) -> tuple[SlideEntry, ...]:
        """Test slides of patients whose other slides are trained on."""
        trained = {entry.patient_id for entry in self.train}
        return tuple(entry for entry in self.test if entry.patient_id in trained)


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
    if announce:
        _tell_skipped(entries, counted, use, "image only")
    return counted


def with_images(entries: Sequence[SlideEntry], use: str) -> tuple[SlideEntry, ...]:
    """The slides with an image; those that are left out of ``use`` are told."""
    seen = tuple(entry for entry in entries if entry.has_image)
    if seen:
        _tell_skipped(entries, seen, use, "no image")
    return seen


def _tell_skipped(
    entries: Sequence[SlideEntry], kept: Sequence[SlideEntry], use: str, why: str
) -> None:
    names = [entry.slide_id for entry in entries if entry not in kept]
    if names:
        shown = ", ".join(names[:4]) + ", ..." * (len(names) > 4)
        print(f"{use}: {len(names)} of {len(entries)} slides skipped, {why}: {shown}")


def said_for_test(entries: Sequence[SlideEntry], slides: Sequence[str]) -> tuple[SlideEntry, ...]:
    """The entries, those named with the role ``test``, whatever their stores say.

    Raises:
        ConfigError: a slide that is not there.
    """
    names = [entry.slide_id for entry in entries]
    for slide in slides:
        if slide not in names:
            hint = did_you_mean(slide, names)
            raise ConfigError(
                f"test slide {slide!r} is not among the {len(names)} slides with counts{hint}"
            )
    return tuple(replace(e, role=TEST) if e.slide_id in slides else e for e in entries)


def tell_roles(entries: Sequence[SlideEntry]) -> None:
    """Which slides are never trained on, and which of them are of patients that are."""
    test = [entry for entry in entries if entry.role == TEST]
    trained = {entry.patient_id for entry in entries if entry.role != TEST}
    seen = [entry.slide_id for entry in test if entry.patient_id in trained]
    if test:
        print(f"never trained on (role test): {', '.join(entry.slide_id for entry in test)}")
    if seen:
        print(
            f"of patients that are trained on: {', '.join(seen)}; results on them are marked "
            '"seen patient" where their patient is not held out'
        )


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
    """The split that holds out one group of patients, and every slide of role ``test``.

    Args:
        entries: every slide.
        fold: held-out patients joined by ``+`` ("A", "P1+P2"), or ``none`` to hold out no patient.

    Raises:
        ConfigError: an unknown patient, one that has a slide of role ``train``, nothing left to
            train on, or one section on both sides under two ids.
    """
    held_out = () if fold == "none" else tuple(fold.split("+"))
    patients = sorted({entry.patient_id for entry in entries})
    for patient in held_out:
        if patient not in patients:
            hint = did_you_mean(patient, patients)
            raise ConfigError(
                f"fold {fold!r} holds out patient {patient!r}, which is not in the data{hint} "
                f"(patients: {', '.join(patients)})"
            )
    bound = [e.slide_id for e in entries if e.role == TRAIN and e.patient_id in held_out]
    if bound:
        raise ConfigError(
            f"fold {fold!r} holds out the patient of {', '.join(bound[:4])}, whose role is "
            f"{TRAIN!r}; leave the role empty in the manifest and prepare again, or hold out others"
        )
    test = tuple(e for e in entries if e.role == TEST or e.patient_id in held_out)
    train = tuple(e for e in entries if not (e.role == TEST or e.patient_id in held_out))
    if not train:
        raise ConfigError(
            f"fold {fold!r} leaves no patient to train on; hold out fewer, or give fewer slides "
            f"the role {TEST!r}"
        )
    refuse_copies({entry.slide_id: entry.seal for entry in train}, test, f"fold {fold}")
    return Split(fold, train, test)


def copies(known: Seals, entries: Sequence[SlideEntry]) -> list[tuple[str, str]]:
    """Pairs (known slide, entry) of one section under two ids: the same counts in the same order.

    Args:
        known: slide id -> its seal; one without counts (of an older version) is like none.
        entries: slides that are looked up; those without counts are like none.
    """
    holder = {seal["counts"]: slide for slide, seal in known.items() if "counts" in seal}
    found = [
        (holder[entry.parts["counts"]], entry.slide_id)
        for entry in entries
        if entry.has_counts and entry.parts.get("counts") in holder
    ]
    return [(slide, other) for slide, other in found if slide != other]


def refuse_copies(known: Seals, tested: Sequence[SlideEntry], where: str) -> None:
    """Training slides may not come again under another id among the test slides.

    Raises:
        ConfigError: names the two.
    """
    for slide, other in copies(known, tested):
        raise ConfigError(
            f"{where}: the test slide {other!r} has the counts of the training slide {slide!r}, so "
            "they are the same section under two ids; remove one of their stores, or give both one "
            "patient_id in the manifest and prepare again"
        )


def refuse_replaced(
    checkpoint: Path,
    artifacts: Artifacts,
    entries: Sequence[SlideEntry],
    image: ImageInput | None,
) -> None:
    """The stores of training slides must hold what the checkpoint was trained on.

    Args:
        checkpoint: for the message.
        artifacts: its own; those of an older version keep no seals, which is warned of.
        entries: stores as they are now; slides that were not trained on are left out.
        image: what the run reads of pictures; None: nothing.

    Raises:
        ConfigError: names the slides, and the parts of each that differ.
    """
    here = [entry for entry in entries if entry.slide_id in artifacts.train_slides]
    if here and not artifacts.seals:
        warnings.warn(
            f"{checkpoint}: an older HiBio kept no seals of its training slides, so it cannot be "
            "told whether their stores are still the same",
            stacklevel=2,
        )
    read = (*SEALED, *_image_parts(image))
    told = []
    for entry in here:
        seal = artifacts.seals.get(entry.slide_id, {})
        odd = [part for part in read if part in seal and seal[part] != entry.parts.get(part)]
        told += [f"{entry.slide_id} ({', '.join(odd)})"] if odd else []
    if told:
        more = f" and {len(told) - 4} more" * (len(told) > 4)
        raise ConfigError(
            f"{checkpoint} was trained on other content under the ids {', '.join(told[:4])}{more}: "
            "these stores were replaced since; bring the old ones back, give the new slides ids of "
            "their own, or train again"
        )


def _image_parts(image: ImageInput | None) -> tuple[str, ...]:
    if image is None:
        return ()
    if image.key != PATCHES:
        return (f"features/{image.key}",)
    return ("patches", "context") if image.context else ("patches",)


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

    Where no slide has an image (omics-only training), every patient is a fold. A patient whose
    slides all have a role, or one the role ``train``, is not held out; where no other is left, or
    only one to train on beside test slides, the roles are the one split there is: ``none``.
    """
    if list(folds) != ["each"]:
        return list(folds)
    bound = {entry.patient_id for entry in entries if entry.role == TRAIN}
    free = [entry for entry in entries if not entry.role and entry.patient_id not in bound]
    trained = {entry.patient_id for entry in entries if entry.role != TEST}
    if len(trained) == 1 and any(entry.role == TEST for entry in entries):
        return ["none"]
    paired = sorted({entry.patient_id for entry in free if entry.has_image})
    return paired or sorted({entry.patient_id for entry in free}) or ["none"]
