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

from hibio.checkpoint import BANK, DamagedError, refuse_outside_data, verify_file
from hibio.config.files import ConfigError
from hibio.data.counts import align_columns
from hibio.data.dataset import SlideDataset
from hibio.model import HiBio
from preprocessing.files import atomic_path
from preprocessing.hdf5 import hdf5_writer
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


def build_bank(model: HiBio, dataset: SlideDataset) -> Bank | None:
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
        keep = np.arange(slide.n_spots)
        if total > MAX_SPOTS:
            wanted = max(1, slide.n_spots * MAX_SPOTS // total)
            keep = np.linspace(0, slide.n_spots - 1, wanted).astype(int)
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


def read_bank(path: Path) -> Bank:
    """Read what :func:`write_bank` wrote, after comparing it with the checkpoint's checksums.

    Raises:
        ConfigError: the file is missing, was changed or cannot be read.
    """
    if path.is_file():
        verify_file(path)
    try:
        with h5py.File(path, "r") as file:
            refuse_outside_data(file)
            group = file["tfidf"]
            arrays = (group["data"][:].astype(np.float32), group["indices"][:], group["indptr"][:])
            return Bank(
                file["image"][:].astype(np.float32),
                sparse.csr_matrix(arrays, shape=tuple(group.attrs["shape"])),
                file["slide"].asstr()[:].astype(str),
                file["patient"].asstr()[:].astype(str),
            )
    except (OSError, RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: no reference bank can be read ({error}); queries need one: train to "
            "the end on slides with images, with bank: true"
        ) from error


def has_bank(checkpoint: Path) -> bool:
    """Whether the bank is there and whole; a damaged one is told, and written anew."""
    try:
        verify_file(checkpoint / BANK)
    except DamagedError as error:
        if (checkpoint / BANK).is_file():
            warnings.warn(f"{error.problem}; it is written anew", stacklevel=2)
        return False
    return (checkpoint / BANK).is_file()
