"""Memory and speed of `hibio predict`: `python benchmarks/predict_memory.py CHECKPOINT --out DIR`.

Pictures of tissue of 1,000, 10,000 and 30,000 patches are made, tiled as slides are, as large as
the checkpoint reads them; each is predicted twice in a process of its own, from the picture and
then from the store that came of it. One line each: patches, what was given, peak memory (resident),
seconds on the clock and of the processor (of all threads; a busy machine lengthens them little).

With ``--weights FILE`` of the frozen encoder that the checkpoint reads, its bare forward on patches
in memory is timed before and after, in one thread as all of it: the last column is patches a second
of the whole command, from the start of Python to the written file, over those of the forward.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import tifffile
import torch

from eval.embed import one_checkpoint
from hibio.artifacts import read_artifacts
from hibio.backbones.frozen import FrozenBackbone, load_backbone
from hibio.backbones.resolve import resolve_backbone
from hibio.checkpoint import ARTIFACTS, READOUT
from hibio.readout import read_readout

BARE = 64  # patches of a timed forward
TILE = 256  # pixels
CHILD = (  # whose own peak is asked of the kernel: that of getrusage begins with its parent's
    "import sys; from pathlib import Path; from hibio.cli import main; code = main(sys.argv[1:]); "
    "print('VmHWM', Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0], "
    "file=sys.stderr); sys.exit(code)"
)


def picture(path: Path, n: int, px: int) -> None:
    """A square of noisy pink of n patches of so many pixels: tiles of JPEG in three levels."""
    side = int(np.ceil(np.sqrt(n))) * px + px // 2
    rng = np.random.default_rng(n)
    coarse = rng.uniform(-40, 40, (8, TILE // 32, TILE // 32, 3)).repeat(32, 1).repeat(32, 2)
    noise = rng.normal(0, 12, (8, TILE, TILE, 1))
    tiles = (np.array([200, 120, 170]) + coarse + noise).clip(0, 255).astype(np.uint8)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for down in (1, 4, 16):
            edge = -(-side // down)
            file.write(
                (tiles[rng.integers(8)] for _ in range((-(-edge // TILE)) ** 2)),
                shape=(edge, edge, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                subfiletype=int(down > 1),
            )


def measured(checkpoint: Path, data: Path, mpp: float, out: Path, *more: object) -> np.ndarray:
    """Peak memory in MiB, and seconds on the clock and of the processor, of one prediction."""
    words = ["predict", "--checkpoint", checkpoint, "--data", data, "--mpp", mpp, "--out", out]
    begin, before = time.monotonic(), os.times()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, [*words, *more])],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    after = os.times()
    processor = sum(after[2:4]) - sum(before[2:4])  # of children
    kib = int(done.stderr.rpartition("VmHWM")[2])
    return np.array([kib / 1024, time.monotonic() - begin, processor])


def forward(network: FrozenBackbone, px: int) -> np.ndarray:
    """Seconds a patch on the clock and of the processor, of the encoder alone."""
    patches = torch.randint(0, 256, (BARE, px, px, 3), dtype=torch.uint8)
    network(patches[:2])
    begin, processor = time.monotonic(), time.process_time()
    network(patches)
    return np.array([time.monotonic() - begin, time.process_time() - processor]) / BARE


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patches", type=int, nargs="+", default=[1000, 10_000, 30_000])
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = one_checkpoint(options.checkpoint)
    source = read_readout(checkpoint / READOUT).source
    px = int(source["patch_px"])
    um = read_artifacts(checkpoint / ARTIFACTS).settings.patch_um
    assert um is not None, "a model without images predicts nothing"
    network, more = None, []
    if options.weights is not None:
        network = load_backbone(resolve_backbone(source["encoder"]), options.weights)
        more = ["--weights", options.weights]
    options.out.mkdir(parents=True, exist_ok=True)
    print("patches | given | peak memory | clock | processor | over the forward: clock, processor")
    for n in options.patches:
        data = options.out / f"patches{n}.tif"
        picture(data, n, px)
        for given, again in ((data, "picture"), (options.out / "stores", "store")):
            path = given if again == "picture" else given / f"{data.stem}.h5"
            target = options.out / f"{data.stem}.predict.h5ad"
            target.unlink(missing_ok=True)
            bare = [] if network is None else [forward(network, px)]
            took = measured(checkpoint, path, um / px, options.out, *more)
            told = f"{took[0]:.0f} MiB | {took[1]:.0f} s | {took[2]:.0f} s"
            if network is not None and again == "picture":
                bare.append(forward(network, px))
                with h5py.File(target, "r") as file:
                    share = np.mean(bare, axis=0) * file["X"].shape[0] / took[1:]
                told += f" | {share[0]:.3f}, {share[1]:.3f}"
            print(f"{n} | {again} | {told}", flush=True)


if __name__ == "__main__":
    main()
