"""Memory of `hibio predict`: `python benchmarks/predict_memory.py CHECKPOINT --out DIR`.

Pictures of tissue of 1,000, 10,000 and 30,000 patches are made, as large as the checkpoint reads
them; each is predicted twice in a process of its own, from the picture and then from the store that
came of it. One line each: patches, what was given, peak memory (resident) and seconds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from eval.embed import one_checkpoint
from hibio.artifacts import read_artifacts
from hibio.checkpoint import ARTIFACTS, READOUT
from hibio.readout import read_readout

CHILD = (  # whose own peak is asked of the kernel: that of getrusage begins with its parent's
    "import sys; from pathlib import Path; from hibio.cli import main; code = main(sys.argv[1:]); "
    "print('VmHWM', Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0], "
    "file=sys.stderr); sys.exit(code)"
)


def picture(path: Path, n: int, px: int) -> None:
    """A square of noisy pink, n patches of so many pixels."""
    side = int(np.ceil(np.sqrt(n))) * px + px // 2
    rng = np.random.default_rng(n)
    coarse = rng.uniform(-40, 40, (side // 40 + 1, side // 40 + 1, 3)).repeat(40, 0).repeat(40, 1)
    noise = rng.normal(0, 12, (side, side, 1))
    pixels = np.array([200, 120, 170]) + coarse[:side, :side] + noise
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def measured(checkpoint: Path, data: Path, mpp: float, out: Path) -> str:
    """Peak memory and seconds of one prediction."""
    words = ["predict", "--checkpoint", checkpoint, "--data", data, "--mpp", mpp, "--out", out]
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, words)], capture_output=True, text=True, check=True
    )
    kib = int(done.stderr.rpartition("VmHWM")[2])
    return f"{kib / 1024:.0f} MiB | {time.monotonic() - begin:.0f} s"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patches", type=int, nargs="+", default=[1000, 10_000, 30_000])
    options = parser.parse_args()
    checkpoint = one_checkpoint(options.checkpoint)
    px = int(read_readout(checkpoint / READOUT).source["patch_px"])
    um = read_artifacts(checkpoint / ARTIFACTS).settings.patch_um
    assert um is not None, "a model without images predicts nothing"
    options.out.mkdir(parents=True, exist_ok=True)
    print("patches | given | peak memory | time")
    for n in options.patches:
        data = options.out / f"patches{n}.tif"
        picture(data, n, px)
        for given, again in ((data, "picture"), (options.out / "stores", "store")):
            path = given if again == "picture" else given / f"{data.stem}.h5"
            (options.out / f"{data.stem}.predict.h5ad").unlink(missing_ok=True)
            told = measured(checkpoint, path, um / px, options.out)
            print(f"{n} | {again} | {told}", flush=True)


if __name__ == "__main__":
    main()
