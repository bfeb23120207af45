"""The read-out of a checkpoint: fitted, and measured on training patients held out in turn.

It is ridge from [stored features that the tower reads, image embedding], one penalty for all genes
by the rule of `eval.measures.ridge`, fitted once to the training slides and kept in the checkpoint
(docs/predict.md). The encoder was trained on all of these patients, and its embedding of them looks
better than that of a new patient; so what is measured is measured with the same ridge from their
stored features alone, which no training touched.

Shapes: S spots, F inputs, T genes or gene sets, U units held out (patients).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import t as student
from tqdm import tqdm

from eval.embed import Checkpoint, checked, image_embedding
from eval.measures.inner_folds import MIN_UNITS, group_folds, inner_groups
from eval.measures.metrics import pearson_per_gene
from eval.measures.ridge import (
    Moments,
    RidgeConfig,
    Targets,
    choose_alpha,
    inner_predictions,
    ridge_weights,
)
from eval.predict.labels import fit_labels
from eval.query import gene_sets
from hibio.bank import bank_spots, read_bank
from hibio.checkpoint import BANK, READOUT, add_checksum
from hibio.config.files import ConfigError
from hibio.config.model import PATCHES
from hibio.data.counts import align_columns
from hibio.data.splits import SlideEntry, read_entries
from hibio.data.stored_features import standardise_columns
from hibio.readout import (
    GENE,
    GENE_SET,
    LabelProbe,
    Look,
    Readout,
    distances,
    read_readout,
    write_readout,
)
from preprocessing.run.preparation import HANDCRAFTED
from preprocessing.selection import normalised
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from preprocessing.store.write import feature_origin

COVERAGE = 0.9  # of the interval of a spot
BLOCK = 512  # genes at once
UNTRAINED_AXES = 64  # of the stored features, for what is held out
AXES, REFERENCE, DRAWN = 16, 4000, 400  # of `Look`; held-out spots drawn from a unit


@dataclass(frozen=True)
class TrainingRows:
    """Training spots: inputs (S, F) by slide, and what tells the inner folds apart.

    Attributes:
        x: (S, F) inputs, standardised within each slide.
        untrained: (S, P) principal axes of the stored features, standardised within each slide.
        slides: (S,) names.
        groups: (S,) what is held out whole.
        penalty_groups: (S,) what the inner folds of the penalty never split.
        unit: what a group is: patients, slides or blocks.
    """

    x: np.ndarray
    untrained: np.ndarray
    slides: np.ndarray
    groups: np.ndarray
    penalty_groups: np.ndarray
    unit: str

    @staticmethod
    def of(
        x: np.ndarray,
        untrained: np.ndarray,
        patients: np.ndarray,
        slides: np.ndarray,
        xy_um: np.ndarray,
    ) -> TrainingRows:
        """Rows with the inner folds that they allow.

        Two patients are enough to hold one out: slides of one patient would say too much of
        another. The penalty, which needs an error, is chosen over slides then (`inner_groups`).
        """
        chosen_on = inner_groups(patients, slides, xy_um).astype(str)
        several = len(set(patients.tolist())) > 1
        unit = "slides" if len(set(slides.tolist())) > 1 else "blocks"
        groups = patients if several else chosen_on
        return TrainingRows(
            x, untrained, slides, groups, chosen_on, "patients" if several else unit
        )


def fit_readout(
    rows: TrainingRows,
    y: np.ndarray | sparse.spmatrix,
    names: Sequence[str] | np.ndarray,
    *,
    kind: str = GENE,
    choose_on: np.ndarray | None = None,
    coverage: float = COVERAGE,
) -> Readout:
    """Fit the linear maps, and measure each on the units that were held out in turn.

    Args:
        rows: training spots.
        y: (S, T) targets of the spots.
        names: (T,).
        kind: `GENE` or `GENE_SET`.
        choose_on: targets that choose the penalty; all when None.
        coverage: share of a new patient's spots that the interval should hold.
    """
    config = RidgeConfig()
    fold_of = group_folds(rows.groups, config.n_folds)
    x, untrained = (one - one.mean(axis=0) for one in (rows.x, rows.untrained))
    y = sparse.csc_matrix(y) if sparse.issparse(y) else np.asarray(y)
    chosen = np.arange(y.shape[1]) if choose_on is None else choose_on
    z = Targets.of(_dense(y, chosen), rows.slides).z
    alpha, alpha_held_out = (
        choose_alpha(one, z, rows.penalty_groups, rows.slides, config) for one in (x, untrained)
    )
    parts: list[dict[str, np.ndarray]] = []
    for start in tqdm(range(0, y.shape[1], BLOCK), desc="read-out", disable=None, leave=False):
        block = _dense(y, np.arange(start, min(start + BLOCK, y.shape[1])))
        targets = Targets.of(block, rows.slides)
        weights = ridge_weights(Moments.of(x, targets.z), [alpha])[0]
        held_out = inner_predictions(untrained, targets.z, fold_of, alpha_held_out)
        width, covered = half_widths(
            np.abs(block - targets.back(held_out)), rows.groups, fold_of, coverage
        )
        parts.append(
            {
                "weights": weights.astype(np.float32).T,
                "mean": targets.mean,
                "spread": targets.spread,
                **reliabilities(held_out, block, rows),
                "width": width,
                "covered": covered,
            }
        )
    found: dict[str, Any] = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    found["weights"] = found["weights"].T
    found |= {"kinds": np.full(y.shape[1], kind), "ids": np.full(y.shape[1], "")}
    return Readout(np.asarray(names), unit=rows.unit, coverage=coverage, **found)


def _dense(y: np.ndarray | sparse.csc_matrix, columns: np.ndarray) -> np.ndarray:
    part: Any = y[:, columns]
    return np.asarray(part.toarray() if sparse.issparse(part) else part, dtype=np.float64)


def reliabilities(
    held_out: np.ndarray, truth: np.ndarray, rows: TrainingRows
) -> dict[str, np.ndarray]:
    """Pearson r (T,) within slides, mean over the slides of a unit, then over units.

    Returns:
        reliability, low and high (95 % by Student's t over at least three units, else NaN), and
        n_units that have a value.
    """
    by_unit = []
    for unit in np.unique(rows.groups):
        own = rows.groups == unit
        slides = [own & (rows.slides == slide) for slide in np.unique(rows.slides[own])]
        by_unit.append(_mean([pearson_per_gene(held_out[one], truth[one]) for one in slides]))
    mean, low, high, n = over_units(np.array(by_unit))
    return {"reliability": mean, "low": low, "high": high, "n_units": n}


def over_units(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean (T,) of the units (U, T) that have a value, its 95 % interval, and how many they are."""
    n = np.isfinite(table).sum(axis=0)
    mean = _mean(table)
    square = np.where(np.isfinite(table), (table - mean) ** 2, 0.0).sum(axis=0)
    error = np.sqrt(square / np.maximum(n - 1, 1) / np.maximum(n, 1))
    reach = np.where(n >= MIN_UNITS, error * student.ppf(0.975, np.maximum(n - 1, 1)), np.nan)
    return mean, np.maximum(mean - reach, -1.0), np.minimum(mean + reach, 1.0), n


def _mean(values: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Mean of the values that are there; NaN without any."""
    table = np.array(values)
    n = np.isfinite(table).sum(axis=0)
    return np.asarray(np.where(n, np.nansum(table, axis=0) / np.maximum(n, 1), np.nan))


def half_widths(
    residual: np.ndarray, groups: np.ndarray, fold_of: np.ndarray, coverage: float
) -> tuple[np.ndarray, np.ndarray]:
    """Half width (T,) of the interval of a new patient's spot, and how often it held.

    The quantile of held-out absolute residuals (split conformal; Lei et al. 2018), in which every
    patient weighs the same, however many spots it has (Dunn et al. 2022, pooled): with U patients
    the coverage of a new one is that asked for up to about 1 / U.

    Args:
        residual: (S, T) absolute, of spots that were held out.
        groups: (S,) units.
        fold_of: (S,) inner fold.
        coverage: 0..1.

    Returns:
        Half widths, and the share of held-out spots (every unit the same) inside when the width
        comes from the other folds.
    """
    _, unit, size = np.unique(groups, return_inverse=True, return_counts=True)
    weight = 1.0 / (len(size) * size[unit])
    order = np.argsort(residual, axis=0)
    ranked = np.take_along_axis(residual, order, axis=0)
    covered = np.zeros(residual.shape[1])
    for fold in range(int(fold_of.max()) + 1):
        own = fold_of == fold
        width = _quantile(ranked, np.where(own, 0.0, weight)[order], coverage)
        covered += weight[own] @ (residual[own] <= width)
    return _quantile(ranked, weight[order], coverage), covered


def _quantile(ranked: np.ndarray, weight: np.ndarray, level: float) -> np.ndarray:
    total = np.cumsum(weight, axis=0)
    first = np.argmax(total >= level * total[-1] - 1e-12, axis=0)
    return np.asarray(ranked[first, np.arange(ranked.shape[1])])


def fit_look(features: np.ndarray, groups: np.ndarray) -> Look:
    """What the training patches look like: features (S, F) as stored, and their units (S,)."""
    mean, sd = features.mean(axis=0), features.std(axis=0)
    scale = np.where(sd > 1e-8, 1.0 / np.maximum(sd, 1e-8), 0.0)
    z = (features - mean) * scale
    _, vectors = np.linalg.eigh(z.T @ z / len(z))
    look = Look(mean, scale, vectors[:, ::-1][:, :AXES], np.zeros((0, 0)), np.zeros(0))
    place = look.place(features)
    units = np.unique(groups)
    kept = np.concatenate([_evenly(groups == one, REFERENCE // len(units) + 1) for one in units])
    held_out = []
    for one in units:
        others = kept[groups[kept] != one]
        held_out.append(distances(place[others], place[_evenly(groups == one, DRAWN)]))
    ranked = np.sort(np.concatenate(held_out))
    return dataclasses.replace(look, reference=place[kept], held_out=ranked)


def _evenly(own: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows of a mask, evenly."""
    rows = np.flatnonzero(own)
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]


def readout_of(checkpoint: Checkpoint) -> Readout:
    """The read-out of a checkpoint; where it has none, it is fitted to the training stores.

    Raises:
        ConfigError: it reads no images, or it has none and the stores are not there.
    """
    path = checkpoint.path / READOUT
    if path.is_file():
        return read_readout(path)
    if checkpoint.image_input is None or checkpoint.model.vision is None:
        raise ConfigError(f"{checkpoint.path} reads no images, so it predicts nothing from them")
    folder = Path(checkpoint.run.data.stores)
    if not folder.is_dir():
        return read_readout(path)  # says what is missing
    trained = set(checkpoint.model.artifacts.train_slides)
    entries = [e for e in read_entries(stores_in(folder)) if e.slide_id in trained]
    missing = sorted(trained - {entry.slide_id for entry in entries})
    if missing:
        raise ConfigError(
            f"{checkpoint.path} has no {READOUT}, and to fit it {len(missing)} of its training "
            f"slides are missing in {folder}: {', '.join(missing[:4])}; put their stores back"
        )
    checked(checkpoint, entries)
    readout = _fitted(checkpoint, [entry for entry in entries if entry.has_image])
    write_readout(path, readout)
    add_checksum(path)
    return readout


def _fitted(checkpoint: Checkpoint, entries: Sequence[SlideEntry]) -> Readout:
    """The read-out of all genes of the vocabulary, on the training spots of the bank."""
    artifacts, image = checkpoint.model.artifacts, checkpoint.image_input
    assert image is not None
    key = "" if image.key == PATCHES else image.key
    total = sum(entry.n_spots for entry in entries)
    x, y, look, known, xy_um, patients, slides, labels = [], [], [], [], [], [], [], []
    ids: dict[str, str] = {}
    for entry in tqdm(entries, desc="read-out", disable=None, leave=False):
        embedding = image_embedding(checkpoint, entry.path)
        kept = bank_spots(entry.n_spots, total)
        with SlideStore(entry.path) as store:
            features = store.features(key or HANDCRAFTED)
            alone = standardise_columns(features)
            counts = align_columns(store.counts(kept), store.gene_names, artifacts.genes)
            ids |= zip(store.gene_names, store.gene_ids, strict=True)
            look.append(features[kept])
            xy_um.append(store.xy_um[kept])
            labels.append(store.labels().iloc[kept])
        known.append(alone[kept].astype(np.float64))
        x.append(np.hstack([alone, standardise_columns(embedding)][not key :])[kept])
        y.append(normalised(counts, artifacts.modality))
        patients += [entry.patient_id] * len(kept)
        slides += [entry.slide_id] * len(kept)
    raw, untrained = np.concatenate(look), np.concatenate(known)
    _, axes = np.linalg.eigh(untrained.T @ untrained)
    untrained = untrained @ axes[:, ::-1][:, :UNTRAINED_AXES]
    rows = TrainingRows.of(
        np.concatenate(x).astype(np.float64),
        untrained,
        np.array(patients),
        np.array(slides),
        np.concatenate(xy_um),
    )
    readout = fit_readout(
        rows, sparse.vstack(y), artifacts.genes, choose_on=np.asarray(artifacts.target_genes)
    )
    with SlideStore(entries[0].path) as store:
        source = {"patch_px": int(store.attrs["patch_px"])}
    origin = feature_origin(entries[0].path, key) if key else None
    return dataclasses.replace(
        readout,
        ids=np.array([ids.get(name, "") for name in artifacts.genes]),
        features=key,
        look=fit_look(raw, rows.groups),
        untrained=untrained,
        labels=label_probes(rows, pd.concat(labels)),
        source={**source, **(origin or {})},
    )


def label_probes(rows: TrainingRows, labels: pd.DataFrame) -> tuple[LabelProbe, ...]:
    """A probe of every column of categories (S,) that differ within a slide."""
    found = []
    for name in labels.columns[[labels[one].dtype.kind == "O" for one in labels]]:
        probe = fit_labels(
            str(name),
            labels[name].fillna("").astype(str).to_numpy(),
            (rows.x, rows.untrained),
            rows.groups,
            rows.slides,
            unit=rows.unit,
            interval=over_units,
        )
        found += [probe] if probe is not None else []
    return tuple(found)


def gene_set_readout(checkpoint: Checkpoint, readout: Readout, source: str) -> Readout:
    """A read-out of gene sets: their scores on the reference bank's profiles, from its embeddings.

    ``readout`` is that of the genes, which holds the stored features of the same spots.

    Raises:
        PathwayError: an unknown database, or no set shares enough genes with the vocabulary.
        ConfigError: the checkpoint has no reference bank, or one of other spots.
    """
    bank = read_bank(checkpoint.path / BANK, checkpoint.model)
    if len(bank.image) != len(readout.untrained):
        raise ConfigError(
            f"{checkpoint.path}: {BANK} and {READOUT} are of different spots; remove {READOUT}: it "
            "is fitted again where the training stores are"
        )
    sets = gene_sets(checkpoint, source, bank)
    x = np.zeros(bank.image.shape)
    for slide in np.unique(bank.slide):
        own = bank.slide == slide
        x[own] = standardise_columns(bank.image[own])
    along = np.stack([np.arange(len(x)), np.zeros(len(x))], axis=1)
    untrained = readout.untrained.astype(np.float64)
    rows = TrainingRows.of(x, untrained, bank.patient, bank.slide, along)
    return fit_readout(rows, sets.target, sets.names, kind=GENE_SET)
