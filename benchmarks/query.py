"""Time of `hibio query`: `python benchmarks/query.py --checkpoint RUN --data STORES --out DIR`.

One slide of the folder is laid side by side until it has 5,000 spots and scored on 5,000 random
sets of 10 to 79 genes: sets read, bank, embedding, scores, .h5ad, .csv and .png. Told are the
seconds of the processor and of the clock; the import of Python's modules is not counted.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401 - so that its import is not counted
import numpy as np

from benchmarks.timing import peak_megabytes
from benchmarks.view import enlarged
from eval import query_folder
from eval.report.figures import heatmaps  # noqa: F401 - nor this one's
from preprocessing.store import SlideStore


def random_sets(path: Path, genes: list[str], n: int) -> None:
    """A GMT file of ``n`` sets."""
    rng = np.random.default_rng(0)
    most = min(80, len(genes))
    lines = [
        "\t".join([f"S{m}", "", *rng.choice(genes, rng.integers(10, most), replace=False)])
        for m in range(n)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Print one line a repetition."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--checkpoint", "--data", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--spots", type=int, default=5000)
    parser.add_argument("--sets", type=int, default=5000)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    stores, out = options.out / f"{options.spots}", options.out / "query"
    stores.mkdir(parents=True, exist_ok=True)
    store = stores / f"s{options.spots}.h5"
    if not store.exists():
        enlarged(sorted(options.data.glob("*.h5"))[0], stores, options.spots)
    with SlideStore(store) as slide:
        random_sets(options.out / "sets.gmt", [str(one) for one in slide.gene_names], options.sets)
    print("sets | spots | seconds of the processor | on the clock | peak memory, MB")
    for _ in range(options.times):
        shutil.rmtree(out, ignore_errors=True)
        clock, processor = time.perf_counter(), time.process_time()
        query_folder(options.checkpoint, store, str(options.out / "sets.gmt"), out)
        took = time.process_time() - processor, time.perf_counter() - clock
        told = f"{took[0]:.1f} | {took[1]:.1f} | {peak_megabytes():,.0f}"
        print(f"{options.sets} | {options.spots} | {told}", flush=True)


if __name__ == "__main__":
    main()
