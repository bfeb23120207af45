"""A frozen encoder over the patches of every store, kept beside them.

Legend: S patches, H and W pixels, F features.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from tqdm import tqdm

from hibio.backbones.frozen import FrozenBackbone, Reader, encode_patches, load_backbone
from hibio.backbones.registry import LEAST_PX, Backbone
from hibio.backbones.resolve import find_weights, resolve_backbone
from hibio.config.files import ConfigError
from preprocessing.errors import DataError
from preprocessing.stain import StainMethod, StainNormaliser, sample_patches, stain_normaliser
from preprocessing.store import SlideStore, file_sha256
from preprocessing.store.read import stores_in
from preprocessing.store.write import add_features, feature_origin
from preprocessing.workers import Lost, gathered

TOLERANCE = 0.2  # a resolution that differs from the expected one by up to this share is not told
Status = Literal["done", "replaced", "skipped", "no image", "failed"]
#: Which patches of a spot: its own, the wider ones of its context, or both side by side.
Scale = Literal["spot", "context", "both"]


@dataclass(frozen=True)
class SlideFeatures:
    """What became of one store.

    Attributes:
        path: the store.
        status: done, replaced (there were features of this encoder with other weights or
            settings), skipped (they are there), no image (nothing to encode), or failed.
        spots: rows of the features.
        dim: length of a feature vector.
        seconds: time spent.
        note: reason of a failure, and what to know of the resolution.
    """

    path: Path
    status: Status
    spots: int = 0
    dim: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class FeaturesReport:
    """The results of one run over a folder, in the order of its stores."""

    encoder: str
    rows: tuple[SlideFeatures, ...]

    @property
    def failed(self) -> tuple[SlideFeatures, ...]:
        """The stores that did not get the features."""
        return tuple(row for row in self.rows if row.status == "failed")

    def __str__(self) -> str:
        """A table, one line a store."""
        width = max([len("store"), *(len(row.path.stem) for row in self.rows)])
        lines = [f"{'store':<{width}}  status      spots    dim  seconds  note"]
        lines += [
            f"{r.path.stem:<{width}}  {r.status:<8}  {r.spots:>7}  {r.dim:>5}  {r.seconds:>7.1f}  "
            f"{r.note}".rstrip()
            for r in self.rows
        ]
        return "\n".join(lines)


def scale_note(backbone: Backbone, patch_um: float, patch_px: int, slide_mpp: float) -> str:
    """What to know of the resolution, in one line; "" when it is what the encoder expects.

    The whole patch is resized to the encoder's input, so the encoder sees ``patch_um / input_px``
    micrometres a pixel, with the detail of the coarsest step before: the slide or the stored patch.

    Args:
        backbone: the encoder; nothing is told of those for natural images.
        patch_um: width of a patch, micrometres.
        patch_px: width of a stored patch, pixels.
        slide_mpp: micrometres per level-0 pixel of the slide.
    """
    if not backbone.mpp:
        return ""
    seen = patch_um / backbone.input_px
    expected = min(backbone.mpp, key=lambda mpp: abs(math.log(seen / mpp)))
    if abs(seen / expected - 1.0) > TOLERANCE:
        return (
            f"sees {seen:.3g} um/px, was trained at {expected:g}: prepare with "
            f"--patch-um {expected * backbone.input_px:g}"
        )
    stored = patch_um / patch_px
    if max(stored, slide_mpp) / expected <= 1.0 + TOLERANCE:
        return ""
    if slide_mpp >= stored:
        return f"the slide has only {slide_mpp:.3g} um/px, the encoder was trained at {expected:g}"
    return (
        f"stored at {stored:.3g} um/px, the encoder was trained at {expected:g}: prepare with "
        f"--patch-px {math.ceil(patch_um / expected)}"
    )


def features_report(
    stores: str | Path | Sequence[Path],
    encoder: str,
    *,
    weights: Path | None = None,
    batch: int = 64,
    device: str = "auto",
    threads: int = 1,
    scale: Scale = "spot",
    stain: StainMethod = "none",
    input_px: int | None = None,
    workers: int = 0,
    scheduler: str | None = None,
) -> FeaturesReport:
    """Run the encoder over every store; one bad store does not stop the others.

    A store that has the features of the same encoder, weights and settings is skipped, so a run
    that was stopped goes on where it was. A slide's features are held in memory as float16 (100,000
    spots of 1536: 0.3 GB) and written at its end.

    Args:
        stores: folder of stores, one store, or some.
        encoder: see :func:`hibio.backbones.resolve.resolve_backbone`.
        weights: local weights file; None: the hub's cache, else the hub.
        batch: patches of one forward pass.
        device: auto | cpu | cuda. bf16 is used on CUDA only.
        threads: that decode patches ahead; 0 decodes between the passes.
        scale: which patches: "spot", "context" (a store without them fails), or "both", whose
            features stand side by side.
        stain: none | macenko | reinhard: bring the patches of each slide to one stain before.
        input_px: side of the square that the encoder reads; None: what it was trained on.
        workers: processes that encode a store at a time; 0: this one.
        scheduler: address of a Dask cluster that takes their place.

    Raises:
        ConfigError: the encoder, its weights, the device or an argument cannot be used.
        DataError: no store there.
    """
    if batch < 1 or threads < 0:
        raise ConfigError(f"batch is {batch}, threads {threads}; expected at least 1 and 0")
    if input_px is not None and input_px < LEAST_PX:
        raise ConfigError(f"input_px is {input_px}; expected at least {LEAST_PX} pixels, e.g. 112")
    for name, given, choices in (("scale", scale, Scale), ("stain", stain, StainMethod)):
        if given not in get_args(choices):
            raise ConfigError(f"{name} is {given!r}; choose {', '.join(get_args(choices))}")
    target = _device(device)
    if isinstance(stores, str | Path):
        stores = stores_in(stores)
    native = resolve_backbone(encoder)
    backbone = native.at(input_px)
    file = find_weights(backbone, weights)
    resized = backbone.input_px != native.input_px
    job = _Job(backbone, file, target, scale, stain, batch, threads, resized)
    tasks = {path.stem: path for path in stores}
    found = gathered(functools.partial(_attempt, job=job), tasks, job.name, workers, scheduler)
    return FeaturesReport(job.name, tuple(_row(tasks[name], one) for name, one in found.items()))


def _row(path: Path, found: SlideFeatures | Lost) -> SlideFeatures:
    if not isinstance(found, Lost):
        return found
    return SlideFeatures(path, "failed", seconds=found.seconds, note=found.reason)


@dataclass(frozen=True)
class _Job:
    """What is the same for every store of a run."""

    backbone: Backbone
    weights: Path
    device: torch.device
    scale: Scale
    stain: StainMethod
    batch: int
    threads: int
    resized: bool

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Of the weights file."""
        return file_sha256(self.weights)

    @functools.cached_property
    def network(self) -> FrozenBackbone:
        """The encoder on its device; built when the first store needs it."""
        return load_backbone(self.backbone, self.weights).to(self.device)

    @property
    def name(self) -> str:
        """Name of the feature set: the encoder, and what is not as usual."""
        unusual = [f"{self.backbone.input_px}px"] * self.resized
        unusual += [self.scale] * (self.scale != "spot") + [self.stain] * (self.stain != "none")
        return "_".join([self.backbone.encoder, *unusual])

    def readers(self, store: SlideStore) -> list[Reader]:
        """What gives the patches of each scale that is asked for.

        Raises:
            DataError: no context patches, or a slide whose stain cannot be measured.
        """
        if self.scale != "spot":
            store.context([0])  # refused before the first pass where there are none
        scales: list[Reader] = [store.patches] * (self.scale != "context")
        scales += [store.context] * (self.scale != "spot")
        if self.stain == "none":
            return scales
        normaliser = stain_normaliser(self.stain, sample_patches(store))
        return [functools.partial(_normalised, read, normaliser) for read in scales]

    def origin(self, store: SlideStore) -> dict[str, Any]:
        """What the features depend on beside the pixels, as plain values."""
        known = self.backbone
        unusual: dict[str, Any] = {} if self.stain == "none" else {"stain": self.stain}
        if self.scale != "spot":
            unusual |= {"scale": self.scale, "context_um": store.context_um}
        amp = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return unusual | {
            "encoder": known.encoder,
            "timm_name": known.timm_name,
            "timm_arguments": dict(known.arguments),
            "weights_sha256": self.weights_sha256,
            "input_px": known.input_px,
            "interpolation": known.interpolation,
            "mean": list(known.mean),
            "std": list(known.std),
            "pooling": known.pooling,
            "patch_um": float(store.attrs["patch_um"]),
            "precision": "bfloat16" if amp else "float32",
        }


