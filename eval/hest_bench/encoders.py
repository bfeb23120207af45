"""Encoders of HEST patches: hand-made features, a frozen backbone, the image tower of a checkpoint.

They are kept as ``<folder>/<TASK>/<ENCODER>/<sample>.h5`` with embeddings (N, F) and barcodes (N,).
Shapes: N patches of p x p pixels, F features.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
from PIL import Image
from scipy import sparse
from tqdm import tqdm

from eval.embed import Checkpoint
from eval.hest_bench.layout import BenchTask, Sample
from eval.hest_bench.samples import patch_images, read_barcodes
from hibio.backbones.frozen import encode_patches, load_backbone
from hibio.backbones.resolve import find_weights, resolve_backbone
from hibio.config.files import ConfigError
from hibio.config.model import PATCHES
from hibio.data.counts import ArrayCounts
from hibio.data.slide import PreparedSlide, colour_statistics, expression_slide
from hibio.data.stored_features import standardise_columns
from preprocessing.errors import DataError
from preprocessing.files import atomic_path, file_sha256
from preprocessing.handcrafted import FEATURE_NAMES, handcrafted_batch
from preprocessing.patches import iter_patches
from preprocessing.readers.hdf5 import open_hdf5
from preprocessing.slides.hest import HestPatches, hest_coordinates
from preprocessing.stain import StainMethod, stain_normaliser

HANDCRAFTED = "handcrafted"
HANDCRAFTED_PATCH = "handcrafted_patch"
PATCH_UM = 112.0  # of every task (224 pixels of 0.5 um)
CONTEXT = 3  # the outer scale of the stores' hand-made features, in patch widths
FEATURE_PX = 64
_BLOCK = 64


class PatchEncoder(Protocol):
    """What turns the patches of one sample into vectors."""

    @property
    def name(self) -> str:
        """Row name in the results and folder name of the embeddings."""

    @property
    def origin(self) -> Mapping[str, Any]:
        """What the vectors depend on beside the pixels, as plain values."""

    def encode(self, patches: Path, barcodes: np.ndarray) -> np.ndarray:
        """Vectors (N, F) of the patches of a file, in its order."""
        ...


class StoredEmbeddings:
    """Embeddings of an encoder that are there already, such as those of the published tool."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def path(self, task: BenchTask, sample: Sample) -> Path:
        """The file of a sample."""
        return self.folder / task.name / self.name / f"{sample.sample_id}.h5"

    def of(self, task: BenchTask, sample: Sample, barcodes: np.ndarray) -> np.ndarray:
        """Vectors (N, F) in the order of the barcodes."""
        return read_embeddings(self.path(task, sample), barcodes)


class ComputedEmbeddings(StoredEmbeddings):
    """Embeddings that are computed once and kept; the files of another origin are written anew."""

    def __init__(self, folder: Path, encoder: PatchEncoder) -> None:
        super().__init__(folder, encoder.name)
        self.encoder = encoder

    def of(self, task: BenchTask, sample: Sample, barcodes: np.ndarray) -> np.ndarray:
        """Vectors (N, F) in the order of the barcodes."""
        path = self.path(task, sample)
        origin = {**self.encoder.origin, "patches_sha256": file_sha256(sample.patches)}
        text = json.dumps(origin, sort_keys=True)
        if path.is_file():
            with open_hdf5(path, "embeddings") as file:
                kept = str(file.attrs.get("origin", ""))
            if kept == text:
                return read_embeddings(path, barcodes)
        values = self.encoder.encode(sample.patches, barcodes)
        _check(path, values, len(barcodes))
        names = np.array([str(name).encode() for name in barcodes])
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            file["embeddings"], file["barcodes"] = values.astype(np.float32), names[:, None]
            file.attrs["origin"] = text
        return np.asarray(values, dtype=np.float32)


