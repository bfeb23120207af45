"""Fit every expression artifact on the training slides, streaming over stores (METHOD 1-3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import sparse
from tqdm import tqdm

from hibio.artifacts import Artifacts
from hibio.config import ConfigError
from pathways import PathwayDatabase, fit_anchors, load_pathways, matched_random
from preprocessing.coexpression import fit_gene_factors, gene_graph
from preprocessing.graphs import KNNGraph, SpotGraph
from preprocessing.selection import select_genes
from preprocessing.store import SlideStore
from preprocessing.tfidf import TfidfReweighter

MATCHED_RANDOM = "matched_random:"
CACHE_NONZEROS = 150_000_000  # about 1.2 GB of TF-IDF blocks; the rest is re-read


@dataclass(frozen=True)
class GenesConfig:
    """The expression side of the fit.

    Attributes:
        tfidf: log | raw | bm25 | depth_matched | spatial.
        keyword_genes: K, genes of a spot that enter its gene graph; 64-512.
        selector: tfidf (each spot's own keywords) | hvg | svg | rank | top | random (one corpus
            set of K genes).
        rank: components of the gene factors.
        neighbours: spatial neighbours of a spot.
        graph: knn | random (the control: as many random spots of the slide instead of the
            neighbours, for both towers; METHOD section 6).
        min_slide_fraction: a gene enters the vocabulary when it was measured on at least this
            share of the training slides; 1.0 is the intersection of the panels.
        min_spots: and was seen in at least this many training spots.
        target_genes: genes predicted from the image tower (highest variance on training slides).
        graph_edges: strongest co-expression edges kept for each gene.
        graph_spots: training spots sampled for the gene graph.
    """

    tfidf: str = "log"
    keyword_genes: int = 128
    selector: str = "tfidf"
    rank: int = 20
    neighbours: int = 6
    graph: Literal["knn", "random"] = "knn"
    min_slide_fraction: float = 1.0
    min_spots: int = 10
    target_genes: int = 200
    graph_edges: int = 16
    graph_spots: int = 2000

    def __post_init__(self) -> None:
        if self.keyword_genes < 1 or self.rank < 1 or self.neighbours < 1:
            raise ValueError("keyword_genes, rank and neighbours must be at least 1")
        if not 0.0 < self.min_slide_fraction <= 1.0:
            raise ValueError(
                f"min_slide_fraction is a share in (0, 1], not {self.min_slide_fraction}"
            )


@dataclass(frozen=True)
class PathwaysConfig:
    """The pathway side of the fit.

    Attributes:
        source: what :func:`pathways.load_pathways` takes, or ``matched_random:SOURCE`` for the
            control of METHOD section 2.
        min_genes: sets with fewer genes in the vocabulary are dropped (and counted).
        max_genes: sets with more are dropped (and counted).
        temperature: T_match of the soft targets.
        top: k_p, pathways that share a spot's target mass.
        threshold: a match below it (standardised, centred per spot) gets no mass.
    """

    source: str = "default"
    min_genes: int = 5
    max_genes: int = 500
    temperature: float = 0.5
    top: int = 5
    threshold: float = 0.0


class CountBlocks:
    """Training counts, one CSR block a slide on the vocabulary, re-readable.

    Args:
        paths: training stores.
        genes: (G,) vocabulary.
    """

    def __init__(self, paths: Sequence[Path], genes: np.ndarray) -> None:
        self.paths = list(paths)
        self.genes = genes
        self._cache: dict[Path, sparse.csr_matrix] = {}
        self._cached = 0

    def __iter__(self) -> Iterator[sparse.csr_matrix]:
        for path in self.paths:
            yield self._block(path)

    def _block(self, path: Path) -> sparse.csr_matrix:
        if path in self._cache:
            return self._cache[path]
        with SlideStore(path) as store:
            block = align_columns(store.counts(), store.gene_names, self.genes)
        if self._cached + block.nnz <= CACHE_NONZEROS:
            self._cache[path] = block
            self._cached += block.nnz
        return block


def align_columns(
    counts: sparse.csr_matrix, names: np.ndarray, vocabulary: np.ndarray
) -> sparse.csr_matrix:
    """Counts (S, G') on the columns of ``vocabulary`` (G,); a gene not measured stays 0."""
    position = {name: column for column, name in enumerate(vocabulary)}
    target = np.array([position.get(name, -1) for name in names], dtype=np.int64)
    kept = np.flatnonzero(target >= 0)
    pick = sparse.csr_matrix(
        (np.ones(len(kept), dtype=counts.dtype), (kept, target[kept])),
        shape=(counts.shape[1], len(vocabulary)),
    )
    aligned = sparse.csr_matrix(counts @ pick)
    aligned.sort_indices()
    return aligned


def fit_vocabulary(paths: Sequence[Path], config: GenesConfig) -> np.ndarray:
    """Gene names that are on enough training slides and in enough training spots.

    Raises:
        ConfigError: fewer than 50 genes are left.
    """
    slides: dict[str, int] = {}
    spots: dict[str, int] = {}
    for path in paths:
        with SlideStore(path) as store:
            seen = np.asarray((store.counts() > 0).sum(axis=0)).ravel()
            for name, count in zip(store.gene_names, seen, strict=True):
                slides[name] = slides.get(name, 0) + 1
                spots[name] = spots.get(name, 0) + int(count)
    need = config.min_slide_fraction * len(paths) - 1e-9
    genes = sorted(
        name for name, n in slides.items() if n >= need and spots[name] >= config.min_spots
    )
    if len(genes) < 50:
        raise ConfigError(
            f"only {len(genes)} of {len(slides)} genes are on at least "
            f"{config.min_slide_fraction:.0%} of the {len(paths)} training slides and in "
            f"{config.min_spots} spots; lower genes.min_slide_fraction or genes.min_spots, or "
            "train on slides whose panels overlap"
        )
    return np.array(genes)


def fit_artifacts(
    paths: Sequence[Path], genes: GenesConfig, pathways: PathwaysConfig, seed: int = 0
) -> Artifacts:
    """Fit vocabulary, TF-IDF, gene factors, gene graph and pathway anchors.

    Args:
        paths: stores of the TRAINING slides; no test slide may be among them.
        genes: expression settings.
        pathways: database and soft-target settings.
        seed: of the sampled and randomised parts.
    """
    steps = tqdm(total=6, desc="fit", disable=None, leave=False)
    vocabulary = fit_vocabulary(paths, genes)
    counts = CountBlocks(paths, vocabulary)
    steps.update()
    tfidf = _fit_tfidf(counts, genes)
    steps.update()

    def blocks() -> Iterator[sparse.csr_matrix]:
        return (tfidf.transform(block) for block in counts)

    factors = fit_gene_factors(blocks, len(vocabulary), rank=genes.rank, seed=seed)
    steps.update()
    graph = gene_graph(
        blocks,
        len(vocabulary),
        n_neighbours=genes.graph_edges,
        max_spots=genes.graph_spots,
        seed=seed,
    )
    steps.update()
    database = _load_database(pathways, vocabulary, counts, seed)
    anchors = fit_anchors(database, vocabulary.tolist(), tfidf.idf, blocks())
    steps.update()
    n_targets = min(genes.target_genes, len(vocabulary))
    targets = select_genes("hvg", lambda: iter(counts), n_targets, seed=seed)
    node_genes = _node_genes(counts, genes, seed)
    steps.close()
    return Artifacts(
        genes=vocabulary,
        tfidf=tfidf,
        factors=factors,
        gene_graph=graph,
        database=database,
        anchors=anchors,
        target_genes=targets,
        node_genes=node_genes,
        train_slides=tuple(_slide_id(path) for path in paths),
        settings={
            "genes": asdict(genes),
            "pathways": asdict(pathways),
            "patch_um": _patch_um(paths),
        },
    )


def _graphs(counts: CountBlocks, genes: GenesConfig) -> Iterator[SpotGraph]:
    for path in counts.paths:
        with SlideStore(path) as store:
            xy_um = store.xy_um
        yield KNNGraph(k=genes.neighbours).build(xy_um)


def _fit_tfidf(counts: CountBlocks, genes: GenesConfig) -> TfidfReweighter:
    tfidf = TfidfReweighter(genes.tfidf)
    graphs = _graphs(counts, genes) if genes.tfidf == "spatial" else None
    for block in counts:
        tfidf.partial_fit(block, next(graphs) if graphs else None)
    return tfidf


def _node_genes(counts: CountBlocks, genes: GenesConfig, seed: int) -> np.ndarray | None:
    """The corpus-wide keyword set of every selector but ``tfidf``, which has none."""
    if genes.selector == "tfidf":
        return None
    return select_genes(
        genes.selector,
        lambda: iter(counts),
        min(genes.keyword_genes, len(counts.genes)),
        graphs=lambda: _graphs(counts, genes),
        seed=seed,
    )


def _load_database(
    pathways: PathwaysConfig, vocabulary: np.ndarray, counts: CountBlocks, seed: int
) -> PathwayDatabase:
    source = pathways.source.removeprefix(MATCHED_RANDOM)
    database, report = load_pathways(source).restrict(
        vocabulary.tolist(), min_genes=pathways.min_genes, max_genes=pathways.max_genes
    )
    tqdm.write(str(report))
    if pathways.source.startswith(MATCHED_RANDOM):
        mean = _mean_expression(counts, len(vocabulary))
        database = matched_random(database, vocabulary.tolist(), mean, seed=seed)
    return database


def _mean_expression(counts: CountBlocks, n_genes: int) -> np.ndarray:
    total = np.zeros(n_genes)
    n_spots = 0
    for block in counts:
        total += np.asarray(block.sum(axis=0)).ravel()
        n_spots += block.shape[0]
    return total / n_spots


def _patch_um(paths: Sequence[Path]) -> float | None:
    """Patch width of the training stores with an image, in micrometres; None without any.

    Raises:
        ConfigError: they differ, so one image embedding would mean different things.
    """
    widths: dict[float, Path] = {}
    for path in paths:
        with SlideStore(path) as store:
            if store.has_image:
                widths.setdefault(round(float(store.attrs["patch_um"]), 3), path)
    if len(widths) > 1:
        found = ", ".join(f"{width:g} um ({path.name})" for width, path in widths.items())
        raise ConfigError(
            f"training stores have patches of different width: {found}; prepare "
            "all of them with one --patch-um"
        )
    return next(iter(widths), None)


def _slide_id(path: Path) -> str:
    with SlideStore(path) as store:
        return store.slide_id
