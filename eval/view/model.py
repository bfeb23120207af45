"""A checkpoint as the page asks it: what it can answer, what a question means, its embeddings.

Shapes: S spots, G genes of the vocabulary, M gene sets, n spots of the bank, D embedding, L region
levels.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, overload

import anndata
import numpy as np
import pandas as pd

from eval.embed import embed_slide, image_embedding, load_checkpoint, one_checkpoint
from eval.predict.fit import readout_of
from eval.query import FEWEST, GeneSets, scored_on_bank
from eval.tables import hashes_of, open_table, table_path
from hibio import keys
from hibio.bank import Bank, read_bank
from hibio.checkpoint import BANK
from hibio.config.files import ConfigError
from hibio.data.splits import SlideEntry
from hibio.readout import MIN_RELIABILITY, Readout
from pathways import PathwayDatabase, load_pathways
from pathways.files import GeneSet
from preprocessing.errors import DataError, did_you_mean
from preprocessing.store import SlideStore

MOST = 500  # known genes of a set
LONGEST = 20_000  # characters of a question
_SEPARATORS = re.compile(r"[\s,;|]+")


T = TypeVar("T")


class once(Generic[T]):
    """A property that the first thread to ask for it computes; others that ask wait for it."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...
    def __get__(self, instance: object, owner: type | None = None) -> Self | T:
        if instance is None:
            return self
        kept: dict[str, Any] = vars(instance)
        with kept.setdefault("_locks", {}).setdefault(self.name, threading.RLock()):
            if self.name not in kept:
                kept[self.name] = self.compute(instance)
            found: T = kept[self.name]  # where Python looks first from now on
            return found


class UnknownName(ConfigError):
    """A slide, spot, gene, set or level that is not there."""


