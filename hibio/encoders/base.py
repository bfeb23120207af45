"""The contract of an encoder, and how a name becomes one."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from hibio.artifacts import Artifacts
from hibio.batch import SlideBatch
from hibio.config import ConfigError

#: Environment variable: packages and modules whose encoders a checkpoint may name.
PLUGINS_VARIABLE = "HIBIO_PLUGINS"


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


def refuse_code(name: str, source: Path) -> None:
    """Refuse an encoder of a checkpoint that would import a module which nobody here asked for.

    Allowed are encoders that ship with HiBio, modules that this program has imported already, and
    those that the environment variable ``HIBIO_PLUGINS`` lists (packages or modules, with commas).

    Args:
        name: ``model.vision.name`` or ``model.omics.name`` of the checkpoint.
        source: its ``config.yaml``, for the message.

    Raises:
        ConfigError: it is ``package.module:Class`` and the module is none of these.
    """
    if ":" not in name:
        return
    module = name.partition(":")[0]
    allowed = [one.strip() for one in os.environ.get(PLUGINS_VARIABLE, "").split(",")]
    listed = any(one and (module == one or module.startswith(f"{one}.")) for one in allowed)
    if not listed and module not in sys.modules:
        raise ConfigError(
            f"{source}: this checkpoint wants to run code, the encoder {name!r}; if you trust it, "
            f"set {PLUGINS_VARIABLE}={module}, or import {module} first"
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
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{kind} encoder {name!r} cannot be imported: {error}") from error
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ConfigError(f"{kind} encoder {name!r} is no torch.nn.Module class; name one")
        return found
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"unknown {kind} encoder {name!r}{hint} (choices: {', '.join(table)}, or "
        "'package.module:Class')"
    )
