"""Imputation of hidden genes from the visible ones (docs/method.md 6.5).

``pearson/hidden_genes`` is Pearson per gene over the cells of one test slide (or held-out block of
a slide when nothing is held out), mean over genes; ``pearson_median`` their median; ``rmse`` is in
training standard deviations of the gene. Every representation, computed without the genes, gets a
ridge read-out; ``gene_mean`` and ``knn`` need none of them; rows that end in ``_decoder`` predict
without any read-out and on a scale of their own, so they have no ``rmse``.
Shapes: S spots, H hidden genes, D dimensions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from eval.folds.fold import Fold, HiddenGenes, SlideData, stack
from eval.folds.spatial_blocks import BlocksConfig, block_splits
from eval.measures.inner_folds import inner_groups
from eval.measures.metrics import WORDS, pearson_per_gene, summarise
from eval.measures.ridge import RidgeConfig, knn_mean, ridge_fit_predict, zscore
from eval.results import DECODER_SUFFIX, Measure, Question, ResultTable, TaskResult
from hibio.config.schema import Count

QUESTION = Question(
    "imputation",
    "Random genes are removed from the counts before anything is computed and predicted back from "
    "the rest: by ridge on each embedding, fitted on training patients (or other spatial blocks of "
    "the slide), and by decoders that need no fit.",
    ("pearson/hidden_genes", "rmse/hidden_genes", "pearson_median/hidden_genes"),
)
KNN_OF = "pca_expression"  # whose nearest cells are averaged
HIDDEN = "hidden_genes: genes whose counts no input holds a trace of"
UNIT = "Pearson r over the cells of a held-out part, {} over genes"
MEAN = Measure("pearson/hidden_genes", UNIT.format("mean"), words=(WORDS["pearson"], HIDDEN))
MEDIAN = Measure(
    "pearson_median/hidden_genes",
    UNIT.format("median"),
    words=(WORDS["pearson"], HIDDEN, "median: over genes; otherwise their mean"),
)
RMSE = Measure(
    "rmse/hidden_genes",
    "RMSE in training standard deviations of the gene, mean over genes",
    "low",
    ("rmse: error of predicted values; lower is better", HIDDEN),
)


@dataclass(frozen=True)
class ImputationConfig:
    """Settings of the read-outs.

    Args:
        ridge: from an embedding to the hidden genes.
        k: training cells in the mean of the nearest.
        blocks: how a slide is cut when nothing is held out.
        max_train_spots: larger training sets are thinned at random (and noted).
    """

    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    k: Count = 50
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    max_train_spots: Count = 20_000


@dataclass(frozen=True)
class Part:
    """Some cells of a slide; ``key`` names them in the results."""

    slide: SlideData
    spots: np.ndarray
    key: str = ""


@dataclass(frozen=True)
class Split:
    """Cells that read-outs are fitted on, and held-out parts.

    Args:
        train: parts that are stacked.
        test: parts that are scored one by one.
        groups: (S,) inner folds never split these.
        units: (S,) the inner validation correlation is taken within these.
    """

    train: tuple[Part, ...]
    test: tuple[Part, ...]
    groups: np.ndarray
    units: np.ndarray


def run(fold: Fold, config: ImputationConfig) -> TaskResult:
    """Predict the hidden genes of held-out cells from every representation of the rest."""
    table = ResultTable(QUESTION)
    hidden = fold.hidden
    if hidden is None or not hidden.names:
        table.note(f"fold {fold.name}: no genes were hidden; not run")
    for note in hidden.notes if hidden is not None else ():
        table.note(f"fold {fold.name}: {note}")
    if hidden is None or not hidden.names:
        return table.result()
    _note_protocol(table, fold, hidden)
    _declare_rows(table, hidden)
    for split in _splits(fold, hidden, config, table):
        truth = _gathered(hidden.truth, split.train)
        _note_constant(table, hidden, split)
        for name, predicted in _predictions(hidden, split, truth, config):
            _add(table, name, (hidden, split), predicted, truth)
        for name, by_slide in (hidden.decoded or {}).items():
            decoded = [by_slide[part.slide.slide_id][part.spots] for part in split.test]
            _add(table, name, (hidden, split), decoded)
    return table.result(hidden.models)


def _declare_rows(table: ResultTable, hidden: HiddenGenes) -> None:
    """Rows that are no representation; a decoder has the role of the model that it is part of."""
    table.row("gene_mean", "baseline", "predicts the training mean")
    nearest = "mean of the nearest training cells in principal components of the visible genes"
    table.row("knn", "baseline", nearest)
    roles = {model.name: model.role for model in hidden.models}
    for name in hidden.decoded or {}:
        own = roles.get(name.removesuffix(DECODER_SUFFIX), "baseline")
        words = "predicts hidden genes by the model itself, no read-out is fitted"
        table.row(name, "variant" if own == "model" else own, words)


def _splits(
    fold: Fold, hidden: HiddenGenes, config: ImputationConfig, table: ResultTable
) -> Iterator[Split]:
    """One split by patient, or one for each block of each slide when nothing is held out."""
    rng = np.random.default_rng(fold.seed)
    if hidden.train:
        total = sum(slide.n_spots for slide in hidden.train)
        share = min(1.0, config.max_train_spots / total)
        every = [Part(s, np.arange(s.n_spots)) for s in hidden.train]
        train = tuple(_thinned(part, share, rng, table) for part in every)
        names = {k: _per_spot(train, k) for k in ("patient_id", "slide_id")}
        xy_um = stack([part.slide.xy_um[part.spots] for part in train])
        groups = inner_groups(names["patient_id"], names["slide_id"], xy_um)
        test = [Part(s, np.arange(s.n_spots), fold.key(s.slide_id)) for s in hidden.test]
        yield Split(train, tuple(test), groups, names["slide_id"])
        return
    for slide in hidden.test:
        for block in block_splits(slide, config.blocks, table):
            if len(set(block.block[block.train].tolist())) < 2:
                where = f"slide {slide.slide_id}, {block.name}"
                table.note(f"{where}: the buffer leaves less than two blocks; skipped")
                continue
            own = Part(slide, np.flatnonzero(block.train))
            part = _thinned(own, min(1.0, config.max_train_spots / len(own.spots)), rng, table)
            groups = block.block[part.spots].astype(str).astype(object)
            units = np.full(len(groups), slide.slide_id, dtype=object)
            key = fold.key(f"{slide.slide_id}:{block.name}")
            yield Split((part,), (Part(slide, np.flatnonzero(block.test), key),), groups, units)


def _predictions(
    hidden: HiddenGenes, split: Split, truth: np.ndarray, config: ImputationConfig
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Name of a row and its prediction (S, H) for every held-out part."""
    sizes = [len(part.spots) for part in split.test]
    cuts = np.cumsum(sizes)[:-1]
    yield "gene_mean", [np.tile(truth.mean(axis=0), (size, 1)) for size in sizes]
    for model in hidden.models:
        if model.omics is None:
            continue
        slides = {p.slide.slide_id: p.slide for p in (*split.train, *split.test)}
        rows = {name: zscore(model.rows("omics", [slide])[0]) for name, slide in slides.items()}
        x, held_out = _gathered(rows, split.train), _gathered(rows, split.test)
        if model.name == KNN_OF:
            yield "knn", np.split(knn_mean(x, truth, held_out, config.k), cuts)
        ridge = ridge_fit_predict(
            x, truth, held_out, config.ridge.alpha, split.groups, split.units, config.ridge
        )
        yield model.name, np.split(ridge, cuts)


