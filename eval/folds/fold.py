"""What an evaluation task sees: slides, embeddings of them, and which slides are the training ones.

Every task runs the same code on the model and on its baselines, because a baseline is a
`Representation` like any other. Nothing here fits anything on test slides; where a number is
standardised per slide, no label is used (docs/method.md 6).
Shapes: S spots of one slide, G genes, D embedding dimensions, M pathways, H genes to predict,
k neighbours.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy import sparse

from eval.errors import FoldError
from eval.results import Role, Row, Seen
from hibio.regions import RegionTree
from preprocessing.errors import did_you_mean
from preprocessing.selection import normalised

MODALITIES = ("omics", "image")
ACTIVITY_PREFIX = "activity:"
NOT_A_LABEL = ("", "undetermined", "unknown", "nan", "na")


@dataclass(frozen=True)
class SlideData:
    """The measured side of one slide, aligned to the gene vocabulary of the fold.

    Args:
        slide_id: name of the slide, unique in the fold.
        patient_id: splits are made by this name.
        counts: (S, G) raw counts.
        tfidf: (S, G) rows of the training TF-IDF (docs/method.md 1).
        profile: (S, G) rows that the gene factors turn into spot vectors; None: those of ``tfidf``.
        xy_um: (S, 2) spot centres in micrometres.
        neighbours: (S, k) indices of spatial neighbours, nearest first, padded with -1.
        labels: S rows; string columns are categories, float columns are measurements, of which
            ``activity:<NAME>`` is the planted activity of the gene set NAME.
        has_image: whether image embeddings exist for this slide.
        modality: ``rna`` (counts) or ``protein`` (intensities).
        outcome: of the patient, free text; "" is unknown.
    """

    slide_id: str
    patient_id: str
    counts: sparse.csr_matrix
    tfidf: sparse.csr_matrix
    xy_um: np.ndarray
    neighbours: np.ndarray
    labels: pd.DataFrame
    has_image: bool = True
    modality: str = "rna"
    outcome: str = ""
    profile: sparse.csr_matrix | None = None

    @property
    def profiles(self) -> sparse.csr_matrix:
        """(S, G) rows that the gene factors turn into spot vectors."""
        return self.tfidf if self.profile is None else self.profile

    def __post_init__(self) -> None:
        n_spots = self.counts.shape[0]
        sizes = {
            "tfidf": self.tfidf.shape[0],
            "xy_um": len(self.xy_um),
            "neighbours": len(self.neighbours),
            "labels": len(self.labels),
        }
        wrong = {name: size for name, size in sizes.items() if size != n_spots}
        if wrong:
            raise FoldError(
                f"slide {self.slide_id}: counts have {n_spots} rows but {wrong}; "
                "all tables of a slide must list the same spots in the same order"
            )
        if self.neighbours.size and int(self.neighbours.max()) >= n_spots:
            raise FoldError(
                f"slide {self.slide_id}: neighbour index {int(self.neighbours.max())} but only "
                f"{n_spots} spots; pad missing neighbours with -1"
            )

    @property
    def n_spots(self) -> int:
        """Number of spots S."""
        return int(self.counts.shape[0])

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Names of the category columns."""
        return tuple(str(c) for c in self.labels if not _is_number(self.labels[c]))

    @property
    def measurement_columns(self) -> tuple[str, ...]:
        """Names of the float columns."""
        return tuple(str(c) for c in self.labels if _is_number(self.labels[c]))

    def categories(self, column: str) -> np.ndarray:
        """Labels (S,) of a column; missing and undetermined ones are the empty string."""
        if column not in self.labels:
            return np.full(self.n_spots, "", dtype=object)
        values = self.labels[column].fillna("").astype(str).str.strip()
        return np.where(values.str.lower().isin(NOT_A_LABEL), "", values).astype(object)


def _is_number(column: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column))


