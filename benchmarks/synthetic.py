"""Synthetic data of any size: sections whose rows are made when asked for, and folders of stores.

In a store, a spot is a mixture of two of a few programmes (each a draw of gene shares), its depth
is log-normal; its counts are that many draws of genes. Only one slide is in memory at a time.

Legend: S spots, n spots asked for, K keyword genes, G vocabulary, V gene factors, N neighbours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from scipy import sparse

from hibio.batch import SlideBatch
from hibio.data.collate import collate
from hibio.data.slide import ExpressionRows, PreparedSlide
from hibio.encoders.base import OmicsContext
from preprocessing.graphs import KNNGraph
from preprocessing.patches import PatchConfig
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable, hilbert_order
from preprocessing.store import write_store

GENES, FACTORS, EDGES, MODULE = 2000, 20, 16, 50
PATTERNS = 512  # different cells
PROGRAMMES = 12
DEPTH = 400  # counts of a median spot: about 250 genes of 2,000 are seen
PITCH_UM = 20.0


@dataclass(frozen=True)
class Rows:
    """What `hibio.data.collate` reads of a spot's expression."""

    gene_SK: np.ndarray
    value_SK: np.ndarray
    target_SM: np.ndarray
    expression_SH: np.ndarray


@dataclass(frozen=True)
class PatternExpression:
    """Each spot is one of a few hundred patterns, so memory does not grow with the section."""

    gene_PK: np.ndarray
    value_PK: np.ndarray

    def rows(self, spots: np.ndarray) -> ExpressionRows:
        """Rows of ``spots``, in their order."""
        pattern = spots % len(self.gene_PK)
        nothing = np.zeros((len(spots), 1), np.float32)
        return ExpressionRows(self.gene_PK[pattern], self.value_PK[pattern], *[nothing] * 4)


@dataclass(frozen=True)
class Section:
    """The fields of a `PreparedSlide` that a batch is made of."""

    xy_um: np.ndarray
    neighbour_SN: np.ndarray
    distance_um_SN: np.ndarray
    vector_SV: np.ndarray
    spot_group_S: np.ndarray
    expression: PatternExpression
    vector_scale_V: np.ndarray = field(default_factory=lambda: np.ones(FACTORS, np.float32))
    slide_id: str = "synthetic"
    features_SF: Any = None
    stain_6: Any = None
    use_patches: bool = False

    @property
    def n_spots(self) -> int:
        """S."""
        return len(self.xy_um)


def draw_context(keyword_genes: int, seed: int = 0) -> OmicsContext:
    """Gene factors and two gene graphs, in which a gene's partners lie in its module of 50."""
    rng = np.random.default_rng(seed)
    module = np.arange(GENES)[None, :, None] // MODULE * MODULE
    other = rng.permuted(np.tile(np.arange(MODULE), (2, GENES, 1)), axis=2)[:, :, :EDGES]
    return OmicsContext(
        n_genes=GENES,
        keyword_genes=keyword_genes,
        factors_GV=rng.normal(size=(GENES, FACTORS)).astype(np.float32),
        edge_TGE=module + other,
        weight_TGE=rng.gamma(0.5, 0.2, other.shape).astype(np.float32),
    )


