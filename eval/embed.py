"""A checkpoint and stores to one AnnData a slide, kept under (checkpoint hash, store hash)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from eval.results import Role
from eval.tables import (
    H5AD,
    HASHES,
    hashes_of,
    lay_out,
    open_folder,
    require_finite,
    table_path,
    write_table,
)
from hibio import keys
from hibio.checkpoint import (
    CONFIG,
    REHEARSAL,
    TRAINER,
    WEIGHTS,
    find_checkpoint,
    load_trainer_state,
    model_sha256,
)
from hibio.config.files import ConfigError, load_saved
from hibio.config.model import ImageInput
from hibio.config.run import RunConfig
from hibio.data.fitting import MATCHED_RANDOM
from hibio.data.fold_in import panel_genes
from hibio.data.slide import PreparedSlide, prepare_slide
from hibio.data.splits import SlideEntry, copies, read_entries, refuse_replaced
from hibio.model import HiBio, SlideEmbedding
from hibio.regions import slide_regions
from hibio.share import HUB, fetch_pretrained
from preprocessing.files import atomic_path, not_ours
from preprocessing.hest_layout import obs_columns
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from preprocessing.workers import each

SUMMARY = "embed.json"
LAYOUT = "2"  # of the files; before, "spatial" was in micrometres and regions were bare numbers


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        path: the folder.
        model: in evaluation mode.
        run: settings of its run, for this fold, seed and variant.
    """

    path: Path
    model: HiBio
    run: RunConfig

    @property
    def variant(self) -> str:
        """Name of the variant, ``hibio`` for the main run."""
        return self.run.variant

    @property
    def fold(self) -> str:
        """The held-out patients."""
        return self.run.folds[0]

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return self.run.seeds[0]

    @property
    def image_input(self) -> ImageInput | None:
        """How the model's vision tower has a slide read: context and stain included."""
        return self.model.config.vision.image_input(self.run.data.image)

    @property
    def role(self) -> Role:
        """Its role in a comparison: a control by its settings, never by its name."""
        if self.variant == keys.MAIN:
            return "model"
        return "control" if is_control(self.run) else "baseline"

    @property
    def sha256(self) -> str:
        """Hash of the weights and the artifacts."""
        return model_sha256(self.path)


def is_control(run: RunConfig) -> bool:
    """Whether pairs, pathways, neighbours, genes or regions of a run are random on purpose."""
    return (
        run.data.shuffle_pairs
        or run.pathways.source.startswith(MATCHED_RANDOM)
        or "random" in (run.genes.graph, run.genes.selector)
        or run.regions.kind != "tree"
    )


def load_checkpoint(path: Path) -> Checkpoint:
    """Load one checkpoint folder.

    Raises:
        ConfigError: it is none, or it is torn.
    """
    model = HiBio.from_checkpoint(path)
    try:
        return Checkpoint(path, model, load_saved(RunConfig, path / CONFIG))
    except ConfigError as error:
        raise ConfigError(
            f"{error}; not the settings of a HiBio run: use the checkpoint's .previous sibling, "
            "or train again"
        ) from error


def unfinished_step(path: Path) -> str | None:
    """Where the training of a checkpoint was stopped, as "89 of 100"; None for a finished one.

    One without a trainer state was made to be passed on; of a damaged one it is warned.
    """
    if not (path / TRAINER).is_file():
        return None
    try:
        state = load_trainer_state(path)
    except ConfigError as error:
        warnings.warn(f"{error}; whether its training was finished is not known", stacklevel=2)
        return None
    if state["finished"]:
        return None
    of = f" of {state['n_steps']}" if "n_steps" in state else ""
    return f"{state['step']}{of}"


def checked(checkpoint: Checkpoint, entries: Sequence[SlideEntry]) -> None:
    """Compare a checkpoint with the slides that it is used on, before any work.

    Warned of: a training that was stopped, and a slide that was trained on under another id.

    Raises:
        ConfigError: the store of a training slide was replaced since.
    """
    artifacts = checkpoint.model.artifacts
    refuse_replaced(checkpoint.path, artifacts, entries, checkpoint.image_input)
    for known, other in copies(artifacts.trained_seals, entries):
        warnings.warn(
            f"slide {other!r} has the counts of {known!r}, which {checkpoint.path} was trained on: "
            "it is no unseen slide",
            stacklevel=2,
        )
    step = unfinished_step(checkpoint.path)
    if step is not None:
        warnings.warn(
            f"the training of {checkpoint.path} is not finished: it stopped at step {step}; go on "
            "with `hibio train --config CONFIG --resume RUN`",
            stacklevel=2,
        )


