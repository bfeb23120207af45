"""Fit every artifact on the training slides, streaming over stores (docs/method.md 1-3).

Legend: S spots of a slide, G genes of the vocabulary.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy import sparse
from tqdm import tqdm

from hibio.artifacts import Artifacts, FitSettings, KeywordScales, keywords_among, niche
from hibio.config.data import GenesConfig, PathwaysConfig
from hibio.config.files import ConfigError, to_dict
from hibio.data.counts import CountBlocks, ordered_map, reading
from hibio.data.splits import SlideEntry, indexed_entries
from pathways import PathwayAnchors, PathwayDatabase, fit_anchors, load_pathways, matched_random
from preprocessing.coexpression import (
    fit_gene_factors,
    group_gene_graphs,
    spot_vectors,
    standardise,
)
from preprocessing.coexpression.gene_graph import EdgeRule, edge_limit, pair_edges
from preprocessing.coexpression.spot_groups import fit_spot_groups
from preprocessing.graphs import SpotGraph, spatial_graph
from preprocessing.selection import KeywordOverlap, keyword_overlap, select_genes
from preprocessing.spot_table import RNA
from preprocessing.store import SlideStore
from preprocessing.tfidf import TfidfReweighter
from preprocessing.tfidf.shrinkage import RatePrior

R = TypeVar("R")

OVERLAP_SLIDES = 8  # on which it is measured how well keyword genes reproduce
MIN_GENES = 10  # fewer say too little about a spot to learn from
#: What is fitted on counts, and taken over by a warm start.
EXPRESSION = (
    "tfidf",
    "vector_tfidf",
    "overlap",
    "factors",
    "groups",
    "gene_graphs",
    "node_genes",
    "n_folded_in",
    "scales",
)
SAMPLED_SPOTS = 64  # of a slide, whose pairs of keyword genes are looked at
PRIOR_SPOTS = 10  # of an average gene, added to the values of each
MATCHED_RANDOM = "matched_random:"
NO_PATHWAYS = "none"
INTENSITY_VARIANTS = ("arcsinh", "rank")


@dataclass(frozen=True)
class TfidfStream:
    """The TF-IDF of training counts, made anew on every pass (`ParallelBlocks`)."""

    counts: CountBlocks
    tfidf: TfidfReweighter
    genes: GenesConfig

    def __call__(self) -> Iterator[sparse.csr_matrix]:
        """TF-IDF (S, G) of every slide, in order."""
        return self.map(lambda rows: rows)

    def map(self, function: Callable[[sparse.csr_matrix], R]) -> Iterator[R]:
        """The function's value for the TF-IDF of every slide, in order."""
        return self.counts.map_slides(
            lambda block, path: function(self.tfidf.transform(block, self.niche(path)))
        )

    def niche(self, path: Path) -> np.ndarray | None:
        """What the weighting reads around the spots of one slide."""
        if not self.tfidf.reads_neighbours:
            return None
        return niche(self.genes, [self.tfidf], _place(path))


def fit_vocabulary(
    paths: Sequence[Path],
    min_slide_fraction: float,
    min_spots: int,
    exclude: Sequence[str] = (),
    threads: int = 1,
) -> np.ndarray:
    """Gene names that are on enough training slides and in enough training spots.

    Args:
        paths: training stores.
        min_slide_fraction: share of the slides whose panel must have the gene.
        min_spots: training spots that must have counts of it.
        exclude: genes left out, by name or by shell pattern ("MT-*").
        threads: that read stores.

    Raises:
        ConfigError: fewer than 10 genes are left, or an exclusion that fits no gene.
    """
    slides: dict[str, int] = {}
    spots: dict[str, int] = {}
    for names, seen in ordered_map(_detections, paths, threads):
        for name, count in zip(names, seen, strict=True):
            slides[name] = slides.get(name, 0) + 1
            spots[name] = spots.get(name, 0) + int(count)
    need = min_slide_fraction * len(paths) - 1e-9
    excluded = _excluded(slides, exclude)
    genes = sorted(
        name
        for name, n in slides.items()
        if n >= need and spots[name] >= min_spots and name not in excluded
    )
    if len(genes) < MIN_GENES:
        raise ConfigError(
            f"only {len(genes)} of {len(slides)} genes are on at least "
            f"{min_slide_fraction:.0%} of the {len(paths)} training slides and in "
            f"{min_spots} spots, and {MIN_GENES} are needed; lower genes.min_slide_fraction or "
            "genes.min_spots, or train on slides with larger panels that overlap"
        )
    return np.array(genes)


