"""`hibio search`: the spots and regions of a cohort that are nearest to a spot, genes or a patch.

Shapes: S rows (spots or regions) of a slide, N of a level over all slides, D embedding, Q
questions.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from eval.embed import Checkpoint, load_checkpoint, one_checkpoint
from eval.indexed import (
    ABOUT,
    EXACT,
    SPOT,
    Rows,
    exact,
    labels_of,
    opened,
    parameters,
    read_summary,
    require_seal,
)
from eval.measures.metrics import unit_rows
from eval.tables import open_folder
from hibio.config.files import ConfigError
from hibio.config.model import PATCHES
from hibio.data.dataset import image_batch
from preprocessing.canvas import panel_grid, picture_of
from preprocessing.errors import DataError, did_you_mean
from preprocessing.files import atomic_path, refuse_others, spreadsheet_text
from preprocessing.handcrafted import handcrafted_batch
from preprocessing.run.preparation import HANDCRAFTED
from preprocessing.store import SlideStore

SHOWN = 100  # of the rows found, in the picture
BILINEAR = Image.Resampling.BILINEAR  # as patches are read
FEATURE_PX = 64  # of the picture that the handcrafted features are made of


class Index:
    """An index that `hibio index` wrote.

    Args:
        folder: of it.

    Raises:
        ConfigError: it is none, or was not finished.
    """

    def __init__(self, folder: Path) -> None:
        summary = read_summary(folder)
        self.folder, self.about = folder, summary["slides"]
        self.tables = summary["tables"]
        if not self.tables:
            raise ConfigError(f"{folder} was not finished; run `hibio index` again")
        self.rows = Rows(folder, tuple(self.about))

    def mask(self, level: str, where: Mapping[str, Sequence[str]]) -> np.ndarray | None:
        """Rows (N,) that have one of the values of every key; None without keys.

        A key is slide_id, a column of the manifest (patient_id, tissue, organism, technology), or
        a label.

        Raises:
            ConfigError: an unknown key, or no such row.
        """
        known = ["slide_id", *ABOUT, *sorted(self.rows.columns)]
        for key in where:
            if key not in known:
                raise ConfigError(f"no {key!r} to choose by; there are {', '.join(known)}")
        if not where:
            return None
        parts = []
        for slide, size in zip(self.rows.slides, self.rows.sizes[level], strict=True):
            values = {"slide_id": slide, **self.about[slide]}
            keep = np.ones(size, dtype=bool)
            with self.rows.open(slide) as file:
                for key, wanted in where.items():
                    if key in values:
                        keep &= values[key] in wanted
                    elif (own := labels_of(file[level]).get(key)) is not None:
                        keep &= np.isin(own.asstr()[:].astype(str), wanted)
                    else:
                        keep[:] = False
            parts.append(keep)
        found = np.concatenate(parts)
        if not found.any():
            told = " and ".join(f"{key}={' or '.join(values)}" for key, values in where.items())
            raise ConfigError(f"no {level} has {told}")
        return found

    def nearest(
        self,
        question: np.ndarray,
        modality: str = "image",
        level: str = SPOT,
        k: int = 10,
        mask: np.ndarray | None = None,
    ) -> pd.DataFrame:
        """The k rows nearest to an embedding (D,), nearest first, with their cosine distance.

        Few rows of a mask (N,) are compared one by one; of many, more lists are read.

        Raises:
            ConfigError: no such table.
        """
        name = f"{level}.{modality}"
        if name not in self.tables:
            raise ConfigError(f"no {name!r} in the index{did_you_mean(name, list(self.tables))}")
        if not np.isfinite(question).all():
            raise ConfigError(f"{self.folder}: what is asked is not finite; make the index anew")
        table, asked = self.tables[name], unit_rows(question[None].astype(np.float32))
        k = min(k, int(self.rows.starts(level)[-1]))
        if mask is not None and mask.sum() <= EXACT:
            number, cosine = exact(self.rows, level, modality, asked, k, mask)
        else:
            share = 1.0 if mask is None else float(mask.mean())
            probed = min(table.lists, math.ceil(table.probed / share))
            index = opened(self.rows, table)
            cosine, number = index.search(asked, k, params=parameters(probed, mask))
        there = number[0] >= 0
        if number.max(initial=0) >= self.rows.starts(level)[-1]:
            raise ConfigError(f"{self.folder}: {name} names rows that there are not; make it anew")
        found = self.rows.described(level, number[0][there])
        found.insert(0, "distance", 1.0 - cosine[0][there].astype(np.float64))
        if not np.isfinite(found["distance"]).all():
            raise ConfigError(f"{self.folder}: embeddings that are not finite; make it anew")
        return found


def gene_list(checkpoint: Checkpoint, genes: Sequence[str]) -> np.ndarray:
    """Embedding (D,) of a list of genes; those that the model does not know are told.

    Raises:
        ConfigError: it knows none.
    """
    known = set(checkpoint.model.artifacts.genes.tolist())
    inside = [gene for gene in dict.fromkeys(genes) if gene in known]
    unknown = [gene for gene in genes if gene not in known]
    if not inside:
        near = did_you_mean(unknown[0], known)
        raise ConfigError(f"the model knows none of the genes {', '.join(unknown[:5])}{near}")
    if unknown:
        print(f"{len(unknown)} of {len(genes)} genes are unknown: {', '.join(unknown[:5])}")
    return checkpoint.model.encode_gene_sets({"asked": inside})[0]


def picture(checkpoint: Checkpoint, index: Index, path: Path) -> np.ndarray:
    """Embedding (D,) of a patch in a file, of the colours of the mean slide of the index.

    It shows what a patch of the stores does; for a model of handcrafted features three patch
    widths, since these are made of a spot and what lies around it.

    Raises:
        ConfigError: no picture, or a model that reads what a patch alone does not say.
    """
    try:
        with Image.open(path) as opened_file:
            if opened_file.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a pixel; save it with 8")
            image = opened_file.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} is no picture that can be read ({error})") from error
    model, asked = checkpoint.model, checkpoint.image_input
    if asked is None or model.vision is None or asked.key not in (PATCHES, HANDCRAFTED):
        raise ConfigError(
            f"{checkpoint.path} does not read a patch alone; prepare its slide and ask with --like"
        )
    looks = {s: one for s in index.rows.slides if (one := _look(index, s)) is not None}
    if not looks:
        raise ConfigError("no slide of the index has an image that is there, to look alike")
    shape = (1, 6) if asked.key == PATCHES else (2, model.config.vision.feature_dim)
    if any(np.shape(one) != shape or not np.isfinite(one).all() for one in looks.values()):
        raise ConfigError(f"{index.folder}: not the looks of slides of this model; make it anew")
    look = np.mean([*looks.values()], axis=0)
    if asked.key == PATCHES:
        with SlideStore(Path(index.about[next(iter(looks))]["path"])) as store:
            side = int(store.attrs["patch_px"])
        pixels = np.asarray(image.resize((side, side), BILINEAR))[None]
        batch = image_batch(pixels, model.artifacts, pixels if asked.context else None, asked.stain)
        batch = replace(batch, stain_S6=torch.from_numpy(look.astype(np.float32)))
    else:
        size, across, down = (FEATURE_PX, FEATURE_PX), image.width / 3, image.height / 3
        boxes = ((across, down, 2 * across, 2 * down), None)
        shown = [np.asarray(image.resize(size, BILINEAR, box))[None] for box in boxes]
        scales = [handcrafted_batch(one) for one in shown]
        features = (np.hstack(scales) - look[0]) / np.maximum(look[1], 1e-8)
        batch = image_batch(features, model.artifacts)
        batch = replace(batch, features_SF=torch.from_numpy(features.astype(np.float32)))
    model.eval()
    with torch.inference_mode():
        return F.normalize(model.project_image(batch.to(model.device)), dim=1)[0].cpu().numpy()


def _look(index: Index, slide: str) -> np.ndarray | None:
    with index.rows.open(slide) as file:
        look: np.ndarray | None = file.attrs.get("look")
    return look


def write_found(
    found: pd.DataFrame, index: Index, out: Path, asked: np.ndarray | None = None
) -> list[Path]:
    """``nearest.csv`` and, where the stores have pictures, ``nearest.png``.

    Args:
        found: what `Index.nearest` gives.
        index: it is of.
        out: folder.
        asked: patch of the question, drawn first.
    """
    refuse_others({out / "nearest.csv": "distance,slide_id,name"}, [out / "nearest.png"])
    open_folder(out)
    shown = found.map(lambda cell: spreadsheet_text(cell) if isinstance(cell, str) else cell)
    shown = shown.rename(columns=spreadsheet_text)
    with atomic_path(out / "nearest.csv") as temporary:
        shown.to_csv(temporary, index=False)
    pictures: list[tuple[np.ndarray | None, str]] = []
    if asked is not None:
        pictures.append((asked, "asked"))
    for line in found[:SHOWN].to_dict("records"):
        labels = [str(line[c]) for c in sorted(index.rows.columns) if line.get(c)]
        text = [str(line["name"]), f"distance {line['distance']:.3f}", *labels[:1]]
        pictures.append((patch_of(index, line["slide_id"], line["spot"]), "\n".join(text)))
    known = [(patch, text) for patch, text in pictures if patch is not None]
    if not known:
        return [out / "nearest.csv"]
    page, axes = panel_grid(len(known), 5, (2.0, 2.4))
    for place, (shot, title) in zip(axes, known, strict=True):
        place.imshow(shot)
        place.set_title(title, fontsize=7)
        place.axis("off")
    with atomic_path(out / "nearest.png") as temporary:
        picture_of(page).save(temporary)
    return [out / "nearest.csv", out / "nearest.png"]


def patch_of(index: Index, slide: str, spot: int) -> np.ndarray | None:
    """The patch of a spot, or of the spot in the middle of a region; None without its store."""
    try:
        with SlideStore(Path(index.about[slide]["path"])) as store, index.rows.open(slide) as own:
            same = store.sha256 == own.attrs.get("store_sha256")
            return store.patches(np.array([spot]))[0] if store.has_image and same else None
    except (DataError, OSError):
        return None


def search(options: argparse.Namespace) -> list[Path]:
    """Run what the options of `hibio search` ask.

    Returns:
        The files written.

    Raises:
        ConfigError: an unknown row, key, level or gene, or the checkpoint of another index.
    """
    where: dict[str, list[str]] = {}
    for text in options.where:
        key, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"--where {text!r}: expected KEY=VALUE, such as tissue=breast")
        where.setdefault(key, []).append(value)
    if options.top < 1:
        raise ConfigError(f"--top is {options.top}; expected at least 1")
    index, find, patch = Index(options.index), options.find or "omics", None
    level = options.level
    if level not in index.rows.levels:
        known = ", ".join(index.rows.levels)
        raise ConfigError(f"no level {level!r} in the index; there are {known}")
    if options.like is not None:
        number, found = index.rows.named(level, options.like)
        by = options.by or "image"
        if by not in found:
            raise ConfigError(f"{options.like} has no {by}; ask --by {', '.join(found)}")
        question, line = found[by], index.rows.described(level, np.array([number])).iloc[0]
        patch = patch_of(index, line["slide_id"], line["spot"])
    else:
        if options.checkpoint is None:
            raise ConfigError("genes and patches are embedded by the model: give --checkpoint too")
        checkpoint = load_checkpoint(one_checkpoint(options.checkpoint))
        require_seal(options.index, checkpoint)
        if options.genes:
            question, find = gene_list(checkpoint, options.genes), options.find or "image"
        else:
            question = picture(checkpoint, index, options.patch)
            patch = np.asarray(Image.open(options.patch).convert("RGB"))
    mask = index.mask(level, where)
    return write_found(
        index.nearest(question, find, level, options.top, mask), index, options.out, patch
    )
