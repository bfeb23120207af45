"""Annotation by a linear probe on frozen embeddings, test patients unseen (docs/method.md 6.4).

Metrics ``omics/balanced_accuracy``, ``omics/macro_f1``, ``omics/macro_auroc`` and the same with
``image``; one value per test patient and label column. Where nothing is held out (fold ``none``,
a model trained without labels on the very slides) the probe is held out instead: every slide is
cut into spatial blocks with a buffer, one value per slide, label column and block.

``<modality>/few_shot@k``: balanced accuracy in every test patient of a probe fitted on k labelled
spots of each class, drawn from the training patients together; several draws, one value a test
patient, label column and draw (the key ends in ``:draw<i>``). Models of one modality get the same
spots, and a larger k keeps those of a smaller one. The penalty is fixed: there is nothing to choose
it on.
Shapes: S labelled spots, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from sklearn.linear_model import LogisticRegression

from eval.errors import FoldError
from eval.folds.fold import MODALITIES, Fold, Representation, SlideData, spot_names, stack
from eval.folds.spatial_blocks import BlocksConfig, BlockSplit, block_splits
from eval.measures.inner_folds import group_folds
from eval.measures.metrics import WORDS, balanced_accuracy, macro_auroc, macro_f1
from eval.measures.ridge import zscore
from eval.results import Measure, Question, ResultTable, TaskResult
from hibio.config.schema import Count, Folds, Positive

QUESTION = Question(
    "annotation",
    "A linear probe on frozen embeddings predicts the pathologist's or planted label, or the type "
    "of a cell, in patients it was not fitted on; without such patients in spatial blocks of the "
    "slide it was not fitted on.",
    (
        "omics/balanced_accuracy",
        "omics/macro_f1",
        "omics/macro_auroc",
        "image/balanced_accuracy",
        "omics/few_shot@1",
        "omics/few_shot@5",
        "omics/few_shot@20",
    ),
)
LEAST = 1e-12  # probability whose log stands for that of a smaller one
FEW_SHOT = (
    "few_shot@k: balanced accuracy of a probe fitted on k labelled spots of each class, several "
    "random draws"
)


@dataclass(frozen=True)
class FewShotConfig:
    """Settings of the curves.

    Args:
        k: labelled spots of each class; of a rarer class all are taken. Empty: no curves.
        draws: random draws of the spots for each k.
        c: inverse penalty of the probe, whose features have standard deviation 1.
        max_iter: of its solver.
    """

    k: tuple[Count, ...] = (1, 2, 5, 10, 20)
    draws: Count = 5
    c: Positive = 0.1
    max_iter: Count = 300

    def __post_init__(self) -> None:
        if any(k < 1 for k in self.k) or self.draws < 1:
            raise FoldError(f"few-shot k {self.k}, draws {self.draws}; all must be at least 1")


@dataclass(frozen=True)
class Labelled:
    """Labelled spots: features (S, D) z-scored per slide, class and patient (or block) of each."""

    x: np.ndarray
    y: np.ndarray
    patient: np.ndarray

    def only(self, keep: np.ndarray) -> Labelled:
        """The spots where ``keep`` is true, or at its indices."""
        return Labelled(self.x[keep], self.y[keep], self.patient[keep])


@dataclass(frozen=True)
class FewShotScore:
    """Balanced accuracy in one test patient after one draw of k spots a class."""

    k: int
    draw: int
    patient: str
    value: float
    chance: float


def draw_spots(classes: np.ndarray, k: int, seed: Sequence[int]) -> np.ndarray:
    """Indices of k random spots of each class, of a rarer class all of them, sorted.

    Args:
        classes: (S,) class of each spot.
        k: spots of each class.
        seed: of the draw; the spots of a smaller k are among those of a larger one.
    """
    rank = np.random.default_rng(list(seed)).random(len(classes))
    members = [np.flatnonzero(classes == name) for name in np.unique(classes)]
    chosen = [own[np.argsort(rank[own], kind="stable")[:k]] for own in members]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def few_shot_scores(
    train: Labelled, test: Labelled, seed: int, config: FewShotConfig
) -> Iterator[FewShotScore]:
    """Fit on few spots, score every test patient; every class of ``test`` occurs in ``train``."""
    for k in config.k:
        for draw in range(config.draws):
            few = train.only(draw_spots(train.y, k, (seed, draw)))
            probe = LogisticRegression(
                C=config.c, class_weight="balanced", max_iter=config.max_iter
            )
            found = probe.fit(few.x, few.y).predict(test.x)
            for name in np.unique(test.patient):
                own = test.patient == name
                value = balanced_accuracy(test.y[own], found[own])
                yield FewShotScore(k, draw, str(name), value, 1.0 / len(set(test.y[own])))


@dataclass(frozen=True)
class AnnotationConfig:
    """Settings of the linear probe.

    Args:
        columns: label columns; empty: every category column that occurs on both sides.
        grid: inverse penalties C, chosen by inner folds over training patients.
        default_c: with one labelled training patient.
        n_folds: most inner folds.
        max_train_spots: larger training sets are thinned at random (and noted).
        max_iter: of the logistic regression.
        tolerance: at which it stops.
        blocks: how a slide is cut when no slide is held out.
        few_shot: curves over the number of labelled spots; only where patients are held out.
    """

    columns: tuple[str, ...] = ()
    grid: tuple[Positive, ...] = (1e-4, 1e-3, 0.01, 0.1, 1.0)
    default_c: Positive = 0.01
    n_folds: Folds = 3
    max_train_spots: Count = 20_000
    max_iter: Count = 300
    tolerance: Positive = 1e-3
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)


@dataclass(frozen=True)
class Case:
    """Where one probe stands: whose embedding, and of which column."""

    model: str
    modality: str
    column: str


def run(fold: Fold, config: AnnotationConfig) -> TaskResult:
    """Fit a probe on labelled training spots and score it on each test patient or block."""
    table = ResultTable(QUESTION)
    if fold.train:
        _over_patients(table, fold, config)
    else:
        _over_blocks(table, fold, config)
    return table.result(fold.models)


def _over_patients(table: ResultTable, fold: Fold, config: AnnotationConfig) -> None:
    columns = _columns(fold, config)
    if not columns:
        table.note(f"fold {fold.name}: no label column on both training and test slides; not run")
    for column in columns:
        for model in fold.models:
            for modality in MODALITIES:
                train = _labelled(model, modality, fold.train, column)
                test = _labelled(model, modality, fold.test, column)
                if train is not None and test is not None and len(set(train.y)) > 1:
                    case = Case(model.name, modality, column)
                    _add(table, fold, case, (train, test), config)
                    _add_few_shot(table, fold, case, (train, test), config.few_shot)


def _over_blocks(table: ResultTable, fold: Fold, config: AnnotationConfig) -> None:
    """Cross-validate the probe over the blocks of every slide."""
    found = False
    for slide in fold.test:
        columns = [c for c in slide.label_columns if len(set(slide.categories(c)) - {""}) > 1]
        columns = [c for c in columns if not config.columns or c in config.columns]
        splits = block_splits(slide, config.blocks, table) if columns else []
        for column in columns:
            for split in _labelled_splits(table, slide, column, splits):
                found = True
                unit = f"{slide.slide_id}:{column}:{split.name}"
                for case, data in _block_cases(fold, slide, column, split):
                    _add(table, fold, case, data, config, unit)
    if found:
        table.note(
            f"fold {fold.name}: no slide is held out; model and baselines saw every cell without "
            "labels (transductive), the probe is fitted on other blocks of the same slide"
        )
    else:
        table.note(f"fold {fold.name}: no slide with two classes to split; not run")


def _labelled_splits(
    table: ResultTable, slide: SlideData, column: str, splits: list[BlockSplit]
) -> Iterator[BlockSplit]:
    """Splits with two classes to learn and a labelled cell to test; the others are noted."""
    y = slide.categories(column)
    for split in splits:
        classes, n_test = set(y[split.train]) - {""}, int((y[split.test] != "").sum())
        if len(classes) > 1 and n_test:
            yield split
        else:
            table.note(
                f"slide {slide.slide_id}, column {column}, {split.name}: {len(classes)} classes "
                f"to learn outside the buffer, {n_test} labelled cells to test; skipped"
            )


def _block_cases(
    fold: Fold, slide: SlideData, column: str, split: BlockSplit
) -> Iterator[tuple[Case, tuple[Labelled, Labelled]]]:
    """Training and test cells of every embedding; blocks stand in the place of patients."""
    y = slide.categories(column).astype(str)
    train, test = split.train & (y != ""), split.test & (y != "")
    for model in fold.models:
        for modality in MODALITIES:
            if model.covers(modality, slide):
                x = zscore(model.rows(modality, [slide])[0])
                every = Labelled(x, y, split.block.astype(str))
                yield Case(model.name, modality, column), (every.only(train), every.only(test))


def choose_c(train: Labelled, config: AnnotationConfig) -> float:
    """C with the lowest balanced log loss in held-out training patients; ties: the smaller C.

    Every class of a held-out patient weighs the same, and every patient; classes that the others
    do not have are left out.
    """
    if len(set(train.patient)) < 2:
        return config.default_c
    fold_of = group_folds(train.patient, config.n_folds)
    losses = []
    for held in range(int(fold_of.max()) + 1):
        inner, outer = train.only(fold_of != held), train.only(fold_of == held)
        outer = outer.only(np.isin(outer.y, np.unique(inner.y)))
        if len(set(inner.y)) > 1 and len(outer.y):
            probes = [_fitted(inner, c, config) for c in config.grid]
            losses.append([_log_loss(outer, probe) for probe in probes])
    if not losses:
        return config.default_c
    order = np.argsort(config.grid, kind="stable")
    loss = np.round(np.asarray(losses).mean(axis=0), 9)[order]
    return float(config.grid[order[int(np.argmin(loss))]])


def _log_loss(outer: Labelled, probe: LogisticRegression) -> float:
    """Mean over classes of the mean -log probability of the true class of its spots."""
    column = np.searchsorted(probe.classes_, outer.y)
    chosen = probe.predict_proba(outer.x)[np.arange(len(column)), column]
    loss = -np.log(np.maximum(chosen, LEAST))
    return float(np.mean([loss[outer.y == name].mean() for name in np.unique(outer.y)]))


def _fitted(train: Labelled, c: float, config: AnnotationConfig) -> LogisticRegression:
    probe = LogisticRegression(
        C=c, class_weight="balanced", max_iter=config.max_iter, tol=config.tolerance
    )
    return probe.fit(train.x, train.y)


def _columns(fold: Fold, config: AnnotationConfig) -> list[str]:
    found = [
        {c for s in slides for c in s.label_columns if len(set(s.categories(c)) - {""}) > 0}
        for slides in (fold.train, fold.test)
    ]
    both = found[0] & found[1]
    return sorted(both & set(config.columns)) if config.columns else sorted(both)


def _labelled(
    model: Representation, modality: str, slides: tuple[SlideData, ...], column: str
) -> Labelled | None:
    """Labelled spots of the slides that have this modality; None when there is none."""
    usable = [s for s in slides if column in s.label_columns and model.covers(modality, s)]
    if not usable:
        return None
    y = np.concatenate([slide.categories(column) for slide in usable])
    x = stack([zscore(rows) for rows in model.rows(modality, usable)])
    every = Labelled(x, y, spot_names(usable, "patient"))
    named = every.only(y != "")
    found = Labelled(named.x, named.y.astype(str), named.patient.astype(str))
    return found if len(found.y) else None


def _add(
    table: ResultTable,
    fold: Fold,
    case: Case,
    data: tuple[Labelled, Labelled],
    config: AnnotationConfig,
    unit: str = "",
) -> None:
    """Fit on the first, score every patient of the second; ``unit`` names a block of a slide."""
    train, test = _thinned(data[0], fold, config, table), data[1]
    known = np.isin(test.y, np.unique(train.y))
    if not known.all():
        lost = sorted(set(test.y[~known].tolist()))
        table.note(
            f"fold {fold.name}, {unit or case.column}: {int((~known).sum())} test spots of classes "
            f"without training spots left out: {lost}"
        )
    probe = _fitted(train, choose_c(train, config), config)
    tested = "block" if unit else "test patient"
    for patient in np.unique(test.patient[known]):
        own = test.only(known & (test.patient == patient))
        predicted, score = probe.predict(own.x), probe.predict_proba(own.x)
        values = {
            "balanced_accuracy": (balanced_accuracy(own.y, predicted), 1.0 / len(set(own.y))),
            "macro_f1": (macro_f1(own.y, predicted), None),
            "macro_auroc": (macro_auroc(own.y, score, list(probe.classes_)), 0.5),
        }
        for name, (value, chance) in values.items():
            of = f"{name.replace('_', ' ')} per {tested}"
            words = WORDS["auroc" if name == "macro_auroc" else name]
            measure = Measure(f"{case.modality}/{name}", of, words=(words,))
            key = fold.key(unit or f"{patient}:{case.column}")
            table.add(case.model, measure, key, value, chance)


def _add_few_shot(
    table: ResultTable,
    fold: Fold,
    case: Case,
    data: tuple[Labelled, Labelled],
    config: FewShotConfig,
) -> None:
    """Curves over the number of labelled training spots a class."""
    train, test = data
    rare = [str(c) for c in np.unique(train.y) if (train.y == c).sum() < max(config.k, default=0)]
    if rare:
        table.note(
            f"fold {fold.name}, {case.column}: fewer than {max(config.k)} training spots of "
            f"{rare}; few-shot curves take all of them"
        )
    test = test.only(np.isin(test.y, np.unique(train.y)))
    unit = "balanced accuracy per test patient and draw of the labelled spots"
    for one in few_shot_scores(train, test, fold.seed, config):
        key = fold.key(f"{one.patient}:{case.column}:draw{one.draw}")
        measure = Measure(f"{case.modality}/few_shot@{one.k}", unit, words=(FEW_SHOT,))
        table.add(case.model, measure, key, one.value, one.chance)


def _thinned(train: Labelled, fold: Fold, config: AnnotationConfig, table: ResultTable) -> Labelled:
    if len(train.y) <= config.max_train_spots:
        return train
    table.note(
        f"fold {fold.name}: {config.max_train_spots} of {len(train.y)} labelled training spots "
        "are used (drawn at random)"
    )
    pick = np.random.default_rng(fold.seed).permutation(len(train.y))[: config.max_train_spots]
    return train.only(np.sort(pick))
