"""Clinical outcome of patients never seen, from frozen embeddings (docs/method.md 6.6).

Where the manifest's outcomes are ``TIME;EVENT``: ``<modality>/mean/c_index``: a
ridge Cox model on the patients' mean embeddings, its penalty chosen on training patients; the log
hazards of the test patients of all folds of a seed, each against its fold's mean training patient,
are pooled into one Harrell C-index with a bootstrap interval over patients. Every patient's risk is
kept. Attention pooling is for classes only.

A patient is the bag of spots of their slides. ``<modality>/mean/...``: mean of the spots, then a
logistic regression with an inner choice of C; ``<modality>/attention/...``: gated attention over
the spots (`eval.tasks.patients`). Encoder and read-out are fitted on training patients only. The
probabilities of all folds of a seed are pooled into one AUROC, with a bootstrap interval over
patients (``auroc_low``, ``auroc_high``); every patient's probability is kept. ``pseudobulk`` (mean
expression) and ``cohort_facts`` (number of spots, depth) are rows that no model is needed for.
Outcomes ``TIME;EVENT`` are survival times: see `eval.tasks.outcome` (C-index).

Shapes: P patients, D dimensions, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eval.folds.fold import Fold
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


def _measure(modality: str, pooling: str, score: str, unit: str) -> Measure:
    """A score of the patients; a risk, or the probability of a class, ranks no model."""
    known = [text for text in (POOLING_WORDS[pooling], SCORE_WORDS.get(score)) if text]
    ranks = score in SCORE_WORDS and score != "log_hazard"
    better: Better = "high" if ranks else "none"
    return Measure(f"{modality}/{pooling}/{score}", unit, better, tuple(known))


def _declare_tables(table: ResultTable) -> None:
    table.row("pseudobulk", "baseline", "mean expression of the patient")
    table.row("cohort_facts", "control", "number of spots and mean depth, no expression")


TABLES = {"pseudobulk": pseudobulk, "cohort_facts": cohort_facts}

MODALITIES = ("omics", "image")


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

    min_events: int = 3
    grid: tuple[float, ...] = (0.01, 0.1, 1.0)
    n_folds: int = 4
    level: float = 0.95
    draws: int = 1000


def add_survival(
    table: ResultTable, folds: Sequence[Fold], outcomes: Mapping[str, str], config: SurvivalConfig
) -> None:
    """Score every model that all folds have, then the tables that need no model.

    Args:
        table: of the outcome task.
        folds: all folds of one seed.
        outcomes: patient -> ``TIME;EVENT``.
        config: settings.
    """
    usable = [fold for fold in folds if _enough(fold, outcomes, config, table)]
    for name, modality in _rows(usable):
        risks: dict[str, float] = {}
        keys: dict[str, str] = {}
        for fold in usable:
            found = fold_risk(fold, name, modality, outcomes, config)
            risks |= found
            keys |= {patient: f"{fold.key(patient)}:{outcomes[patient]}" for patient in found}
        if risks:
            _add(table, (name, modality), usable[0].seed, risks, keys, outcomes, config)
        else:
            table.note(
                f"{name}, {modality}: no test patient with this modality, or the mean over spots "
                "is the same for all patients (standardised per slide); left out"
            )


def fold_risk(
    fold: Fold, name: str, modality: str, outcomes: Mapping[str, str], config: SurvivalConfig
) -> dict[str, float]:
    """Log hazard of each test patient of a fold; their own outcomes are never looked at.

    Returns:
        Empty where the fold has no test patient with this modality, too few training events, or
        the same mean for all patients (embeddings standardised per slide).
    """
    sides = [_patients(fold, name, modality, side, dict(outcomes)) for side in ("train", "test")]
    train, test = sides
    if train is None or test is None or not test.names:
        return {}
    known = survival_of(outcomes, train.names)
    if int(known.event.sum()) < config.min_events:
        return {}
    keep = ~constant_features(train.vectors, train.spread)
    if not keep.any():
        return {}
    own, others = train.vectors[:, keep], test.vectors[:, keep]
    risk = cox_risk(own, known, others, config.grid, config.n_folds)
    return dict(zip(test.names, risk.tolist(), strict=True))


def _patients(
    fold: Fold, name: str, modality: str, side: str, outcomes: dict[str, str]
) -> Patients | None:
    slides = fold.train if side == "train" else fold.test
    if name in TABLES:
        return TABLES[name](slides, outcomes)
    return embedded_patients(fold.model(name), modality, slides, outcomes, 1, fold.seed)


def _enough(
    fold: Fold, outcomes: Mapping[str, str], config: SurvivalConfig, table: ResultTable
) -> bool:
    """Whether a fold has enough training patients with an event and a test patient."""
    train = tuple(sorted({s.patient_id for s in fold.train} & set(outcomes)))
    events = int(survival_of(outcomes, train).event.sum()) if train else 0
    if events < config.min_events:
        table.note(
            f"fold {fold.name}: {events} training patients with an event, {config.min_events} are "
            "needed; not run"
        )
        return False
    if not {s.patient_id for s in fold.test} & set(outcomes):
        table.note(f"fold {fold.name}: no test patient has an outcome; not run")
        return False
    return True


def _rows(folds: Sequence[Fold]) -> list[tuple[str, str]]:
    """Every (model, modality) that all folds have, then the tables."""
    rows = [
        (name, modality)
        for name in dict.fromkeys(m.name for fold in folds for m in fold.models)
        for modality in MODALITIES
        if all(_has(fold, name, modality) for fold in folds)
    ]
    return rows + [(name, "omics") for name in TABLES] if folds else []


def _has(fold: Fold, name: str, modality: str) -> bool:
    if not fold.has_model(name):
        return False
    model = fold.model(name)
    return (model.image if modality == "image" else model.omics) is not None


def _add(
    table: ResultTable,
    row: tuple[str, str],
    seed: int,
    risks: Mapping[str, float],
    keys: Mapping[str, str],
    outcomes: Mapping[str, str],
    config: SurvivalConfig,
) -> None:
    names = tuple(risks)
    truth, risk = survival_of(outcomes, names), np.array([risks[name] for name in names])
    low, high = concordance_interval(truth, risk, config.level, config.draws, seed)
    percent = f"{100 * config.level:g} %"
    pooled = f"pooled/{seed}/{len(names)} patients, {int(truth.event.sum())} events"
    values = {
        "c_index": (concordance_index(truth, risk), "C-index of pooled log hazards", 0.5),
        "c_index_low": (low, f"lower end of its {percent} interval over patients", None),
        "c_index_high": (high, f"upper end of its {percent} interval over patients", None),
    }
    for name, (value, unit, chance) in values.items():
        table.add(row[0], _measure(row[1], "mean", name, unit), pooled, value, chance)
    unit = "log hazard per test patient against the mean training patient; the key ends in the time"
    measure = _measure(row[1], "mean", "log_hazard", unit)
    for name in names:
        table.add(row[0], measure, keys[name], risks[name])


FEW = 10

POOLINGS = ("mean", "attention")

TABLES_outcome: dict[str, Callable[..., Patients]] = {
    "pseudobulk": pseudobulk,
    "cohort_facts": cohort_facts,
}


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

    min_train: int = 2
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    attention: AttentionPoolConfig = field(default_factory=AttentionPoolConfig)
    level: float = 0.95
    draws: int = 2000
    survival: SurvivalConfig = field(default_factory=SurvivalConfig)


@dataclass(frozen=True)
class Predicted:
    """Probabilities (P, C) of the test patients of one fold, by the name of the pooling."""

    fold: Fold
    patients: tuple[str, ...]
    by_pooling: dict[str, np.ndarray]


def run(folds: Sequence[Fold], config: OutcomeConfig) -> TaskResult:
    """Predict the outcome of every fold's test patients and score all folds together.

    Args:
        folds: all folds of one seed.
        config: settings.
    """
    table = ResultTable(QUESTION)
    _declare_tables(table)
    outcomes = patient_outcomes([s for fold in folds for s in (*fold.train, *fold.test)])
    if is_survival(outcomes):
        add_survival(table, folds, outcomes, config.survival)
        return table.result([model for fold in folds for model in fold.models])
    classes = sorted(set(outcomes.values()))
    if len(classes) < 2:
        table.note(
            f"{len(outcomes)} patients with an outcome, {len(classes)} different; not run: two "
            "are needed (column outcome of the manifest, then prepare again)"
        )
        return table.result()
    usable = [fold for fold in folds if _enough_outcome(fold, outcomes, classes, config, table)]
    for name, modality in _rows_outcome(usable, table) if usable else ():
        found = [predict(fold, name, modality, outcomes, classes, config) for fold in usable]
        for one in (one for one in found if not one.patients):
            table.note(
                f"fold {one.fold.name}, {name}, {modality}: no test patient or fewer than "
                f"{config.min_train} training patients a class with this modality; left out"
            )
        _add_outcome(
            table, (name, modality), [one for one in found if one.patients], outcomes, config
        )
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
    sides = _sides(fold, name, modality, outcomes, config)
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


def _sides(
    fold: Fold, name: str, modality: str, outcomes: dict[str, str], config: OutcomeConfig
) -> tuple[Patients, Patients] | None:
    """Training and test patients of a row; None when one side has none with this modality."""
    if name in TABLES_outcome:
        return TABLES_outcome[name](fold.train, outcomes), TABLES_outcome[name](fold.test, outcomes)
    model, most = fold.model(name), config.attention.max_spots
    train = embedded_patients(model, modality, fold.train, outcomes, most, fold.seed)
    test = embedded_patients(model, modality, fold.test, outcomes, None, fold.seed)
    return None if train is None or test is None else (train, test)


def _enough_outcome(
    fold: Fold,
    outcomes: dict[str, str],
    classes: Sequence[str],
    config: OutcomeConfig,
    table: ResultTable,
) -> bool:
    """Whether a fold has test patients with an outcome, and enough training patients of each."""
    train = {slide.patient_id for slide in fold.train}
    held = [outcomes[p] for p in train if p in outcomes]
    least = min((held.count(name), name) for name in classes)
    if least[0] < config.min_train:
        table.note(
            f"fold {fold.name}: {least[0]} training patients with the outcome {least[1]!r}, "
            f"{config.min_train} are needed; not run"
        )
        return False
    if not any(slide.patient_id in outcomes for slide in fold.test):
        table.note(f"fold {fold.name}: no test patient has an outcome; not run")
        return False
    return True


def _rows_outcome(folds: Sequence[Fold], table: ResultTable) -> list[tuple[str, str]]:
    """Every (model, modality) that all folds have, then the tables that need no model."""
    rows = []
    for model in {m.name: m for fold in folds for m in fold.models}.values():
        for modality in MODALITIES:
            have = [fold.name for fold in folds if _has(fold, model.name, modality)]
            if len(have) == len(folds):
                rows.append((model.name, modality))
            elif have:
                table.note(
                    f"{model.name}, {modality}: only {len(have)} of {len(folds)} folds have it, so "
                    "its probabilities are not pooled; not run"
                )
    return rows + [(name, "omics") for name in TABLES_outcome]


def _add_outcome(
    table: ResultTable,
    row: tuple[str, str],
    found: Sequence[Predicted],
    outcomes: dict[str, str],
    config: OutcomeConfig,
) -> None:
    """Score the pooled probabilities of one model and modality."""
    if not found:
        return
    classes = sorted(set(outcomes.values()))
    patients = [patient for one in found for patient in one.patients]
    truth = np.array([outcomes[patient] for patient in patients])
    keys = [f"{one.fold.key(p)}:{outcomes[p]}" for one in found for p in one.patients]
    pooled = f"pooled/{found[0].fold.seed}/{len(patients)} patients"
    few = [f"{name}: {n}" for name in classes if (n := int((truth == name).sum())) < FEW]
    if few:
        table.note(
            f"seed {found[0].fold.seed}: few test patients with an outcome ({', '.join(few)}); the "
            "interval cannot show how uncertain so few are, and 1 to 1 or 0 to 0 is no certainty"
        )
    poolings = [p for p in POOLINGS if all(p in one.by_pooling for one in found)]
    if "mean" not in poolings:
        table.note(
            f"{row[0]}, {row[1]}: the mean over spots is the same for all patients (standardised "
            "per slide); mean pooling not run"
        )
    for pooling in poolings:
        score = np.concatenate([one.by_pooling[pooling] for one in found])
        low, high = auroc_interval(truth, score, classes, patients, config.level, config.draws)
        percent = f"{100 * config.level:g} %"
        predicted = np.array(classes)[score.argmax(axis=1)]
        values = {
            "auroc": (macro_auroc(truth, score, classes), "AUROC of pooled probabilities", 0.5),
            "auroc_low": (low, f"lower end of its {percent} interval over patients", None),
            "auroc_high": (high, f"upper end of its {percent} interval over patients", None),
            "balanced_accuracy": (
                balanced_accuracy(truth, predicted),
                "balanced accuracy of the likeliest class",
                1.0 / len(set(truth.tolist())),
            ),
        }
        for name, (value, unit, chance) in values.items():
            table.add(row[0], _measure(row[1], pooling, name, unit), pooled, value, chance)
        _add_probabilities(table, (*row, pooling), keys, score, truth, classes)


def _add_probabilities(
    table: ResultTable,
    row: tuple[str, str, str],
    keys: Sequence[str],
    score: np.ndarray,
    truth: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Every patient's probability: of the true class and, beyond two classes, of each class."""
    columns = {"probability_of_outcome": [list(classes).index(name) for name in truth]}
    if len(classes) > 2:
        columns |= {f"probability_{name}": [c] * len(truth) for c, name in enumerate(classes)}
    for name, column in columns.items():
        chance = 1.0 / len(classes) if name == "probability_of_outcome" else None
        unit = "probability per test patient; the key ends in the outcome"
        measure = _measure(*row[1:], name, unit)
        for key, value in zip(keys, score[np.arange(len(truth)), column], strict=True):
            table.add(row[0], measure, key, value, chance)
