"""Region trees of one slide, from its expression and, once there are some, its embeddings.

METHOD section 5. Legend: S spots of a slide, L levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hibio.data.slide import PreparedSlide
from hibio.keys import level_name
from hibio.leiden import leiden_regions
from hibio.model import SlideEmbedding
from hibio.regions import (
    RegionTree,
    fit_region_tree,
    grid_regions,
    n_regions_for,
    region_levels,
    shuffled_regions,
)

KINDS = ("tree", "grid", "shuffled", "leiden")


@dataclass(frozen=True)
class RegionsConfig:
    """Regions of METHOD section 5.

    Attributes:
        diameters_um: equivalent diameter of each level, fine to coarse.
        kind: tree | grid | shuffled | leiden (all but the first are controls).
    """

    diameters_um: tuple[float, ...] = (300.0, 600.0, 1200.0)
    kind: str = "tree"

    def __post_init__(self) -> None:
        if not self.diameters_um or list(self.diameters_um) != sorted(self.diameters_um):
            raise ValueError("diameters_um must rise from fine to coarse, e.g. [300, 600, 1200]")
        if self.kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, not {self.kind!r}")

    @property
    def levels(self) -> tuple[str, ...]:
        """Level names, fine to coarse."""
        return tuple(level_name(diameter) for diameter in self.diameters_um)


def fused_features(slide: PreparedSlide, embedding: SlideEmbedding | None) -> np.ndarray:
    """What the tree clusters: the smoothed spot vector, then also the current embeddings.

    Each part is scaled to total variance 1, so that none of them rules by its number of columns.
    """
    neighbour = slide.neighbour_SN
    present = (neighbour >= 0)[..., None]
    around = (slide.vector_SV[neighbour] * present).sum(axis=1)
    smooth = (slide.vector_SV + around) / (1.0 + present.sum(axis=1))
    parts = [smooth] if slide.has_counts else []
    if embedding is not None:
        parts += [part for part in (embedding.omics, embedding.image) if part is not None]
    scaled = []
    for part in parts:
        centred = part - part.mean(axis=0)
        scaled.append(centred / max(float(np.sqrt((centred**2).sum(axis=1).mean())), 1e-8))
    return np.concatenate(scaled, axis=1)


def slide_tree(slide: PreparedSlide, embedding: SlideEmbedding | None) -> RegionTree:
    """Ward tree of one slide on its fused features, constrained by the spatial graph."""
    return fit_region_tree(fused_features(slide, embedding), slide.graph)


def slide_regions(
    slide: PreparedSlide, embedding: SlideEmbedding | None, config: RegionsConfig
) -> np.ndarray:
    """Region of each spot at each level, (L, S)."""
    if config.kind == "grid":
        return np.stack([grid_regions(slide.xy_um, d) for d in config.diameters_um])
    if config.kind == "leiden":
        feature, xy_um, graph = fused_features(slide, embedding), slide.xy_um, slide.graph
        sizes = [n_regions_for(d, xy_um, graph) for d in config.diameters_um]
        return np.stack([leiden_regions(feature, graph, size) for size in sizes])
    tree = slide_tree(slide, embedding)
    levels = region_levels(tree, slide.xy_um, slide.graph, config.diameters_um)
    if config.kind == "shuffled":
        return np.stack([shuffled_regions(level, seed=0) for level in levels])
    return levels
