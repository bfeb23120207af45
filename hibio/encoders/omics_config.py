"""The model.omics section of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class OmicsConfig:
    """The omics tower.

    Attributes:
        name: graph_hierarchy | mlp (baseline) | package.module:Class.
        variant: of graph_hierarchy: hibio (METHOD section 3) | heist (the layer arithmetic of the
            published v2 model, for comparison; it reads a whole slide at once).
        width: d.
        layers: L.
        heads: attention heads; divides width.
        dropout: everywhere.
        identity: what tells genes apart: factors (vocabulary-free) | table (learned, bound to the
            vocabulary) | none.
        skip: the spot vector enters the spot token (METHOD section 3).
        gene_graph: co-expression as attention bias.
        spatial_graph: attention over the spatial neighbours.
        cross: messages between genes and spots.
        init_from: a checkpoint, omics-only or multimodal, whose omics tower is the start.
        checkpoint: keep only the tokens between layers while training, and compute the layers
            again in the backward pass: less memory for about a third more time (graph_hierarchy).
    """

    name: str = "graph_hierarchy"
    variant: Literal["hibio", "heist"] = "hibio"
    width: int = 192
    layers: int = 4
    heads: int = 6
    dropout: float = 0.1
    identity: Literal["factors", "table", "none"] = "factors"
    skip: bool = True
    gene_graph: bool = True
    spatial_graph: bool = True
    cross: bool = True
    init_from: Path | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint and (self.name, self.variant) != ("graph_hierarchy", "hibio"):
            raise ValueError(
                "checkpoint is of the layers of name: graph_hierarchy, variant: hibio; leave it out"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