@dataclass(frozen=True)
class Cost:
    """What a fitted model took, printed beside its results.

    Args:
        source: what it is, or the paper that it follows.
        n_parameters: numbers that were fitted.
        seconds: wall time of the fit, or None where it was not measured.
        steps: of the optimiser; None where there is none, or none is known.
    """

    source: str
    n_parameters: int
    seconds: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Prediction:
    """Expression that a model predicts itself from the image, without a read-out fitted here.

    Args:
        genes: (H,) indices in the gene vocabulary of the fold.
        values: slide_id -> (S, H).
    """

    genes: np.ndarray
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Representation:
    """One model's embedding of every slide; a baseline is one too.

    Args:
        name: row name in the results; ``hibio`` is the checkpoint itself.
        image: slide_id -> (S, D) from the image alone, or None.
        omics: slide_id -> (S, D) from the counts, or None.
        notes: printed with the results.
        role: what it is in a comparison; see `eval.results.Row`.
        words: what it does, where the notes do not say it.
        aligned: whether image and omics live in one space, so that their cosine means something.
            Retrieval bridges the two by ridge where they do not.
        anchor: (M, D) embeddings of the fold's pathways in the image space, or None.
        trees: slide_id -> the model's own region tree, or None.
        prediction: expression that the model predicts itself from the image alone, or None.
        cost: parameters and wall time, or None where nothing was fitted.
    """

    name: str
    image: Mapping[str, np.ndarray] | None = None
    omics: Mapping[str, np.ndarray] | None = None
    notes: tuple[str, ...] = ()
    role: Role = "baseline"
    words: str = ""
    aligned: bool = True
    anchor: np.ndarray | None = None
    trees: Mapping[str, RegionTree] | None = None
    prediction: Prediction | None = None
    cost: Cost | None = None

    @property
    def row(self) -> Row:
        """Its role and what it does."""
        return Row(self.role, self.words or "; ".join(self.notes))

    def covers(self, modality: str, slide: SlideData) -> bool:
        """Whether the slide has an embedding of the modality (``omics`` or ``image``)."""
        there = getattr(self, modality) is not None
        return there and (modality == "omics" or slide.has_image)

    def rows(self, modality: str, slides: Iterable[SlideData]) -> list[np.ndarray]:
        """Embeddings (``image`` or ``omics``) of the slides in order, each (S, D) float64, checked.

        Raises:
            FoldError: the modality or a slide is missing, sizes differ, or a value is not finite.
        """
        table = getattr(self, modality)
        if table is None:
            raise FoldError(f"{self.name} has no {modality} embedding; ask for the other one")
        return [self._checked(f"{modality} embedding", table, slide) for slide in slides]

    def predicted(self, slides: Iterable[SlideData], genes: np.ndarray) -> list[np.ndarray]:
        """The model's own prediction of some genes, slide by slide, each (S, T) float64.

        Args:
            slides: the slides asked for.
            genes: (T,) indices in the vocabulary.

        Raises:
            FoldError: it predicts nothing, or not these genes or slides; or a value is not finite.
        """
        if self.prediction is None:
            raise FoldError(f"{self.name} predicts no expression; use a read-out of its embedding")
        column = {int(gene): at for at, gene in enumerate(self.prediction.genes)}
        missing = [int(gene) for gene in genes if int(gene) not in column]
        if missing:
            raise FoldError(
                f"{self.name} predicts {len(column)} genes, but not {len(missing)} of the "
                f"{len(genes)} targets (first missing: vocabulary index {missing[0]}); fit it on "
                "as many variable genes as the expression task has"
            )
        order = [column[int(gene)] for gene in genes]
        table = self.prediction.values
        return [self._checked("prediction", table, slide)[:, order] for slide in slides]

    def _checked(self, what: str, table: Mapping[str, np.ndarray], slide: SlideData) -> np.ndarray:
        where = f"{self.name}, {what} of slide {slide.slide_id}"
        if slide.slide_id not in table:
            raise FoldError(f"{where} is missing; found {sorted(table)[:5]}; embed it first")
        rows = np.asarray(table[slide.slide_id], dtype=np.float64)
        if rows.ndim != 2 or len(rows) != slide.n_spots:
            raise FoldError(f"{where} has shape {rows.shape}, expected ({slide.n_spots}, D)")
        if not np.isfinite(rows).all():
            bad = int((~np.isfinite(rows)).any(axis=1).sum())
            raise FoldError(f"{where} has {bad} rows that are not finite; check the training log")
        return rows