def draw_section(
    n_spots: int, keyword_genes: int, *, padding: bool = False, seed: int = 0
) -> PreparedSlide:
    """Spots at random places, about 20 um apart, along a space-filling curve as in a store.

    Args:
        n_spots: S.
        keyword_genes: K.
        padding: leave some spots with fewer genes.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 20.0 * np.sqrt(n_spots), (n_spots, 2))
    xy = xy[hilbert_order(xy)]
    neighbour, distance = KNNGraph().build(xy).neighbours(6)
    shape = (PATTERNS, keyword_genes)
    gene = np.stack([rng.choice(GENES, keyword_genes, replace=False) for _ in range(PATTERNS)])
    value = -np.sort(-rng.gamma(1.0, 1.0, shape), axis=1).astype(np.float32)
    if padding:
        short = (
            np.arange(keyword_genes)
            >= rng.integers(keyword_genes // 2, 2 * keyword_genes, PATTERNS)[:, None]
        )
        gene[short], value[short] = GENES, 0.0
    section = Section(
        xy_um=xy.astype(np.float32),
        neighbour_SN=neighbour.astype(np.int64),
        distance_um_SN=distance.astype(np.float32),
        vector_SV=rng.normal(size=(n_spots, FACTORS)).astype(np.float32),
        spot_group_S=rng.integers(0, 2, n_spots),
        expression=PatternExpression(gene.astype(np.int64), value),
    )
    return cast(PreparedSlide, section)


def whole_batch(slide: PreparedSlide) -> SlideBatch:
    """Every spot of the section as core."""
    regions = np.zeros((1, slide.n_spots), dtype=np.int64)
    return collate([(slide, regions, np.arange(slide.n_spots))])


def programme_shares(seed: int = 0) -> np.ndarray:
    """Gene shares (PROGRAMMES, G), cumulative, each row ending at 1."""
    rng = np.random.default_rng(seed)
    shares = rng.gamma(0.4, size=GENES) * rng.gamma(1.0, size=(PROGRAMMES, GENES))
    return np.cumsum(shares / shares.sum(axis=1, keepdims=True), axis=1)


def draw_counts(n_spots: int, shares: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
    """Counts (S, G) int32."""
    depth = np.maximum(20, rng.lognormal(np.log(DEPTH), 0.4, n_spots)).astype(np.int64)
    two = rng.integers(0, PROGRAMMES, (n_spots, 2))
    part = rng.random(n_spots)
    row = np.repeat(np.arange(n_spots, dtype=np.int32), depth)
    second = rng.random(len(row)) < part[row]
    programme = two[row, second.astype(np.int64)]
    order = np.argsort(programme, kind="stable")
    drawn = np.empty(len(row), dtype=np.int32)
    edges = np.searchsorted(programme[order], np.arange(PROGRAMMES + 1))
    for number in range(PROGRAMMES):
        mine = order[edges[number] : edges[number + 1]]
        drawn[mine] = np.searchsorted(shares[number], rng.random(len(mine)))
    drawn = np.minimum(drawn, GENES - 1)
    ones = np.ones(len(row), dtype=np.int32)
    counts = sparse.csr_matrix((ones, (row, drawn)), shape=(n_spots, GENES))
    counts.sum_duplicates()
    return counts


def write_slides(folder: Path, n_slides: int, n_spots: int, seed: int = 0) -> list[Path]:
    """Stores ``s00000.h5`` ... of ``n_spots`` spots each; those that are there already stay."""
    shares = programme_shares()
    paths = [folder / f"s{number:05d}.h5" for number in range(n_slides)]
    side = int(np.ceil(np.sqrt(n_spots)))
    place = np.arange(n_spots)
    xy = np.stack([place % side, place // side], axis=1) * PITCH_UM
    names = np.array([f"G{gene:04d}" for gene in range(GENES)])
    for number, path in enumerate(paths):
        if path.exists():
            continue
        rng = np.random.default_rng([seed, number])
        table = SpotTable(
            counts=draw_counts(n_spots, shares, rng),
            gene_ids=names,
            gene_names=names,
            barcodes=np.array([f"b{spot}" for spot in place]),
            xy_px0=xy,
            xy_um=xy,
            mpp=1.0,
            diameter_um=None,
            labels=pd.DataFrame(index=pd.RangeIndex(n_spots)),
        )
        row = SlideRow(path.stem, f"p{number}", None, "csv", technology="synthetic")
        write_store(path, table, row, patches=None, patch=PatchConfig(100.0))
    return paths


def copies(source: Path, folder: Path, n_stores: int) -> list[Path]:
    """One store under many names (hard links where the file system has them)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{source.stem}-{number:06d}.h5" for number in range(n_stores)]
    for path in paths:
        if not path.exists():
            os.link(source, path)
    return paths