def _detections(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Gene names of one store, and the spots that have each."""
    with reading(path), SlideStore(path) as store:
        counts, names = store.counts(), store.gene_names
    return names, np.bincount(counts.indices[counts.data > 0], minlength=counts.shape[1])


def _excluded(names: Collection[str], exclude: Sequence[str]) -> set[str]:
    """The names that an entry of ``exclude`` is, or fits as a shell pattern."""
    found: set[str] = set()
    for entry in exclude:
        fitting = {entry} if entry in names else set(fnmatch.filter(names, entry))
        if not fitting:
            raise ConfigError(
                f"genes.exclude: {entry!r} fits none of the {len(names)} genes of the training "
                "slides; check its spelling, or take it out"
            )
        found |= fitting
    return found


def common_modality(entries: Sequence[SlideEntry]) -> str:
    """Rna or protein, as all training stores say.

    Raises:
        ConfigError: they differ: counts and intensities have no scale in common.
    """
    found: dict[str, Path] = {}
    for entry in entries:
        found.setdefault(entry.modality, entry.path)
    if len(found) > 1:
        told = ", ".join(f"{modality} ({path.name})" for modality, path in found.items())
        raise ConfigError(f"training stores are of different modality: {told}; train one at a time")
    return next(iter(found))


def common_patch_um(entries: Sequence[SlideEntry]) -> float | None:
    """Patch width of the training stores with an image, in micrometres; None without any.

    Raises:
        ConfigError: they differ, so one image embedding would mean different things.
    """
    widths: dict[float, Path] = {}
    for entry in entries:
        if entry.patch_um is not None:
            widths.setdefault(round(entry.patch_um, 3), entry.path)
    if len(widths) > 1:
        found = ", ".join(f"{width:g} um ({path.name})" for width, path in widths.items())
        raise ConfigError(
            f"training stores have patches of different width: {found}; prepare "
            "all of them with one --patch-um"
        )
    return next(iter(widths), None)


def context_widths(entries: Sequence[SlideEntry]) -> list[float]:
    """The different widths of the training stores' context patches, micrometres; mostly one."""
    return sorted({round(e.context_um, 3) for e in entries if e.context_um is not None})


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
    *,
    asks_absent: bool = False,
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
        asks_absent: whether the masked term will ask about genes outside a spot's keywords.

    Raises:
        ConfigError: slides that do not go together, or settings that differ from ``start``'s.
    """
    steps = tqdm(total=4, desc="fit", disable=None, leave=False)
    entries = indexed_entries(paths)
    modality = common_modality(entries)
    _check_modality(modality, genes)
    if start is None:
        settings = (genes.min_slide_fraction, genes.min_spots, genes.exclude)
        vocabulary = fit_vocabulary(paths, *settings, threads)
    else:
        check_start(start, genes, modality)
        vocabulary = start.genes
    counts = CountBlocks(paths, vocabulary, threads)
    steps.update()
    expression = {name: getattr(start, name) for name in EXPRESSION if start is not None}
    expression = expression or _fit_expression(counts, genes, seed, modality, asks_absent)
    steps.update()
    blocks = TfidfStream(counts, expression["tfidf"], genes)
    database, anchors = _fit_pathways(pathways, blocks, seed)
    steps.close()
    return Artifacts(
        genes=vocabulary,
        database=database,
        anchors=anchors,
        target_genes=_target_genes(counts, genes, seed, modality),
        train_slides=tuple(entry.slide_id for entry in entries),
        seals=_seals(entries, start),
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


def _seals(entries: Sequence[SlideEntry], start: Artifacts | None) -> dict[str, Any]:
    """Seals of the slides, and of those that a warm start goes back to."""
    before = {} if start is None else start.trained_seals
    return {**before, **{entry.slide_id: entry.seal for entry in entries}}


def _check_modality(modality: str, genes: GenesConfig) -> None:
    if modality == "protein" and genes.tfidf not in INTENSITY_VARIANTS:
        raise ConfigError(
            f"the training stores hold protein intensities, and genes.tfidf is {genes.tfidf!r}, "
            f"which divides by sequencing depth; set genes.tfidf: {' or '.join(INTENSITY_VARIANTS)}"
        )


def _fit_expression(
    counts: CountBlocks, genes: GenesConfig, seed: int, modality: str, asks_absent: bool
) -> dict[str, Any]:
    """TF-IDF, factors, groups, node genes, gene graphs and scales of the training counts."""
    tfidf = _fit_tfidf(counts, genes, genes.tfidf)
    vector_tfidf = tfidf
    if modality == RNA and genes.spot_vector != genes.tfidf:
        vector_tfidf = _fit_tfidf(counts, genes, genes.spot_vector)
    n_genes = len(counts.genes)
    blocks = TfidfStream(counts, vector_tfidf, genes)
    factors = fit_gene_factors(blocks, n_genes, rank=genes.rank, seed=seed)

    def vectors() -> Iterator[np.ndarray]:
        return blocks.map(lambda block: standardise(spot_vectors(block, factors), factors)[0])

    groups = fit_spot_groups(vectors, genes.graph_groups, seed=seed)
    # 2 bytes a spot, instead of two more passes over all slides
    assigned = [groups.assign(vector).astype(np.int16) for vector in vectors()]
    node_genes = _node_genes(counts, genes, seed, modality)
    keywords = TfidfStream(counts, tfidf, genes)
    values = _keyword_values(keywords, genes.keyword_genes, node_genes, asks_absent)
    among = values.use > 0
    n_edges = genes.graph_edges or edge_limit(int(among.sum()), n_genes, groups.n_groups)
    graphs = group_gene_graphs(
        blocks,
        lambda: iter(assigned),
        n_genes,
        groups.n_groups,
        EdgeRule(n_edges, among=among),
        seed=seed,
    )
    gene = np.concatenate(values.gene)
    group = np.concatenate([one[at] for one, at in zip(assigned, values.spots, strict=True)])
    share, spread = pair_edges(graphs, gene, group.astype(np.int64))
    tqdm.write(
        f"gene graph: {share:.1%} of the pairs of a spot's keyword genes have an edge (at most "
        f"{n_edges} a gene, among {int(among.sum())} of {n_genes} genes)"
    )
    return {
        "tfidf": tfidf,
        "vector_tfidf": vector_tfidf,
        "overlap": _overlap(keywords, seed, modality),
        "factors": factors,
        "groups": groups,
        "gene_graphs": tuple(graphs),
        "node_genes": node_genes,
        "scales": KeywordScales(values.use, values.mean, values.spread, spread or 1.0, share),
    }


@dataclass(frozen=True)
class _KeywordValues:
    """`KeywordScales` before there are edges, and some spots of each slide with their keywords."""

    use: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    spots: list[np.ndarray]
    gene: list[np.ndarray]


def _keyword_values(
    blocks: TfidfStream, k: int, node_genes: np.ndarray | None, asks_absent: bool
) -> _KeywordValues:
    """Use, mean and spread of every gene's value; rare genes are drawn to the mean of all.

    Where the masked term also asks about genes outside a spot's keywords, both kinds of question
    weigh the same, whatever their number: a gene that is a keyword lies about +1 away, one that is
    not -1.
    """

    def sums(tfidf: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        gene, value = keywords_among(tfidf, k, node_genes)
        n_spots, n_genes = tfidf.shape
        scale = value.sum(axis=1) / np.maximum((gene < n_genes).sum(axis=1), 1)
        scale = np.maximum(scale, 1e-8)
        relative = (value / scale[:, None]).ravel()
        weights = (None, relative, relative**2)
        among = [np.bincount(gene.ravel(), one, n_genes + 1)[:n_genes] for one in weights]
        if asks_absent:
            every = sparse.diags(1 / scale) @ tfidf
            total = [every.sum(axis=0), every.multiply(every).sum(axis=0)]
            other = np.stack([np.full(n_genes, n_spots), *(np.asarray(t).ravel() for t in total)])
        else:
            other = np.stack(among)
        spots = np.linspace(0, n_spots - 1, min(n_spots, SAMPLED_SPOTS)).astype(np.int64)
        return np.stack(among), other - np.stack(among), spots, gene[spots]

    found = list(blocks.map(sums))
    among, other = (np.sum([one[place] for one in found], axis=0) for place in (0, 1))
    mean, variance = _moments(among)
    if asks_absent:
        mean_other, variance_other = _moments(other)
        variance = (variance + variance_other) / 2 + (mean - mean_other) ** 2 / 4
        mean = (mean + mean_other) / 2
    spread = np.sqrt(np.where(variance > 1e-12, variance, 1.0))
    return _KeywordValues(
        among[0].astype(np.int64),
        mean.astype(np.float32),
        spread.astype(np.float32),
        [one[2] for one in found],
        [one[3].astype(np.int64) for one in found],
    )


def _moments(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (G,) from number, sum and sum of squares (3, G), drawn to those of all."""
    n, total, square = sums
    inside = np.maximum(square - total**2 / np.maximum(n, 1), 0.0)
    mean = (total + PRIOR_SPOTS * total.sum() / max(n.sum(), 1)) / (n + PRIOR_SPOTS)
    pooled = inside.sum() / max(np.maximum(n - 1, 0).sum(), 1)
    return mean, (inside + PRIOR_SPOTS * pooled) / (n + PRIOR_SPOTS)


def _overlap(blocks: TfidfStream, seed: int, modality: str) -> KeywordOverlap | None:
    """How well the keyword genes of training spots reproduce, said aloud; None of intensities."""
    genes = blocks.genes
    if modality != RNA or genes.selector != "tfidf":
        return None
    paths = blocks.counts.paths
    some = {paths[i] for i in np.linspace(0, len(paths) - 1, OVERLAP_SLIDES).astype(int)}
    k = min(genes.keyword_genes, len(blocks.counts.genes))

    def slide(block: sparse.csr_matrix, path: Path) -> KeywordOverlap | None:
        if path not in some:
            return None
        return keyword_overlap(block, blocks.tfidf, k, blocks.niche(path), seed)

    found = [one for one in blocks.counts.map_slides(slide) if one is not None]
    overlap = KeywordOverlap.mean(found)
    tqdm.write(str(overlap))
    if blocks.tfidf.reads_neighbours:
        tqdm.write(str(RatePrior.of(blocks.tfidf.sums)))
    return overlap


def _place(path: Path) -> np.ndarray:
    with reading(path), SlideStore(path) as store:
        return store.xy_um


def _graph(path: Path, genes: GenesConfig) -> SpotGraph:
    return spatial_graph(genes.graph, genes.neighbours, _place(path))


def _fit_tfidf(counts: CountBlocks, genes: GenesConfig, variant: str) -> TfidfReweighter:
    """One fit a slide, merged in their order."""
    reads_graph = variant == "spatial" or (variant == "shrunken" and genes.graph != "random")

    def one(block: sparse.csr_matrix, path: Path) -> TfidfReweighter:
        graph = _graph(path, genes) if reads_graph else None
        return TfidfReweighter(variant).partial_fit(block, graph)

    return reduce(TfidfReweighter.merge, counts.map_slides(one))


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
    pathways: PathwaysConfig, blocks: TfidfStream, seed: int
) -> tuple[PathwayDatabase | None, PathwayAnchors]:
    """The database restricted to the vocabulary, and its match on the training spots."""
    counts = blocks.counts
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
    return database, fit_anchors(database, vocabulary.tolist(), blocks.tfidf.idf, blocks())


def _mean_expression(counts: CountBlocks, n_genes: int) -> np.ndarray:
    total = np.zeros(n_genes)
    n_spots = 0
    for block in counts:
        total += np.asarray(block.sum(axis=0)).ravel()
        n_spots += block.shape[0]
    return total / n_spots
