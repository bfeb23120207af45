"""Clinical outcome of patients never seen, from frozen embeddings (docs/method.md 6.6).

A patient is the bag of spots of their slides. ``<modality>/mean/...``: mean of the spots, then a
logistic regression with an inner choice of C; ``<modality>/attention/...``: gated attention over
the spots (`eval.tasks.patients`). Encoder and read-out are fitted on training patients only. The
probabilities of all folds of a seed are pooled into one AUROC, with a bootstrap interval over
patients (``auroc_low``, ``auroc_high``); every patient's probability is kept. ``pseudobulk`` (mean
expression) and ``cohort_facts`` (number of spots, depth) are rows that no model is needed for.

Outcomes ``TIME;EVENT`` in the manifest are survival times: ``<modality>/mean/c_index``
is a ridge Cox model on the patients' means, its penalty chosen on training patients; the log
hazards of the test patients, each against its fold's mean training patient, are pooled into one
Harrell C-index in the same way. Attention pooling is for classes only.
Shapes: P patients, D dimensions, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eval.folds.fold import MODALITIES, Fold
from eval.measures.intervals import auroc_interval
from eval.measures.metrics import WORDS, balanced_accuracy, macro_auroc
from eval.measures.survival import (
    concordance_index,
    concordance_interval,
    cox_risk,
    is_survival,
    survival_of,
)
from eval.results import Better, Measure, Question, ResultTable, TaskResult
from eval.tasks.patients import (
    AttentionPoolConfig,
    Patients,
    ProbeConfig,
    cohort_facts,
    constant_features,
    embedded_patients,
    fit_attention_pool,
    patient_outcomes,
    probe_probabilities,
    pseudobulk,
)
from hibio.config.schema import Count, Folds, Level, Positive

QUESTION = Question(
    "outcome",
    "Slide embeddings predict a patient-level outcome of patients not fitted on.",
    (
        "omics/mean/c_index",
        "omics/mean/c_index_low",
        "omics/mean/c_index_high",
        "omics/mean/auroc",
        "omics/attention/auroc",
        "omics/mean/auroc_low",
        "omics/mean/auroc_high",
        "omics/attention/auroc_low",
        "omics/attention/auroc_high",
        "image/mean/auroc",
        "image/attention/auroc",
    ),
)
POOLING_WORDS = {
    "mean": "mean: the patient is the mean of the embeddings of its spots",
    "attention": "attention: the patient is a learned weighted mean of its spots",
}
SCORE_WORDS = {
    "auroc": WORDS["auroc"],
    "auroc_low": "auroc_low, auroc_high: 95 % bootstrap interval over patients",
    "auroc_high": "auroc_low, auroc_high: 95 % bootstrap interval over patients",
    "balanced_accuracy": WORDS["balanced_accuracy"],
    "c_index": "c_index: share of comparable pairs in the right order, 0.5 is chance",
    "c_index_low": "c_index_low, c_index_high: 95 % bootstrap interval over patients",
    "c_index_high": "c_index_low, c_index_high: 95 % bootstrap interval over patients",
    "log_hazard": "log_hazard: predicted risk of a test patient, higher is earlier",
    "probability_of_outcome": "probability_of_outcome: what the true class of a test patient was "
    "given",
}
TABLES = {"pseudobulk": pseudobulk, "cohort_facts": cohort_facts}
HAZARD_UNIT = (
    "log hazard per test patient against the mean training patient; the key ends in the time"
)
FEW = 10  # test patients of a class; below, the interval says too little

Values = Mapping[str, tuple[float, str, float | None]]  # score -> value, unit, chance


@dataclass(frozen=True)
class SurvivalConfig:
    """Settings of the Cox read-out.

    Args:
        min_events: training patients with an event that a fold needs.
        grid: penalties.
        n_folds: most inner folds.
        level: coverage of the interval.
        draws: of the bootstrap.
    """

    min_events: Count = 3
    grid: tuple[Positive, ...] = (0.01, 0.1, 1.0)
    n_folds: Folds = 4
    level: Level = 0.95
    draws: Count = 1000


@dataclass(frozen=True)
class OutcomeConfig:
    """Settings of the outcome task.

    Args:
        min_train: training patients of each class that a fold needs.
        probe: the logistic regression on means.
        attention: the attention pool.
        level: coverage of the interval.
        draws: of the bootstrap.
        survival: of outcomes that are survival times.
    """

    min_train: Count = 2
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    attention: AttentionPoolConfig = field(default_factory=AttentionPoolConfig)
    level: Level = 0.95
    draws: Count = 2000
    survival: SurvivalConfig = field(default_factory=SurvivalConfig)


@dataclass(frozen=True)
class Predicted:
    """Probabilities (P, C) of the test patients of one fold, by the name of the pooling."""

    fold: Fold
    patients: tuple[str, ...]
    by_pooling: dict[str, np.ndarray]


def run(folds: Sequence[Fold], config: OutcomeConfig) -> TaskResult:
    """Predict the outcome of every fold's test patients; score all folds of one seed together."""
    table = ResultTable(QUESTION)
    table.row("pseudobulk", "baseline", "mean expression of the patient")
    table.row("cohort_facts", "control", "number of spots and mean depth, no expression")
    outcomes = patient_outcomes([s for fold in folds for s in (*fold.train, *fold.test)])
    if is_survival(outcomes):
        _add_survival(table, folds, outcomes, config.survival)
        return table.result([model for fold in folds for model in fold.models])
    classes = sorted(set(outcomes.values()))
    if len(classes) < 2:
        table.note(
            f"{len(outcomes)} patients with an outcome, {len(classes)} different; not run: two "
            "are needed (column outcome of the manifest, then prepare again)"
        )
        return table.result()
    usable = [
        fold
        for fold in folds
        if _enough_of_each(fold, outcomes, classes, config.min_train, table)
        and _anybody_to_test(fold, outcomes, table)
    ]
    for name, modality in _rows(usable, table) if usable else ():
        found = [predict(fold, name, modality, outcomes, classes, config) for fold in usable]
        for one in (one for one in found if not one.patients):
            table.note(
                f"fold {one.fold.name}, {name}, {modality}: no test patient or fewer than "
                f"{config.min_train} training patients a class with this modality; left out"
            )
        found = [one for one in found if one.patients]
        if found:
            _add_classes(table, (name, modality), found, outcomes, config)
    return table.result([model for fold in usable for model in fold.models])