def find_checkpoints(path: Path) -> list[Path]:
    """The newest checkpoint of every run folder at or below ``path``, sorted.

    Raises:
        ConfigError: there is none.
    """
    if (path / WEIGHTS).is_file():
        return [path]
    folders = {weights.parent.parent for weights in path.glob(f"**/checkpoint*/{WEIGHTS}")}
    trained = {folder for folder in folders if folder.name != REHEARSAL}
    found = sorted(one for folder in trained if (one := find_checkpoint(folder)) is not None)
    if not found:
        raise ConfigError(
            f"{path}: no checkpoint there or below; give the folder that `hibio train` wrote"
        )
    return found


def one_checkpoint(path: Path) -> Path:
    """The only checkpoint at or below ``path``, or the shared model ``hf-hub:ORG/NAME``.

    Raises:
        ConfigError: there are several; they are listed.
    """
    if str(path).startswith(HUB):
        return fetch_pretrained(str(path))
    found = find_checkpoints(path)
    if len(found) > 1:
        listed = "\n  ".join(str(p) for p in found[:8])
        raise ConfigError(f"{path} holds {len(found)} checkpoints; choose one:\n  {listed}")
    return found[0]


def embed_slide(
    checkpoint: Checkpoint, store: Path, image: np.ndarray | None = None
) -> tuple[PreparedSlide, SlideEmbedding, np.ndarray]:
    """One slide prepared, embedded, and its regions (L, S).

    ``image`` is its `image_embedding` (S, D) where it is at hand.
    """
    slide = prepare_slide(store, checkpoint.model.artifacts, checkpoint.image_input)
    embedding = checkpoint.model.encode_slide(slide, image_SD=image)
    if embedding.image is None and embedding.omics is None:
        raise ConfigError(
            f"slide {slide.slide_id!r} has no counts, and {checkpoint.path} reads no image; embed "
            "it with a checkpoint that has a vision tower"
        )
    made = {"image embeddings": embedding.image, "omics embeddings": embedding.omics}
    require_finite(slide.slide_id, {name: rows for name, rows in made.items() if rows is not None})
    feature_SF = slide.fused(embedding.omics, embedding.image)
    regions = slide_regions(feature_SF, slide.xy_um, slide.graph, checkpoint.run.regions)
    return slide, embedding, regions


def image_embedding(checkpoint: Checkpoint, store: Path) -> np.ndarray:
    """Image embeddings (S, D) of a slide; its counts are not looked at."""
    artifacts, image = checkpoint.model.artifacts, checkpoint.image_input
    slide = prepare_slide(store, artifacts, image, counts=False)
    found = checkpoint.model.encode_slide(slide).image
    if found is None:
        raise ConfigError(f"{store}: no image can be read, so nothing is predicted")
    return found


def image_regions(
    checkpoint: Checkpoint, store: Path, image: np.ndarray
) -> dict[str, pd.Categorical]:
    """Columns of the regions of a slide from its image embeddings (S, D) alone, level by level."""
    slide = prepare_slide(store, checkpoint.model.artifacts, None, counts=False)
    feature_SF = slide.fused(None, image)
    regions = slide_regions(feature_SF, slide.xy_um, slide.graph, checkpoint.run.regions)
    return region_columns(checkpoint, slide.slide_id, regions)


def region_columns(
    checkpoint: Checkpoint, slide_id: str, regions_LS: np.ndarray
) -> dict[str, pd.Categorical]:
    """Name of the region of each spot, by the column of its level."""
    names = [keys.OBS_REGION + name for name in checkpoint.run.regions.levels]
    named = (region_names(slide_id, region_S) for region_S in regions_LS)
    return dict(zip(names, named, strict=True))


def region_embedding(model: HiBio, embedding: SlideEmbedding, region: np.ndarray) -> np.ndarray:
    """Embedding (S, D) of each spot's region: pooled omics, or image where there are no counts."""
    rows = embedding.omics if embedding.omics is not None else embedding.image
    if rows is None:
        raise ConfigError("a slide without counts and without an image cannot be embedded")
    ids, index = np.unique(region, return_inverse=True)
    with torch.inference_mode():
        spot_SD = torch.from_numpy(rows).to(model.device)
        group_S = torch.from_numpy(index).to(model.device)
        pooled = model.pooled(spot_SD, group_S, len(ids)).cpu().numpy()
    return pooled[index]


