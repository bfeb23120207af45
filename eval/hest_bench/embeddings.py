"""Embeddings of the patches of a sample, kept in the layout that the published tool writes.

``<folder>/<TASK>/<ENCODER>/<sample>.h5`` with embeddings (N, F) and barcodes (N,). Shapes: N
patches of p x p pixels, F features.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from tqdm import tqdm

from eval.hest_bench.layout import BenchTask, Sample
from eval.hest_bench.samples import read_barcodes
from preprocessing.atomic import atomic_path
from preprocessing.errors import DataError
from preprocessing.file_hash import file_sha256
from preprocessing.readers.hdf5 import open_hdf5


class PatchEncoder(Protocol):
    """What turns the patches of one sample into vectors."""

    @property
    def name(self) -> str:
        """Row name in the results and folder name of the embeddings."""
        ...

    @property
    def origin(self) -> Mapping[str, Any]:
        """What the vectors depend on beside the pixels, as plain values."""
        ...

    def encode(self, patches: Path, barcodes: np.ndarray) -> np.ndarray:
        """Vectors (N, F) of the patches of a file, in its order."""
        ...


class StoredEmbeddings:
    """Embeddings that are there already, for example those of the published tool.

    Args:
        folder: the folder with one folder a task.
        name: of the encoder.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def of(self, task: BenchTask, sample: Sample, barcodes: np.ndarray) -> np.ndarray:
        """Vectors (N, F) in the order of the barcodes."""
        path = self.folder / task.name / self.name / f"{sample.sample_id}.h5"
        return read_embeddings(path, barcodes)


class ComputedEmbeddings:
    """Embeddings that are computed once and kept; the files of another origin are written anew.

    Args:
        folder: where they are kept.
        encoder: computes them.
    """

    def __init__(self, folder: Path, encoder: PatchEncoder) -> None:
        self.folder, self.encoder, self.name = folder, encoder, encoder.name

    def of(self, task: BenchTask, sample: Sample, barcodes: np.ndarray) -> np.ndarray:
        """Vectors (N, F) in the order of the barcodes."""
        path = self.folder / task.name / self.name / f"{sample.sample_id}.h5"
        origin = {**self.encoder.origin, "patches_sha256": file_sha256(sample.patches)}
        text = json.dumps(origin, sort_keys=True)
        if path.is_file() and _origin(path) == text:
            return read_embeddings(path, barcodes)
        values = self.encoder.encode(sample.patches, barcodes)
        _check(path, values, len(barcodes))
        names = np.array([str(name).encode() for name in barcodes])
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            file["embeddings"], file["barcodes"] = values.astype(np.float32), names[:, None]
            file.attrs["origin"] = text
        return np.asarray(values, dtype=np.float32)


Embeddings = StoredEmbeddings | ComputedEmbeddings


def task_embeddings(
    source: Embeddings, task: BenchTask, barcodes: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Vectors (N, F) of every sample of a task.

    Raises:
        DataError: missing, damaged, or of different widths.
    """
    found = {}
    bar = tqdm(task.samples, desc=f"{task.name}: {source.name}", unit="sample", disable=None)
    for sample in bar:
        found[sample.sample_id] = source.of(task, sample, barcodes[sample.sample_id])
    widths = {values.shape[1] for values in found.values()}
    if len(widths) > 1:
        raise DataError(
            f"task {task.name}: the embeddings of {source.name!r} have {sorted(widths)} features; "
            "they come from different encoders, compute them again"
        )
    return found


def read_embeddings(path: Path, barcodes: np.ndarray) -> np.ndarray:
    """Vectors (N, F) float32 of these spots, in this order.

    Raises:
        DataError: missing, damaged, or a spot is not in it.
    """
    with open_hdf5(path, "embeddings (.h5 with embeddings and barcodes)") as file:
        node = file.get("embeddings")
        if not isinstance(node, h5py.Dataset) or node.ndim != 2 or node.dtype.kind != "f":
            raise DataError(f"{path}: no dataset embeddings (N, F) of floats")
        names, values = read_barcodes(file, path), np.asarray(node[:], dtype=np.float32)
    row = {name: i for i, name in enumerate(names.tolist())}
    missing = [name for name in barcodes.tolist() if name not in row]
    if missing or len(names) != len(values):
        raise DataError(
            f"{path}: {len(missing)} of {len(barcodes)} patches have no embedding; compute them "
            "for the patches of this folder"
        )
    values = values[[row[name] for name in barcodes.tolist()]]
    _check(path, values, len(barcodes))
    return values


def _origin(path: Path) -> str:
    with open_hdf5(path, "embeddings") as file:
        return str(file.attrs.get("origin", ""))


def _check(path: Path, values: np.ndarray, n: int) -> None:
    if values.ndim != 2 or len(values) != n or not values.shape[1]:
        raise DataError(f"{path}: embeddings {values.shape} of {n} patches; expected one row each")
    if not np.isfinite(values).all():
        raise DataError(f"{path}: embeddings are not finite; check the encoder and its weights")