@dataclass(frozen=True)
class HiddenGenes:
    """One draw of hidden genes in one fold.

    Args:
        names: the H genes.
        train: slides that read-outs are fitted on, without the counts of the genes.
        test: test slides, without them.
        truth: slide_id -> (S, H) expression of the genes, normalised with all genes.
        models: representations computed without the genes.
        decoded: row name -> slide_id -> (S, H): predictions that need no read-out.
        notes: printed with the results.
    """

    names: tuple[str, ...]
    train: tuple[SlideData, ...]
    test: tuple[SlideData, ...]
    truth: Mapping[str, np.ndarray]
    models: tuple[Representation, ...] = ()
    decoded: Mapping[str, Mapping[str, np.ndarray]] | None = None
    notes: tuple[str, ...] = ()


class GeneSetScores(Protocol):
    """Gene sets that can be scored on TF-IDF rows; `pathways.anchors.PathwayAnchors` is one."""

    @property
    def names(self) -> Sequence[str]:
        """The M set names, in column order."""

    def match(self, tfidf: sparse.csr_matrix) -> np.ndarray:
        """Score (S, M), standardised per set over training spots, centred per spot."""


@dataclass(frozen=True)
class Fold:
    """One split by patient under one seed, with every model's embedding of its slides.

    Args:
        name: name of the split, for example the held-out patient.
        seed: seed of the trained models; also the seed of what a task draws at random.
        genes: (G,) names of the gene vocabulary.
        train: slides that models and read-outs may be fitted on.
        test: slides of other patients.
        models: the checkpoint's and the baselines' embeddings.
        anchors: pathways scored on TF-IDF rows, standardised on the training spots, or None.
        random_sets: random sets matched to ``anchors`` in size and mean expression, or None.
        factors: gene factors with ``components`` (G, r) and ``spread`` (r,), or None.
        hidden: genes to impute, and every representation without them, or None.
        per_slide: models fitted anew on every slide, each in a space of its own; only tasks that
            stay within a slide can score them.
        raw_features: stored image features and, as their omics side, the spot vector, which
            read-outs of expression and retrieval put beside an embedding; scored only where
            ``models`` has them too. None: those in ``models``, if any.
        seen: test slide -> what of it the models saw in training; slides that are not named: none.
    """

    name: str
    seed: int
    genes: np.ndarray
    train: tuple[SlideData, ...]
    test: tuple[SlideData, ...]
    models: tuple[Representation, ...] = ()
    anchors: GeneSetScores | None = None
    random_sets: GeneSetScores | None = None
    factors: Any = field(default=None, repr=False)
    hidden: HiddenGenes | None = field(default=None, repr=False)
    per_slide: tuple[Representation, ...] = ()
    raw_features: Representation | None = field(default=None, repr=False)
    seen: Mapping[str, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for slide in (*self.train, *self.test):
            if slide.counts.shape[1] != len(self.genes):
                raise FoldError(
                    f"slide {slide.slide_id} has {slide.counts.shape[1]} genes, fold {self.name} "
                    f"has {len(self.genes)}; align the columns to the fold's vocabulary"
                )
        _reject_repeats("slide", [s.slide_id for s in (*self.train, *self.test)], self.name)
        _reject_repeats("model", [m.name for m in (*self.models, *self.per_slide)], self.name)

    @property
    def paired_train(self) -> tuple[SlideData, ...]:
        """Training slides with an image."""
        return tuple(slide for slide in self.train if slide.has_image)

    @property
    def paired_test(self) -> tuple[SlideData, ...]:
        """Test slides with an image."""
        return tuple(slide for slide in self.test if slide.has_image)

    @property
    def mark(self) -> Seen:
        """What was seen of its test slides, where it is the same for all (see `by_seen`)."""
        return self.seen.get(self.test[0].slide_id, "") if self.test else ""

    def by_seen(self) -> list["Fold"]:
        """The fold for each kind of test slides apart: unseen ones, seen patients, trained on."""
        kinds = [self.seen.get(slide.slide_id, "") for slide in self.test]
        return [self._only(kind, kinds) for kind in dict.fromkeys(sorted(kinds))] or [self]

    def _only(self, kind: Seen, kinds: Sequence[Seen]) -> "Fold":
        if len(set(kinds)) == 1:
            return self
        test = tuple(s for s, own in zip(self.test, kinds, strict=True) if own == kind)
        hidden = self.hidden
        if hidden is not None:
            names = {slide.slide_id for slide in test}
            kept = tuple(slide for slide in hidden.test if slide.slide_id in names)
            hidden = replace(hidden, test=kept)
        return replace(self, test=test, hidden=hidden)

    def model(self, name: str) -> Representation:
        """The representation of this name.

        Raises:
            FoldError: unknown name; the nearest one is suggested.
        """
        names = [model.name for model in self.models]
        if name in names:
            return self.models[names.index(name)]
        hint = did_you_mean(name, names)
        raise FoldError(f"fold {self.name} has no model {name!r}; it has {names}{hint}")

    def has_model(self, name: str) -> bool:
        """Whether a representation of this name is there."""
        return any(model.name == name for model in self.models)

    def key(self, unit: str) -> str:
        """Key of one value: ``fold/seed/unit``, unit being a slide, a patient or ``pooled``."""
        return f"{self.name}/{self.seed}/{unit}"


def _reject_repeats(kind: str, names: list[str], fold: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise FoldError(f"fold {fold} names the {kind} {repeated[0]!r} twice; names must differ")


def stack(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several slides below each other."""
    return np.concatenate(list(parts), axis=0)


def split_rows(rows: np.ndarray, slides: Sequence[SlideData]) -> list[np.ndarray]:
    """Stacked rows cut back into slides."""
    return np.split(rows, np.cumsum([slide.n_spots for slide in slides])[:-1])


def spot_names(slides: Iterable[SlideData], kind: str) -> np.ndarray:
    """The ``slide`` or ``patient`` (S,) of every spot of slides that are stacked in this order."""
    return np.concatenate([np.full(s.n_spots, getattr(s, f"{kind}_id"), object) for s in slides])


def expression(slide: SlideData) -> sparse.csr_matrix:
    """What expression means on this slide, sparse (S, G) float64; an empty spot stays 0.

    ln(1 + 10,000 x / depth) of counts, arcsinh of intensities (no depth scaling).
    """
    return normalised(slide.counts, slide.modality).astype(np.float64)


def dense_expression(slide: SlideData, genes: np.ndarray) -> np.ndarray:
    """`expression` of some genes (H,), dense (S, H)."""
    return np.asarray(expression(slide)[:, genes].toarray())


def variable_genes(slides: Iterable[SlideData], k: int, min_detected: float = 0.1) -> np.ndarray:
    """The k genes whose expression varies most within slides.

    The variance is taken within each slide and pooled, so that depth differences of patients do
    not choose the genes. Genes detected in too few spots come after all others (HEST-Bench keeps
    genes detected in 10 % of the spots).

    Args:
        slides: training slides, never test slides.
        k: number of genes; all genes when there are fewer.
        min_detected: share of spots in which a gene must be detected.

    Returns:
        (k,) gene indices by falling variance; ties in gene order.

    Raises:
        FoldError: no slide.
    """
    squares: np.ndarray | float = 0.0
    detected: np.ndarray | float = 0.0
    n_spots = 0
    for slide in slides:
        values = expression(slide)
        total = np.asarray(values.sum(axis=0)).ravel()
        power = np.asarray(values.multiply(values).sum(axis=0)).ravel()
        squares = squares + np.maximum(power - total**2 / slide.n_spots, 0.0)
        detected = detected + np.bincount(values.indices, minlength=values.shape[1])
        n_spots += slide.n_spots
    if not n_spots:
        raise FoldError("no training slide to choose variable genes on; check the split")
    variance, often = np.asarray(squares) / n_spots, np.asarray(detected) >= min_detected * n_spots
    return np.lexsort((-variance, ~often))[:k]