def embed_to_anndata(checkpoint: Checkpoint, store_path: Path) -> anndata.AnnData:
    """Counts, labels, coordinates, embeddings and regions of one slide."""
    slide, embedding, regions = embed_slide(checkpoint, store_path)
    with SlideStore(store_path) as store:
        own = region_columns(checkpoint, slide.slide_id, regions)
        taken = (keys.OBS_SLIDE, keys.OBS_SHAPES, keys.OBS_SPOT, *own)
        labels = obs_columns(store.label_columns(), taken)
        obs = store.labels().set_axis(list(labels), axis=1)
        obs.index = pd.Index(store.barcodes)
        adata = anndata.AnnData(X=store.counts(), obs=obs, var=store.genes())
        lay_out(adata, store)
        store_hash = store.sha256
    if embedding.image is not None:
        adata.obsm[keys.OBSM_IMAGE] = embedding.image
    if embedding.omics is not None:
        adata.obsm[keys.OBSM_OMICS] = embedding.omics
    middle = regions[len(regions) // 2]
    adata.obsm[keys.OBSM_REGION] = region_embedding(checkpoint.model, embedding, middle)
    for column, names in own.items():
        adata.obs[column] = names
    adata.uns[keys.UNS] = {
        "slide_id": slide.slide_id,
        "patient_id": slide.patient_id,
        "checkpoint_sha256": checkpoint.sha256,
        "store_sha256": store_hash,
        "layout": LAYOUT,
        "labels": labels,
        "genes_matched": slide.genes_matched - slide.genes_folded_in,
        "genes_folded_in": slide.genes_folded_in,
        "genes_dropped": slide.genes_dropped,
    }
    return adata


def region_names(slide_id: str, labels: np.ndarray) -> pd.Categorical:
    """Names (S,) of regions, such as ``A1:07``: unique over slides, their order that of numbers."""
    numbers = np.unique(labels)
    digits = len(str(numbers.max(initial=0)))
    names = np.array([f"{slide_id}:{number:0{digits}d}" for number in numbers])
    return pd.Categorical(names[np.searchsorted(numbers, labels)], names, ordered=True)


def embed_folder(
    checkpoint_path: Path,
    data: Path,
    out: Path,
    fold_in: Path | None = None,
    *,
    form: str = H5AD,
    workers: int = 0,
    scheduler: str | None = None,
    only: str | None = None,
) -> list[Path]:
    """Write ``<out>/<slide_id>.h5ad`` for every store; whole files of the same inputs are kept.

    ``form`` is one of `keys.TABLES`: ``.zarr`` or ``.sdata.zarr`` takes the place of ``.h5ad``.
    With ``fold_in``, a folder of bridge stores, genes of the data that the model never saw are
    folded in by their co-expression there with known ones, and the account of all is printed.
    ``workers`` and ``scheduler`` are as in `preprocessing.workers.each`, a slide a task, and
    ``only`` is the slide of a task.

    Raises:
        DataError: slides that failed in other processes; the others are written.
        ConfigError: no checkpoint, several, no store, values that are not finite, or a file in
            ``out`` that `embed` did not make.
    """
    checkpoint = load_checkpoint(one_checkpoint(checkpoint_path))
    entries = read_entries(stores_in(data))
    checked(checkpoint, entries)
    open_folder(out, form)
    targets = {entry.slide_id: table_path(out, entry.slide_id, form) for entry in entries}
    for target in targets.values():
        hashes_of(target)
    _refuse_other_summary(out / SUMMARY)
    if workers or scheduler:
        call = functools.partial(embed_folder, checkpoint_path, data, out, fold_in, form=form)
        calls = {slide: functools.partial(call, only=slide) for slide in targets}
        each(calls, workers, scheduler, "embed")
    weights = checkpoint.sha256
    if fold_in is not None:
        checkpoint, weights = _folded_in(checkpoint, stores_in(fold_in), entries)
    written = []
    for entry in tqdm(entries, desc="embed", disable=None):
        if only not in (None, entry.slide_id):
            continue
        target = targets[entry.slide_id]
        with SlideStore(entry.path) as store:
            wanted = dict(zip((*HASHES, "layout"), (weights, store.sha256, LAYOUT), strict=True))
        if hashes_of(target, "layout") != wanted:
            adata = embed_to_anndata(checkpoint, entry.path)
            adata.uns[keys.UNS]["checkpoint_sha256"] = weights
            require_finite(entry.slide_id, dict(adata.obsm))
            write_table(target, adata)
        written.append(target)
    if only is not None:
        return written
    summary = {"checkpoint": str(checkpoint.path), "slides": [path.name for path in written]}
    with atomic_path(out / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    return written


def _folded_in(
    checkpoint: Checkpoint, bridge: Sequence[Path], entries: Sequence[SlideEntry]
) -> tuple[Checkpoint, str]:
    """The checkpoint with the genes of the entries folded in, and a hash of both it was made of."""
    panel = panel_genes([entry.path for entry in entries])
    model, report = checkpoint.model.fold_in(bridge, panel)
    print(report)
    digest = hashlib.sha256(checkpoint.sha256.encode())
    digest.update(" ".join(sorted(panel)).encode())
    for path in bridge:
        with SlideStore(path) as store:
            digest.update(store.sha256.encode())
    return dataclasses.replace(checkpoint, model=model), digest.hexdigest()


def _refuse_other_summary(path: Path) -> None:
    if not path.exists():
        return
    with suppress(OSError, ValueError, TypeError, RecursionError):
        if {"checkpoint", "slides"} <= set(json.loads(path.read_text(encoding="utf-8"))):
            return
    raise not_ours(path)
