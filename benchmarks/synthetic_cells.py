"""A synthetic section of any size whose rows are made when they are asked for.

Legend: S spots, n spots asked for, K keyword genes, G vocabulary, V gene factors, N neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from hibio.batch import SlideBatch
from hibio.data.collate import collate
from hibio.data.slide import PreparedSlide
from hibio.encoders.base import OmicsContext
from preprocessing.graphs import KNNGraph
from preprocessing.spot_table import hilbert_order

GENES, FACTORS, EDGES, MODULE = 2000, 20, 16, 50
PATTERNS = 512  # different cells


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

    def rows(self, spots: np.ndarray) -> Rows:
        """Rows of ``spots``, in their order."""
        pattern = spots % len(self.gene_PK)
        nothing = np.zeros((len(spots), 1), np.float32)
        return Rows(self.gene_PK[pattern], self.value_PK[pattern], nothing, nothing)


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
