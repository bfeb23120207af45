"""What acts in a model: how much of its output each path makes (docs/method.md 3, 5).

A path is cut (its message becomes 0, its summand the mean of itself), and the change of what comes
out is set against the variance of what comes out. So 0 is a path that does nothing, and 1 one that
changes the output as much as spots differ; paths that say the same do not add up to 1.

Legend: S spots, R regions, M pathways, D shared width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hibio.batch import SlideBatch
from hibio.encoders.heist import HeistEncoder
from hibio.encoders.layers import GeneAttention
from hibio.encoders.omics import GraphHierarchyEncoder, MlpOmicsEncoder
from hibio.model import HiBio

REGION_UM = 600.0  # side of the squares that stand for regions
LEAST = 0.01  # of the output; a path below it does not act

Cut = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class PathShare:
    """What one path does.

    Attributes:
        path: its name.
        output: change of the output without it, over the variance of the output.
        token: share of the variance of the token that it is a summand of; None for other paths.
        facts: more numbers about it, by name.
    """

    path: str
    output: float
    token: float | None = None
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def acts(self) -> bool:
        """Whether it makes at least 1 % of the output."""
        return self.output >= LEAST


@torch.no_grad()
def path_shares(model: HiBio, batch: SlideBatch) -> list[PathShare]:
    """Every path of the omics tower, the pooling of regions and the anchors.

    Args:
        model: as it is; nothing of it is changed, but its anchors are encoded anew.
        batch: spots of training slides with their halo; the core spots are looked at.
    """
    was_training = model.training
    model.eval()
    whole_SD = _embedded(model, batch)
    tokens = _token_shares(model.omics, batch)
    facts = _facts(model.omics, batch)
    found = []
    for path, cut in _cuts(model.omics).items():
        with cut():
            output = change(whole_SD, _embedded(model, batch))
        found.append(PathShare(path, output, tokens.get(path), facts.get(path, {})))
    found.append(_pooling(model, batch, whole_SD))
    if model.artifacts.n_pathways:
        found += _anchors(model, whole_SD)
    model.train(was_training)
    return found


def change(whole: Tensor, cut: Tensor) -> float:
    """Mean squared distance between rows, over their variance; 0 where nothing varies."""
    variance = float(whole.var(dim=0, correction=0).sum())
    return float((whole - cut).square().sum(dim=1).mean()) / variance if variance > 0 else 0.0


def _embedded(model: HiBio, batch: SlideBatch) -> Tensor:
    return F.normalize(model.project_omics(batch)[batch.core_S], dim=1)


@contextmanager
def zeroed(*tensors: Tensor) -> Iterator[None]:
    """Parameters, or parts of them, are 0 meanwhile."""
    kept = [one.clone() for one in tensors]
    for one in tensors:
        one.zero_()
    try:
        yield
    finally:
        for one, value in zip(tensors, kept, strict=True):
            one.copy_(value)


@contextmanager
def _hooked(
    modules: Sequence[nn.Module], change_output: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_hook(lambda m, inputs, output: change_output(output))
            stack.callback(hook.remove)
        yield


def _same_for_all(output: Tensor) -> Tensor:
    """The mean row in the place of every row."""
    return output.flatten(0, -2).mean(dim=0).expand_as(output)


def _cuts(tower: nn.Module) -> dict[str, Cut]:
    """Name of each path -> a context in which it is cut; none for an encoder of one's own."""
    if isinstance(tower, GraphHierarchyEncoder):
        return _hierarchy_cuts(tower)
    if isinstance(tower, MlpOmicsEncoder):
        first: Any = tower.layers[0]
        own, around = first.weight.chunk(2, dim=1)
        return {
            "spot: own vector": lambda: zeroed(own),
            "spot: neighbours' mean": lambda: zeroed(around),
        }
    if isinstance(tower, HeistEncoder):
        layers: Any = list(tower.layers)
        around_spots = [one for x in layers for one in (x.neighbour_sum, x.slide_attention)]
        return {
            "spot: place": lambda: _hooked([tower.spot_input], _same_for_all),
            "gene: value and rank": lambda: _hooked([tower.gene_input], _same_for_all),
            "gene graph": lambda: zeroed(tower.gene_graphs.weight_TGE),
            "spots <- spots": lambda: _hooked(around_spots, torch.zeros_like),
            "spots <- genes": lambda: _hooked([x.spot_gate for x in layers], torch.zeros_like),
            "genes <- spot": lambda: _hooked([x.gene_gate for x in layers], torch.zeros_like),
        }
    return {}


