"""`hibio search`: the spots and regions of a cohort that are nearest to a spot, genes or a patch.

Shapes: S rows (spots or regions) of a slide, N of a level over all slides, D embedding, Q
questions.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from eval.embed import Checkpoint, load_checkpoint, not_ours, one_checkpoint
from eval.measures.metrics import unit_rows
from hibio.config.files import ConfigError
from hibio.config.model import PATCHES
from hibio.data.dataset import image_batch
from preprocessing.canvas import panel_grid, picture_of
from preprocessing.errors import DataError, did_you_mean
from preprocessing.files import atomic_path, spreadsheet_text
from preprocessing.handcrafted import handcrafted_batch
from preprocessing.hdf5 import open_guarded
from preprocessing.run.preparation import HANDCRAFTED
from preprocessing.store import SlideStore

MAKER = "hibio index"
SUMMARY = "index.json"
SPOT = "spot"
MODALITIES = ("image", "omics")
EXACT = 20_000  # rows that are compared one by one
ABOUT = ("patient_id", "tissue", "organism", "technology")  # of a slide, to choose by
FEATURE_PX = 64  # of the picture that the handcrafted features are made of


@dataclass(frozen=True)
class Table:
    """The inverted file of one level and modality.

    Attributes:
        name: ``<level>.<modality>``.
        n: rows in it.
        lists: it has.
        probed: lists that a question reads.
        recall: R@10 against exact, by the modality of the question.
    """

    name: str
    n: int
    lists: int
    probed: int
    recall: Mapping[str, float]

    def __str__(self) -> str:
        """One line of the report."""
        told = ", ".join(f"asked by {name} {value:.3f}" for name, value in self.recall.items())
        return (
            f"{self.name}: {self.n:,} rows, {self.probed} of {self.lists} lists read; "
            f"R@10 against exact {told}"
        )


def faiss_module() -> Any:
    """The library that keeps the inverted files.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError('an index needs faiss: pip install "hibio[search]"') from error
    return faiss


def read_summary(folder: Path) -> dict[str, Any]:
    """What ``index.json`` says.

    Raises:
        ConfigError: there is none, or it is of something else.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise ConfigError(f"{folder} is no index; `hibio index` makes one")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["made_by"] == MAKER and {"checkpoint_sha256", "slides"} <= set(found):
            return found
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    raise not_ours(path)


def require_seal(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse an index of another checkpoint.

    Raises:
        ConfigError: as said.
    """
    seal = read_summary(folder)["checkpoint_sha256"]
    if seal != checkpoint.sha256:
        raise ConfigError(
            f"{folder} is the index of another checkpoint (seal {seal[:12]}) than {checkpoint.path}"
            f" (seal {checkpoint.sha256[:12]}): their embeddings cannot be compared; give that "
            "checkpoint, or make an index of this one in another folder"
        )