def predict(
    fold: Fold,
    name: str,
    modality: str,
    outcomes: dict[str, str],
    classes: Sequence[str],
    config: OutcomeConfig,
) -> Predicted:
    """Probabilities of the test patients of one fold; their own outcomes are never looked at.

    Args:
        fold: the split.
        name: a model of the fold, ``pseudobulk`` or ``cohort_facts``.
        modality: ``omics`` or ``image``.
        outcomes: patient -> class; of the test patients only the names are used.
        classes: the C classes in column order.
        config: settings.

    Returns:
        No patients where the fold has none with this modality, or too few to train on.
    """
    sides = _sides(fold, name, modality, outcomes, config.attention.max_spots)
    if sides is None:
        return Predicted(fold, (), {})
    train, test = sides
    label = np.array([classes.index(outcomes[patient]) for patient in train.names], dtype=np.int64)
    if np.bincount(label, minlength=len(classes)).min() < config.min_train or not test.names:
        return Predicted(fold, (), {})
    found = {}
    if not constant_features(train.vectors, train.spread).all():
        found["mean"] = probe_probabilities(
            train.vectors, label, test.vectors, config.probe, train.spread, fold.seed
        )
    if train.bags:
        pool = fit_attention_pool(train.bags, label, len(classes), fold.seed, config.attention)
        found["attention"] = pool.predict(test.bags)
    return Predicted(fold, test.names, found)


def fold_risk(
    fold: Fold, name: str, modality: str, outcomes: Mapping[str, str], config: SurvivalConfig
) -> dict[str, float]:
    """Log hazard of each test patient of a fold; their own outcomes are never looked at.

    Returns:
        Empty where the fold has no test patient with this modality, too few training events, or
        the same mean for all patients (embeddings standardised per slide).
    """
    sides = _sides(fold, name, modality, dict(outcomes), 1)
    if sides is None or not sides[1].names:
        return {}
    train, test = sides
    known = survival_of(outcomes, train.names)
    if int(known.event.sum()) < config.min_events:
        return {}
    keep = ~constant_features(train.vectors, train.spread)
    if not keep.any():
        return {}
    own, others = train.vectors[:, keep], test.vectors[:, keep]
    risk = cox_risk(own, known, others, config.grid, config.n_folds)
    return dict(zip(test.names, risk.tolist(), strict=True))