def _hierarchy_cuts(tower: GraphHierarchyEncoder) -> dict[str, Cut]:
    layers: Any = list(tower.layers)
    cuts: dict[str, Cut] = {
        "gene: value": lambda: _hooked([tower.value], _same_for_all),
        "gene: rank": lambda: _hooked([tower.rank], _same_for_all),
    }
    identity = tower.identity
    if identity is not None:
        cuts["gene: identity"] = lambda: _hooked([identity], _same_for_all)
    if tower.gene_graphs is not None:
        scales = [one.gene_attention.bias_scale_H for one in layers]
        cuts["gene graph"] = lambda: zeroed(*scales)
    if tower.spot_vector is not None:
        own, around = tower.spot_vector.weight.chunk(2, dim=1)
        cuts["spot: own vector"] = lambda: zeroed(own)
        cuts["spot: neighbours' mean"] = lambda: zeroed(around)
    if tower.config.spatial_graph:
        gates = [one.spot_attention.gate for one in layers]
        cuts["spots <- spots"] = lambda: zeroed(*gates)
    if tower.config.cross:
        up, down = ([getattr(x.cross, name) for x in layers] for name in ("gate_up", "gate_down"))
        cuts["spots <- genes"] = lambda: zeroed(*up)
        cuts["genes <- spot"] = lambda: zeroed(*down)
    return cuts


def _token_shares(tower: nn.Module, batch: SlideBatch) -> dict[str, float]:
    """Share of each summand in the sum of their variances, over spots (and genes)."""
    if not isinstance(tower, GraphHierarchyEncoder):
        return {}
    core = batch.core_S
    present = batch.gene_SK[core] < tower.n_genes
    genes = tower.gene_summands(batch.gene_SK[core], batch.value_SK[core])
    spots = {name: one[core] for name, one in tower.spot_summands(batch).items()}
    messages = _messages_up(tower, batch)
    shares: dict[str, float] = {}
    for kind, parts in (("gene", {n: one[present] for n, one in genes.items()}), ("spot", spots)):
        variance = {n: float(one.var(dim=0, correction=0).sum()) for n, one in parts.items()}
        total = sum(variance.values()) + (messages if kind == "spot" else 0.0)
        shares |= {f"{kind}: {name}": one / max(total, 1e-30) for name, one in variance.items()}
        if kind == "spot":
            shares["spots <- genes"] = messages / max(total, 1e-30)
    return shares


def _messages_up(tower: GraphHierarchyEncoder, batch: SlideBatch) -> float:
    """Variance over the core spots of what the genes add to the spot tokens, of all layers."""
    if not tower.config.cross:
        return 0.0
    seen: list[float] = []
    layers: Any = list(tower.layers)
    with ExitStack() as stack, torch.enable_grad():  # the whole batch at a time
        for layer in layers:
            gate = layer.cross.gate_up

            def keep(module: nn.Module, inputs: Any, output: Tensor, gate: Tensor = gate) -> None:
                moved = (gate * output)[batch.core_S].detach()
                seen.append(float(moved.var(dim=0, correction=0).sum()))

            stack.callback(layer.cross.value.register_forward_hook(keep).remove)
        tower.encode(batch)
    return sum(seen)


def _facts(tower: nn.Module, batch: SlideBatch) -> dict[str, dict[str, float]]:
    """More about gates and about the attention among genes."""
    if not isinstance(tower, GraphHierarchyEncoder):
        return {}
    layers: Any = list(tower.layers)
    facts: dict[str, dict[str, float]] = {}
    if tower.config.spatial_graph:
        facts["spots <- spots"] = _size([one.spot_attention.gate for one in layers])
    if tower.config.cross:
        facts["spots <- genes"] = _size([one.cross.gate_up for one in layers])
        facts["genes <- spot"] = _size([one.cross.gate_down for one in layers])
    if tower.gene_graphs is not None:
        facts["gene graph"] = _attention_change(tower, batch)
    return facts


