"""Expression prediction from H&E (docs/method.md 6.1; read-outs of section 6, last paragraph).

Every ridge and neighbour read-out is fitted to expression z-scored within each training slide.
Metrics: ``pearson/top50_hvg`` is ridge with its penalty from inner folds; ``pearson_hest`` uses the
fixed HEST penalty on targets as they are, ``pearson_bleep`` the mean of 50 training spots,
``pearson_both`` ridge on [raw features, embedding], ``pearson_via_omics`` ridge on [raw features,
embedding] to the spot vector, which least squares turn into genes. ``pearson_combined`` is the
z-scored mean of ridge and via_omics of the raw features, ridge, via_omics and nearest spots of the
model (in this order in the notes), weighted by inner folds; ``pearson_combined_niche`` is the same
of every image embedding beside the mean of its neighbours' (S, 2 D), a wider window of tissue, and
``pearson_combined_random_graph`` its control. A model that predicts expression itself is scored on
that under ``pearson``; ridge on its embedding is ``pearson_ridge``.
One value per test slide (mean over genes); ``..._pooled`` is over all test spots of the fold.
Shapes: S spots, T target genes, V dimensions of the spot vector.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from eval.folds.fold import (
    Fold,
    Representation,
    dense_expression,
    split_rows,
    stack,
    variable_genes,
)
from eval.measures.metrics import WORDS, pearson_per_gene, summarise
from eval.measures.ridge import ReadOut, RidgeConfig, centre, choose_weights, zscore, zscore_mean
from eval.results import RAW, Measure, Question, ResultTable, TaskResult
from eval.tasks.probes import FULL, PLAIN, ImageProbe, check_readout, item_graphs
from hibio.config.schema import Count, Share
from preprocessing.graphs import neighbour_mean

QUESTION = Question(
    "expression",
    "Gene expression of held-out patients' spots, predicted from H&E: frozen image embeddings, a "
    "ridge (or neighbour) read-out fitted on the training patients.",
    (
        "pearson/top50_hvg",
        "pearson_hest/top50_hvg",
        "pearson_bleep/top50_hvg",
        "pearson_combined/top50_hvg",
        "pearson_via_omics/top50_hvg",
        "pearson/top200_hvg",
    ),
)
RAW_SIDE = ""  # name of the raw features among the spot vectors; no model has it
#: Suffix of the metric -> what the read-out is.
READOUTS = {
    "": "",
    "_hest": "hest: ridge with the fixed penalty of HEST-Bench",
    "_bleep": "bleep: mean expression of the nearest training spots",
    "_both": "both: ridge on raw features and embedding side by side",
    "_combined": "combined: z-scored mean of ridge and via_omics, from raw features and from the "
    "embedding, and nearest training spots; weights by inner folds",
    "_combined_niche": "combined_niche: combined, every image embedding beside the mean of its "
    "neighbours' embeddings; the window is that much wider",
    "_combined_random_graph": "combined_random_graph: the same with random spots of the slide for "
    "neighbours; a niche gains only what it has beyond this",
    "_via_omics": "via_omics: ridge on raw features and embedding to the spot vector, and from "
    "there to genes by least squares on training spots",
    "_ridge": "pearson_ridge: ridge on the embedding of a model that predicts expression itself, "
    "whose own prediction is plain pearson",
}
UNIT = "Pearson r per slide, mean over genes"
POOLED = "Pearson r over all test spots, mean over genes"


@dataclass(frozen=True)
class ExpressionConfig:
    """Settings of expression prediction.

    Args:
        n_genes: sizes of the target sets, highly variable on the training slides.
        min_detected: share of training spots in which a target should be detected.
        ridge: PCA and ridge.
        bleep_k: training spots in the retrieval mean.
        raw: name of the model whose features stand beside the embedding in ``both`` and
            ``via_omics``, and whose omics side is the spot vector; where no model has it,
            ``Fold.raw_features`` do.
        readout: ``plain``, or ``full`` = also ``_combined_niche`` with its control, and with
            several seeds a row of their embeddings side by side.
    """

    n_genes: tuple[Count, ...] = (50, 200)
    min_detected: Share = 0.1
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    bleep_k: Count = 50
    raw: str = RAW
    readout: str = PLAIN

    def __post_init__(self) -> None:
        check_readout("expression", self.readout)


@dataclass(frozen=True)
class Targets:
    """Log expression of the target genes: training spots stacked, test spots by slide.

    ``genes`` (T,) are their indices in the vocabulary; ``train_z`` is ``train`` z-scored within
    each slide, so that a deeply sequenced slide does not outweigh the others.
    """

    name: str
    genes: np.ndarray
    train: np.ndarray
    train_z: np.ndarray
    test: list[np.ndarray]


@dataclass(frozen=True)
class Mixture:
    """A read-out: the weighted mean of z-scored predictions (S', T) of all test spots.

    ``suffix`` ends the metric's name.
    """

    suffix: str
    parts: tuple[np.ndarray, ...]
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SpotVectors:
    """Spot vectors of the training spots (S, V), measured, and as a model predicts them."""

    known: np.ndarray
    predicted: Mapping[str, ReadOut]

    def genes(self, name: str, targets: Targets) -> ReadOut:
        """The predictions of a model turned into genes."""
        found = self.predicted[name]
        return ReadOut(
            decode(self.known, targets.train_z, found.test),
            decode(self.known, targets.train_z, found.inner),
        )


def run(fold: Fold, config: ExpressionConfig) -> TaskResult:
    """Predict variable genes of the test slides from every model's image embedding."""
    table = ResultTable(QUESTION)
    if not fold.paired_train or not fold.paired_test:
        table.note(f"fold {fold.name}: no training or no test slide with an image; not run")
        return table.result()
    sides = {item: _sides(seen, config) for item, seen in _items(fold, config)}
    for targets in _target_sets(fold, config, table):
        _add_references(table, fold, targets)
        for item, seen in sides.items():
            for name, mixtures in _read_outs(seen, targets, config, item):
                _add_model(table, fold, (name, item, targets), mixtures)
        for model in fold.models:
            if model.prediction is not None:
                rows = stack(model.predicted(fold.paired_test, targets.genes))
                _add(table, fold, (model.name, "", targets), Mixture("", (rows,)))
    if sides[""].raw is None:
        table.note(f"no model {config.raw!r}: the read-outs 'both' and 'combined' are left out")
    if sides[""].vectors is None:
        table.note(f"no spot vector beside {config.raw!r}: the read-out 'via_omics' is left out")
    return table.result(fold.models)


def _items(fold: Fold, config: ExpressionConfig) -> Iterator[tuple[str, Fold]]:
    """Part of a metric's name, and the fold as its read-outs see it."""
    yield "", fold
    if config.readout == FULL:
        slides = (*fold.paired_train, *fold.paired_test)
        for suffix, graph in item_graphs(slides, "niche", fold.seed):
            lists = {one.slide_id: own for one, own in zip(slides, graph or [], strict=True)}
            models = tuple(_widened(m, lists) for m in fold.models if m.image is not None)
            raw = None if fold.raw_features is None else _widened(fold.raw_features, lists)
            yield suffix or "_niche", replace(fold, models=models, raw_features=raw)


def _widened(model: Representation, lists: Mapping[str, np.ndarray]) -> Representation:
    """Image embeddings beside the mean over the listed neighbours (S, k) of each spot."""
    image = {
        name: np.hstack([rows, neighbour_mean(rows, lists[name])])
        for name, rows in (model.image or {}).items()
        if name in lists
    }
    return replace(model, image=image)


@dataclass(frozen=True)
class Sides:
    """What the read-outs see: a probe of each model, the raw features', and spot vectors."""

    probes: dict[str, ImageProbe]
    raw: ImageProbe | None
    vectors: SpotVectors | None


def _sides(fold: Fold, config: ExpressionConfig) -> Sides:
    probes = {m.name: ImageProbe.of(fold, m) for m in fold.models if m.image is not None}
    beside = fold.model(config.raw) if fold.has_model(config.raw) else fold.raw_features
    raw = None if beside is None else probes.get(config.raw) or ImageProbe.of(fold, beside)
    return Sides(probes, raw, _spot_vectors(fold, beside, probes, raw, config))


def _read_outs(
    sides: Sides, targets: Targets, config: ExpressionConfig, item: str
) -> Iterator[tuple[str, Iterator[Mixture]]]:
    """Name and read-outs of every model; of a niche what `combined` is made of."""
    given, vectors = None, sides.vectors
    if sides.raw is not None:
        via = None if vectors is None else vectors.genes(RAW_SIDE, targets)
        given = RawReadOuts(sides.raw, _ridge(sides.raw, targets, config), via)
    for name, probe in sides.probes.items():
        through = None if vectors is None else vectors.genes(name, targets)
        yield name, _mixtures(probe, targets, (given, through), config, combined_alone=bool(item))


def _add_model(
    table: ResultTable, fold: Fold, cell: tuple[str, str, Targets], mixtures: Iterator[Mixture]
) -> None:
    """Every read-out of one model, of a niche the combined one alone.

    Plain pearson is left to what the model predicts itself.
    """
    name, item, targets = cell
    own = fold.model(name).prediction is not None
    for mixture in mixtures:
        suffix = (mixture.suffix or "_ridge" * own) + item
        if suffix in READOUTS:
            _add(table, fold, (name, suffix, targets), mixture)
        if mixture.suffix == "_combined":
            shares = " ".join(f"{weight:.3g}" for weight in mixture.weights or ())
            table.note(f"{suffix[1:]}, fold {fold.key(name)}, {targets.name}: weights {shares}")


def decode(known: np.ndarray, target: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Least squares from spot vectors to genes, fitted on training spots.

    The spot vector has few dimensions, which all genes share: what an image says about one noisy
    gene is read through what it says about all of them (reduced-rank regression with the rank and
    the axes of docs/method.md 3).

    Args:
        known: (S, V) measured spot vectors of the training spots.
        target: (S, T) their expression.
        predicted: (S', V) predicted spot vectors of the test spots.

    Returns:
        (S', T).
    """
    mean_known, mean_target = known.mean(axis=0), target.mean(axis=0)
    weights = np.linalg.lstsq(known - mean_known, target - mean_target, rcond=None)[0]
    return np.asarray((predicted - mean_known) @ weights + mean_target)


def _spot_vectors(
    fold: Fold,
    beside: Representation | None,
    probes: Mapping[str, ImageProbe],
    raw: ImageProbe | None,
    config: ExpressionConfig,
) -> SpotVectors | None:
    """Spot vectors of the training slides, centred per slide, and what each model predicts."""
    if beside is None or beside.omics is None:
        return None
    known = stack([centre(rows) for rows in beside.rows("omics", fold.paired_train)])
    predicted = {
        name: probe.ridge_readout(known, config.ridge, beside=None if probe is raw else raw)
        for name, probe in probes.items()
    }
    if raw is not None:
        same = [name for name, probe in probes.items() if probe is raw]
        own = predicted[same[0]] if same else raw.ridge_readout(known, config.ridge)
        predicted[RAW_SIDE] = own
    return SpotVectors(known, predicted)


def _target_sets(fold: Fold, config: ExpressionConfig, table: ResultTable) -> Iterator[Targets]:
    order = variable_genes(fold.train, max(config.n_genes), config.min_detected)
    train = [dense_expression(slide, order) for slide in fold.paired_train]
    train_z = [zscore(values) for values in train]
    test = [dense_expression(slide, order) for slide in fold.paired_test]
    for n in config.n_genes:
        name = f"top{n}_hvg"
        if len(order) < n:
            table.note(f"{name}: the vocabulary has only {len(order)} genes; all are used")
        for slide, values in zip(fold.paired_test, test, strict=True):
            constant = int((np.ptp(values[:, :n], axis=0) == 0).sum())
            if constant:
                table.note(
                    f"{name}: {constant} genes are constant on test slide {slide.slide_id} "
                    f"(fold {fold.name}) and left out there"
                )
        known, known_z = stack(train)[:, :n], stack(train_z)[:, :n]
        yield Targets(name, order[:n], known, known_z, [values[:, :n] for values in test])


@dataclass(frozen=True)
class RawReadOuts:
    """Raw features, and their read-outs of one set of targets, ``via`` the spot vector or None."""

    probe: ImageProbe
    ridge: ReadOut
    via: ReadOut | None


def _mixtures(
    probe: ImageProbe,
    targets: Targets,
    beside: tuple[RawReadOuts | None, ReadOut | None],
    config: ExpressionConfig,
    combined_alone: bool,
) -> Iterator[Mixture]:
    """Every read-out of one model; ``beside`` are those of raw features, and via_omics."""
    raw, via = beside
    alone = raw is not None and raw.probe is probe
    ridge = raw.ridge if raw is not None and alone else _ridge(probe, targets, config)
    nearest = probe.nearest_readout(targets.train, config.bleep_k, config.ridge)
    yield Mixture("", (ridge.test,))
    if not combined_alone:
        yield Mixture("_hest", (probe.ridge(targets.train, config.ridge, alpha="hest"),))
    yield Mixture("_bleep", (nearest.test,))
    if via is not None:
        yield Mixture("_via_omics", (via.test,))
    if raw is None:
        return
    if not alone and not combined_alone:
        both = probe.ridge(targets.train, config.ridge, beside=raw.probe)
        yield Mixture("_both", (both,))
    every = [ridge, via, nearest] if alone else [raw.ridge, raw.via, ridge, via, nearest]
    parts = [part for part in every if part is not None]
    weights = choose_weights([part.inner for part in parts], targets.train_z, probe.units)
    tested = tuple(part.test for part in parts)
    yield Mixture("_combined", tested, weights)


def _ridge(probe: ImageProbe, targets: Targets, config: ExpressionConfig) -> ReadOut:
    return probe.ridge_readout(targets.train, config.ridge)


def _add(table: ResultTable, fold: Fold, cell: tuple[str, str, Targets], mixture: Mixture) -> None:
    model, suffix, targets = cell
    words = tuple(text for text in (WORDS["pearson"], READOUTS[suffix]) if text)
    measure = Measure(f"pearson{suffix}/{targets.name}", UNIT, words=words)
    pooled = Measure(
        f"pearson{suffix}_pooled/{targets.name}", POOLED, words=(*words, WORDS["pooled"])
    )
    by_slide = [split_rows(part, fold.paired_test) for part in mixture.parts]
    for index, slide in enumerate(fold.paired_test):
        mixed = zscore_mean(*(part[index] for part in by_slide), weights=mixture.weights)
        r = summarise(pearson_per_gene(mixed, targets.test[index])).mean
        table.add(model, measure, fold.key(slide.slide_id), r)
    mixed = zscore_mean(*mixture.parts, weights=mixture.weights)
    r = summarise(pearson_per_gene(mixed, stack(targets.test))).mean
    table.add(model, pooled, fold.key("pooled"), r)


def _add_references(table: ResultTable, fold: Fold, targets: Targets) -> None:
    """The mean of the training spots, and the neighbours' true expression."""
    flat = np.tile(targets.train.mean(axis=0), (sum(len(t) for t in targets.test), 1))
    table.row("mean", "baseline", "predicts the training mean")
    _add(table, fold, ("mean", "", targets), Mixture("", (flat,)))
    table.note("mean: a constant prediction has no correlation; it is reported as 0")
    near = [
        neighbour_mean(values, slide.neighbours)
        for slide, values in zip(fold.paired_test, targets.test, strict=True)
    ]
    table.row("neighbour_oracle", "oracle", "measured expression of the neighbouring test spots")
    _add(table, fold, ("neighbour_oracle", "", targets), Mixture("", (stack(near),)))
    table.note("neighbour_oracle: reference that sees the test counts of the neighbouring spots")