def _sides(
    fold: Fold, name: str, modality: str, outcomes: dict[str, str], most: int
) -> tuple[Patients, Patients] | None:
    """Training (bags of ``most`` spots a slide) and test patients of a row, where both exist."""
    if name in TABLES:
        return TABLES[name](fold.train, outcomes), TABLES[name](fold.test, outcomes)
    model = fold.model(name)
    train = embedded_patients(model, modality, fold.train, outcomes, most, fold.seed)
    test = embedded_patients(model, modality, fold.test, outcomes, None, fold.seed)
    return None if train is None or test is None else (train, test)


def _rows(folds: Sequence[Fold], table: ResultTable) -> list[tuple[str, str]]:
    """Every (model, modality) that all folds have, then the tables that need no model."""
    rows = []
    for name in dict.fromkeys(m.name for fold in folds for m in fold.models):
        for modality in MODALITIES:
            have = [f for f in folds if _has(f, name, modality)]
            if len(have) == len(folds):
                rows.append((name, modality))
            elif have:
                table.note(
                    f"{name}, {modality}: only {len(have)} of {len(folds)} folds have it, so "
                    "its probabilities are not pooled; not run"
                )
    return rows + [(name, "omics") for name in TABLES]


def _has(fold: Fold, name: str, modality: str) -> bool:
    return fold.has_model(name) and getattr(fold.model(name), modality) is not None


def _enough_of_each(
    fold: Fold,
    outcomes: Mapping[str, str],
    classes: Sequence[str],
    min_train: int,
    table: ResultTable,
) -> bool:
    """Whether a fold has enough training patients of each class."""
    held = [outcomes[p] for p in {s.patient_id for s in fold.train} if p in outcomes]
    least, name = min((held.count(name), name) for name in classes)
    if least < min_train:
        table.note(
            f"fold {fold.name}: {least} training patients with the outcome {name!r}, "
            f"{min_train} are needed; not run"
        )
    return least >= min_train


def _enough_events(
    fold: Fold, outcomes: Mapping[str, str], min_events: int, table: ResultTable
) -> bool:
    """Whether a fold has enough training patients with an event."""
    train = tuple(sorted({s.patient_id for s in fold.train} & set(outcomes)))
    events = int(survival_of(outcomes, train).event.sum()) if train else 0
    if events < min_events:
        table.note(
            f"fold {fold.name}: {events} training patients with an event, {min_events} are "
            "needed; not run"
        )
    return events >= min_events


def _anybody_to_test(fold: Fold, outcomes: Mapping[str, str], table: ResultTable) -> bool:
    found = any(slide.patient_id in outcomes for slide in fold.test)
    if not found:
        table.note(f"fold {fold.name}: no test patient has an outcome; not run")
    return found


def _add_survival(
    table: ResultTable, folds: Sequence[Fold], outcomes: Mapping[str, str], config: SurvivalConfig
) -> None:
    """Score every model that all folds have, then the tables that need no model."""
    usable = [
        fold
        for fold in folds
        if _enough_events(fold, outcomes, config.min_events, table)
        and _anybody_to_test(fold, outcomes, table)
    ]
    for name, modality in _rows(usable, table) if usable else ():
        risks: dict[str, float] = {}
        keys: dict[str, str] = {}
        for fold in usable:
            found = fold_risk(fold, name, modality, outcomes, config)
            risks |= found
            keys |= {patient: f"{fold.key(patient)}:{outcomes[patient]}" for patient in found}
        if not risks:
            table.note(
                f"{name}, {modality}: no test patient with this modality, or the mean over spots "
                "is the same for all patients (standardised per slide); left out"
            )
            continue
        seed, names = usable[0].seed, tuple(risks)
        truth, risk = survival_of(outcomes, names), np.array([risks[name] for name in names])
        ends = concordance_interval(truth, risk, config.level, config.draws, seed)
        pooled = f"pooled/{seed}/{len(names)} patients, {int(truth.event.sum())} events"
        value, unit = concordance_index(truth, risk), "C-index of pooled log hazards"
        values = _with_interval("c_index", unit, value, ends, config.level)
        _add_values(table, (name, modality, "mean"), pooled, values)
        for patient in names:
            hazard = {"log_hazard": (risks[patient], HAZARD_UNIT, None)}
            _add_values(table, (name, modality, "mean"), keys[patient], hazard)