def _attempt(path: Path, job: _Job) -> SlideFeatures:
    """Encode one store and turn what is wrong with it into a row."""
    begin = time.monotonic()
    try:
        row = _encode_store(path, job)
    except (DataError, OSError) as error:
        row = SlideFeatures(path, "failed", note=" ".join(str(error).split()))
    return replace(row, seconds=time.monotonic() - begin)


def _encode_store(path: Path, job: _Job) -> SlideFeatures:
    with SlideStore(path) as store:
        if not store.has_image:
            return SlideFeatures(path, "no image", note="counts only, nothing to encode")
        origin = job.origin(store)
        um, px = float(store.attrs["patch_um"]), int(store.attrs["patch_px"])
        note = ""  # a context is coarse on purpose
        if job.scale != "context":
            note = scale_note(job.backbone, um, px, store.mpp)
        before = feature_origin(path, job.name)
        if before is not None and {**before, "precision": ""} == {**origin, "precision": ""}:
            dim = store.features(job.name).shape[1]
            return SlideFeatures(path, "skipped", store.n_spots, dim, note=note)
        readers = job.readers(store)
        total = store.n_spots * len(readers)
        with tqdm(total=total, desc=path.stem, unit="patch", disable=None, leave=False) as bar:
            encode = functools.partial(
                encode_patches,
                spots=store.n_spots,
                network=job.network,
                batch=job.batch,
                workers=job.threads,
                progress=bar.update,
            )
            values = np.hstack([encode(read) for read in readers])
    add_features(path, job.name, values, origin)
    spots, dim = values.shape
    return SlideFeatures(path, "done" if before is None else "replaced", spots, dim, note=note)


def _normalised(read: Reader, normaliser: StainNormaliser, index: np.ndarray) -> np.ndarray:
    return normaliser(read(index))


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees none; see `hibio doctor`")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
