"""Fit every artifact on the training slides, streaming over stores (docs/method.md 1-3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from tqdm import tqdm

from hibio.artifacts import Artifacts, FitSettings
from hibio.config.data import GenesConfig, PathwaysConfig
from hibio.config.files import ConfigError, to_dict
from hibio.data.counts import reading
from hibio.data.splits import indexed_entries
from hibio.data.training_slides import (
    CountBlocks,
    TfidfStream,
    common_modality,
    common_patch_um,
    context_widths,
    fit_vocabulary,
)
from pathways import PathwayAnchors, PathwayDatabase, fit_anchors, load_pathways, matched_random
from preprocessing.coexpression import (
    fit_gene_factors,
    group_gene_graphs,
    spot_vectors,
    standardise,
)
from preprocessing.coexpression.gene_graph import EdgeRule
from preprocessing.coexpression.spot_groups import Smoothing, fit_spot_groups
from preprocessing.graphs import SpotGraph, spatial_graph
from preprocessing.selection import select_genes
from preprocessing.store import SlideStore
from preprocessing.tfidf import TfidfReweighter

#: What is fitted on counts, and taken over by a warm start.
EXPRESSION = ("tfidf", "factors", "groups", "gene_graphs", "node_genes", "n_folded_in")
MATCHED_RANDOM = "matched_random:"
NO_PATHWAYS = "none"
INTENSITY_VARIANTS = ("arcsinh", "rank")


def check_start(start: Artifacts, genes: GenesConfig, modality: str) -> None:
    """The expression side of a warm start is its checkpoint's, so the settings must say so."""
    if start.modality != modality:
        raise ConfigError(
            f"model.omics.init_from was trained on {start.modality}, these stores hold {modality}"
        )
    here, there = to_dict(genes), to_dict(start.settings.genes)
    differ = [
        f"{key}: {here[key]} here, {value} there"
        for key, value in there.items()
        if key != "target_genes" and here[key] != value
    ]
    if differ:
        raise ConfigError(
            "genes settings differ from those of model.omics.init_from, whose vocabulary and "
            f"factors are taken over ({'; '.join(differ)}); copy its genes section"
        )


def slides_seen(start: Artifacts) -> tuple[str, ...]:
    """Slides of every run that a warm start goes back to, not only of the last."""
    return tuple(sorted({*start.train_slides, *start.settings.pretrain_slides}))


def fit_artifacts(
    paths: Sequence[Path],
    genes: GenesConfig,
    pathways: PathwaysConfig,
    seed: int = 0,
    start: Artifacts | None = None,
    threads: int = 1,
) -> Artifacts:
    """Fit vocabulary, TF-IDF, gene factors, spot groups, gene graphs and pathway anchors.

    Args:
        paths: stores of the TRAINING slides; no test slide may be among them.
        genes: expression settings.
        pathways: database and soft-target settings.
        seed: of the sampled and randomised parts.
        start: of the checkpoint that the omics tower starts from: what is fitted on counts is its
            own, since the weights mean nothing without it; the rest is fitted here.
        threads: that read slides, one each; their number does not change a bit of the result.

    Raises:
        ConfigError: slides that do not go together, or settings that differ from ``start``'s.
    """
    steps = tqdm(total=4, desc="fit", disable=None, leave=False)
    entries = indexed_entries(paths)
    modality = common_modality(entries)
    _check_modality(modality, genes)
    if start is not None:
        check_start(start, genes, modality)
    if start is None:
        settings = (genes.min_slide_fraction, genes.min_spots, genes.exclude)
        vocabulary = fit_vocabulary(paths, *settings, threads)
    else:
        vocabulary = start.genes
    counts = CountBlocks(paths, vocabulary, threads)
    steps.update()
    if start is None:
        expression = _fit_expression(counts, genes, seed, modality)
    else:
        expression = {name: getattr(start, name) for name in EXPRESSION}
    steps.update()
    database, anchors = _fit_pathways(pathways, counts, expression["tfidf"], seed)
    steps.update()
    targets = _target_genes(counts, genes, seed, modality)
    steps.close()
    return Artifacts(
        genes=vocabulary,
        database=database,
        anchors=anchors,
        target_genes=targets,
        train_slides=tuple(entry.slide_id for entry in entries),
        settings=FitSettings(
            genes,
            pathways,
            common_patch_um(entries),
            tuple(context_widths(entries)),
            modality,
            () if start is None else slides_seen(start),
        ),
        **expression,
    )


