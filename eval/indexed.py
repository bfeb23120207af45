"""What the folder of an index holds: its summary, the rows of every slide, the inverted files.

Whoever made it, all is looked at as it is opened. Shapes: S rows (spots or regions) of a slide, N
of a level over all slides, D embedding, Q questions.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
import pandas as pd

from eval.embed import Checkpoint
from hibio.config.files import ConfigError
from preprocessing.errors import DataError, did_you_mean
from preprocessing.files import require_plain_name
from preprocessing.hdf5 import open_guarded, require_arrays

MAKER = "hibio index"
SUMMARY = "index.json"
SPOT = "spot"
MODALITIES = ("image", "omics")
EXACT = 20_000  # rows that are compared one by one
COLUMNS = ("distance", "slide_id", "name", "spot", "x_um", "y_um")  # of an answer
ABOUT = ("patient_id", "tissue", "organism", "technology")  # of a slide, to choose by


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

    Returns:
        ``checkpoint_sha256``, ``slides``: id -> path and `ABOUT`, and ``tables``: `Table` by name.

    Raises:
        ConfigError: there is none, or it is damaged or of something else.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise ConfigError(f"{folder} is no index; `hibio index` makes one")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["made_by"] != MAKER or not isinstance(found["checkpoint_sha256"], str):
            raise ValueError("made by something else")
        for slide, about in found["slides"].items():
            require_plain_name("slide", slide)
            if not all(isinstance(about[name], str) for name in ("path", *ABOUT)):
                raise ValueError(f"slide {slide} is described by something that is no text")
        tables = [Table(**one) for one in found["tables"]]
        if any(type(n) is not int for one in tables for n in (one.n, one.lists, one.probed)):
            raise ValueError("a size is no number")
        return {**found, "tables": {one.name: one for one in tables}}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not what `hibio index` wrote ({error}); move it and run that again"
        ) from error


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


def open_rows(path: Path) -> h5py.File:
    """The file of a slide.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return open_guarded(path)
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); remove it and run `hibio index` again"
        ) from error


def labels_of(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """Labels of a level by name; one that means something else in the answer gets "_" behind it."""
    named = {unquote(name): data for name, data in group.get("label", {}).items()}
    found = {name: data for name, data in named.items() if name not in COLUMNS}
    for name in named.keys() - found.keys():
        free = f"{name}_"
        while free in found:
            free += "_"
        found[free] = named[name]
    return found


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
        self.width: int | None = None
        for number, slide in enumerate(self.slides):
            with self.open(slide) as file:
                self._check(slide, file)
                self.levels = self.levels or tuple(sorted(file, key=lambda name: name != SPOT))
                for level in self.levels:
                    sizes = self.sizes.setdefault(level, np.zeros(len(self.slides), np.int64))
                    sizes[number] = len(file[level]["name"])
                    self._modalities |= {(level, m) for m in MODALITIES if m in file[level]}
                    self.columns |= labels_of(file[level]).keys()

    def _check(self, slide: str, file: h5py.File) -> None:
        """Compare the file of a slide with what `hibio index` writes.

        Raises:
            DataError: something is missing, of another shape or type, or points outside.
        """
        try:
            n_spots = file[SPOT]["name"].shape[0]
            for level in {*file, *self.levels}:
                group = file[level]
                n = group["name"].shape[0]
                vectors = [name for name in MODALITIES if name in group]
                require_arrays(
                    group,
                    {
                        "name": ("text", (n,)),
                        "spot": ("whole number", (n,)),
                        "xy_um": ("number", (n, 2)),
                        **{f"label/{one}": ("text", (n,)) for one in group.get("label", ())},
                        **dict.fromkeys(vectors, ("number", (n, self.width))),
                    },
                )
                spots, places = group["spot"][:], group["xy_um"][:]
                if not np.isin(spots, np.arange(n_spots)).all() or not np.isfinite(places).all():
                    raise DataError(f"{level} has a spot or a place that there is not")
                self.width = group[vectors[0]].shape[1] if vectors else self.width
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.folder / 'slides' / slide}.h5: damaged ({error}); remove it and run "
                "`hibio index` again"
            ) from error

    def open(self, slide: str) -> Any:
        """The file of a slide."""
        return open_rows(self.folder / "slides" / f"{slide}.h5")

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
                line |= {c: one.asstr()[own] for c, one in labels_of(group).items()}
            lines.append(line)
        return pd.DataFrame(lines)


def parameters(probed: int, mask: np.ndarray | None = None) -> Any:
    """How a question is answered: from so many lists, from the rows of a mask (N,)."""
    faiss = faiss_module()
    if mask is None:
        return faiss.SearchParametersIVF(nprobe=probed)
    chosen = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
    return faiss.SearchParametersIVF(nprobe=probed, sel=chosen)


def opened(rows: Rows, table: Table) -> Any:
    """An inverted file, mapped into memory, not read.

    Raises:
        ConfigError: it is missing, damaged, or not of these rows.
    """
    path = rows.folder / f"{table.name}.faiss"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; run `hibio index` to its end")
    try:
        index = _mapped(path, path.stat().st_mtime_ns)
    except RuntimeError as error:
        raise ConfigError(f"{path}: damaged; run `hibio index` again") from error
    if (index.ntotal, index.d) != (table.n, rows.width):
        raise ConfigError(f"{path} is not of the slides of the index; run `hibio index` again")
    return index


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