def _measure(modality: str, pooling: str, score: str, unit: str) -> Measure:
    """A score of the patients; a risk, or the probability of a class, ranks no model."""
    known = [text for text in (POOLING_WORDS[pooling], SCORE_WORDS.get(score)) if text]
    ranks = score in SCORE_WORDS and score != "log_hazard"
    better: Better = "high" if ranks else "none"
    return Measure(f"{modality}/{pooling}/{score}", unit, better, tuple(known))


def _with_interval(
    score: str, unit: str, value: float, ends: tuple[float, float], level: float
) -> Values:
    """A pooled score whose chance is 0.5, and the ends of its interval."""
    over = f"end of its {100 * level:g} % interval over patients"
    return {
        score: (value, unit, 0.5),
        f"{score}_low": (ends[0], f"lower {over}", None),
        f"{score}_high": (ends[1], f"upper {over}", None),
    }


def _add_values(table: ResultTable, where: tuple[str, str, str], key: str, values: Values) -> None:
    """Add scores of one model, modality and pooling under one key."""
    model, modality, pooling = where
    for score, (value, unit, chance) in values.items():
        table.add(model, _measure(modality, pooling, score, unit), key, value, chance)


def _add_classes(
    table: ResultTable,
    row: tuple[str, str],
    found: Sequence[Predicted],
    outcomes: dict[str, str],
    config: OutcomeConfig,
) -> None:
    """Score the pooled probabilities of one model and modality."""
    classes = sorted(set(outcomes.values()))
    patients = [patient for one in found for patient in one.patients]
    truth = np.array([outcomes[patient] for patient in patients])
    keys = [f"{one.fold.key(p)}:{outcomes[p]}" for one in found for p in one.patients]
    seed = found[0].fold.seed
    pooled = f"pooled/{seed}/{len(patients)} patients"
    few = [f"{name}: {n}" for name in classes if (n := int((truth == name).sum())) < FEW]
    if few:
        table.note(
            f"seed {seed}: few test patients with an outcome ({', '.join(few)}); the "
            "interval cannot show how uncertain so few are, and 1 to 1 or 0 to 0 is no certainty"
        )
    poolings = [p for p in POOLING_WORDS if all(p in one.by_pooling for one in found)]
    if "mean" not in poolings:
        table.note(
            f"{row[0]}, {row[1]}: the mean over spots is the same for all patients (standardised "
            "per slide); mean pooling not run"
        )
    for pooling in poolings:
        score = np.concatenate([one.by_pooling[pooling] for one in found])
        ends = auroc_interval(truth, score, classes, patients, config.level, config.draws)
        value, unit = macro_auroc(truth, score, classes), "AUROC of pooled probabilities"
        balanced = balanced_accuracy(truth, np.array(classes)[score.argmax(axis=1)])
        chance, of = 1.0 / len(set(truth.tolist())), "balanced accuracy of the likeliest class"
        values: Values = {
            **_with_interval("auroc", unit, value, ends, config.level),
            "balanced_accuracy": (balanced, of, chance),
        }
        _add_values(table, (*row, pooling), pooled, values)
        _add_probabilities(table, (*row, pooling), keys, score, truth, classes)


def _add_probabilities(
    table: ResultTable,
    where: tuple[str, str, str],
    keys: Sequence[str],
    score: np.ndarray,
    truth: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Every patient's probability: of the true class and, beyond two classes, of each class."""
    columns = {"probability_of_outcome": [list(classes).index(name) for name in truth]}
    if len(classes) > 2:
        columns |= {f"probability_{name}": [c] * len(truth) for c, name in enumerate(classes)}
    unit = "probability per test patient; the key ends in the outcome"
    for name, column in columns.items():
        chance = 1.0 / len(classes) if name == "probability_of_outcome" else None
        for key, value in zip(keys, score[np.arange(len(truth)), column], strict=True):
            _add_values(table, where, key, {name: (value, unit, chance)})