def _add(
    table: ResultTable,
    model: str,
    case: tuple[HiddenGenes, Split],
    predicted: list[np.ndarray],
    train_truth: np.ndarray | None = None,
) -> None:
    """Score one row on every held-out part; ``train_truth`` (S, H) gives the unit of the RMSE."""
    hidden, split = case
    for part, found in zip(split.test, predicted, strict=True):
        truth = hidden.truth[part.slide.slide_id][part.spots].astype(np.float64)
        summary = summarise(pearson_per_gene(found, truth))
        table.add(model, MEAN, part.key, summary.mean, 0.0)
        table.add(model, MEDIAN, part.key, summary.median, 0.0)
        if train_truth is not None:
            error = relative_rmse(found, truth, train_truth.std(axis=0))
            table.add(model, RMSE, part.key, error)


def relative_rmse(predicted: np.ndarray, truth: np.ndarray, spread: np.ndarray) -> float:
    """Root mean square error per gene over its spread, mean over genes that vary in training.

    Args:
        predicted: (S, H).
        truth: (S, H).
        spread: (H,) standard deviation over the training cells.
    """
    error = np.sqrt(np.mean((predicted - truth) ** 2, axis=0))
    varies = spread > 0
    return float((error[varies] / spread[varies]).mean()) if varies.any() else float("nan")


def _gathered(by_slide: Mapping[str, np.ndarray], parts: tuple[Part, ...]) -> np.ndarray:
    return stack([np.asarray(by_slide[p.slide.slide_id], np.float64)[p.spots] for p in parts])


def _per_spot(parts: tuple[Part, ...], attribute: str) -> np.ndarray:
    named = [np.full(len(p.spots), getattr(p.slide, attribute), object) for p in parts]
    return np.concatenate(named)


def _thinned(part: Part, share: float, rng: np.random.Generator, table: ResultTable) -> Part:
    if share >= 1.0:
        return part
    size = max(1, int(share * len(part.spots)))
    table.note(f"slide {part.slide.slide_id}: {size} of {len(part.spots)} training cells are used")
    return Part(part.slide, np.sort(rng.permutation(part.spots)[:size]), part.key)


def _note_constant(table: ResultTable, hidden: HiddenGenes, split: Split) -> None:
    for part in split.test:
        truth = hidden.truth[part.slide.slide_id][part.spots]
        constant = int((np.ptp(truth, axis=0) == 0).sum())
        if constant:
            table.note(f"{part.key}: {constant} genes are constant there and left out")


def _note_protocol(table: ResultTable, fold: Fold, hidden: HiddenGenes) -> None:
    table.note("gene_mean: a constant prediction has no correlation; it is reported as 0")
    if hidden.decoded:
        table.note("rows ending in _decoder predict without a fitted read-out, on another scale")
    if not hidden.train:
        table.note(
            f"fold {fold.name}: nothing is held out from pretraining, which saw these cells with "
            "all genes; the read-outs are fitted on other blocks of the slide"
        )
