"""Speed and memory of the omics encoder: `python benchmarks/omics.py [--variant heist]`.

Everything in one run on one device: outputs against a message-passing version with the same
weights (`MessagePassing`), cells a second of both, the matrix products' FLOP/s over the rate of
one large `torch.matmul`, the default preset, time and peak memory of sections from 1,000 to 100,000
cells, and the spatial graph of a million points. Each rate is the best of several, taken in turn.
On a GPU the encoder runs in bf16 autocast and the large product is in bf16. Run it with nothing
else on the machine.

Presets are K:layers:width:heads.

Legend: S spots, g genes of all the spots at hand, N neighbours, D width, H heads, E edges.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from synthetic import draw_context, draw_section, whole_batch
from timing import in_own_process, in_turn, peak_megabytes, seconds
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hibio.batch import SlideBatch
from hibio.config.model import OmicsConfig
from hibio.data.collate import iter_tiles
from hibio.encoders.layers import CrossMessages, HierarchyLayer
from hibio.encoders.omics import GraphHierarchyEncoder, build_omics_encoder
from preprocessing.graphs import KNNGraph

PUBLISHED = "200:10:128:8"
REFERENCE_CELLS = 8  # the message-passing version is slow
TILE = 1024


@dataclass(frozen=True)
class Preset:
    """Sizes of an encoder."""

    keyword_genes: int
    layers: int
    width: int
    heads: int

    @classmethod
    def read(cls, text: str) -> Preset:
        """From K:layers:width:heads."""
        return cls(*(int(part) for part in text.split(":")))

    def __str__(self) -> str:
        return (
            f"{self.keyword_genes} genes, {self.layers} layers, width {self.width}, "
            f"{self.heads} heads"
        )


@dataclass(frozen=True)
class SpotGraphs:
    """The gene graphs of some spots as one graph without edges between spots.

    Attributes:
        spots: which spots.
        spot_g: which of them each gene token belongs to.
        token_g: flat index (spot * K + place) of each.
        source_E: gene that speaks, of each edge.
        target_E: gene that listens.
        weight_E: co-expression of the two.
    """

    spots: slice
    spot_g: Tensor
    token_g: Tensor
    source_E: Tensor
    target_E: Tensor
    weight_E: Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, edge: tuple[Tensor, Tensor], bias: Tensor):
    """Softmax-weighted mean of the values that reach each target, (targets, H, d)."""
    source_E, target_E = edge
    key_EHd = key.index_select(0, source_E)
    query_EHd = query.index_select(0, target_E)
    logit_EH = (query_EHd * key_EHd).sum(dim=2) / math.sqrt(query.shape[2]) + bias
    index_EH = target_E[:, None].expand_as(logit_EH)
    top = logit_EH.new_full(query.shape[:2], -torch.inf)
    top.scatter_reduce_(0, index_EH, logit_EH, "amax")
    weight_EH = (logit_EH - top.index_select(0, target_E)).exp()
    total = torch.zeros_like(top).index_add_(0, target_E, weight_EH)
    weight_EH = weight_EH / total.index_select(0, target_E)
    message_EHd = weight_EH[:, :, None] * value.index_select(0, source_E)
    return torch.zeros_like(query).index_add_(0, target_E, message_EHd)


class MessagePassing:
    """The encoder's forward pass, message by message: same weights and results, other arithmetic.

    A list of edges under every spot (each pair of its genes), one over the spots; for every edge
    of every layer its two ends are gathered (`index_select`) and its message scattered
    (`index_add_`).

    Args:
        encoder: whose weights to use, in evaluation mode.
        at_a_time: spots whose gene graphs are joined into one; 1 is spot by spot.
    """

    def __init__(self, encoder: GraphHierarchyEncoder, at_a_time: int = 1) -> None:
        self.encoder = encoder
        self.at_a_time = at_a_time

    @torch.no_grad()
    def __call__(self, batch: SlideBatch) -> Tensor:
        """Spot embeddings (S, D)."""
        encoder = self.encoder
        gene_SKD = encoder._gene_tokens(batch.gene_SK, batch.value_SK, None)
        spot_SD = encoder._spot_tokens(batch, None)
        graphs = self._graphs(batch)
        flat_gD = gene_SKD.flatten(0, 1)
        token = [flat_gD[graph.token_g] for graph in graphs]
        for layer in encoder.layers:
            spot_SD = self._spots(layer, spot_SD, batch)
            moved = spot_SD.clone()
            for number, graph in enumerate(graphs):
                token[number] = self._genes(layer, token[number], graph)
                if layer.cross is not None:
                    moved[graph.spots], token[number] = self._cross(
                        layer.cross, spot_SD[graph.spots], token[number], graph
                    )
            spot_SD = moved
        return encoder.norm_spot(spot_SD)

    def _graphs(self, batch: SlideBatch) -> list[SpotGraphs]:
        n_genes = self.encoder.n_genes
        graphs = []
        for start in range(0, batch.n_spots, self.at_a_time):
            spots = slice(start, min(start + self.at_a_time, batch.n_spots))
            gene_SK = batch.gene_SK[spots]
            spot_g, place_g = (gene_SK < n_genes).nonzero(as_tuple=True)
            offset = torch.cat([spot_g.new_zeros(1), spot_g.bincount().cumsum(0)[:-1]])
            token_g = (start + spot_g) * gene_SK.shape[1] + place_g
            weight_SKK = self.encoder.pair_weights(gene_SK, batch.spot_group_S[spots])
            source, target, weight = [], [], []
            for spot, first in enumerate(offset.tolist()):
                place = place_g[spot_g == spot]
                local = torch.arange(len(place), device=place.device)
                pair = torch.cartesian_prod(local, local)
                target.append(first + pair[:, 0])
                source.append(first + pair[:, 1])
                if weight_SKK is not None:
                    weight.append(weight_SKK[spot][place[pair[:, 0]], place[pair[:, 1]]])
            weight_E = torch.cat(weight) if weight else torch.zeros(len(torch.cat(source)))
            graphs.append(
                SpotGraphs(spots, spot_g, token_g, torch.cat(source), torch.cat(target), weight_E)
            )
        return graphs

    def _genes(self, layer: HierarchyLayer, token_gD: Tensor, graph: SpotGraphs) -> Tensor:
        part = layer.gene_attention
        packed = part.query_key_value(part.norm(token_gD)).view(len(token_gD), 3, part.heads, -1)
        bias_EH = graph.weight_E[:, None] * part.bias_scale_H
        edge = (graph.source_E, graph.target_E)
        mixed = attend(packed[:, 0], packed[:, 1], packed[:, 2], edge, bias_EH)
        token_gD = token_gD + part.out(mixed.flatten(1))
        return token_gD + layer.gene_forward(token_gD)

    def _spots(self, layer: HierarchyLayer, spot_SD: Tensor, batch: SlideBatch) -> Tensor:
        part = layer.spot_attention
        if part is not None:
            n_spots = len(spot_SD)
            own = torch.arange(n_spots, device=spot_SD.device)
            spot_E, place_E = (batch.neighbour_SN >= 0).nonzero(as_tuple=True)
            source_E = torch.cat([own, batch.neighbour_SN[spot_E, place_E]])
            bias_SHN = part._bias(batch.distance_um_SN)[:, :, 1:]
            bias_EH = bias_SHN[spot_E, :, place_E]
            bias_EH = torch.cat([bias_EH.new_zeros(n_spots, part.heads), bias_EH])
            normed = part.norm(spot_SD)
            query = part.query(normed).view(n_spots, part.heads, -1)
            packed = part.key_value(normed).view(n_spots, 2, part.heads, -1)
            edge = (source_E, torch.cat([own, spot_E]))
            mixed = attend(query, packed[:, 0], packed[:, 1], edge, bias_EH)
            spot_SD = spot_SD + part.gate * part.out(mixed.flatten(1))
        return spot_SD + layer.spot_forward(spot_SD)

    def _cross(
        self, part: CrossMessages, spot_SD: Tensor, token_gD: Tensor, graph: SpotGraphs
    ) -> tuple[Tensor, Tensor]:
        normed_gD = part.norm_gene(token_gD)
        query_SD = part.score(part.norm_spot(spot_SD))
        logit_g = (query_SD.index_select(0, graph.spot_g) * normed_gD).sum(dim=1)
        logit_g = logit_g / math.sqrt(spot_SD.shape[1])
        top_S = spot_SD.new_full((len(spot_SD),), -torch.inf)
        top_S.scatter_reduce_(0, graph.spot_g, logit_g, "amax")
        weight_g = (logit_g - top_S.index_select(0, graph.spot_g)).exp()
        total_S = torch.zeros_like(top_S).index_add_(0, graph.spot_g, weight_g)
        weight_g = weight_g / total_S.index_select(0, graph.spot_g)
        message_gD = weight_g[:, None] * part.value(normed_gD)
        up_SD = torch.zeros_like(spot_SD).index_add_(0, graph.spot_g, message_gD)
        spot_SD = spot_SD + part.gate_up * up_SD
        down_SD = part.gate_down * part.to_gene(part.norm_spot(spot_SD))
        return spot_SD, token_gD + down_SD.index_select(0, graph.spot_g)


def default_preset() -> str:
    """The model that a configuration gets that names no sizes, with 64 keyword genes."""
    config = OmicsConfig()
    return f"64:{config.layers}:{config.width}:{config.heads}"


def build(preset: Preset, variant: str, device: str) -> Any:
    """A random encoder with every gate and bias switched on."""
    torch.manual_seed(0)
    config = OmicsConfig(
        variant="heist" if variant == "heist" else "hibio",
        layers=preset.layers,
        width=preset.width,
        heads=preset.heads,
        **({"identity": "none", "skip": False} if variant == "heist" else {}),
    )
    encoder = build_omics_encoder(config, draw_context(preset.keyword_genes)).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "gate" in name or "distance_bias" in name or "bias_scale" in name:
                parameter.normal_(std=0.7)
    return encoder.to(device)


@torch.inference_mode()
def embed(encoder: Any, batch: SlideBatch) -> Tensor:
    """Embeddings; bf16 autocast on a GPU."""
    device = batch.gene_SK.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        found = encoder(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return found


def product(device: str) -> tuple[Callable[[], None], float]:
    """A large matrix product and its FLOP."""
    size, kind = (8192, torch.bfloat16) if device == "cuda" else (4096, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))

    def multiply() -> None:
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()

    return multiply, 2.0 * size**3


def flop_per_cell(encoder: Any, batch: SlideBatch) -> float:
    """FLOP of the matrix products that the encoder really makes, a cell."""
    with FlopCounterMode(display=False) as counter:
        embed(encoder, batch)
    return counter.get_total_flops() / batch.n_spots


def rates(presets: dict[str, Preset], given: argparse.Namespace, device: str) -> None:
    """Cells a second of every preset and of the message-passing version, in turn."""
    multiply, multiply_flop = product(device)
    actions: dict[str, Callable[[], Any]] = {"matmul": multiply}
    cells: dict[str, int] = {}
    flop: dict[str, float] = {}
    for name, preset in presets.items():
        encoder = build(preset, given.variant, device)
        n_cells = max(64, int(given.cells * 200 * 10 / preset.keyword_genes / preset.layers))
        batch = whole_batch(draw_section(n_cells, preset.keyword_genes)).to(device)
        actions[name] = lambda encoder=encoder, batch=batch: embed(encoder, batch)
        cells[name], flop[name] = n_cells, flop_per_cell(encoder, batch)
        if name == "published size" and given.variant == "hibio":
            few = whole_batch(draw_section(REFERENCE_CELLS, preset.keyword_genes)).to(device)
            for together in (1, REFERENCE_CELLS):
                plain = MessagePassing(encoder, together)
                title = f"message passing, {together} spots at a time"
                actions[title] = lambda plain=plain, few=few: plain(few)
                cells[title], flop[title] = REFERENCE_CELLS, float("nan")
    taken = in_turn(actions, given.rounds)
    peak = multiply_flop / min(taken["matmul"])
    print(f"large matmul: {peak / 1e9:.0f} GFLOP/s (best of {given.rounds})")
    first = cells["published size"] / min(taken["published size"])
    for name, n_cells in cells.items():
        rate = n_cells / min(taken[name])
        every = ", ".join(f"{n_cells / one:.4g}" for one in taken[name])
        print(f"{name} [{presets.get(name, 'as the published size')}]")
        print(f"  {rate:.4g} cells/s (all: {every}); published size / this {first / rate:.3g}")
        if not np.isnan(flop[name]):
            share = rate * flop[name] / peak
            print(f"  {flop[name] / 1e6:.0f} MFLOP a cell, {share:.2f} of the large matmul's rate")


def check(preset: Preset, device: str) -> None:
    """Refuse to time what is not equal."""
    encoder = build(preset, "hibio", device)
    batch = whole_batch(draw_section(24, preset.keyword_genes, padding=True)).to(device)
    with torch.inference_mode():
        found, wanted = encoder(batch), MessagePassing(encoder)(batch)
    gap = float((found - wanted).abs().max())
    print(f"largest difference from message passing: {gap:.1e} (24 spots, float32, with padding)")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def section(n_spots: int, preset: Preset, variant: str, threads: int) -> tuple[float, float]:
    """Seconds and peak MB of one section, tile by tile with its halo, in a process of its own."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = build(preset, variant, device)
    slide = draw_section(n_spots, preset.keyword_genes)

    def run() -> None:
        for _, batch in iter_tiles(slide, encoder.hops, TILE):
            embed(encoder, batch.to(device))[batch.core_S.to(device)].cpu()

    taken = seconds(run)
    if device == "cuda":
        return taken, torch.cuda.max_memory_allocated() / 1e6
    return taken, peak_megabytes()


