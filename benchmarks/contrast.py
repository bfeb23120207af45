"""Time and memory of the tiled contrast against the dense one: `python benchmarks/contrast.py`.

For every N: one training step's worth of the spot term (N pairs of width 256 with near-duplicates
and both kinds of negatives, forward and backward), tiled and dense in turn, each in a process of
its own so that its peak memory is its own. Both give the same loss; the ratios are of one run. The
dense version holds about ten N x N matrices and runs up to --dense-up-to only. Positions are those
of a section with one spot every 100 micrometres. On a GPU memory is that of the allocator.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import torch
from timing import in_own_process, peak_megabytes, seconds
from torch import Tensor

from hibio.losses import NearDuplicates, info_nce
from hibio.losses.logits import cosine_logits

WIDTH = 256
SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
N_SLIDES = 4


class Measured(NamedTuple):
    """Best seconds of a step, megabytes above what the process held before, and the loss."""

    seconds: float
    megabytes: float
    loss: float


def draw(n: int, device: str) -> tuple[list[Tensor], NearDuplicates]:
    """Two towers and a temperature with gradients, and the spots' near-duplicates."""
    generator = torch.Generator().manual_seed(0)
    image, omics = torch.randn(2, n, WIDTH, generator=generator).to(device)
    omics = omics + image
    side = math.ceil(math.sqrt(n / N_SLIDES))
    place = torch.arange(n) // N_SLIDES
    xy_um = torch.stack([place % side, place // side], dim=1).float() * 100.0
    profile = torch.randn(n, 20, generator=generator)
    slide = torch.arange(n) % N_SLIDES
    near = NearDuplicates(profile.to(device), xy_um.to(device), slide.to(device), 150.0, 0.5)
    inputs = [image, omics, torch.tensor(0.07, device=device)]
    return [one.requires_grad_() for one in inputs], near


def dense(image: Tensor, omics: Tensor, temperature: Tensor, near: NearDuplicates) -> Tensor:
    """The same loss with the whole matrix, its masks and autograd."""
    logits = cosine_logits(image, omics, temperature)
    slide = near.slide_of_spot_S
    allowed = ~near.rows(0, near.n_spots)
    diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    losses = []
    for mask in (allowed, allowed & (slide[:, None] == slide[None, :])):
        masked = logits.masked_fill(~(mask | diagonal), -math.inf)
        both = (masked.logsumexp(dim=1) + masked.logsumexp(dim=0)) / 2
        losses.append((both - logits.diagonal()).mean())
    return torch.stack(losses).mean()


def tiled(image: Tensor, omics: Tensor, temperature: Tensor, near: NearDuplicates) -> Tensor:
    """The loss as training computes it."""
    return info_nce(image, omics, temperature, near, near.slide_of_spot_S, "mixed")


VERSIONS = {"tiled": tiled, "dense": dense}


def held(device: str) -> float:
    """Peak megabytes of this process, or of the GPU's allocator, so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_megabytes()


def measure(version: str, n: int, rounds: int, device: str) -> Measured:
    """One process: draw, warm up on a few pairs, then time the steps."""
    step = VERSIONS[version]
    small, near_small = draw(64, device)
    step(*small, near_small).backward()
    inputs, near = draw(n, device)
    before, losses = held(device), []

    def once() -> None:
        loss = step(*inputs, near)
        loss.backward()
        losses.append(float(loss.detach()))

    taken = min(seconds(once) for _ in range(rounds))
    return Measured(taken, held(device) - before, losses[-1])


def row(n: int, rounds: int, with_dense: bool, device: str) -> str:
    """One line of the table."""
    new = in_own_process(measure, "tiled", n, rounds, device)
    mine = f"| {n:,} | {new.seconds:.3f} | {new.megabytes:,.0f} "
    if not with_dense:
        return mine + "| | | | |"
    old = in_own_process(measure, "dense", n, rounds, device)
    if abs(old.loss - new.loss) > 1e-5 * abs(old.loss):
        raise SystemExit(f"N = {n}: tiled loss {new.loss}, dense loss {old.loss}; they must agree")
    memory = f"{new.megabytes / old.megabytes:.2f}" if old.megabytes else "-"  # too small to see
    return mine + (
        f"| {old.seconds:.3f} | {old.megabytes:,.0f} | {new.seconds / old.seconds:.2f} | {memory} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--dense-up-to", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, width {WIDTH}")
    print("| N | tiled, s | MB | dense, s | MB | tiled / dense time | memory |")
    print("|---|---|---|---|---|---|---|")
    for n in given.sizes:
        print(row(n, given.rounds if n <= 8192 else 1, n <= given.dense_up_to, device), flush=True)


if __name__ == "__main__":
    main()