def _size(gates: Sequence[Tensor]) -> dict[str, float]:
    return {"gate": float(torch.cat(list(gates)).abs().mean())}


def _attention_change(tower: GraphHierarchyEncoder, batch: SlideBatch) -> dict[str, float]:
    """Total variation between attention among genes with and without the bias, mean over all."""
    moved: list[float] = []
    edges: list[float] = []

    def look(module: nn.Module, inputs: Any) -> None:
        assert isinstance(module, GeneAttention)
        gene_SKD, present_SK, edge_SKK = (one[batch.core_S].detach() for one in inputs[:3])
        seen = present_SK | ~present_SK.any(dim=1, keepdim=True)
        logit = module.logits(gene_SKD).detach().masked_fill(~seen[:, None, None, :], -1e4)
        bias = module.bias_scale_H.detach()[:, None, None] * edge_SKK[:, None]
        apart = (logit.softmax(dim=3) - (logit + bias).softmax(dim=3)).abs().sum(dim=3) / 2
        moved.append(float(apart.mean(dim=1)[present_SK].mean()))
        pair = present_SK[:, :, None] & present_SK[:, None, :]
        edges.append(float((edge_SKK[pair] > 0).float().mean()))

    layers: Any = list(tower.layers)
    with ExitStack() as stack, torch.enable_grad():  # the whole batch at a time
        for layer in layers:
            stack.callback(layer.gene_attention.register_forward_pre_hook(look).remove)
        tower.encode(batch)
    return {
        "attention moved": sum(moved) / len(moved),
        "pairs with an edge": sum(edges) / len(edges),
    }


def _pooling(model: HiBio, batch: SlideBatch, spot_SD: Tensor) -> PathShare:
    """Attention pooling of regions against the plain mean; squares stand for regions."""
    core = batch.core_S
    square = torch.floor(batch.xy_um_S2[core] / REGION_UM)
    place = torch.cat([batch.slide_of_spot_S[core][:, None].to(square.dtype), square], dim=1)
    region_S = torch.unique(place, dim=0, return_inverse=True)[1]
    n_R = torch.bincount(region_S)
    pooled_RD = model.pooled(spot_SD, region_S, len(n_R))
    mean_RD = torch.zeros_like(pooled_RD).index_add(0, region_S, spot_SD) / n_R[:, None]
    score_S = model.pool.score(spot_SD).squeeze(1)
    evenness = []
    for region, size in enumerate(n_R.tolist()):
        if size > 1:
            weight = score_S[region_S == region].softmax(dim=0)
            entropy = -(weight * weight.clamp(min=1e-30).log()).sum()
            evenness.append(float(entropy / torch.log(torch.tensor(float(size)))))
    facts = {"entropy over uniform": sum(evenness) / max(len(evenness), 1), "regions": len(n_R)}
    return PathShare(
        "regions: attention", change(pooled_RD, F.normalize(mean_RD, dim=1)), None, facts
    )


def _anchors(model: HiBio, spot_SD: Tensor) -> list[PathShare]:
    """How far the spots tell the anchors apart, and what the gene graph does to the anchors."""
    anchor_MD = model.anchor_embeddings().clone()
    kind_SM = (spot_SD @ anchor_MD.T / model.anchor_temperature).softmax(dim=1)
    apart = float((kind_SM - kind_SM.mean(dim=0)).abs().sum(dim=1).mean()) / 2
    facts = {"spread": float(anchor_MD.var(dim=0, correction=0).sum())}
    found = [PathShare("anchors: mass moved", apart, None, facts)]
    cut = _cuts(model.omics).get("gene graph")
    if cut is not None and model.anchors.table_MD is None:
        with cut():
            output = change(anchor_MD, model.anchor_embeddings())
        found.append(PathShare("anchors: gene graph", output))
    return found


def beside(start: Sequence[PathShare], trained: Sequence[PathShare]) -> list[dict[str, Any]]:
    """Both beside each other: one row a path, with ``acts`` after training."""
    before = {one.path: dataclasses.asdict(one) for one in start}
    return [
        {
            "path": one.path,
            "acts": one.acts,
            "start": {k: v for k, v in before[one.path].items() if k != "path"},
            "trained": {k: v for k, v in dataclasses.asdict(one).items() if k != "path"},
        }
        for one in trained
    ]
