"""One slide as the page asks about it: heatmaps, spots, regions, areas.

What is large is computed when it is first asked for, and kept with the slide. Shapes: S spots, G
genes of the vocabulary, M gene sets, D embedding, F inputs of the read-out, L region levels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from eval.query import FEWEST, GeneSets, image_scores, nearest_in_bank
from eval.tables import open_table, region_outlines, spot_diameter
from eval.view.model import Embedded, Model, UnknownName, made_of, once, plain
from eval.view.tiles import DeepZoom
from hibio.config.files import ConfigError
from hibio.data.counts import PanelMap, StoreCounts
from hibio.data.slide import SlideExpression
from hibio.data.splits import SlideEntry
from hibio.readout import GENE, GENE_SET, MIN_RELIABILITY, verdict
from pathways import PathwayDatabase
from pathways.anchors import empty_rows
from preprocessing.selection import normalised
from preprocessing.store import SlideStore

Kind = Literal["measured", "predicted"]
BLOCK = 8192  # spots whose counts are read at once
LOOKED_AT = 10_000  # spots that say whether a slide is foreign
KEYWORDS = 12  # genes that are shown of a spot
EXPRESSION = "log expression, on the scale of the training spots"
SCORE = "match score: standard deviations above the mean of the training spots"
RELATIVE = "predicted match: standard deviations above the mean of this slide"


@dataclass(frozen=True)
class Heat:
    """One value a spot.

    Attributes:
        values: (S,) float32.
        about: title, unit, kind and what is known of it, as plain values.
    """

    values: np.ndarray
    about: dict[str, Any]


class ViewedSlide:
    """One slide; what is large is computed when it is first asked for."""

    def __init__(
        self,
        model: Model,
        entry: SlideEntry,
        embedded: Embedded,
        folder: Path | None = None,
        predictions: Path | None = None,
    ) -> None:
        """Read the places of the spots.

        Args:
            model: what is asked.
            entry: the slide.
            embedded: its embeddings.
            folder: of the slide images, or None.
            predictions: folder of files of `hibio predict`, or None.
        """
        self.model, self.entry, self.folder = model, entry, folder
        self.predictions, self._embedded = predictions, embedded
        self._outlined: dict[str, bytes] = {}
        self._outlining = threading.Lock()
        with SlideStore(entry.path) as store:
            self.xy_px0, self.mpp, self.xy_um = store.xy_px0, store.mpp, store.xy_um
            self.barcodes = [str(one) for one in store.barcodes]
            self.diameter = spot_diameter(store)
            self.labels = store.label_columns()
            self.panel = set(store.gene_names.tolist())

    @once
    def zoom(self) -> DeepZoom:
        """Tiles of its picture."""
        with SlideStore(self.entry.path) as store:
            return DeepZoom(store, self.folder)

    def facts(self) -> dict[str, Any]:
        """What the page must know to draw it."""
        return {
            "id": self.entry.slide_id,
            "mpp": self.mpp,
            "spots": len(self.xy_px0),
            "diameter": self.diameter,
            "tiles": self.zoom.facts,
            "verdict": self._verdict,
        }

    @once
    def _verdict(self) -> str:
        readout = self.model.readout
        if (
            not self.entry.has_image
            or readout is None
            or readout.look is None
            or not readout.features
        ):
            return ""
        step = -(-len(self.xy_px0) // LOOKED_AT)
        return verdict(readout.look.familiarity(self._features(slice(None, None, step))))

    def heat(self, asked: str, kind: Kind) -> Heat:
        """Values of a gene, a set or a list over the slide.

        Raises:
            UnknownName: the model does not know it.
            ConfigError: it was not measured, or cannot be predicted.
        """
        if kind == "predicted" and asked.strip() in self._filed.index:
            return self._from_file(asked.strip())
        question = self.model.question(asked)
        if isinstance(question, str) and question in self.model.genes:
            return self._gene(question, kind)
        return self._set(question, kind)

    def _gene(self, name: str, kind: Kind) -> Heat:
        about = {"title": name, "kind": kind, "unit": EXPRESSION, "of": GENE}
        if kind == "measured":
            if self.entry.has_counts and name not in self.panel:
                raise ConfigError(
                    f"slide {self.entry.slide_id!r} does not measure {name}; look at what is "
                    "predicted"
                )
            gene = [self.model.genes[name]]
            parts = [block[:, gene].toarray().ravel() for block in self.expression]
            return Heat(np.concatenate(parts).astype(np.float32), about)
        readout = self.model.readout
        if readout is None:
            raise ConfigError(self.model.missing["genes"])
        one = readout.of([name])
        about |= _known(one.var(MIN_RELIABILITY).iloc[0])
        return Heat(one.values(self.inputs).ravel(), about)

    def files(self) -> list[Path]:
        """What `hibio predict` and `hibio embed` wrote of the slide, as far as it was given.

        Raises:
            ConfigError: it is of another checkpoint or store, or of neither command.
        """
        return [path for path in (self._file, self._embedded.table) if path is not None]

    @once
    def _filed(self) -> pd.DataFrame:
        """Names of the file of `hibio predict`, with what is known of each; none without a file.

        Raises:
            ConfigError: it is of another checkpoint or store, or was not made by `predict`.
        """
        path = self._file
        if path is None:
            return pd.DataFrame()
        with open_table(path) as table:
            return pd.DataFrame(anndata.io.read_elem(table["var"]))

    @once
    def _file(self) -> Path | None:
        """What `hibio predict` wrote of the slide."""
        return made_of(self.model, self.entry, self.predictions, ".predict", "--predictions")

    def _from_file(self, name: str) -> Heat:
        assert self._file is not None
        column = list(self._filed.index).index(name)
        row = self._filed.iloc[column]
        with open_table(self._file) as table:
            values = table["X"][:, column]
        of = str(row["feature_type"])
        about = {"title": name, "kind": "predicted", "of": of, "from": self._file.name}
        unit = EXPRESSION if of == GENE else SCORE
        return Heat(np.asarray(values, dtype=np.float32), about | {"unit": unit} | _known(row))

    def _set(self, question: str | PathwayDatabase, kind: Kind) -> Heat:
        if isinstance(question, PathwayDatabase):
            sets, column = self.model.scored(question), 0
        elif kind == "measured":
            sets, column = self.model.sets.only(question), 0
        else:
            sets = self.model.sets
            column = sets.names.index(question)
        if kind == "measured":
            self._require_measured(sets)
            values = self._measured(sets)
        elif sets is self.model.sets:
            values = self.predicted_sets
        else:
            values = self._predicted(sets)
        about = {
            "title": sets.names[column],
            "kind": kind,
            "of": GENE_SET,
            "unit": SCORE if kind == "measured" else RELATIVE,
            "genes": list(sets.genes[column]),
        }
        return Heat(values[:, column].astype(np.float32), about)

    def _require_measured(self, sets: GeneSets) -> None:
        known = len(self.panel.intersection(sets.genes[0]))
        if self._counted and known < FEWEST:
            raise ConfigError(
                f"slide {self.entry.slide_id!r} measures {known} of the {len(sets.genes[0])} genes "
                f"of {sets.names[0]}, at least {FEWEST} are needed; look at what is predicted"
            )

    def _measured(self, sets: GeneSets) -> np.ndarray:
        return np.concatenate([sets.measure_columns(*block) for block in self.tfidf])

    def _predicted(self, sets: GeneSets) -> np.ndarray:
        bank = self.model.bank
        assert bank is not None
        image = self._image
        return image_scores(self.model.checkpoint, sets, bank, image, "default", self._nearest)

    @once
    def measured_sets(self) -> np.ndarray:
        """Scores (S, M) of the database on the counts."""
        return self._measured(self.model.sets)

    @once
    def predicted_sets(self) -> np.ndarray:
        """Scores (S, M) of the database from the image, as `hibio query` gives them."""
        return self._predicted(self.model.sets)

    @once
    def _nearest(self) -> sparse.csr_matrix:
        assert self.model.bank is not None
        image = self._image
        with self._telling("looking for the nearest training spots"):
            return nearest_in_bank(self.model.bank, image)

    @property
    def _counted(self) -> bool:
        """Whether it has counts of what the model was trained on."""
        return self.entry.has_counts and self.entry.modality == self.model.artifacts.modality

    @once
    def _counts(self) -> SlideExpression:
        """Counts on the vocabulary, of the spots that are asked for."""
        if not self.entry.has_counts:
            raise ConfigError(
                f"slide {self.entry.slide_id!r} has no counts: nothing was measured on it; look at "
                "what is predicted"
            )
        artifacts, nothing = self.model.artifacts, np.zeros(0)
        if self.entry.modality != artifacts.modality:
            raise ConfigError(
                f"slide {self.entry.slide_id!r} measures {self.entry.modality}, the model was "
                f"trained on {artifacts.modality}; look at what is predicted"
            )
        with SlideStore(self.entry.path) as store:
            panel = PanelMap.between(
                store.gene_names, artifacts.genes, n_folded_in=artifacts.n_folded_in
            )
        source = StoreCounts(self.entry.path, panel, self.entry.n_spots)
        return SlideExpression(source, artifacts, artifacts.niche(self.xy_um), nothing, nothing)

    def _blocks(self, words: str) -> Iterator[np.ndarray]:
        """The spots, some at a time; who waits is told how far that is."""
        n = self.entry.n_spots
        with self._telling(words) as told:
            for start in range(0, n, BLOCK):
                told(start / n)
                yield np.arange(start, min(start + BLOCK, n))

    @once
    def expression(self) -> list[sparse.csc_matrix]:
        """Measured log expression (n, G), block by block of spots."""
        modality, source = self.model.artifacts.modality, self._counts.source
        blocks = self._blocks("reading the counts")
        return [normalised(source.rows(spots), modality).tocsc() for spots in blocks]

    @once
    def tfidf(self) -> list[tuple[sparse.csc_matrix, np.ndarray, np.ndarray]]:
        """TF-IDF rows (n, G), their background (n,) and which are empty (n,), block by block."""
        counts, anchors, found = self._counts, self.model.artifacts.anchors, []
        for spots in self._blocks("weighing the counts"):
            rows = self._weighed(counts, spots)
            found.append((rows.tocsc(), anchors.background(rows), empty_rows(rows)))
        return found

    def _weighed(self, counts: SlideExpression, spots: np.ndarray) -> sparse.csr_matrix:
        rows, near = counts.read(spots)
        return self.model.artifacts.tfidf.transform(rows, near)

    def _telling(self, words: str) -> AbstractContextManager[Callable[[float], None]]:
        return self.model.telling(f"{self.entry.slide_id}: {words}")

    def _features(self, rows: slice) -> np.ndarray:
        assert self.model.readout is not None
        with SlideStore(self.entry.path) as store:
            return store.features(self.model.readout.features, rows)

    @property
    def _image(self) -> np.ndarray:
        image = self._embedded.image
        if image is None:
            raise ConfigError(
                f"slide {self.entry.slide_id!r} has no image, or the model reads none: nothing is "
                "predicted; look at what was measured"
            )
        return image

    @once
    def inputs(self) -> np.ndarray:
        """What the read-out of the genes reads (S, F)."""
        readout = self.model.readout
        assert readout is not None
        features = self._features(slice(None)) if readout.features else None
        return readout.inputs(features, self._image)

    def regions(self, level: str) -> bytes:
        """The regions of one level.

        Returns:
            Region of every spot as uint32; then of every piece of an outline x and y, from and to,
            in level-0 pixels, as float32; little-endian.

        Raises:
            UnknownName: no such level.
        """
        if level not in self.model.levels:
            raise UnknownName(f"no level {level[:40]!r}; there are {', '.join(self.model.levels)}")
        with self._outlining:
            if level not in self._outlined:
                self._outlined[level] = self._outline(level)
        return self._outlined[level]

    def _outline(self, level: str) -> bytes:
        code = self._codes[self.model.levels.index(level)]
        with self._telling(f"outlining the regions of {level}"):
            outlines = region_outlines(self.xy_px0, code)
        rings = [ring for pieces in outlines.values() for piece in pieces for ring in piece]
        drawn = [np.hstack([ring[:-1], ring[1:]]) for ring in rings]
        return code.astype("<u4").tobytes() + np.concatenate(drawn).astype("<f4").tobytes()

    @once
    def _codes(self) -> np.ndarray:
        regions = self._embedded.regions
        return np.stack([np.unique(one, return_inverse=True)[1] for one in regions])

    def within(self, numbers: Sequence[int]) -> list[dict[str, int]]:
        """Level -> region of some spots.

        Raises:
            UnknownName: a spot that is not there.
        """
        require_spots(self.entry, numbers)
        codes = self._codes[:, list(numbers)]
        return [dict(zip(self.model.levels, code.tolist(), strict=True)) for code in codes.T]

    def spots(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """What is known of some spots without an embedding: keyword genes and labels.

        Raises:
            UnknownName: a spot that is not there.
        """
        require_spots(self.entry, numbers)
        keywords: list[list[Any]] = [[] for _ in numbers]
        if self._counted:
            keywords = self._keywords(self._weighed(self._counts, np.array(numbers)))
        return [
            {
                "spot": i,
                "barcode": self.barcodes[i],
                "um": self.xy_um[i].round(1).tolist(),
                "labels": {name: plain(column[i]) for name, column in self.labels.items()},
                "keywords": words,
            }
            for i, words in zip(numbers, keywords, strict=True)
        ]

    def _keywords(self, tfidf: sparse.csr_matrix) -> list[list[Any]]:
        artifacts = self.model.artifacts
        gene, value = artifacts.keywords(tfidf, KEYWORDS)
        return [
            [[str(artifacts.genes[g]), round(float(v), 3)] for g, v in zip(*row, strict=True) if v]
            for row in zip(gene, value, strict=True)
        ]

    def area(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Mean profile of an area beside that of the rest: measured, or predicted without counts.

        Args:
            numbers: its spots.

        Returns:
            "kind", "spots", and for "genes" and "sets" the columns name, inside, outside and sd
            (over all spots of the slide), of what the slide measures.

        Raises:
            UnknownName: no spot, or one that is not there.
        """
        require_spots(self.entry, numbers)
        inside = np.zeros(len(self.xy_px0), dtype=bool)
        inside[list(numbers)] = True
        if not inside.any():
            raise UnknownName("the area holds no spot; draw it around spots")
        kind: Kind = "measured" if self._counted else "predicted"
        answer: dict[str, Any] = {"kind": kind, "spots": int(inside.sum())}
        names, values = self._profile(kind)
        answer["genes"] = _only(
            compared(names, values, inside), names if kind == "predicted" else self.panel
        )
        if self.model.bank is not None:
            scores = self.measured_sets if kind == "measured" else self.predicted_sets
            blocks = (scores[start : start + BLOCK] for start in range(0, len(scores), BLOCK))
            sets = self.model.sets
            seen = sets.measurable(self.panel) | (kind == "predicted")
            there = [name for name, one in zip(sets.names, seen, strict=True) if one]
            answer["sets"] = _only(compared(sets.names, blocks, inside), there)
        return answer

    def _profile(self, kind: Kind) -> tuple[Sequence[str], Iterable[Any]]:
        if kind == "measured":
            return list(self.model.genes), self.expression
        readout = self.model.readout
        if readout is None:
            raise ConfigError(self.model.missing["genes"])
        blocks = self._blocks("predicting all genes")
        return readout.names.tolist(), (readout.values(self.inputs[spots]) for spots in blocks)