class Rows:
    """The rows of an index, slide by slide; a row's number counts them all.

    Args:
        folder: the index.
        slides: in the order of the rows.
    """

    def __init__(self, folder: Path, slides: Sequence[str]) -> None:
        self.folder, self.slides = folder, tuple(slides)
        self.sizes: dict[str, np.ndarray] = {}
        self.levels: tuple[str, ...] = ()
        self.columns: set[str] = set()
        self._modalities: set[tuple[str, str]] = set()
        for number, slide in enumerate(self.slides):
            with self.open(slide) as file:
                self.levels = self.levels or tuple(sorted(file, key=lambda name: name != SPOT))
                for level in self.levels:
                    sizes = self.sizes.setdefault(level, np.zeros(len(self.slides), np.int64))
                    sizes[number] = len(file[level]["name"])
                    self._modalities |= {(level, m) for m in MODALITIES if m in file[level]}
                    self.columns |= set(file[level].get("label", ()))

    def open(self, slide: str) -> Any:
        """The file of a slide."""
        return open_guarded(self.folder / "slides" / f"{slide}.h5")

    def has(self, level: str, modality: str) -> bool:
        """Whether any slide has such rows."""
        return (level, modality) in self._modalities

    def starts(self, level: str) -> np.ndarray:
        """Number of the first row of each slide, and N."""
        return np.concatenate([[0], np.cumsum(self.sizes[level])])

    def vectors(
        self, level: str, modality: str, wanted: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers and embeddings (S, D), slide by slide; of all, or of a mask (N,)."""
        starts = self.starts(level)
        for slide, low, high in zip(self.slides, starts, starts[1:], strict=False):
            keep = np.arange(high - low) if wanted is None else np.flatnonzero(wanted[low:high])
            if not len(keep):
                continue
            with self.open(slide) as file:
                if modality in file[level]:
                    rows = file[level][modality][:][keep]
                    yield low + keep, rows.astype(np.float32)

    def named(self, level: str, name: str) -> tuple[int, dict[str, np.ndarray]]:
        """Number and embeddings of the row of a name.

        Raises:
            ConfigError: there is none.
        """
        slide = name.partition(":")[0]
        if slide not in self.slides:
            raise ConfigError(f"no slide {slide!r} in the index{did_you_mean(slide, self.slides)}")
        with self.open(slide) as file:
            names = file[level]["name"].asstr()[:].astype(str)
            place = np.flatnonzero(names == name)
            if not len(place):
                raise ConfigError(
                    f"no {level} {name!r} in the index, whose names are such as {str(names[0])!r}"
                    f"{did_you_mean(name, names.tolist())}"
                )
            own = int(place[0])
            found = {m: file[level][m][own] for m in MODALITIES if m in file[level]}
        first = self.starts(level)[self.slides.index(slide)]
        return int(first) + own, {m: row.astype(np.float32) for m, row in found.items()}

    def described(self, level: str, numbers: np.ndarray) -> pd.DataFrame:
        """What is known of rows: slide, name, spot, place and labels."""
        starts, lines = self.starts(level), []
        for number in numbers.tolist():
            slide = int(np.searchsorted(starts, number, side="right")) - 1
            own = number - int(starts[slide])
            with self.open(self.slides[slide]) as file:
                group = file[level]
                line = {"slide_id": self.slides[slide], "name": group["name"].asstr()[own]}
                line["spot"], (line["x_um"], line["y_um"]) = group["spot"][own], group["xy_um"][own]
                line |= {c: group["label"][c].asstr()[own] for c in group.get("label", ())}
            lines.append(line)
        return pd.DataFrame(lines)


def parameters(probed: int, mask: np.ndarray | None = None) -> Any:
    """How a question is answered: from so many lists, from the rows of a mask (N,)."""
    faiss = faiss_module()
    if mask is None:
        return faiss.SearchParametersIVF(nprobe=probed)
    chosen = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
    return faiss.SearchParametersIVF(nprobe=probed, sel=chosen)


def opened(folder: Path, name: str) -> Any:
    """An inverted file, mapped into memory, not read."""
    path = folder / f"{name}.faiss"
    if not path.is_file():
        raise ConfigError(f"{folder} has no {name}; run `hibio index` to its end")
    return _mapped(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _mapped(path: Path, written_ns: int) -> Any:
    faiss = faiss_module()
    merged = path.with_suffix(".lists").is_file()  # then the lists are mapped as they are
    flag = faiss.IO_FLAG_ONDISK_SAME_DIR if merged else faiss.IO_FLAG_MMAP
    return faiss.read_index(str(path), flag | faiss.IO_FLAG_READ_ONLY)


def exact(
    rows: Rows, level: str, modality: str, question: np.ndarray, k: int, mask: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of questions (Q, D), all compared: numbers (-1 pads) and cosines."""
    best = np.full((len(question), k), -np.inf, dtype=np.float32)
    number = np.full((len(question), k), -1)
    for numbers, block in rows.vectors(level, modality, mask):
        score = np.hstack([best, question @ block.T])
        known = np.hstack([number, np.broadcast_to(numbers, (len(question), len(numbers)))])
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        best, number = np.take_along_axis(score, order, 1), np.take_along_axis(known, order, 1)
    return number, best


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
        self.tables = {one["name"]: Table(**one) for one in summary["tables"]}
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
                raise ConfigError(f"no {key!r} to choose by{did_you_mean(key, known)}")
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
                    elif key in file[level].get("label", ()):
                        keep &= np.isin(file[level]["label"][key].asstr()[:].astype(str), wanted)
                    else:
                        keep[:] = False
            parts.append(keep)
        found = np.concatenate(parts)
        if not found.any():
            raise ConfigError(
                f"no {level} has {' and '.join(f'{k}={v}' for k, v in where.items())}"
            )
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
        table, asked = self.tables[name], unit_rows(question[None].astype(np.float32))
        if mask is not None and mask.sum() <= EXACT:
            number, cosine = exact(self.rows, level, modality, asked, k, mask)
        else:
            share = 1.0 if mask is None else float(mask.mean())
            probed = min(table.lists, math.ceil(table.probed / share))
            index = opened(self.folder, name)
            cosine, number = index.search(asked, k, params=parameters(probed, mask))
        there = number[0] >= 0
        found = self.rows.described(level, number[0][there])
        found.insert(0, "distance", 1.0 - cosine[0][there].astype(np.float64))
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
        raise ConfigError(f"the model knows none of the genes {', '.join(unknown[:5])}")
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
            image = opened_file.convert("RGB")
    except OSError as error:
        raise ConfigError(f"{path} is no picture that can be read ({error})") from error
    model, asked = checkpoint.model, checkpoint.image_input
    if asked is None or model.vision is None or asked.key not in (PATCHES, HANDCRAFTED):
        raise ConfigError(
            f"{checkpoint.path} does not read a patch alone; prepare its slide and ask with --like"
        )
    looks = {s: one for s in index.rows.slides if (one := _look(index, s)) is not None}
    if not looks:
        raise ConfigError("no slide of the index has an image that is there, to look alike")
    look = np.mean([*looks.values()], axis=0)
    if asked.key == PATCHES:
        with SlideStore(Path(index.about[next(iter(looks))]["path"])) as store:
            side = int(store.attrs["patch_px"])
        pixels = np.asarray(image.resize((side, side)))[None]
        batch = image_batch(pixels, model.artifacts, pixels if asked.context else None, asked.stain)
        batch = replace(batch, stain_S6=torch.from_numpy(look.astype(np.float32)))
    else:
        size, across, down = (FEATURE_PX, FEATURE_PX), image.width / 3, image.height / 3
        middle = image.resize(size, box=(across, down, 2 * across, 2 * down))
        scales = [handcrafted_batch(np.asarray(p)[None]) for p in (middle, image.resize(size))]
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
    out.mkdir(parents=True, exist_ok=True)
    shown = found.map(lambda cell: spreadsheet_text(cell) if isinstance(cell, str) else cell)
    with atomic_path(out / "nearest.csv") as temporary:
        shown.to_csv(temporary, index=False)
    pictures: list[tuple[np.ndarray | None, str]] = []
    if asked is not None:
        pictures.append((asked, "asked"))
    for line in found.to_dict("records"):
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
        with SlideStore(Path(index.about[slide]["path"])) as store:
            return store.patches(np.array([spot]))[0] if store.has_image else None
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
        key, _, value = text.partition("=")
        where.setdefault(key, []).append(value)
    if options.top < 1:
        raise ConfigError(f"--top is {options.top}; expected at least 1")
    index, find, patch = Index(options.index), options.find or "omics", None
    level = options.level
    if level not in index.rows.levels:
        hint = did_you_mean(level, index.rows.levels)
        raise ConfigError(f"no level {level!r} in the index{hint}")
    if options.like is not None:
        number, found = index.rows.named(level, options.like)
        if options.by not in found:
            raise ConfigError(f"{options.like} has no {options.by}; ask --by {', '.join(found)}")
        question, line = found[options.by], index.rows.described(level, np.array([number])).iloc[0]
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
