"""The contract of an encoder, and how a name becomes one."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from hibio.artifacts import Artifacts
from hibio.batch import SlideBatch
from hibio.config import ConfigError


class SpotEncoder(Protocol):
    """Anything with ``embed_dim`` and ``forward(batch) -> (S, embed_dim)``, row i being spot i."""

    embed_dim: int

    def __call__(self, batch: SlideBatch) -> Tensor:
        """Embeddings (S, embed_dim)."""
        ...


@dataclass(frozen=True)
class OmicsContext:
    """What an omics encoder is told at construction; it comes from the artifacts.

    Attributes:
        n_genes: vocabulary size G; also the padding index.
        keyword_genes: K.
        factors_GV: gene factors, (G, r) float32.
        edge_TGE: strongest co-expression partners of each gene in each of the T gene graphs (one
            a group of spots), padded with G.
        weight_TGE: their mutual information in nats, padding 0.
    """

    n_genes: int
    keyword_genes: int
    factors_GV: np.ndarray
    edge_TGE: np.ndarray
    weight_TGE: np.ndarray

    @classmethod
    def of(cls, artifacts: Artifacts) -> OmicsContext:
        """The context that ``artifacts`` hold."""
        graphs = artifacts.gene_graphs
        return cls(
            n_genes=artifacts.n_genes,
            keyword_genes=artifacts.settings["genes"]["keyword_genes"],
            factors_GV=artifacts.factors.components.astype(np.float32),
            edge_TGE=np.stack([graph.neighbour for graph in graphs]).astype(np.int64),
            weight_TGE=np.stack([graph.weight for graph in graphs]).astype(np.float32),
        )


def resolve_encoder(name: str, table: Mapping[str, Any], kind: str) -> Any:
    """The encoder class called ``name``: an entry of ``table``, or ``package.module:Class``.

    A ``package.module:Class`` name imports and runs that code: use it for code that you trust.

    Raises:
        ConfigError: the name is neither; the choices and the nearest are listed.
    """
    if name in table:
        return table[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{kind} encoder {name!r} cannot be imported: {error}") from error
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"unknown {kind} encoder {name!r}{hint} (choices: {', '.join(table)}, or "
        "'package.module:Class')"
    )
