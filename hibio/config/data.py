"""Sections of a configuration that say what is fitted on training slides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from hibio.config.schema import Range, Temperature
from hibio.keys import level_name

#: Weightings of `preprocessing.tfidf`, and selectors of `preprocessing.selection`.
Tfidf = Literal[
    "log",
    "raw",
    "bm25",
    "depth_matched",
    "spatial",
    "unweighted",
    "lognormal",
    "shrunken",
    "arcsinh",
    "rank",
]
Selector = Literal["tfidf", "hvg", "svg", "rank", "top", "random"]


@dataclass(frozen=True)
class GenesConfig:
    """The expression side of the fit.

    Attributes:
        tfidf: weighting of keyword genes, anchors and queries: shrunken | log | raw | bm25 |
            depth_matched | spatial | unweighted | lognormal; intensities: arcsinh | rank.
        spot_vector: weighting of the spot vector and the gene factors, the same names; of
            intensities it is that of ``tfidf``.
        keyword_genes: K, genes of a spot that enter its gene graph; 64-512.
        selector: tfidf (each spot's own keywords) | hvg | svg | rank | top | random (one corpus
            set of K genes).
        rank: components of the gene factors.
        neighbours: spatial neighbours of a spot.
        graph: knn | delaunay (of its neighbours the nearest ones) | random (the control: as many
            random spots of the slide instead, for both towers; docs/method.md 6).
        min_slide_fraction: a gene enters the vocabulary when it was measured on at least this
            share of the training slides; 1.0 is the intersection of the panels.
        min_spots: and was seen in at least this many training spots.
        exclude: genes never used, by name or shell pattern, e.g. ["MT-*", "RPL*"].
        target_genes: genes predicted from the image tower (highest variance on training slides).
        graph_edges: strongest co-expression edges kept for each gene; null: 8 sqrt(n) of the n
            genes that are keywords of some training spot, in at most 32 MB.
        graph_groups: label-free groups of spots that have a gene graph of their own.
    """

    tfidf: Tfidf = "shrunken"
    spot_vector: Tfidf = "log"
    keyword_genes: Annotated[int, Range(1, 8192)] = 128
    selector: Selector = "tfidf"
    rank: Annotated[int, Range(1, 4096)] = 20
    neighbours: Annotated[int, Range(1, 1000)] = 6
    graph: Literal["knn", "delaunay", "random"] = "knn"
    min_slide_fraction: Annotated[float, Range(0, 1, "low")] = 1.0
    min_spots: Annotated[int, Range(0)] = 10
    exclude: tuple[str, ...] = ()
    target_genes: Annotated[int, Range(1)] = 200
    graph_edges: Annotated[int, Range(1)] | None = None
    graph_groups: Annotated[int, Range(1, 1000)] = 1


@dataclass(frozen=True)
class PathwaysConfig:
    """The pathway side of the fit.

    Attributes:
        source: what :func:`pathways.load_pathways` takes, ``matched_random:SOURCE`` for the
            control of docs/method.md 2, or ``none`` (small panels, proteins).
        min_genes: sets with fewer genes in the vocabulary are dropped (and counted).
        max_genes: sets with more are dropped (and counted).
        temperature: T_match of the soft targets.
        top: k_p, pathways that share a spot's target mass.
        threshold: a match below it (standardised, centred per spot) gets no mass.
    """

    source: str = "default"
    min_genes: Annotated[int, Range(1)] = 5
    max_genes: Annotated[int, Range(1)] = 500
    temperature: Temperature = 0.5
    top: Annotated[int, Range(1)] = 5
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.min_genes > self.max_genes:
            raise ValueError(
                f"min_genes is {self.min_genes} and max_genes {self.max_genes}: no set is left"
            )


@dataclass(frozen=True)
class RegionsConfig:
    """Regions of docs/method.md 5.

    Attributes:
        diameters_um: equivalent diameter of each level, fine to coarse.
        kind: tree | grid | shuffled | leiden (all but the first are controls).
    """

    diameters_um: tuple[Annotated[float, Range(0, 1e6, "low")], ...] = (300.0, 600.0, 1200.0)
    kind: Literal["tree", "grid", "shuffled", "leiden"] = "tree"

    def __post_init__(self) -> None:
        if not self.diameters_um or list(self.diameters_um) != sorted(set(self.diameters_um)):
            raise ValueError("diameters_um must rise from fine to coarse, e.g. [300, 600, 1200]")

    @property
    def levels(self) -> tuple[str, ...]:
        """Level names, fine to coarse."""
        return tuple(level_name(diameter) for diameter in self.diameters_um)
