"""A cohort behind one checkpoint: its slides, and the likes of a spot among them.

Answers are computed from the stores when they are asked for; what was computed is kept for the
slides that were looked at last. Shapes: S spots, D embedding, n and K spots.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.embed import checked
from eval.view.model import Embedded, Model, UnknownName, once, table_in
from eval.view.slide import ViewedSlide, require_spots
from hibio.config.files import ConfigError
from hibio.data.splits import SlideEntry, read_entries
from preprocessing.errors import did_you_mean
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in

MODALITIES = ("image", "omics")
NEIGHBOURS = 6  # that are shown of a spot
UNSEEN = "unseen"  # the slides that were never trained on
KEPT = 3  # slides whose counts and scores stay in memory,
KEPT_SPOTS = 100_000  # as long as the others have no more spots than this
AHEAD_SPOTS = 100_000  # embedded before anybody asks
LAST_S = 10.0  # for the slide that is being embedded when the page is closed
MOST = 1 << 24  # cosines at once


class _Looked:
    """A slide that is looked at: its store is opened once, and holds up no other slide."""

    def __init__(self, cohort: Cohort, entry: SlideEntry, embedded: Embedded) -> None:
        self._given = (cohort.model, entry, embedded, cohort.folder, cohort.predictions)

    @once
    def slide(self) -> ViewedSlide:
        return ViewedSlide(*self._given)


class Cohort:
    """Slides behind one checkpoint.

    Threads may ask at once. One slide is embedded at a time by each tower; who asks for
    no embedding waits for none.
    """

    def __init__(
        self,
        checkpoint: Path,
        data: Path,
        *,
        slides: Path | None = None,
        predictions: Path | None = None,
        embeddings: Path | None = None,
        sets: str | None = None,
        only: Sequence[str] = (),
    ) -> None:
        """Load a checkpoint and list the stores.

        Args:
            checkpoint: a checkpoint, or a run that holds one.
            data: folder of stores.
            slides: folder of the slide images; None: thumbnails of the stores are shown.
            predictions: folder of what `hibio predict` wrote of this data by this checkpoint, which
                is shown then; None: the page predicts.
            embeddings: folder of what `hibio embed` wrote of it, likewise.
            sets: what `pathways.load_pathways` takes; None: those of the checkpoint.
            only: slides to show, in this order, or `UNSEEN`; all when empty.

        Raises:
            ConfigError: no checkpoint, several, a store that was replaced since training, or no
                folder where one is named.
            DataError: no stores, or two of one name.
            PathwayError: an unknown database, or one that shares no genes with the model.
        """
        self.model = Model(checkpoint, sets)
        self.entries = {entry.slide_id: entry for entry in read_entries(stores_in(data))}
        checked(self.model.checkpoint, tuple(self.entries.values()))
        trained = set(self.model.artifacts.train_slides)
        unseen = [slide_id for slide_id in self.entries if slide_id not in trained]
        if only:
            chosen = unseen if list(only) == [UNSEEN] else only
            self.entries = {slide_id: self.entry(slide_id) for slide_id in chosen}
        if not self.entries:
            raise ConfigError(f"{data}: every slide there was trained on; name some with --only")
        given = {"slides": slides, "predictions": predictions, "embeddings": embeddings}
        for option, folder in given.items():
            if folder is not None and not folder.is_dir():
                raise ConfigError(f"--{option} {folder} is no folder")
        for option, ending in (("predictions", ".predict"), ("embeddings", "")):
            folder = given[option]
            if folder and not any(table_in(folder, name + ending) for name in self.entries):
                raise ConfigError(
                    f"--{option} {folder} holds no file of the slides shown, such as "
                    f"{next(iter(self.entries))}{ending}.h5ad"
                )
        self.folder, self.predictions = slides, predictions
        self._lock, self._opened, self._closed = threading.Lock(), threading.Event(), False
        self._stacking = {by: threading.Lock() for by in MODALITIES}
        self._embedded = {
            name: Embedded(self.model, one, embeddings) for name, one in self.entries.items()
        }
        self._seen: dict[str, _Looked] = {}
        self._stacks: dict[str, tuple[list[str], np.ndarray, np.ndarray]] = {}

    def entry(self, slide_id: str, spots: Sequence[int] = ()) -> SlideEntry:
        """A slide of the cohort that has these spots.

        Raises:
            UnknownName: there is none of this name, or it has no such spot.
        """
        if slide_id not in self.entries:
            near = did_you_mean(slide_id[:80], self.entries)
            raise UnknownName(f"no slide {slide_id[:80]!r}{near}")
        entry = self.entries[slide_id]
        require_spots(entry, spots)
        return entry

    def slide(self, slide_id: str) -> ViewedSlide:
        """A slide of the cohort, with what was computed of it.

        Raises:
            UnknownName: there is none of this name.
        """
        entry = self.entry(slide_id)
        with self._lock:
            found = self._seen.pop(slide_id, None) or _Looked(self, entry, self._embedded[slide_id])
            self._seen[slide_id] = found  # the last one looked at is the last one to go
            while len(self._seen) > 1 and self._too_much():
                del self._seen[next(iter(self._seen))]
        self._opened.set()
        return found.slide

    @contextlib.contextmanager
    def embedding_ahead(self) -> Iterator[None]:
        """Embed slides in the block, once one is looked at: first those that are, then the others.

        No slide of more than `AHEAD_SPOTS` spots, and of those not looked at no more together.
        """
        thread = threading.Thread(target=self._embed_ahead, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closed = True
            self._opened.set()
            thread.join(LAST_S)  # what reads a store should not be cut off

    def _embed_ahead(self) -> None:
        left, room = {name: entry.n_spots for name, entry in self.entries.items()}, AHEAD_SPOTS
        while self._opened.wait() and not self._closed:
            with self._lock:
                self._opened.clear()
                looked_at = [name for name in reversed(self._seen) if name in left]
            others = [name for name, spots in left.items() if spots <= room]
            for name in (looked_at or others)[:1]:
                spots = left.pop(name)
                room -= 0 if looked_at else spots
                self._opened.set()  # to look again
                if spots <= AHEAD_SPOTS:
                    with contextlib.suppress(Exception):  # which is told to whoever asks for it
                        _ = self._embedded[name].regions

    def _too_much(self) -> bool:
        before = [self.entries[slide_id].n_spots for slide_id in self._seen][:-1]
        return len(before) >= KEPT or sum(before) > KEPT_SPOTS

    def facts(self) -> dict[str, Any]:
        """What the page starts from."""
        trained = set(self.model.artifacts.train_slides)
        slides = [
            {
                "id": entry.slide_id,
                "patient": entry.patient_id,
                "spots": entry.n_spots,
                "trained": entry.slide_id in trained,
                "counts": entry.has_counts,
                "image": "image" in self.embedded_by(entry.slide_id),
                "patches": entry.has_image,
            }
            for entry in self.entries.values()
        ]
        return {"slides": slides, "maps": _colour_maps(), **self.model.facts()}

    def embedded_by(self, slide_id: str) -> list[str]:
        """Which of `MODALITIES` a slide is embedded by."""
        entry, vision = self.entries[slide_id], self.model.checkpoint.model.vision
        there = (entry.has_image and vision is not None, entry.has_counts)
        return [by for by, has in zip(MODALITIES, there, strict=True) if has]

    def patches(self, slide_id: str, spots: Sequence[int]) -> np.ndarray:
        """Patches (n, px, px, 3) uint8 of some spots.

        Raises:
            UnknownName: a slide or spot that is not there, or a slide without image.
        """
        entry = self.entry(slide_id, spots)
        if not entry.has_image:
            raise UnknownName(f"slide {slide_id!r} has no patches")
        with SlideStore(entry.path) as store:
            return store.patches(list(spots))

    def near(self, slide_id: str, spots: Sequence[int], by: str) -> list[list[dict[str, Any]]]:
        """The nearest spots by image or by omics.

        Args:
            slide_id: whose spots are asked about.
            spots: (n,) their numbers.
            by: one of `MODALITIES`.

        Returns:
            Of each spot: slide, spot and cosine of the nearest ones, in other slides, or in the own
            one where it is the only one.

        Raises:
            UnknownName: a slide or spot that is not there, or a slide without such an embedding.
        """
        self.entry(slide_id, spots)
        if by not in self.embedded_by(slide_id):
            raise UnknownName(f"slide {slide_id!r} has no embedding by {by[:20]!r}")
        step = max(1, MOST // sum(entry.n_spots for entry in self.entries.values()))
        parts = [spots[start : start + step] for start in range(0, len(spots), step)]
        return [found for part in parts for found in self._near(slide_id, part, by)]

    def _near(self, slide_id: str, spots: Sequence[int], by: str) -> list[list[dict[str, Any]]]:
        mine = getattr(self._embedded[slide_id], by)
        names, start, rows = self._stack(by)
        similarity = mine[list(spots)] @ rows.T
        own = names.index(slide_id)
        if len(names) > 1:
            similarity[:, start[own] : start[own + 1]] = -np.inf
        else:
            similarity[np.arange(len(spots)), list(spots)] = -np.inf
        k = min(NEIGHBOURS, similarity.shape[1] - 1)
        if k < 1:
            return [[] for _ in spots]
        some = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        found = []
        for row, columns in zip(similarity, some, strict=True):
            best = columns[np.argsort(-row[columns], kind="stable")]
            best = best[np.isfinite(row[best])]
            of = np.searchsorted(start, best, side="right") - 1
            found.append(
                [
                    {
                        "slide": names[s],
                        "spot": int(b - start[s]),
                        "cosine": round(float(row[b]), 3),
                    }
                    for s, b in zip(of, best, strict=True)
                ]
            )
        return found

    def _stack(self, by: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Slides that have an embedding, the first row of each, and the rows of all."""
        with self._stacking[by]:
            if by not in self._stacks:
                names, parts = [], []
                for number, slide_id in enumerate(self.entries, start=1):
                    told = f"{by} embeddings of slide {number} of {len(self.entries)}"
                    with self.model.telling(told):
                        rows = getattr(self._embedded[slide_id], by)
                    if rows is not None:
                        names.append(slide_id)
                        parts.append(rows)
                start = np.cumsum([0, *map(len, parts)])
                self._stacks[by] = (names, start, np.concatenate(parts))
            return self._stacks[by]


def _colour_maps() -> Mapping[str, list[int]]:
    """256 colours each of the maps that any reader can tell apart, as one row of R, G, B."""
    import matplotlib as mpl

    maps = ("viridis", "cividis", "magma")
    steps = np.arange(256)
    return {name: mpl.colormaps[name](steps, bytes=True)[:, :3].ravel().tolist() for name in maps}
