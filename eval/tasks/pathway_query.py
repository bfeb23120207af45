"""Zero-shot pathway maps from H&E against the measured score (docs/method.md 2 and 6.7).

Metrics ``pearson/<readout>/median`` and so on over pathways, within each test slide; read-outs are
``anchor``, ``ridge``, ``retrieval`` and ``default`` (z-scored mean of the last two); planted
activities come as ``spearman_planted/...``. The row ``matched_random`` is the first model with an
image embedding, asked for random sets.
Shapes: S spots, M gene sets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from eval.folds.fold import ACTIVITY_PREFIX, Fold, GeneSetScores, Representation, split_rows, stack
from eval.measures.metrics import WORDS, pearson_per_gene, spearman_per_gene, summarise, unit_rows
from eval.measures.ridge import RidgeConfig, zscore_mean
from eval.results import Measure, Question, ResultTable, TaskResult
from eval.tasks.probes import ImageProbe
from hibio.config.schema import Count

QUESTION = Question(
    "pathway_query",
    "A gene set, also one never trained on, is scored on H&E alone and compared with the set's "
    "measured score on the same spots.",
    (
        "spearman/default/median",
        "spearman/ridge/median",
        "spearman/anchor/median",
        "spearman_planted/default/median",
        "spearman_planted/anchor/median",
    ),
)
ANCHOR = "anchor: cosine of the image embedding and the gene set's own embedding"
PLANTED = "planted: compared with the simulated truth instead of the measured score"
CORRELATIONS = {"pearson": pearson_per_gene, "spearman": spearman_per_gene}


@dataclass(frozen=True)
class PathwayQueryConfig:
    """Settings of the pathway query.

    Args:
        ridge: regression of the training spots' scores on their image embedding.
        k: training spots in the retrieval mean.
        random_of: model that is asked for the matched random sets; empty: the first one with an
            image embedding.
    """

    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    k: Count = 50
    random_of: str = ""


@dataclass(frozen=True)
class Query:
    """Gene sets with their measured scores: training spots stacked, test spots by slide."""

    names: tuple[str, ...]
    train: np.ndarray
    test: list[np.ndarray]

    @staticmethod
    def of(fold: Fold, sets: GeneSetScores) -> "Query":
        """Measured scores of the sets on the slides with an image."""
        train = [np.asarray(sets.match(slide.tfidf), np.float64) for slide in fold.paired_train]
        test = [np.asarray(sets.match(slide.tfidf), np.float64) for slide in fold.paired_test]
        return Query(tuple(sets.names), stack(train), test)


def run(fold: Fold, config: PathwayQueryConfig) -> TaskResult:
    """Score gene sets on test slides from the image alone and compare with the counts."""
    table = ResultTable(QUESTION)
    pictured = fold.paired_train and fold.paired_test
    if fold.anchors is None or not len(fold.anchors.names) or not pictured:
        table.note(f"fold {fold.name}: no pathways, or no training or test images; not run")
        return table.result()
    query = Query.of(fold, fold.anchors)
    models = [model for model in fold.models if model.image is not None]
    for model in models:
        _add_model(table, fold, model, query, config)
    table.row("measured_oracle", "oracle", "the measured score itself")
    _add_planted(table, fold, "measured_oracle", query, {"measured": query.test})
    _add_random(table, fold, models, config)
    return table.result(fold.models)


def _add_model(
    table: ResultTable,
    fold: Fold,
    model: Representation,
    query: Query,
    config: PathwayQueryConfig,
) -> None:
    predicted = dict(_readouts(fold, ImageProbe.of(fold, model), query, config))
    if model.anchor is not None:
        predicted["anchor"] = anchor_scores(fold, model, model.anchor)
    for readout, by_slide in predicted.items():
        _add_correlations(table, fold, (model.name, readout), query, by_slide)
    _add_planted(table, fold, model.name, query, predicted)


def _readouts(
    fold: Fold, probe: ImageProbe, query: Query, config: PathwayQueryConfig
) -> Iterator[tuple[str, list[np.ndarray]]]:
    ridge = split_rows(probe.ridge(query.train, config.ridge), fold.paired_test)
    nearest = split_rows(probe.nearest(query.train, config.k), fold.paired_test)
    yield "ridge", ridge
    yield "retrieval", nearest
    yield "default", [zscore_mean(a, b) for a, b in zip(ridge, nearest, strict=True)]


def anchor_scores(fold: Fold, model: Representation, anchor: np.ndarray) -> list[np.ndarray]:
    """Cosine of image and anchor, standardised and centred as the measured score is.

    Args:
        fold: its training slides give mean and standard deviation per set.
        model: whose image embeddings (S, D) are compared.
        anchor: (M, D).

    Returns:
        (S, M) per test slide with an image.
    """
    target = unit_rows(anchor).T
    train = unit_rows(stack(model.rows("image", fold.paired_train))) @ target
    mean, spread = train.mean(axis=0), np.maximum(train.std(axis=0), 1e-12)
    found = []
    for rows in model.rows("image", fold.paired_test):
        score = (unit_rows(rows) @ target - mean) / spread
        alone = score.shape[1] == 1  # a single set has nothing to be compared with
        found.append(score if alone else score - score.mean(axis=1, keepdims=True))
    return found


def _add_correlations(
    table: ResultTable,
    fold: Fold,
    cell: tuple[str, str],
    query: Query,
    by_slide: list[np.ndarray],
) -> None:
    model, readout = cell
    for slide, score, truth in zip(fold.paired_test, by_slide, query.test, strict=True):
        key = fold.key(slide.slide_id)
        for name, function in CORRELATIONS.items():
            summary = summarise(function(score, truth))
            unit = f"{name.title()} r per slide, over {len(query.names)} gene sets"
            for over, value in (("mean", summary.mean), ("median", summary.median)):
                measure = _measure(name, readout, over, unit)
                table.add(model, measure, key, value, 0.0)
            if summary.n_constant:
                table.note(
                    f"slide {slide.slide_id}: {summary.n_constant} gene sets have a constant "
                    "measured score and are left out"
                )


def _measure(score: str, readout: str, over: str, unit: str) -> Measure:
    words = [WORDS[score.removesuffix("_planted")]]
    words += [PLANTED] * score.endswith("_planted") + [ANCHOR] * (readout == "anchor")
    return Measure(f"{score}/{readout}/{over}", unit, words=tuple(words))


def _add_planted(
    table: ResultTable,
    fold: Fold,
    model: str,
    query: Query,
    predicted: dict[str, list[np.ndarray]],
) -> None:
    """Spearman with the simulated activity of the sets that have one."""
    for index, slide in enumerate(fold.paired_test):
        planted = [n for n in query.names if ACTIVITY_PREFIX + n in slide.measurement_columns]
        if not planted:
            continue
        truth = slide.labels[[ACTIVITY_PREFIX + n for n in planted]].to_numpy(dtype=np.float64)
        column = [query.names.index(name) for name in planted]
        for readout, by_slide in predicted.items():
            median = summarise(spearman_per_gene(by_slide[index][:, column], truth)).median
            unit = "Spearman r per slide with the planted activity"
            measure = _measure("spearman_planted", readout, "median", unit)
            table.add(model, measure, fold.key(slide.slide_id), median, 0.0)


def _add_random(
    table: ResultTable, fold: Fold, pictured: list[Representation], config: PathwayQueryConfig
) -> None:
    """Matched random sets, asked of one model: what any set of such genes reaches."""
    if fold.random_sets is None or not pictured:
        table.note("no matched random sets were given; the control row is missing")
        return
    model = fold.model(config.random_of) if config.random_of else pictured[0]
    query = Query.of(fold, fold.random_sets)
    probe = ImageProbe.of(fold, model)
    table.row("matched_random", "control", "random gene sets matched in size and mean expression")
    for readout, by_slide in _readouts(fold, probe, query, config):
        _add_correlations(table, fold, ("matched_random", readout), query, by_slide)
    table.note(f"matched_random: random sets' own scores, read from {model.name}'s embeddings")
