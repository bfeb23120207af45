"""Cost of the data side against its size: `python benchmarks/scale.py`.

fit      vocabulary, TF-IDF, gene factors, groups, gene graph and targets, streamed from stores of
         synthetic sparse counts (`synthetic.py`): seconds, processor time, peak memory, each
         size in a process of its own; the stores are written first, outside the time.
start    what comes before the first batch of an epoch over very many slides: the entries of all
         stores when each has to be opened and when the index of the folder knows them, the plan of
         the epoch, the first batch, and memory after more and more batches.

Stores go to --folder (a temporary one is removed at the end), 0.5 MB a thousand spots; only
--distinct of them are different, since drawing counts takes longer than fitting them. Microseconds
a spot are of the processor, which other jobs on the machine change less than the wall time.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
import time
from pathlib import Path

from synthetic import GENES, copies, write_slides
from timing import in_own_process, peak_megabytes, seconds

from hibio.artifacts import Artifacts
from hibio.config.data import GenesConfig, PathwaysConfig, RegionsConfig
from hibio.config.training import SamplerConfig
from hibio.data.collate import collate
from hibio.data.dataset import PreparedSlides
from hibio.data.fitting import fit_artifacts
from hibio.data.sampler import RegionSampler
from hibio.data.splits import INDEX_NAME, indexed_entries
from hibio.training.region_state import RegionState

SIZES = (10_000, 100_000, 1_000_000)
SMALL_SPOTS = 1_000  # spots of the slide of which there are very many


def fitted(paths: list[Path], threads: int) -> Artifacts:
    """Everything that is fitted on counts, with the default settings."""
    return fit_artifacts(paths, GenesConfig(), PathwaysConfig(source="none"), threads=threads)


def measured_fit(paths: list[Path], threads: int) -> tuple[float, float, float, float]:
    """Wall and processor seconds of the fit, and peak megabytes before and after it."""
    before, worked = peak_megabytes(), time.process_time()
    taken = seconds(lambda: fitted(paths, threads))
    return taken, time.process_time() - worked, before, peak_megabytes()


def stores(folder: Path, n_slides: int, slide_spots: int, distinct: int) -> list[Path]:
    """So many stores; after the first ``distinct`` ones they are the same files again."""
    different = write_slides(folder, min(n_slides, distinct), slide_spots)
    again = math.ceil(n_slides / len(different)) - 1
    parts = [copies(path, folder / "again", again) for path in different]
    return [*different, *(path for same in zip(*parts, strict=True) for path in same)][:n_slides]


def fit(folder: Path, sizes: list[int], slide_spots: int, distinct: int, threads: int) -> None:
    """Fits of rising size, each in a fresh process."""
    print(
        f"\nfit: slides of {slide_spots:,} spots, {distinct} different ones, {GENES} genes, "
        f"{threads} threads"
    )
    print("| spots | slides | fit, s | processor, s | us a spot | memory before, MB | peak, MB |")
    print("|---|---|---|---|---|---|---|")
    for n_spots in sizes:
        paths = stores(folder, max(1, n_spots // slide_spots), slide_spots, distinct)
        taken, worked, before, peak = in_own_process(measured_fit, paths, threads)
        n_done = len(paths) * slide_spots
        rate = 1e6 * worked / n_done
        print(
            f"| {n_done:,} | {len(paths)} | {taken:.1f} | {worked:.1f} | {rate:.0f} "
            f"| {before:,.0f} | {peak:,.0f} |",
            flush=True,
        )


def start(folder: Path, n_slides: int) -> None:
    """Everything before the first batch of an epoch over ``n_slides`` slides."""
    source = write_slides(folder / "one", 1, SMALL_SPOTS)[0]
    artifacts = fitted([source], 1)
    paths = copies(source, folder / "many", n_slides)
    (folder / "many" / INDEX_NAME).unlink(missing_ok=True)
    print(
        f"\nstart: {n_slides:,} slides of {SMALL_SPOTS:,} spots, memory {peak_megabytes():,.0f} MB"
    )
    opening = seconds(lambda: indexed_entries(paths))
    print(f"  every store opened: {opening:.2f} s ({1e3 * opening / n_slides:.2f} ms a store)")
    knowing = seconds(lambda: indexed_entries(paths))
    entries = indexed_entries(paths)
    size = (folder / "many" / INDEX_NAME).stat().st_size / 2**20
    print(f"  from the index: {knowing:.2f} s; index of {size:.1f} MB")
    dataset = PreparedSlides(entries, artifacts, None)
    regions = RegionState(RegionsConfig(), dataset)
    sampler = RegionSampler(SamplerConfig(), [e.n_spots for e in entries], 0)
    started = time.perf_counter()
    batches = sampler.epoch(0, regions.sampling)
    planning = time.perf_counter() - started
    print(f"  plan of an epoch of {len(batches):,} batches: {planning:.2f} s")

    def read(numbers: range) -> None:
        for number in numbers:
            shares = batches[number]
            collate([(dataset[i], regions.current(i), core) for i, core in shares])

    first = seconds(lambda: read(range(1)))
    print(f"  first batch: {first:.2f} s; index, plan and batch {knowing + planning + first:.2f} s")
    done = 1
    for until in (200, 400, 800):
        numbers = range(done, min(until, len(batches)))
        taken = seconds(functools.partial(read, numbers))
        print(
            f"  batches {done}-{until}: {1e3 * taken / (until - done):.0f} ms each, "
            f"peak {peak_megabytes():,.0f} MB",
            flush=True,
        )
        done = until


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=("fit", "start"), default=["fit", "start"])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--slide-spots", type=int, default=10_000)
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--distinct", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if "fit" in given.parts:
            fit(folder / "fit", given.sizes, given.slide_spots, given.distinct, given.threads)
        if "start" in given.parts:
            start(folder, given.slides)


if __name__ == "__main__":
    main()