class Model:
    """One checkpoint: its genes, sets and read-outs.

    Attributes:
        checkpoint: loaded.
        artifacts: of it.
        genes: name -> column of the vocabulary.
        levels: names of the region levels.
        readout: expression from an image; None where there is none.
        bank: that gene sets are read out with; None where there is none.
        database: the sets to choose from, their genes known.
        missing: what cannot be answered, and why.
        embedding: taken by whoever runs a tower, for one slide at a time; the image tower, which is
            fast, does not wait for the other.
    """

    def __init__(self, checkpoint: Path, sets: str | None = None) -> None:
        """Load a checkpoint; the arguments are those of `Cohort`."""
        self.embedding = {"image": threading.Lock(), "omics": threading.Lock()}
        self._doing: dict[str, tuple[float, str]] = {}
        self.checkpoint = load_checkpoint(one_checkpoint(checkpoint))
        self.artifacts = self.checkpoint.model.artifacts
        self.genes = {str(name): column for column, name in enumerate(self.artifacts.genes)}
        self.levels = list(self.checkpoint.run.regions.levels)
        self.missing: dict[str, str] = {}
        self.readout: Readout | None = self._try("genes", lambda: readout_of(self.checkpoint))
        self.bank: Bank | None = self._try("gene sets", self._read_bank)
        self.database = self._database(sets)

    def _try(self, what: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ConfigError as error:
            self.missing[what] = str(error)
            return None

    def _read_bank(self) -> Bank:
        return read_bank(self.checkpoint.path / BANK, self.checkpoint.model)

    def _database(self, source: str | None) -> PathwayDatabase:
        own = self.artifacts.database
        database = own if source is None and own is not None else load_pathways(source or "default")
        genes = self.artifacts.genes.tolist()
        return database.restrict(genes, min_genes=FEWEST, max_genes=MOST)[0]

    @contextmanager
    def telling(self, words: str) -> Iterator[Callable[[float], None]]:
        """Tell whoever waits, by `doing`, that this is done now, and by what is given how far."""
        since = time.monotonic()
        self._doing[words] = since, ""
        try:
            yield lambda share: self._doing.update({words: (since, f", {share:.0%}")})
        finally:
            self._doing.pop(words, None)

    def doing(self) -> list[str]:
        """What takes its time now, for how long, and how far it is where that is known."""
        now = time.monotonic()
        told = list(self._doing.items())
        return [f"{words}{share} ({now - since:.0f} s)" for words, (since, share) in told]

    @once
    def seal(self) -> str:
        """Hash of the weights and the artifacts."""
        return self.checkpoint.sha256

    @once
    def _background(self) -> np.ndarray:
        assert self.bank is not None
        return self.artifacts.anchors.background(self.bank.tfidf)

    @once
    def sets(self) -> GeneSets:
        """The sets of the database, scored on the bank.

        Raises:
            ConfigError: there is no bank.
        """
        return self.scored(self.database)

    def scored(self, database: PathwayDatabase) -> GeneSets:
        """Any sets of known genes, scored on the bank."""
        if self.bank is None:
            raise ConfigError(self.missing["gene sets"])
        return scored_on_bank(self.artifacts, database, self.bank, self._background)

    def question(self, text: str) -> str | PathwayDatabase:
        """What was typed: the name of a gene, of a set, or a list of genes as a set.

        Raises:
            UnknownName: genes that the model does not know, or too few for a set.
        """
        text = text.strip()[:LONGEST]
        if text in self.genes or text in self.database.names:
            return text
        asked = [name for name in dict.fromkeys(_SEPARATORS.split(text)) if name]
        known = [name for name in asked if name in self.genes]
        if len(asked) == 1 or not known:
            choices = [*self.genes, *self.database.names]
            near = did_you_mean(text[:80], choices, "; the nearest:", n=3).replace("?", "")
            raise UnknownName(f"the model knows no gene or gene set {text[:80]!r}{near}")
        if not FEWEST <= len(known) <= MOST:
            left = ", ".join(name[:20] for name in asked if name not in self.genes) or "none"
            raise UnknownName(
                f"{len(known)} of {len(asked)} genes of the list are known (unknown: "
                f"{left[:200]}); a set needs {FEWEST} to {MOST}"
            )
        name = f"list of {len(known)} of {len(asked)} genes"
        return PathwayDatabase.from_sets([GeneSet(name, "", tuple(known))], name)

    def facts(self) -> dict[str, Any]:
        """What the page must know of it."""
        var = None if self.readout is None else self.readout.var(MIN_RELIABILITY)
        shown = ("reliability", "reliability_low", "reliability_high", "reliability_n", "note")
        return {
            "genes": list(self.genes) if var is None else var.index.tolist(),
            "known": {} if var is None else {n: plain(var[n].to_numpy()) for n in shown},
            "reliability_words": "" if self.readout is None else self.readout.words,
            "sets": {name: list(self.database.genes_of(name)) for name in self.database.names},
            "levels": self.levels,
            "missing": self.missing,
        }


class Embedded:
    """What is kept of every slide: embeddings (S, D) as far as there are any, regions (L, S).

    The image embedding is made in a second where the other takes half a minute, so it waits for
    nothing else. Neither is made where `hibio embed` wrote them.
    """

    def __init__(self, model: Model, entry: SlideEntry, folder: Path | None = None) -> None:
        """Compute nothing yet; ``folder`` is of files of `hibio embed`, or None."""
        self._model, self._entry, self._folder = model, entry, folder

    @once
    def table(self) -> Path | None:
        """What `hibio embed` wrote of the slide."""
        return made_of(self._model, self._entry, self._folder, "", "--embeddings")

    @once
    def image(self) -> np.ndarray | None:
        """Image embeddings; the counts are not read for them."""
        checkpoint, entry = self._model.checkpoint, self._entry
        if not entry.has_image or checkpoint.model.vision is None:
            return None
        if self.table is not None:
            return self._read(lambda table: np.asarray(table["obsm"][keys.OBSM_IMAGE]))
        told = f"embedding the image of {entry.slide_id}"
        with self._model.embedding["image"], self._model.telling(told):
            return image_embedding(checkpoint, entry.path)

    @once
    def _rest(self) -> tuple[np.ndarray | None, np.ndarray]:
        image, entry = self.image, self._entry
        if self.table is not None:
            return self._read(self._filed)
        told = f"embedding the counts of {entry.slide_id}, {entry.n_spots} spots, and its regions"
        with self._model.embedding["omics"], self._model.telling(told):
            _, found, regions = embed_slide(self._model.checkpoint, entry.path, image)
        return found.omics, regions

    def _filed(self, table: Any) -> tuple[np.ndarray | None, np.ndarray]:
        obs = anndata.io.read_elem(table["obs"])
        named = [obs[keys.OBS_REGION + level] for level in self._model.levels]
        codes = np.stack([pd.Categorical(one).codes for one in named])
        return np.asarray(table["obsm"][keys.OBSM_OMICS]) if self._entry.has_counts else None, codes

    def _read(self, part: Callable[[Any], T]) -> T:
        assert self.table is not None
        try:
            with open_table(self.table) as table:
                return part(table)
        except KeyError as error:
            raise ConfigError(
                f"{self.table} lacks what `hibio embed` wrote ({error}); make it again, or leave "
                "--embeddings out: the page does it by itself"
            ) from error

    @property
    def omics(self) -> np.ndarray | None:
        """Omics embeddings."""
        return self._rest[0] if self._entry.has_counts else None

    @property
    def regions(self) -> np.ndarray:
        """Region of each spot, level by level."""
        return self._rest[1]


def table_in(folder: Path, name: str) -> Path | None:
    """The table of a name in a folder, in any format; None without one."""
    paths = (table_path(folder, name, form) for form in keys.TABLES)
    return next((path for path in paths if path.exists()), None)


def made_of(
    model: Model, entry: SlideEntry, folder: Path | None, ending: str, option: str
) -> Path | None:
    """The table of a slide that another command wrote, in any format; None without one.

    Raises:
        ConfigError: it is of another checkpoint or store, or of other spots; names the option that
            gave the folder.
        DataError: HiBio did not make it, or it is damaged.
    """
    path = None if folder is None else table_in(folder, entry.slide_id + ending)
    try:
        found = None if path is None else hashes_of(path)
    except DataError as error:
        raise DataError(
            f"{path} is no whole file of HiBio; make it again, or leave {option} out: the page "
            "does it by itself"
        ) from error
    if path is None or found is None:
        return None
    told = f"comparing {path.name} with its store"
    with model.telling(told), SlideStore(entry.path) as store, open_table(path) as table:
        wanted = {"checkpoint_sha256": model.seal, "store_sha256": store.sha256}
        whole = np.array_equal(anndata.io.read_elem(table["obs"]).index, store.barcodes)
    if found != wanted:
        other = " and ".join(n.partition("_")[0] for n in wanted if found[n] != wanted[n])
        raise ConfigError(
            f"{path} was made from another {other} than is shown; make it again, or leave {option} "
            "out: the page does it by itself"
        )
    if not whole:
        raise ConfigError(
            f"{path} does not hold the spots of {entry.path} in their order; make it again, or "
            f"leave {option} out: the page does it by itself"
        )
    return path


def plain(value: Any) -> Any:
    """Numbers as JSON has them, to four digits; None for what is not finite."""
    if isinstance(value, np.ndarray):
        return [plain(one) for one in value.tolist()]
    if isinstance(value, float | np.floating):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
