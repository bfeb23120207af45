"""Speed and memory of the omics encoder: `python benchmarks/omics.py [--variant heist]`.

Everything in one run on one device: outputs against a message-passing version with the same
weights (`message_passing.py`), cells a second of both, the matrix products' FLOP/s over the rate of
one large `torch.matmul`, the default preset, time and peak memory of sections from 1,000 to 100,000
cells, and the spatial graph of a million points. Each rate is the best of several, taken in turn.
On a GPU the encoder runs in bf16 autocast and the large product is in bf16. Run it with nothing
else on the machine.

Presets are K:layers:width:heads.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from message_passing import MessagePassing
from synthetic_cells import draw_context, draw_section, whole_batch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hibio.batch import SlideBatch
from hibio.config.model import OmicsConfig
from hibio.data.collate import iter_tiles
from hibio.encoders.omics import build_omics_encoder
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
        return encoder(batch)


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call, everything on the device finished."""
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, A B C A B C ..., after one call of each."""
    for action in actions.values():
        action()
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            taken[name].append(seconds(action))
    return taken


def product(device: str) -> tuple[Callable[[], Tensor], float]:
    """A large matrix product and its FLOP."""
    size, kind = (8192, torch.bfloat16) if device == "cuda" else (4096, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    return lambda: left @ right, 2.0 * size**3


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
    return taken, peak_memory()


def peak_memory() -> float:
    """Peak MB of this process, by Linux; `getrusage` would tell that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


def scaling(preset: Preset, given: argparse.Namespace) -> None:
    """Time and peak memory of sections of rising size."""
    print(f"sections in tiles of {TILE} cells [{preset}]")
    for n_spots in given.sizes:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            task = pool.submit(section, n_spots, preset, given.variant, given.threads)
            taken, memory = task.result()
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