def _check_modality(modality: str, genes: GenesConfig) -> None:
    if modality == "protein" and genes.tfidf not in INTENSITY_VARIANTS:
        raise ConfigError(
            f"the training stores hold protein intensities, and genes.tfidf is {genes.tfidf!r}, "
            f"which divides by sequencing depth; set genes.tfidf: {' or '.join(INTENSITY_VARIANTS)}"
        )


def _fit_expression(
    counts: CountBlocks, genes: GenesConfig, seed: int, modality: str
) -> dict[str, Any]:
    """TF-IDF, factors, groups, gene graphs and node genes of the training counts."""
    tfidf = _fit_tfidf(counts, genes)
    n_genes = len(counts.genes)
    blocks = TfidfStream(counts, tfidf)
    factors = fit_gene_factors(blocks, n_genes, rank=genes.rank, seed=seed)

    def vectors() -> Iterator[np.ndarray]:
        return blocks.map(lambda block: standardise(spot_vectors(block, factors), factors)[0])

    groups = fit_spot_groups(vectors, genes.graph_groups, seed=seed)
    # 2 bytes a spot, instead of two more passes over all slides
    assigned = [groups.assign(vector).astype(np.int16) for vector in vectors()]
    graphs = group_gene_graphs(
        blocks,
        lambda: iter(assigned),
        n_genes,
        groups.n_groups,
        EdgeRule(genes.graph_edges),
        max_spots=genes.graph_spots,
        smoothing=Smoothing(genes.graph_smoothing),
        vectors=vectors,
        seed=seed,
    )
    return {
        "tfidf": tfidf,
        "factors": factors,
        "groups": groups,
        "gene_graphs": tuple(graphs),
        "node_genes": _node_genes(counts, genes, seed, modality),
    }


def _graph(path: Path, genes: GenesConfig) -> SpotGraph:
    with reading(path), SlideStore(path) as store:
        xy_um = store.xy_um
    return spatial_graph(genes.graph, genes.neighbours, xy_um)


def _fit_tfidf(counts: CountBlocks, genes: GenesConfig) -> TfidfReweighter:
    """One fit a slide, merged in their order."""
    if genes.tfidf == "spatial":
        graphs = (_graph(path, genes) for path in counts.paths)
        return TfidfReweighter(genes.tfidf).fit(counts, graphs)
    fits = counts.map(lambda block: TfidfReweighter(genes.tfidf).partial_fit(block))
    return reduce(TfidfReweighter.merge, fits)


def _node_genes(
    counts: CountBlocks, genes: GenesConfig, seed: int, modality: str
) -> np.ndarray | None:
    """The corpus-wide keyword set of every selector but ``tfidf``, which has none."""
    if genes.selector == "tfidf":
        return None
    return select_genes(
        genes.selector,
        lambda: iter(counts),
        min(genes.keyword_genes, len(counts.genes)),
        graphs=lambda: (_graph(path, genes) for path in counts.paths),
        seed=seed,
        modality=modality,
    )


def _target_genes(counts: CountBlocks, genes: GenesConfig, seed: int, modality: str) -> np.ndarray:
    """The genes of highest variance, which the image tower predicts."""
    n_targets = min(genes.target_genes, len(counts.genes))
    return select_genes("hvg", lambda: iter(counts), n_targets, seed=seed, modality=modality)


def _fit_pathways(
    pathways: PathwaysConfig, counts: CountBlocks, tfidf: TfidfReweighter, seed: int
) -> tuple[PathwayDatabase | None, PathwayAnchors]:
    """The database restricted to the vocabulary, and its match on the training spots."""
    vocabulary = counts.genes
    if pathways.source == NO_PATHWAYS:
        empty = sparse.csr_matrix((len(vocabulary), 0), dtype=np.float32)
        return None, PathwayAnchors((), empty, np.zeros(0), np.zeros(0))
    source = pathways.source.removeprefix(MATCHED_RANDOM)
    database, report = load_pathways(source).restrict(
        vocabulary.tolist(), min_genes=pathways.min_genes, max_genes=pathways.max_genes
    )
    tqdm.write(str(report))
    if pathways.source.startswith(MATCHED_RANDOM):
        mean = _mean_expression(counts, len(vocabulary))
        database = matched_random(database, vocabulary.tolist(), mean, seed=seed)
    blocks = TfidfStream(counts, tfidf)()
    return database, fit_anchors(database, vocabulary.tolist(), tfidf.idf, blocks)


def _mean_expression(counts: CountBlocks, n_genes: int) -> np.ndarray:
    total = np.zeros(n_genes)
    n_spots = 0
    for block in counts:
        total += np.asarray(block.sum(axis=0)).ravel()
        n_spots += block.shape[0]
    return total / n_spots
