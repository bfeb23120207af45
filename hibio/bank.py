"""The reference bank: image embeddings and TF-IDF rows of training spots (docs/method.md 2).

It answers gene-set queries on H&E alone: the set is scored on the bank's profiles when asked,
then carried to new image embeddings by ridge and by nearest neighbours.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from scipy import sparse

from hibio.checkpoint import BANK, DamagedError, verify_file
from hibio.config.files import ConfigError
from hibio.data.counts import align_columns
from hibio.data.dataset import PreparedSlides
from hibio.model import HiBio
from pathways.anchors import UNIT_TOLERANCE
from preprocessing.errors import DataError
from preprocessing.files import atomic_path
from preprocessing.hdf5 import (
    checked_csr,
    hdf5_writer,
    open_guarded,
    require_arrays,
    require_csr,
)
from preprocessing.store import SlideStore

MAX_SPOTS = 50_000  # of a bank, evenly from every slide


@dataclass(frozen=True)
class Bank:
    """Training spots (n of them).

    Attributes:
        image: (n, D) image embeddings.
        tfidf: (n, G) unit TF-IDF rows.
        slide: (n,) slide id.
        patient: (n,) patient id.
    """

    image: np.ndarray
    tfidf: sparse.csr_matrix
    slide: np.ndarray
    patient: np.ndarray


def build_bank(model: HiBio, dataset: PreparedSlides) -> Bank | None:
    """Embed the training spots that have an image, at most `MAX_SPOTS`; None when there are none.

    The pairs of ``dataset``, the training slides, are not shuffled.
    """
    artifacts = model.artifacts
    paired = [i for i, entry in enumerate(dataset.entries) if entry.has_image]
    if model.vision is None or not paired:
        return None
    total = sum(dataset.entries[i].n_spots for i in paired)
    image, tfidf, slides, patients = [], [], [], []
    for index in paired:
        slide = dataset[index]
        keep = bank_spots(slide.n_spots, total)
        with SlideStore(dataset.entries[index].path) as store:
            counts = align_columns(store.counts(), store.gene_names, artifacts.genes)
            near = artifacts.niche(store.xy_um)
        embedding = model.encode_slide(slide).image
        assert embedding is not None
        image.append(embedding[keep])
        tfidf.append(artifacts.tfidf.transform(counts, near)[keep])
        slides += [slide.slide_id] * len(keep)
        patients += [slide.patient_id] * len(keep)
    return Bank(
        np.concatenate(image),
        sparse.csr_matrix(sparse.vstack(tfidf)),
        np.array(slides),
        np.array(patients),
    )


def bank_spots(n_spots: int, total: int) -> np.ndarray:
    """Which spots of a slide with ``n_spots`` stand for it, of a cohort with ``total``."""
    wanted = n_spots if total <= MAX_SPOTS else max(1, n_spots * MAX_SPOTS // total)
    return np.linspace(0, n_spots - 1, wanted).astype(int)


def write_bank(path: Path, bank: Bank) -> None:
    """Write ``bank.h5`` atomically (embeddings and values as float16).

    Raises:
        OSError: the disk is full or not writable; an old file stays.
    """
    with atomic_path(path) as temporary, hdf5_writer(temporary) as (file, _):
        file["image"] = bank.image.astype(np.float16)
        file["slide"] = bank.slide.astype(h5py.string_dtype())
        file["patient"] = bank.patient.astype(h5py.string_dtype())
        group = file.create_group("tfidf")
        group.attrs["shape"] = bank.tfidf.shape
        group.create_dataset("data", data=bank.tfidf.data.astype(np.float16), compression="lzf")
        group.create_dataset("indices", data=bank.tfidf.indices, compression="lzf")
        group["indptr"] = bank.tfidf.indptr


def read_bank(path: Path, model: HiBio | None = None) -> Bank:
    """Read what :func:`write_bank` wrote, after comparing it with the checkpoint's checksums.

    Every part is compared with the others, and with the ``model`` whose bank it is.

    Raises:
        ConfigError: the file is missing, was changed, cannot be read, or is of another model.
    """
    remedy = "queries need one: train to the end on slides with images, with bank: true"
    if not path.is_file():
        raise ConfigError(f"{path.parent} has no reference bank ({path.name}); {remedy}")
    verify_file(path)
    try:
        with open_guarded(path) as file:
            return _read(file, model)
    except (OSError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: no reference bank can be read ({error}); {remedy}") from error


def _read(file: h5py.File, model: HiBio | None) -> Bank:
    """Its parts, whose types, sizes and indices are looked at before they are used."""
    group = file["tfidf"]
    n_spots, n_genes = (int(n) for n in group.attrs["shape"])
    width = None
    if model is not None:
        n_genes, width = model.artifacts.n_genes, model.config.embed_dim
        if tuple(group.attrs["shape"]) != (n_spots, n_genes):
            raise DataError(f"tfidf is of another vocabulary, expected {n_genes} genes")
    names = dict.fromkeys(("slide", "patient"), ("text", (n_spots,)))
    require_arrays(file, {"image": ("number", (n_spots, width)), **names})
    require_csr(file, "tfidf", (n_spots, n_genes))
    arrays = (group["data"][:].astype(np.float32), group["indices"][:], group["indptr"][:])
    bank = Bank(
        file["image"][:].astype(np.float32),
        checked_csr(*arrays, (n_spots, n_genes)),
        file["slide"].asstr()[:].astype(str),
        file["patient"].asstr()[:].astype(str),
    )
    wrong = ~np.isfinite(bank.image).all(axis=1)
    if not n_spots or wrong.any() or not np.isfinite(bank.tfidf.data).all():
        raise DataError(f"{int(wrong.sum())} of {n_spots} image embeddings, or TF-IDF, not finite")
    longest = float(np.sqrt(bank.tfidf.power(2).sum(axis=1).max()))
    if not abs(longest - 1.0) <= UNIT_TOLERANCE:
        raise DataError(f"the longest row of tfidf has length {longest:.3g}, expected 1")
    return bank


def has_bank(checkpoint: Path) -> bool:
    """Whether the bank is there and whole; a damaged one is told, and written anew."""
    try:
        verify_file(checkpoint / BANK)
    except DamagedError as error:
        if (checkpoint / BANK).is_file():
            warnings.warn(f"{error.problem}; it is written anew", stacklevel=2)
        return False
    return (checkpoint / BANK).is_file()