def task_embeddings(
    source: StoredEmbeddings, task: BenchTask, barcodes: Mapping[str, np.ndarray]
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
    """Vectors (N, F) of these spots, in this order, in the type that they are stored in.

    Raises:
        DataError: missing, damaged, or a spot is not in it.
    """
    with open_hdf5(path, "embeddings (.h5 with embeddings and barcodes)") as file:
        node = file.get("embeddings")
        if not isinstance(node, h5py.Dataset) or node.ndim != 2 or node.dtype.kind != "f":
            raise DataError(f"{path}: no dataset embeddings (N, F) of floats")
        names, values = read_barcodes(file, path), np.asarray(node[:])
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


def _check(path: Path, values: np.ndarray, n: int) -> None:
    if values.ndim != 2 or len(values) != n or not values.shape[1]:
        raise DataError(f"{path}: embeddings {values.shape} of {n} patches; expected one row each")
    if not np.isfinite(values).all():
        raise DataError(f"{path}: embeddings are not finite; check the encoder and its weights")


class PatchReader:
    """Patches of one file by row.

    Args:
        path: patches/<sample>.h5.
        px: edge to resize to; None: as stored.
    """

    def __init__(self, path: Path, px: int | None = None) -> None:
        self.path, self.px = path, px

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (n, p, p, 3) of these rows, rising."""
        with open_hdf5(self.path, "patches of HEST (.h5)") as file:
            images = patch_images(file, self.path)
            found = np.stack([images[int(row)] for row in rows])
        if self.px is None or found.shape[1] == self.px:
            return found
        size = (self.px, self.px)
        shown = [Image.fromarray(p).resize(size, Image.Resampling.BOX) for p in found]
        return np.stack([np.asarray(picture) for picture in shown])


class HandcraftedPatch:
    """Hand-made features of the patch alone, at the stores' 64 pixels."""

    name = HANDCRAFTED_PATCH
    origin: Mapping[str, Any] = {"encoder": HANDCRAFTED_PATCH, "px": FEATURE_PX}

    def encode(self, patches: Path, barcodes: np.ndarray) -> np.ndarray:
        """See `PatchEncoder.encode`."""
        read = PatchReader(patches, FEATURE_PX)
        blocks = [
            handcrafted_batch(read(np.arange(start, min(start + _BLOCK, len(barcodes)))))
            for start in tqdm(
                range(0, len(barcodes), _BLOCK), desc=patches.stem, disable=None, leave=False
            )
        ]
        return np.concatenate(blocks)


class Handcrafted:
    """Hand-made features at two scales, as a store has them.

    The outer scale is put together from the neighbouring patches; what lies on none is white.
    """

    name = HANDCRAFTED
    origin: Mapping[str, Any] = {"encoder": HANDCRAFTED, "px": FEATURE_PX, "context": CONTEXT}

    def encode(self, patches: Path, barcodes: np.ndarray) -> np.ndarray:
        """See `PatchEncoder.encode`."""
        names, centres = hest_coordinates(patches)
        _check_order(patches, names, barcodes)
        with HestPatches(patches) as slide:
            scales = (PATCH_UM, CONTEXT * PATCH_UM)
            return np.concatenate([_at_scale(slide, centres, um) for um in scales], axis=1)


def _at_scale(slide: HestPatches, centres: np.ndarray, um: float) -> np.ndarray:
    """Features (N, F) of the tissue around each centre, ``um`` wide."""
    mpp = _mpp(slide)
    result = np.empty((len(centres), len(FEATURE_NAMES)), dtype=np.float32)
    rows: list[int] = []
    pictures: list[np.ndarray] = []
    bar = tqdm(total=len(centres), desc=f"{slide.path.stem}, {um:g} um", disable=None, leave=False)
    with bar:
        for row, picture in iter_patches(slide, centres, mpp, um, FEATURE_PX):
            rows.append(row)
            pictures.append(picture)
            if len(rows) == _BLOCK:
                result[rows] = handcrafted_batch(np.stack(pictures))
                bar.update(len(rows))
                rows, pictures = [], []
        if rows:
            result[rows] = handcrafted_batch(np.stack(pictures))
    return result


class Frozen:
    """A frozen backbone of `hibio.backbones`.

    Args:
        encoder: see `hibio.backbones.resolve.resolve_backbone`.
        weights: local file; None: the hub's cache, else the hub.
        device: cpu or cuda.
        batch: patches of one pass.
    """

    def __init__(
        self, encoder: str, weights: Path | None, device: str = "cpu", batch: int = 64
    ) -> None:
        backbone = resolve_backbone(encoder)
        file = find_weights(backbone, weights)
        self.network = load_backbone(backbone, file).to(torch.device(device))
        self.name, self.batch = backbone.encoder, batch
        self.origin: Mapping[str, Any] = {
            "encoder": backbone.encoder,
            "timm_name": backbone.timm_name,
            "weights_sha256": file_sha256(file),
        }

    def encode(self, patches: Path, barcodes: np.ndarray) -> np.ndarray:
        """See `PatchEncoder.encode`."""
        with tqdm(total=len(barcodes), desc=patches.stem, disable=None, leave=False) as bar:
            return encode_patches(
                PatchReader(patches),
                len(barcodes),
                self.network,
                batch=self.batch,
                progress=bar.update,
            )


class ImageTower:
    """The image side of a HiBio checkpoint: embeddings in the shared space.

    Args:
        checkpoint: a checkpoint with a vision tower.
        features: encodes the patches into the stored features that the tower reads; None when it
            reads the patches themselves.
    """

    def __init__(self, checkpoint: Checkpoint, features: PatchEncoder | None) -> None:
        trained = checkpoint.model.artifacts.settings.patch_um
        if checkpoint.model.vision is None or checkpoint.run.data.image is None:
            raise ConfigError(f"{checkpoint.path}: this checkpoint reads no image")
        if trained is not None and abs(trained - PATCH_UM) > 0.01 * PATCH_UM:
            raise ConfigError(
                f"{checkpoint.path}: trained on patches {trained:g} um wide, the benchmark has "
                f"{PATCH_UM:g} um; train on stores prepared with --patch-um {PATCH_UM:g}"
            )
        read = checkpoint.image_input
        if read is not None and read.context:
            raise ConfigError(
                f"{checkpoint.path}: it reads wider patches too (model.vision.context: patch) "
                "and the benchmark has none; train with model.vision.context: none"
            )
        self.stain: StainMethod = "none" if read is None else read.stain
        self.checkpoint, self.features = checkpoint, features
        self.name = checkpoint.variant
        self.origin: Mapping[str, Any] = {
            "checkpoint_sha256": checkpoint.sha256,
            "features": None if features is None else dict(features.origin),
        }

    def encode(self, patches: Path, barcodes: np.ndarray) -> np.ndarray:
        """See `PatchEncoder.encode`."""
        artifacts = self.checkpoint.model.artifacts
        names, centres = hest_coordinates(patches)
        _check_order(patches, names, barcodes)
        with HestPatches(patches) as slide:
            xy_um = centres * _mpp(slide)
        nothing = sparse.csr_matrix((len(barcodes), artifacts.n_genes), dtype=np.int64)
        bare = expression_slide(
            ArrayCounts(nothing), xy_um, artifacts, slide_id=patches.stem, matched=0, measured=0
        )
        found = self.checkpoint.model.encode_slide(self._with_image(bare, patches, barcodes)).image
        assert found is not None
        return found

    def _with_image(
        self, slide: PreparedSlide, patches: Path, barcodes: np.ndarray
    ) -> PreparedSlide:
        if self.features is not None:
            values = standardise_columns(self.features.encode(patches, barcodes))
            return dataclasses.replace(slide, features_SF=values)
        read = PatchReader(patches)
        chosen = np.unique(np.linspace(0, len(barcodes) - 1, min(len(barcodes), 64)).astype(int))
        sample = read(chosen)
        normaliser = stain_normaliser(self.stain, sample)
        own = {
            "path": patches,
            "use_patches": True,
            "stain": self.stain,
            "normaliser": None if self.stain == "none" else normaliser,
            "stain_6": colour_statistics(normaliser(sample)),
        }
        known = {f.name: getattr(slide, f.name) for f in dataclasses.fields(slide)}
        return _PatchSlide(**{**known, **own})


class _PatchSlide(PreparedSlide):
    """A slide whose patches lie in a file of HEST; ``path`` is that file."""

    def patches(self, spots: np.ndarray) -> np.ndarray:
        """Patches of ``spots``, uint8 (n, px, px, 3), in the stain that was asked for."""
        assert self.path is not None
        pictures = PatchReader(self.path)(spots)
        return pictures if self.normaliser is None else self.normaliser(pictures)


def device_of(name: str) -> str:
    """Where to run: cpu or cuda.

    Raises:
        ConfigError: cuda is asked for and torch sees none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device is cuda, but torch sees none; see `hibio doctor`")
    return "cuda" if available and name != "cpu" else "cpu"


def make_encoder(
    name: str, weights: Path | None = None, device: str = "cpu", batch: int = 64
) -> PatchEncoder:
    """The encoder of a name: handcrafted, handcrafted_patch, or a frozen backbone.

    Raises:
        ConfigError: unknown, or its weights cannot be had.
    """
    if name == HANDCRAFTED:
        return Handcrafted()
    if name == HANDCRAFTED_PATCH:
        return HandcraftedPatch()
    return Frozen(name, weights, device, batch)


def checkpoint_encoder(
    checkpoint: Checkpoint, weights: Path | None = None, device: str = "cpu", batch: int = 64
) -> ImageTower:
    """The image tower of a checkpoint with what its input needs.

    Raises:
        ConfigError: no image tower, another patch width, or its input features cannot be computed.
    """
    if checkpoint.run.data.image is None or checkpoint.run.data.image == PATCHES:
        return ImageTower(checkpoint, None)
    return ImageTower(checkpoint, make_encoder(checkpoint.run.data.image, weights, device, batch))


def _mpp(slide: HestPatches) -> float:
    if slide.mpp is None:
        raise DataError(
            f"{slide.path}: img has no attribute pixel_size (um per pixel of the scan), which this "
            f"encoder needs; {HANDCRAFTED_PATCH!r} and frozen backbones do without"
        )
    return slide.mpp


def _check_order(path: Path, names: np.ndarray, barcodes: np.ndarray) -> None:
    if names.tolist() != barcodes.tolist():
        raise DataError(f"{path}: it changed while it was read; run again")
