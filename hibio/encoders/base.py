"""The contract of an encoder, how a name becomes one, and the parts that several share.

An encoder is a ``torch.nn.Module`` with ``embed_dim: int`` and
``forward(batch: SlideBatch) -> (S, embed_dim)``, row i being spot i.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hibio.artifacts import Artifacts
from hibio.config.files import ConfigError
from preprocessing.coexpression.gene_graph import edge_correlation
from preprocessing.errors import did_you_mean
from preprocessing.files import atomic_path

#: Environment variable: packages and modules whose encoders a checkpoint may name.
PLUGINS_VARIABLE = "HIBIO_PLUGINS"
NO_VARIANCE = 1e-12  # below it is rounding


def mlp(width_in: int, hidden: int, width_out: int, dropout: float) -> nn.Sequential:
    """Linear, GELU, dropout, linear."""
    return nn.Sequential(
        nn.Linear(width_in, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width_out)
    )


@torch.no_grad()
def even_out(module: nn.Linear | nn.Embedding, output: Tensor, variance: float) -> None:
    """Shift and scale a map so that an ``output`` of it would have mean 0 and this variance.

    Layer-sequential unit-variance initialisation (Mishkin and Matas 2016), for one summand.

    Args:
        module: an untrained map with a bias, or a table.
        output: (..., D), what it gave for some typical input.
        variance: over the rows, mean of the columns; an output that does not vary is only shifted,
            and nothing is done without a row.
    """
    rows = output.flatten(0, -2)
    if len(rows) == 0:
        return
    mean_D = rows.mean(dim=0)
    found = float((rows - mean_D).square().mean())
    factor = math.sqrt(variance / found) if found > NO_VARIANCE else 1.0
    if isinstance(module, nn.Linear):
        module.weight.mul_(factor)
        module.bias.sub_(mean_D).mul_(factor)
        return
    module.weight.sub_(mean_D).mul_(factor)
    if module.padding_idx is not None:
        module.weight[module.padding_idx] = 0.0


def neighbour_mean(
    vector_SV: Tensor, neighbour_SN: Tensor, usable_S: Tensor | None = None
) -> Tensor:
    """Mean vector of the spatial neighbours, (S, V); a spot without any gets its own vector.

    Args:
        vector_SV: one vector a spot.
        neighbour_SN: index of each neighbour, -1 is none.
        usable_S: spots that may be read (the unmasked ones); all when None.
    """
    present_SN = neighbour_SN >= 0
    index_SN = neighbour_SN.clamp(min=0)
    if usable_S is not None:
        present_SN = present_SN & usable_S[index_SN]
    weight_SN = present_SN.to(vector_SV.dtype)
    total_SV = torch.einsum("sn,snv->sv", weight_SN, vector_SV[index_SN])
    n_S1 = weight_SN.sum(dim=1, keepdim=True)
    return torch.where(n_S1 > 0, total_SV / n_S1.clamp(min=1.0), vector_SV)


def niche_mean(value_SH: Tensor, neighbour_SN: Tensor) -> Tensor:
    """Mean of each spot and its spatial neighbours together, (S, H); see `neighbour_mean`."""
    n_S1 = (neighbour_SN >= 0).sum(dim=1, keepdim=True)
    return (value_SH + n_S1 * neighbour_mean(value_SH, neighbour_SN)) / (1 + n_S1)


def unit_variance(embedding_SD: Tensor) -> Tensor:
    """Rows of length sqrt(D), from which linear heads read: directions alone count."""
    return nn.functional.normalize(embedding_SD, dim=1) * math.sqrt(embedding_SD.shape[1])


class AttentionPool(nn.Module):
    """Softmax-weighted mean of the members of each group, vectors of length ``width`` (D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, 1)
        )

    def forward(self, spot_SD: Tensor, group_S: Tensor, n_groups: int) -> Tensor:
        """Group embeddings (R, D); spots of group -1 are left out.

        Args:
            spot_SD: member embeddings.
            group_S: 0..R-1, or -1.
            n_groups: R.
        """
        used = group_S >= 0
        member_SD, group = spot_SD[used], group_S[used]
        score_S = self.score(member_SD).squeeze(1)
        top_R = score_S.new_full((n_groups,), -1e4).scatter_reduce(
            0, group, score_S.detach(), "amax"
        )
        weight_S = torch.exp(score_S - top_R[group])
        total_R = weight_S.new_zeros(n_groups).index_add(0, group, weight_S)
        weighted_SD = member_SD * (weight_S / total_R[group].clamp(min=1e-8))[:, None]
        return weighted_SD.new_zeros(n_groups, spot_SD.shape[1]).index_add(0, group, weighted_SD)


@dataclass(frozen=True)
class OmicsContext:
    """What an omics encoder is told at construction; it comes from the artifacts.

    Attributes:
        n_genes: vocabulary size G; also the padding index.
        keyword_genes: K.
        factors_GV: gene factors, (G, r) float32.
        edge_TGE: strongest co-expression partners of each gene in each of the T gene graphs (one
            a group of spots), padded with G.
        weight_TGE: their weight, padding 0: |r|, the correlation behind the mutual information,
            over its spread over the pairs of a spot's keyword genes; in artifacts of an older
            HiBio, without that spread, the mutual information in nats.
    """

    n_genes: int
    keyword_genes: int
    factors_GV: np.ndarray
    edge_TGE: np.ndarray
    weight_TGE: np.ndarray

    @classmethod
    def of(cls, artifacts: Artifacts) -> OmicsContext:
        """The context that ``artifacts`` hold."""
        graphs, scales = artifacts.gene_graphs, artifacts.scales
        weight_TGE = np.stack([graph.weight for graph in graphs]).astype(np.float64)
        if scales is not None:
            weight_TGE = edge_correlation(weight_TGE) / scales.edge_spread
        return cls(
            n_genes=artifacts.n_genes,
            keyword_genes=artifacts.settings.genes.keyword_genes,
            factors_GV=artifacts.factors.components.astype(np.float32),
            edge_TGE=np.stack([graph.neighbour for graph in graphs]).astype(np.int64),
            weight_TGE=weight_TGE.astype(np.float32),
        )


