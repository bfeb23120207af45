"""``hibio hest-bench``: leakage audit, every encoder on every task and fold, and their tables."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from eval.compare.fingerprint import fold_print
from eval.embed import Checkpoint, load_checkpoint, one_checkpoint
from eval.hest_bench.audit import Finding, audit_task, corpus_of, patients_of
from eval.hest_bench.encoders import (
    HANDCRAFTED,
    ComputedEmbeddings,
    StoredEmbeddings,
    checkpoint_encoder,
    device_of,
    make_encoder,
    task_embeddings,
)
from eval.hest_bench.layout import BenchSplit, BenchTask, read_tasks
from eval.hest_bench.protocol import FoldData, FoldScores, HestProtocol, score_fold
from eval.hest_bench.samples import SampleFacts, choose_genes, read_facts, read_targets
from eval.report import write_report
from eval.report.markdown import markdown_table
from eval.results import Better, Measure, Question, ResultTable, write_results
from eval.tables import open_folder
from hibio.checkpoint import provenance
from hibio.config.files import ConfigError
from preprocessing.errors import DataError
from preprocessing.files import atomic_path, refuse_others

Scores = Mapping[tuple[str, str], Sequence[FoldScores]]

WORDS = (
    "HEST-Bench: 50 genes of held-out sections predicted from frozen patch embeddings by the "
    "published PCA and ridge; what is not published stands beside it."
)
POOLED = "Pearson r over all test spots of a fold, mean over genes"
HEAD = (
    *("encoder", "published, PCA", "published, no PCA", "nested alpha", "varying genes"),
    *("per slide", "training genes", "constant genes"),
)
PROTOCOLS = (
    "published: the published protocol with PCA; published_no_pca: the other published one; beside "
    "them nested_alpha (with PCA, penalty from inner folds), varying_genes (constant ones left "
    "out), per_slide (within each section), training_genes "
    "(genes chosen on training sections alone)"
)
READING = (
    "published, PCA: PCA 256, alpha = 100 / (dimensions x genes), Pearson of each of the published "
    "genes over all test spots of a fold, mean over genes, then mean ± population standard "
    "deviation over folds. published, no PCA: the same ridge on the stored features (the paper's "
    "table A13). Beside these, never mixed, all with PCA: the penalty chosen by inner folds of the "
    "training patients; genes that vary in the test spots (a constant gene makes the published "
    "number undefined); within each test section; with genes chosen on the training "
    "sections alone; and published genes that are constant, mean over folds."
)


def add_scores(
    table: ResultTable, task: BenchTask, model: str, found: Sequence[FoldScores], seed: int
) -> None:
    """Every value of one encoder, under ``fold/seed/pooled`` or ``fold/seed/sample``."""
    for split, scores in zip(task.splits, found, strict=True):
        pooled = f"{split.name}/{seed}/pooled"
        values = {
            "pearson/published": scores.published,
            "pearson/published_no_pca": scores.no_pca,
            "pearson/nested_alpha": scores.nested,
            "pearson/varying_genes": scores.varying,
            "pearson/training_genes": scores.own_genes,
        }
        for name, value in values.items():
            table.add(model, _declared(name, POOLED), pooled, value)
        for sample, value in scores.per_slide.items():
            key = f"{split.name}/{seed}/{sample}"
            table.add(model, _declared("pearson/per_slide", "Pearson r per slide"), key, value)
            measure = _declared(
                "constant_genes/per_slide", "published genes that are constant on the slide"
            )
            table.add(model, measure, key, scores.constant_in[sample])
        measure = _declared(
            "constant_genes/pooled", "published genes that are constant over the test spots"
        )
        table.add(model, measure, pooled, scores.constant)
        table.note(f"{model}: {scores.n_components} components, published alpha {scores.alpha:.4g}")


def _declared(name: str, unit: str) -> Measure:
    better: Better = "high" if name.startswith("pearson") else "low"
    return Measure(name, unit, better, (PROTOCOLS,) if better == "high" else ())


def published_summary(tasks: Sequence[BenchTask], scores: Scores) -> dict[str, Any]:
    """Mean, population standard deviation and every gene, as the published tool reports them."""
    models = list(dict.fromkeys(model for _, model in scores))
    summary: dict[str, Any] = {task.name: {} for task in tasks}
    for task in tasks:
        for model in models:
            found = scores[task.name, model]
            each = [one.published for one in found]
            genes = np.stack([one.genes for one in found], axis=1)
            summary[task.name][model] = {
                "mean": float(np.mean(each)),
                "std": float(np.std(each)),
                "mean_per_split": each,
                "genes": dict(zip(task.genes, genes.tolist(), strict=True)),
            }
    average = {m: float(np.mean([summary[t.name][m]["mean"] for t in tasks])) for m in models}
    return {"tasks": summary, "average": average}


def write_tables(
    path: Path,
    tasks: Sequence[BenchTask],
    models: Sequence[str],
    scores: Scores,
    findings: Sequence[Finding],
) -> str:
    """Write the tables as Markdown in one step; returns the text."""
    parts = ["# HEST-Bench", READING]
    for task in tasks:
        rows = [_row(model, scores[task.name, model]) for model in models]
        parts += [f"## {task.name}, {len(task.splits)} folds", markdown_table(HEAD, rows)]
    if len(tasks) > 1:
        rows = [_average(model, [scores[task.name, model] for task in tasks]) for model in models]
        parts += [f"## Average over {len(tasks)} tasks", markdown_table(HEAD, rows)]
    audit = [f"- {finding}" for finding in findings] or ["- nothing found"]
    parts += ["## Leakage audit", "\n".join(audit)]
    text = "\n\n".join(parts) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def _columns(found: Sequence[FoldScores]) -> list[float]:
    """Means over folds of the columns behind the published ones."""
    slides = [value for one in found for value in one.per_slide.values()]
    return [
        float(np.mean([one.nested for one in found])),
        float(np.mean([one.varying for one in found])),
        float(np.mean(slides)),
        float(np.mean([one.own_genes for one in found])),
        float(np.mean([one.constant for one in found])),
    ]


def _row(model: str, found: Sequence[FoldScores]) -> list[str]:
    both = [[one.published for one in found], [one.no_pca for one in found]]
    spread = [f"{_shown(np.mean(each))} ± {_shown(np.std(each))}" for each in both]
    return [model, *spread, *_cells(_columns(found))]


def _average(model: str, by_task: Sequence[Sequence[FoldScores]]) -> list[str]:
    published = [np.mean([np.mean([one.published for one in found]) for found in by_task])]
    published.append(np.mean([np.mean([one.no_pca for one in found]) for found in by_task]))
    means = np.mean([_columns(found) for found in by_task], axis=0)
    return [model, *map(_shown, published), *_cells(means.tolist())]


def _cells(values: Sequence[float]) -> list[str]:
    return [*(_shown(value) for value in values[:-1]), f"{values[-1]:.1f}"]


def _shown(value: float | np.floating) -> str:
    return f"{value:.4f}" if np.isfinite(value) else "undefined"


@dataclass(frozen=True)
class HestBenchConfig:
    """What is measured.

    Args:
        encoders: handcrafted, handcrafted_patch, frozen backbones, or names of given embeddings.
        checkpoint: a HiBio checkpoint whose image tower is measured too.
        tasks: names; all when empty.
        weights: local weights of the backbone.
        embeddings: folder of embeddings that are there already; those of ``encoders`` are read
            from it instead of being computed.
        metadata: metadata table of HEST-1k, for patients.
        stores: stores that the checkpoint was trained on; None: where its configuration says.
        strict: refuse to measure where the audit finds a leak.
        device: auto | cpu | cuda.
        batch: patches of one pass of a backbone.
        protocol: the published settings.
    """

    encoders: tuple[str, ...] = ()
    checkpoint: Path | None = None
    tasks: tuple[str, ...] = ()
    weights: Path | None = None
    embeddings: Path | None = None
    metadata: Path | None = None
    stores: Path | None = None
    strict: bool = False
    device: str = "auto"
    batch: int = 64
    protocol: HestProtocol = field(default_factory=HestProtocol)


def hest_bench(folder: Path, out: Path, config: HestBenchConfig | None = None) -> str:
    """Measure encoders by the published protocol, and write results.json, results.md, report.html.

    ``folder`` holds one folder a task, or is that of one task; ``out`` gets the embeddings too.

    Returns:
        The tables as text.

    Raises:
        DataError: the folder does not fit together, or a leak with ``strict``.
        ConfigError: an encoder or checkpoint cannot be used.
    """
    config = config or HestBenchConfig()
    _refuse_unused(config)
    results_md, page = out / "results.md", out / "report.html"
    refuse_others({out / "results.json": '"hest_bench/'}, [results_md, page])
    open_folder(out)
    started = time.perf_counter()
    tasks = read_tasks(folder, config.tasks)
    checkpoint = None
    if config.checkpoint is not None:
        checkpoint = load_checkpoint(one_checkpoint(config.checkpoint))
    facts = {task.name: _read(task) for task in tasks}
    patients = {task.name: patients_of(task, folder, config.metadata) for task in tasks}
    findings = _audit(tasks, facts, patients, checkpoint, config)
    leaks = [finding for finding in findings if finding.kind == "leak"]
    if config.strict and leaks:
        raise DataError(
            f"{len(leaks)} leaks (first: {leaks[0].text}); remove them from the splits, or measure "
            "without --strict: they stay in the results"
        )
    sources = _sources(config, checkpoint, out)
    results, scores, chosen = [], {}, {}
    for task in tasks:
        chosen[task.name] = _chosen_genes(task, facts[task.name])
        folds = _folds(task, facts[task.name], patients[task.name], chosen[task.name])
        question = Question(f"hest_bench/{task.name}", WORDS, ("pearson/published",))
        table = ResultTable(question)
        for source in sources:
            found = _measure(source, task, facts[task.name], folds, config.protocol)
            scores[task.name, source.name] = found
            own = checkpoint is not None and source.name == checkpoint.variant
            table.row(source.name, "model" if own else "baseline")
            add_scores(table, task, source.name, found, config.protocol.seed)
        results.append(table.result())
    data = {
        **_facts_of_run(folder, tasks, facts, patients),
        "published": published_summary(tasks, scores),
        "audit": [dataclasses.asdict(finding) for finding in findings],
        "genes_of_training_samples": chosen,
        "wall_time_s": time.perf_counter() - started,
    }
    body = write_results(out / "results.json", config, data, results)
    write_report(page, body, title="HEST-Bench")
    return write_tables(results_md, tasks, [s.name for s in sources], scores, findings)


def _refuse_unused(config: HestBenchConfig) -> None:
    """Options that nothing would read."""
    frozen = [name for name in config.encoders if not name.startswith(HANDCRAFTED)]
    if config.checkpoint is None:
        if config.stores is not None:
            raise ConfigError(
                "--stores says what a checkpoint was trained on; give --checkpoint too"
            )
        if config.weights is not None and (config.embeddings is not None or not frozen):
            raise ConfigError("--weights are of a frozen backbone, and none is computed here")
    if config.weights is not None and config.embeddings is None and len(frozen) > 1:
        raise ConfigError(
            f"--weights is one file, but {', '.join(frozen)} are several backbones; run them one "
            "by one into the same --out: their embeddings are kept"
        )


def _facts_of_run(
    folder: Path,
    tasks: Sequence[BenchTask],
    facts: Mapping[str, Mapping[str, SampleFacts]],
    patients: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """What the numbers were measured on."""
    names = {patient for own in patients.values() for patient in own.values()}
    return {
        **provenance(),
        "folder": folder.resolve().name,
        "n_slides": sum(len(task.samples) for task in tasks),
        "n_spots": sum(len(f.barcodes) for own in facts.values() for f in own.values()),
        "n_patients": len(names) or "not known",
        "fingerprint": _fingerprint(tasks, facts),
    }


def _fingerprint(
    tasks: Sequence[BenchTask], facts: Mapping[str, Mapping[str, SampleFacts]]
) -> dict[str, Any]:
    """Counts of every sample, training samples and genes of every fold."""
    slides, folds = {}, {}
    for task in tasks:
        for name, own in facts[task.name].items():
            content = hashlib.sha256(own.spot_keys.tobytes() + own.patch_keys.tobytes())
            slides[f"{task.name}/{name}"] = content.hexdigest()
        for split in task.splits:
            train = [sample.sample_id for sample in split.train]
            folds[f"{task.name}/{split.name}"] = fold_print(train, task.genes)
    return {"slides": slides, "folds": folds}


def _read(task: BenchTask) -> dict[str, SampleFacts]:
    bar = tqdm(task.samples, desc=f"{task.name}: read", unit="sample", disable=None)
    return {sample.sample_id: read_facts(sample) for sample in bar}


def _audit(
    tasks: Sequence[BenchTask],
    facts: Mapping[str, Mapping[str, SampleFacts]],
    patients: Mapping[str, Mapping[str, str]],
    checkpoint: Checkpoint | None,
    config: HestBenchConfig,
) -> list[Finding]:
    """Findings of every task, each printed."""
    corpora, findings = [], []
    if checkpoint is not None:
        artifacts = checkpoint.model.artifacts
        slides = (*artifacts.train_slides, *artifacts.settings.pretrain_slides)
        stores = config.stores or checkpoint.run.data.stores
        there = stores if config.stores or stores.is_dir() else None
        corpus, unread = corpus_of(checkpoint.variant, slides, there)
        corpora.append(corpus)
        if unread:
            text = (
                f"{len(unread)} of the {len(corpus.slides)} slides that {corpus.name} was trained "
                "on were compared by id only; give their stores with --stores"
            )
            findings.append(Finding("unchecked", "pretraining", "all tasks", "", text))
    if not all(name.startswith(HANDCRAFTED) for name in config.encoders):
        text = f"what {', '.join(config.encoders)} was pretrained on is not known here"
        findings.append(Finding("unchecked", "pretraining", "all tasks", "", text))
    for task in tasks:
        findings += audit_task(task, facts[task.name], patients[task.name], corpora)
    print("\n".join(["leakage audit:", *(f"  {finding}" for finding in findings)]))
    if not findings:
        print("  nothing found")
    return findings


def _sources(
    config: HestBenchConfig, checkpoint: Checkpoint | None, out: Path
) -> list[StoredEmbeddings]:
    """Where the embeddings of every row come from."""
    names = config.encoders or (() if checkpoint is not None else (HANDCRAFTED,))
    kept, device = out / "embeddings", device_of(config.device)
    sources: list[StoredEmbeddings] = []
    if config.embeddings is not None:
        sources += [StoredEmbeddings(config.embeddings, name) for name in names]
    else:
        encoders = [make_encoder(n, config.weights, device, config.batch) for n in names]
        sources += [ComputedEmbeddings(kept, encoder) for encoder in encoders]
    if checkpoint is not None:
        tower = checkpoint_encoder(checkpoint, config.weights, device, config.batch)
        sources.append(ComputedEmbeddings(kept, tower))
    listed = [source.name for source in sources]
    if len(set(listed)) < len(listed):
        raise DataError(f"two encoders share a name ({', '.join(listed)}); give each once")
    return sources


def _chosen_genes(task: BenchTask, facts: Mapping[str, SampleFacts]) -> dict[str, tuple[str, ...]]:
    """Genes chosen on the training samples of each fold, as many as the published list has."""
    every = [facts[sample.sample_id].sums for sample in task.samples]
    return {
        split.name: choose_genes(
            [facts[s.sample_id].sums for s in split.train], every, len(task.genes)
        )
        for split in task.splits
    }


def _folds(
    task: BenchTask,
    facts: Mapping[str, SampleFacts],
    patients: Mapping[str, str],
    chosen: Mapping[str, Sequence[str]],
) -> list[FoldData]:
    """Targets of every fold; each sample is read once."""
    genes = list(dict.fromkeys([*task.genes, *(g for own in chosen.values() for g in own)]))
    column = {gene: i for i, gene in enumerate(genes)}
    values = {
        s.sample_id: read_targets(s, facts[s.sample_id].barcodes, genes) for s in task.samples
    }

    def part(split: BenchSplit, wanted: Sequence[str]) -> dict[str, np.ndarray]:
        index = [column[gene] for gene in wanted]
        return {s.sample_id: values[s.sample_id][:, index] for s in (*split.train, *split.test)}

    names = [sample.sample_id for sample in task.samples]
    return [
        FoldData(
            split,
            part(split, task.genes),
            part(split, chosen[split.name]),
            {name: patients.get(name, name) for name in names},
            {name: facts[name].xy for name in names},
        )
        for split in task.splits
    ]


def _measure(
    source: StoredEmbeddings,
    task: BenchTask,
    facts: Mapping[str, SampleFacts],
    folds: Sequence[FoldData],
    protocol: HestProtocol,
) -> list[FoldScores]:
    """Scores of one encoder on every fold of a task."""
    barcodes = {name: own.barcodes for name, own in facts.items()}
    embeddings = task_embeddings(source, task, barcodes)
    bar = tqdm(folds, desc=f"{task.name}: {source.name}", unit="fold", disable=None)
    with threadpool_limits(1):
        return [score_fold(embeddings, fold, protocol) for fold in bar]
