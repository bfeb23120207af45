"""`hibio index`: the embeddings of every slide, and an inverted file of each level and modality.

The inverted files are built part by part and lie on disk, as vectors of float16 (faiss; measured in
benchmarks/2026-11-30-search.md). Shapes: S rows of a slide, N of a level over all slides, Q
questions, D embedding.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import h5py
import numpy as np
import pandas as pd
from tqdm import tqdm

from eval.embed import (
    Checkpoint,
    checked,
    embed_slide,
    load_checkpoint,
    one_checkpoint,
    region_embedding,
    region_names,
)
from eval.indexed import (
    ABOUT,
    EXACT,
    MAKER,
    MODALITIES,
    SPOT,
    SUMMARY,
    Rows,
    Table,
    exact,
    faiss_module,
    open_rows,
    opened,
    parameters,
    require_seal,
)
from eval.tables import open_folder, require_finite
from hibio.config.files import ConfigError
from hibio.config.model import PATCHES, ImageInput
from hibio.data.slide import colour_statistics
from hibio.data.splits import SlideEntry, read_entries
from hibio.model import SlideEmbedding
from preprocessing.files import atomic_path, refusal, temporary_path
from preprocessing.hdf5 import hdf5_writer
from preprocessing.stain import sample_patches
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from preprocessing.workers import each

PART = 1_000_000  # rows in memory while an inverted file is built
LEAST_RECALL, ASKED = 0.99, 200  # R@10 against exact, on so many questions
TEXT = h5py.string_dtype()


def index_folder(
    checkpoint_path: Path,
    data: Path,
    out: Path,
    *,
    workers: int = 0,
    scheduler: str | None = None,
    only: str | None = None,
    part: int = PART,
) -> list[Table]:
    """Index every slide of ``data``; slides that are there are kept, what was removed is left out.

    ``workers`` and ``scheduler`` are as in `preprocessing.workers.each`, a slide a task, and
    ``only`` is the slide of a task. ``part``: rows in memory at once.

    Raises:
        ConfigError: an index of another checkpoint, or a folder of something else; no faiss.
        DataError: slides that failed in other processes.
    """
    faiss_module()
    checkpoint = load_checkpoint(one_checkpoint(checkpoint_path))
    entries = read_entries(stores_in(data))
    checked(checkpoint, entries)
    open_folder(out)
    open_folder(out / "slides")
    if not (out / SUMMARY).exists():
        _say(out, {"checkpoint_sha256": checkpoint.sha256, "slides": {}, "tables": []})
    require_seal(out, checkpoint)
    if workers or scheduler:
        call = functools.partial(index_folder, checkpoint_path, data, out)
        calls = {e.slide_id: functools.partial(call, only=e.slide_id) for e in entries}
        each(calls, workers, scheduler, "index")
    for entry in tqdm(entries, desc="index", unit="slide", disable=None):
        if only in (None, entry.slide_id):
            _write_slide(checkpoint, entry, out)
    if only is not None:
        return []
    about = {e.slide_id: {"path": str(e.path.absolute()), **_about(e)} for e in entries}
    head = {"checkpoint_sha256": checkpoint.sha256, "slides": about}
    _say(out, {**head, "tables": []})
    rows = Rows(out, tuple(about))
    tables = [
        _build(rows, level, modality, part)
        for level in rows.levels
        for modality in MODALITIES
        if rows.has(level, modality)
    ]
    _say(out, {**head, "tables": [vars(table) for table in tables]})
    return tables


def _about(entry: SlideEntry) -> dict[str, str]:
    return {name: str(getattr(entry, name)) for name in ABOUT}


def _say(out: Path, summary: Mapping[str, Any]) -> None:
    with atomic_path(out / SUMMARY) as temporary:
        temporary.write_text(json.dumps({"made_by": MAKER, **summary}, indent=1) + "\n")


def _write_slide(checkpoint: Checkpoint, entry: SlideEntry, out: Path) -> None:
    """``slides/<slide>.h5``: the rows of every level; kept where it is of the same inputs."""
    target = out / "slides" / f"{entry.slide_id}.h5"
    with SlideStore(entry.path) as store:
        seal = {"checkpoint_sha256": checkpoint.sha256, "store_sha256": store.sha256}
        barcodes = np.asarray(store.barcodes).astype(str)
        look = _look(store, checkpoint.image_input)
        labels = {n: c for n, c in store.label_columns().items() if c.dtype == object}
    if target.is_file():
        with open_rows(target) as file:
            if {name: file.attrs.get(name) for name in seal} == seal:
                return
    slide, embedding, regions = embed_slide(checkpoint, entry.path)
    given = {"image": embedding.image, "omics": embedding.omics}
    found = {name: rows for name, rows in given.items() if rows is not None}
    require_finite(entry.slide_id, found)
    levels = dict(zip(checkpoint.run.regions.levels, regions, strict=True))
    names = {SPOT: np.array([f"{entry.slide_id}:{one}" for one in barcodes])}
    with atomic_path(target) as temporary, hdf5_writer(temporary) as (file, _):
        file.attrs.update(seal)
        if look is not None:
            file.attrs["look"] = look
        for level in (SPOT, *levels):
            code = np.arange(slide.n_spots) if level == SPOT else levels[level]
            _, first, own = np.unique(code, return_index=True, return_inverse=True)
            group, middle = file.create_group(level), _middles(slide.xy_um, own)
            name = names.get(level, np.asarray(region_names(entry.slide_id, code)).astype(str))
            for modality, rows in found.items():
                if level != SPOT:
                    alone = SlideEmbedding(rows, None, None)
                    rows = region_embedding(checkpoint.model, alone, code)
                group[modality] = rows[first].astype(np.float16)
            group["name"], group["spot"] = name[first].astype(TEXT), middle
            group["xy_um"] = slide.xy_um[middle]
            for column, values in labels.items():
                if level == SPOT:
                    group[f"label/{quote(column, safe='')}"] = values.astype(str).astype(TEXT)
                    continue
                most = pd.Series(values.astype(str)).groupby(own).agg(lambda x: x.mode().iloc[0])
                group[f"label/{quote(column, safe='')}"] = most.to_numpy(dtype=object).astype(TEXT)


def _middles(xy: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The spot of each group that lies nearest to its centre."""
    table = pd.DataFrame(xy, columns=["x", "y"])
    far = ((table - table.groupby(own).transform("mean")) ** 2).sum(axis=1)
    return far.groupby(own).idxmin().to_numpy()