def scaling(preset: Preset, given: argparse.Namespace) -> None:
    """Time and peak memory of sections of rising size."""
    print(f"sections in tiles of {TILE} cells [{preset}]")
    for n_spots in given.sizes:
        taken, memory = in_own_process(section, n_spots, preset, given.variant, given.threads)
        each = 1e6 * taken / n_spots
        print(f"  {n_spots} cells: {taken:.2f} s, {each:.0f} us a cell, peak {memory:.0f} MB")


def graph(n_points: int) -> None:
    """The spatial graph of random points."""
    xy = np.random.default_rng(0).uniform(0, 20.0 * np.sqrt(n_points), (n_points, 2))
    taken = seconds(lambda: KNNGraph().build(xy))
    print(f"KNNGraph of {n_points} points: {taken:.1f} s")


def main() -> None:
    """Prints every measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=["hibio", "heist"], default="hibio")
    parser.add_argument("--preset", default=default_preset(), help="the default preset")
    parser.add_argument("--small", default="64:2:64:4", help="the preset of configs/heist.yaml")
    parser.add_argument("--cells", type=int, default=256, help="of the published size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[1000, 3000, 10_000, 30_000, 100_000]
    )
    parser.add_argument("--points", type=int, default=1_000_000, help="of the spatial graph")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {named}, {given.threads} threads, variant {given.variant}")
    presets = {
        "published size": Preset.read(PUBLISHED),
        "default": Preset.read(given.preset),
        "small": Preset.read(given.small),
    }
    if given.variant == "hibio":
        check(presets["published size"], device)
    rates(presets, given, device)
    scaling(presets["default"], given)
    if given.points:
        graph(given.points)


if __name__ == "__main__":
    main()
