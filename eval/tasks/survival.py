"""Survival of patients never seen, from the mean of their spots (METHOD section 6.6).

Where the manifest's outcomes are ``TIME;EVENT`` (`eval.survival`). ``<modality>/mean/c_index``: a
ridge Cox model on the patients' mean embeddings, its penalty chosen on training patients; the log
hazards of the test patients of all folds of a seed, each against its fold's mean training patient,
are pooled into one Harrell C-index with a bootstrap interval over patients. Every patient's risk is
kept. Attention pooling is for classes only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.fold import Fold
from eval.patient_probe import constant_features
from eval.patients import Patients, cohort_facts, embedded_patients, pseudobulk
from eval.results import ResultTable
from eval.survival import (
    concordance_index,
    concordance_interval,
    cox_risk,
    survival_of,
)

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
    where = f"{row[1]}/mean/"
    for name, (value, unit, chance) in values.items():
        table.add(row[0], where + name, pooled, value, unit, chance)
    unit = "log hazard per test patient against the mean training patient; the key ends in the time"
    for name in names:
        table.add(row[0], where + "log_hazard", keys[name], risks[name], unit)