def _only(columns: dict[str, list[Any]], names: Collection[str]) -> dict[str, list[Any]]:
    """The rows of columns whose name is among some."""
    keep, known = set(names), columns["name"]
    return {
        column: [value for name, value in zip(known, values, strict=True) if name in keep]
        for column, values in columns.items()
    }


def _known(row: pd.Series) -> dict[str, Any]:
    """What is known of a prediction."""
    reliability = {str(n): plain(row[n]) for n in row.index if str(n).startswith("reliability")}
    return reliability | {"note": str(row["note"])}


def compared(
    names: Sequence[str],
    blocks: Iterable[np.ndarray | sparse.csc_matrix],
    inside: np.ndarray,
) -> dict[str, list[Any]]:
    """Columns of values (S, T), in blocks of rows: mean inside (S,), outside, and sd over all."""
    n, n_in, start = len(inside), int(inside.sum()), 0
    total, within, square = (np.zeros(len(names)) for _ in range(3))
    for values in blocks:
        here = inside[start : start + values.shape[0]].astype(np.float64)
        start += len(here)
        power: Any = values.power(2) if isinstance(values, sparse.csc_matrix) else np.square(values)
        total += np.asarray(values.sum(axis=0), dtype=np.float64).ravel()
        within += np.asarray(here @ values).ravel()
        square += np.asarray(power.sum(axis=0), dtype=np.float64).ravel()
    sd = np.sqrt(np.maximum(square / n - (total / n) ** 2, 0.0))
    outside = (total - within) / (n - n_in) if n > n_in else np.full(len(total), np.nan)
    columns = {"inside": within / n_in, "outside": outside, "sd": sd}
    return {"name": list(names), **{name: plain(column) for name, column in columns.items()}}


def require_spots(entry: SlideEntry, numbers: Sequence[int]) -> None:
    """Raise UnknownName where a slide has no such spot."""
    wrong = [n for n in numbers if not 0 <= n < entry.n_spots]
    if wrong:
        raise UnknownName(
            f"no spot {str(wrong[0])[:40]}: slide {entry.slide_id!r} has the spots 0 to "
            f"{entry.n_spots - 1}"
        )
