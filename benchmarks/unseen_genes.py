"""Genes never seen in training: embed test slides with known, with all, and with unseen genes only.

A third of the genes is hidden from training. Test patients are then embedded from three panels:
the known two thirds, all genes (the hidden ones folded in from the training slides) and the hidden
third alone. The vocabulary-free model (identity: factors) stands beside the vocabulary-bound one
(identity: table, with and without the spot vector, which is itself vocabulary-free) and the plain
spot vector (LSA). Measured are how well a spot's embedding from
unseen genes finds itself among those from known genes of its slide, and a linear probe of the
labels that is fitted on training slides from known genes.

    python benchmarks/unseen_genes.py --stores stores/her2st --config configs/her2st_omics.yaml \
        --folds A B C --column label --out runs/unseen_genes
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from eval.folds.fold import NOT_A_LABEL
from eval.measures.metrics import balanced_accuracy, list_length, recall_at_k, unit_rows
from hibio.config.files import load_config
from hibio.config.run import RunConfig
from hibio.data.fitting import fit_vocabulary
from hibio.data.slide import PreparedSlide, prepare_slide
from hibio.data.splits import SlideEntry, read_entries, split_by_patient
from hibio.model import HiBio
from hibio.run import train_all
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in

PANELS = ("known", "all", "unseen")
PROBE_C = 0.1
#: Row -> settings of the omics tower; without the skip, a table knows a gene by its row alone.
MODELS: dict[str, dict[str, Any]] = {
    "factors": {"identity": "factors"},
    "table": {"identity": "table"},
    "table, no spot vector": {"identity": "table", "skip": False},
}


def main() -> None:
    """Train what is not trained yet, embed, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stores", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--folds", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--column", required=True, help="label column of the probe")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: dict[str, dict[str, list[float]]] = {}
    for fold in options.folds:
        for seed in options.seeds:
            for name, values in _measure_fold(options, fold, seed).items():
                for metric, value in values.items():
                    rows.setdefault(name, {}).setdefault(metric, []).append(value)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "unseen_genes.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(_table(rows))


def _measure_fold(options: argparse.Namespace, fold: str, seed: int) -> dict[str, dict[str, float]]:
    split = split_by_patient(read_entries(stores_in(options.stores)), fold)
    paths = [entry.path for entry in split.train]
    config = load_config(RunConfig, options.config)
    genes = fit_vocabulary(paths, config.genes.min_slide_fraction, config.genes.min_spots)
    draw = np.random.default_rng(seed).permutation(len(genes))
    hidden = tuple(genes[np.sort(draw[: len(genes) // 3])].tolist())
    measured: dict[str, dict[str, float]] = {}
    for name, changes in MODELS.items():
        job = dataclasses.replace(
            config,
            out=options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{fold}-{seed}",
            data=dataclasses.replace(config.data, stores=options.stores),
            folds=(fold,),
            seeds=(seed,),
            variants={},
            genes=dataclasses.replace(config.genes, exclude=hidden),
            model=dataclasses.replace(
                config.model, omics=dataclasses.replace(config.model.omics, **changes)
            ),
        )
        checkpoint = train_all(job, resume=job.out.is_dir())[0]
        known = HiBio.from_checkpoint(checkpoint)
        model, report = known.fold_in(paths, hidden)
        print(f"fold {fold}, seed {seed}, {name}: {report}", flush=True)
        parts = {"model": lambda slide, m=model: m.encode_slide(slide).omics}
        if name == "factors":
            parts["lsa"] = lambda slide: slide.vector_SV
        for part, encode in parts.items():
            row = part if part == "lsa" else name
            slides = _Panels(model, known.artifacts.genes.tolist(), list(report.folded_in))
            measured[row] = _scores(slides, encode, split.train, split.test, options.column)
    return measured


@dataclasses.dataclass(frozen=True)
class _Panels:
    """Slides of one model as each panel shows them."""

    model: HiBio
    known: list[str]
    unseen: list[str]

    def slide(self, path: Path, panel: str) -> PreparedSlide:
        hidden = {"known": self.unseen, "all": [], "unseen": self.known}[panel]
        return prepare_slide(path, self.model.artifacts, None, hidden)


def _scores(panels, encode, train, test, column: str) -> dict[str, float]:
    probe = _probe(panels, encode, train, column)
    scores: dict[str, list[float]] = {}
    for entry in test:
        rows = {p: encode(panels.slide(entry.path, p)) for p in PANELS}
        for panel in PANELS[1:]:
            for words, form in (("", np.asarray), (", standardised", _standard)):
                similarity = unit_rows(form(rows[panel])) @ unit_rows(form(rows["known"])).T
                found = recall_at_k(similarity, list_length(0.1, len(similarity)))
                scores.setdefault(f"{panel} -> known R@10%{words}", []).append(found)
        label = _labels(entry, column)
        if probe is None or not (label != "").any():
            continue
        for panel in PANELS:
            embedded = _standard(rows[panel])
            keep = np.isin(label, probe.classes_)
            value = balanced_accuracy(label[keep], probe.predict(embedded[keep]))
            scores.setdefault(f"probe, {panel}", []).append(value)
    return {metric: float(np.mean(values)) for metric, values in scores.items()}


def _probe(panels, encode, train: tuple[SlideEntry, ...], column: str):
    x, y = [], []
    for entry in train:
        label = _labels(entry, column)
        if (label != "").any():
            x.append(_standard(encode(panels.slide(entry.path, "known")))[label != ""])
            y.append(label[label != ""])
    if not x or len(np.unique(np.concatenate(y))) < 2:
        return None
    probe = LogisticRegression(C=PROBE_C, class_weight="balanced", max_iter=500)
    return probe.fit(np.concatenate(x), np.concatenate(y))


def _labels(entry: SlideEntry, column: str) -> np.ndarray:
    with SlideStore(entry.path) as store:
        labels = store.labels()
    if column not in labels:
        return np.full(entry.n_spots, "")
    values = labels[column].fillna("").astype(str).str.strip()
    return np.where(values.str.lower().isin(NOT_A_LABEL), "", values).astype(str)


def _standard(rows: np.ndarray) -> np.ndarray:
    return (rows - rows.mean(axis=0)) / np.maximum(rows.std(axis=0), 1e-6)


def _table(rows: dict[str, dict[str, list[float]]]) -> str:
    metrics = list(next(iter(rows.values())))
    lines = ["| model | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, values in rows.items():
        cells = [
            f"{np.mean(values[m]):.3f} ({', '.join(f'{v:.3f}' for v in values[m])})"
            if m in values
            else "-"
            for m in metrics
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