def _look(store: SlideStore, image: ImageInput | None) -> np.ndarray | None:
    """What the picture of a slide is standardised by: (2, F) mean and sd, or colours (1, 6)."""
    if image is None or not store.has_image:
        return None
    if image.key == PATCHES:
        return colour_statistics(sample_patches(store))[None]
    features = store.features(image.key)
    return np.stack([features.mean(axis=0), features.std(axis=0)])


def _build(rows: Rows, level: str, modality: str, part: int) -> Table:
    """Write ``<level>.<modality>.faiss``: the lists of all rows, and how many must be read."""
    faiss = faiss_module()
    name = f"{level}.{modality}"
    sizes = [len(numbers) for numbers, _ in rows.vectors(level, modality)]
    n = sum(sizes)
    lists = 1 if n <= EXACT else round(math.sqrt(n))
    step = max(1, n // (64 * lists))
    sample = np.concatenate([block[::step] for _, block in rows.vectors(level, modality)])
    width = sample.shape[1]
    fp16, inner = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    coarse = faiss.IndexFlatIP(width)
    empty = faiss.IndexIVFScalarQuantizer(coarse, width, lists, fp16, inner)
    empty.cp.min_points_per_centroid = 1  # few rows are no fault
    empty.train(sample)
    parts: list[Path] = []
    index = faiss.clone_index(empty)
    for numbers, block in rows.vectors(level, modality):
        if index.ntotal and index.ntotal + len(block) > part:
            parts.append(_put_down(index, temporary_path(rows.folder / f"{name}.faiss")))
            index = faiss.clone_index(empty)
        index.add_with_ids(block, numbers)
    target = rows.folder / f"{name}.faiss"
    target.with_suffix(".lists").unlink(missing_ok=True)
    if parts:
        from faiss.contrib.ondisk import merge_ondisk

        parts.append(_put_down(index, temporary_path(rows.folder / f"{name}.faiss")))
        index = faiss.clone_index(empty)
        if shutil.disk_usage(rows.folder).free < sum(path.stat().st_size for path in parts):
            raise _full(rows.folder)  # what is mapped into memory is not refused: it crashes
        merge_ondisk(index, [str(path) for path in parts], str(rows.folder / f"{name}.lists"))
    with atomic_path(target) as temporary:
        _put_down(index, temporary)
    for path in parts:
        path.unlink()
    del index
    return _tuned(rows, Table(name, n, lists, 1, {}))


def _full(folder: Path) -> BaseException:
    return refusal(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), folder)


def _put_down(index: Any, path: Path) -> Path:
    """Write an inverted file.

    Raises:
        OSError: the disk is full.
    """
    try:
        faiss_module().write_index(index, str(path))
    except RuntimeError as error:
        path.unlink(missing_ok=True)
        if "No space left" in str(error) or "File too large" in str(error):
            raise _full(path.parent) from error
        raise ConfigError(f"{path.parent}: the index cannot be written ({error})") from error
    return path


def _tuned(rows: Rows, table: Table) -> Table:
    """The fewest lists, doubled at a time, with which questions of every modality are answered."""
    level, modality = table.name.rsplit(".", 1)
    recall: dict[str, float] = {}
    probed = 1
    for asked in (m for m in MODALITIES if rows.has(level, m)):
        step = max(1, int(rows.starts(level)[-1]) // ASKED)
        question = np.concatenate([b[::step] for _, b in rows.vectors(level, asked)])[:ASKED]
        best = exact(rows, level, modality, question, 10)[0]
        index = opened(rows, table)
        while True:
            found = index.search(question, 10, params=parameters(probed))[1]
            shared = [len(set(a[a >= 0]) & set(b)) for a, b in zip(best, found, strict=True)]
            recall[asked] = sum(shared) / max(1, int((best >= 0).sum()))
            if recall[asked] >= LEAST_RECALL or probed >= table.lists:
                break
            probed = min(2 * probed, table.lists)
    return replace(table, probed=probed, recall=recall)