def refuse_code(name: str, source: Path) -> None:
    """Refuse an encoder of a checkpoint that would import a module which nobody here asked for.

    Allowed are encoders that ship with HiBio, modules that this program has imported already, those
    that the environment variable ``HIBIO_PLUGINS`` lists (packages or modules, with commas), and
    encoders that this user trained on this machine (`trust_code`).

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
    if listed or module in sys.modules:
        return
    known, here = _trusted().get(name), _place_of(module)
    if known is None or known != here:
        other = (
            ""
            if known is None
            else (f" (trained here with {known}; Python finds {here or 'no such module'} now)")
        )
        raise ConfigError(
            f"{source}: this checkpoint wants to run code, the encoder {name!r}{other}; if you "
            f"trust it, set {PLUGINS_VARIABLE}={module}, or import {module} first"
        )


def trust_code(*names: str) -> None:
    """Let checkpoints name these encoders from now on: this user trains with them on this machine.

    Of each that is ``package.module:Class`` the place of its package is written into
    ``$XDG_STATE_HOME/hibio/trusted_code.json`` (mode 600), and told. Where that file cannot be
    written, this is told, and such a checkpoint needs ``HIBIO_PLUGINS``.
    """
    places = {name: _place_of(name.partition(":")[0]) for name in names if ":" in name}
    trusted = _trusted() if places else {}
    new = {name: place for name, place in places.items() if place not in ("", trusted.get(name))}
    if not new:
        return
    try:
        path = _trusted_file()
        with atomic_path(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps({**trusted, **new}, indent=1) + "\n", encoding="utf-8")
        told = f"may be loaded on this machine from now on: written to {path}"
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        told = f"will need {PLUGINS_VARIABLE} to be loaded: {error}"
    for name, place in new.items():
        print(f"checkpoints with the encoder {name} ({place}) {told}", flush=True)


def _trusted_file() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    folder = state if state.is_absolute() else Path.home() / ".local" / "state"
    return folder / "hibio" / "trusted_code.json"


def _trusted() -> dict[str, str]:
    """Encoders that `trust_code` wrote down -> where their package lies."""
    try:
        path = _trusted_file()
        found = json.loads(path.read_text(encoding="utf-8"))
        if path.stat().st_mode & 0o022:
            raise ValueError("others may write to it")
        return {str(name): str(place) for name, place in dict(found).items()}
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError, TypeError, RecursionError) as error:
        warnings.warn(f"trusted_code.json is not used: {error}", stacklevel=2)
        return {}


def _place_of(module: str) -> str:
    """File or folders of a module's package, found without importing it; "" where there is none."""
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):  # ValueError: no name, or no spec, such as __main__
        return ""
    if spec is None:
        return ""
    places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())
    return os.pathsep.join(os.path.realpath(str(place)) for place in places)


def build_encoder(
    name: str, table: Mapping[str, Any], kind: str, settings: Mapping[str, Any], **offered: Any
) -> Any:
    """The encoder called ``name``: an entry of ``table``, or ``package.module:Class``.

    A ``package.module:Class`` name imports and runs that code: use it for code that you trust. Its
    constructor gets its settings by name and, of what is offered, what it has a parameter for.

    Args:
        name: ``model.vision.name`` or ``model.omics.name``.
        table: those that ship with HiBio; each takes what is offered, in this order.
        kind: vision or omics.
        settings: ``model.vision.settings`` or ``model.omics.settings``.
        offered: ``config``, the section of the configuration; of omics encoders also ``context``,
            an :class:`OmicsContext`.

    Raises:
        ConfigError: there is no such encoder (the choices and the nearest are listed), or it does
            not take its settings.
    """
    if name in table:
        return table[name](*offered.values())
    if ":" not in name:
        raise ConfigError(
            f"unknown {kind} encoder {name!r}{did_you_mean(name, table)} (choices: "
            f"{', '.join(table)}, or 'package.module:Class')"
        )
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{kind} encoder {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"{kind} encoder {name!r} is no torch.nn.Module class; name one")
    signature = inspect.signature(found)
    asked = {key: value for key, value in offered.items() if key in signature.parameters}
    try:
        signature.bind(**asked, **settings)
    except TypeError as error:
        raise ConfigError(
            f"{kind} encoder {name!r} cannot be built: {error}; its constructor gets "
            f"model.{kind}.settings ({', '.join(settings) or 'none are set'}) and, where it has "
            f"such a parameter, {' and '.join(offered)}"
        ) from error
    encoder = found(**asked, **settings)
    if not isinstance(getattr(encoder, "embed_dim", None), int):
        raise ConfigError(f"{kind} encoder {name!r} has no embed_dim: the length of its vectors")
    return encoder
