"""Speed and memory of preparing slides: `python benchmarks/prepare.py [--part read store workers]`.

read     our patch reading against a plain loop over the same spots (OpenSlide's `read_region` at
         level 0, convert, resize), on a simulated pyramid and on the slides given by --slides.
store    a shuffled epoch of regions from a store, against a gather from a memory-mapped array (raw)
         and against a loop of libjpeg over the same bytes in memory (JPEG).
workers  four equal slides with one process and with more (--workers 1 2); nothing else may run.
large    --bins bins on a slide of --side pixels: time and peak memory. Not part of the default.

Both sides of a ratio are measured in turn, in the same run, three times; the best time counts.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
import openslide
import tifffile
from PIL import Image
from scipy import ndimage
from scipy.sparse import random as random_sparse
from timing import in_turn, peak_megabytes

from preprocessing.patches import PatchConfig, iter_patches
from preprocessing.run import prepare
from preprocessing.run.preparation import attempt_slide
from preprocessing.run.sifting import SlideTask
from preprocessing.simulate import write_pyramid
from preprocessing.slide_row import SlideRow
from preprocessing.slides import open_slide
from preprocessing.slides.decoders import direct_tiles
from preprocessing.store import SlideStore
from preprocessing.store.read import patch_bytes, patch_places

PX, UM = 224, 112.0
LARGE_TILE = 512


def best(*actions: Callable[[], object], times: int = 3) -> list[float]:
    """Best seconds of each action, measured in turn."""
    named = {str(number): action for number, action in enumerate(actions)}
    return [min(every) for every in in_turn(named, times, warm=False).values()]


def tissue(side: int, seed: int = 0) -> np.ndarray:
    """A stained texture with structure at every scale, (side, side, 3) uint8."""
    rng = np.random.default_rng(seed)
    field = sum(
        ndimage.zoom(rng.normal(size=(side // s, side // s)), s, order=1) for s in (64, 16, 4)
    )
    share = 1 / (1 + np.exp(-field))[..., None].astype(np.float32)
    colour = share * np.array([95, 55, 140], "f4") + (1 - share) * np.array([225, 170, 205], "f4")
    return np.clip(colour + rng.normal(0, 6, colour.shape), 0, 255).astype(np.uint8)


def plain_loop(path: Path, xy: np.ndarray, mpp: float) -> int:
    """What one writes first: a region of level 0 for each spot, converted and resized."""
    side, total = round(UM / mpp), 0
    with openslide.OpenSlide(path) as slide:
        for x, y in xy:
            corner = (round(x - side / 2), round(y - side / 2))
            region = slide.read_region(corner, 0, (side, side)).convert("RGB")
            if side != PX:
                region = region.resize((PX, PX), Image.Resampling.BILINEAR)
            total += np.asarray(region).nbytes
    return total


def our_loop(path: Path, xy: np.ndarray, mpp: float) -> int:
    """As `prepare` reads."""
    with direct_tiles(open_slide(path)) as slide:
        return sum(patch.nbytes for _, patch in iter_patches(slide, xy, mpp, UM, PX))


def read_part(slides: list[tuple[Path, float]], folder: Path) -> Iterator[str]:
    """Rows of patch reading, for spots of Visium, of a dense array and of Visium HD bins."""
    write_pyramid(folder / "simulated.tif", tissue(6144), 0.25)
    yield "| slide | um/px | pitch um | spots | plain patches/s | ours | ours MB/s | ratio |"
    yield "|---|---|---|---|---|---|---|---|"
    for path, mpp in [(folder / "simulated.tif", 0.25), *slides]:
        with openslide.OpenSlide(path) as slide:
            size = np.array(slide.dimensions) * mpp
        for pitch in (100.0, 55.0, 16.0):
            axes = [np.arange(UM / 2, edge - UM / 2, pitch) for edge in size]
            xy = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2) / mpp
            xy = np.random.default_rng(0).permutation(xy)[:1500]  # barcodes are in no order
            plain, ours = best(
                lambda p=path, s=xy, m=mpp: plain_loop(p, s, m),
                lambda p=path, s=xy, m=mpp: our_loop(p, s, m),
            )
            rates = f"{len(xy) / plain:,.0f} | {len(xy) / ours:,.0f}"
            bandwidth = len(xy) * PX * PX * 3 / ours / 1e6
            yield (
                f"| {path.name} | {mpp:g} | {pitch:g} | {len(xy)} | {rates} | {bandwidth:,.0f} | "
                f"{plain / ours:.1f} |"
            )


def cell_slide(folder: Path, name: str, side: int, pitch: float, genes: int = 200) -> SlideRow:
    """A loom table on a square grid over a picture of 0.5 um per pixel."""
    axis = np.arange(150.0, side - 150.0, pitch * 2)
    xy = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    counts = random_sparse(len(xy), genes, 0.1, random_state=0, format="csr")
    counts.data = np.ceil(counts.data * 9)
    with h5py.File(folder / f"{name}.loom", "w") as file:
        dense = np.asarray(counts.T.todense(), dtype=np.uint8) + np.uint8(1)
        file.create_dataset("matrix", data=dense, compression="gzip", compression_opts=1)
        file["row_attrs/Gene"] = np.array([f"G{g}" for g in range(genes)], dtype="S")
        file["col_attrs/CellID"] = np.array([f"c{i}" for i in range(len(xy))], dtype="S")
        file["col_attrs/X"], file["col_attrs/Y"] = xy[:, 0], xy[:, 1]
    image = folder / f"{name}.tif"
    return SlideRow(name, name, folder / f"{name}.loom", "loom", image=image, mpp=0.5)


def store_part(folder: Path) -> Iterator[str]:
    """Rows of reading regions of 64 spots, shuffled, every spot once."""
    row = cell_slide(folder, "regions", 6144, 55.0)
    write_pyramid(folder / "regions.tif", tissue(6144), 0.5)
    yield "| patches | spots | ours patches/s | ours MB/s | bare patches/s | ours / bare |"
    yield "|---|---|---|---|---|---|"
    for images in ("raw", "jpeg"):
        report = prepare([row], folder / images, images=images)
        assert not report.failed, str(report)
        with SlideStore(folder / images / "regions.h5") as store:
            spots = store.n_spots
            cuts = np.arange(64, spots, 64)
            regions = np.split(np.arange(spots), cuts)  # neighbours along the curve
            order = np.random.default_rng(0).permutation(len(regions))
            epoch = [regions[i] for i in order]
            bare = bare_reading(store, epoch, folder)
            ours, theirs = best(
                lambda s=store, e=epoch: consume(s.patches(i) for i in e), bare, times=7
            )
        bandwidth = spots * PX * PX * 3 / ours / 1e6
        yield (
            f"| {images} | {spots} | {spots / ours:,.0f} | {bandwidth:,.0f} | "
            f"{spots / theirs:,.0f} | {theirs / ours:.2f} |"
        )


def consume(regions: Iterable[np.ndarray]) -> None:
    """Look at each region and let go of it, as training does."""
    for region in regions:
        assert region.shape[1:] == (PX, PX, 3)


def bare_reading(store: SlideStore, epoch: list[np.ndarray], folder: Path) -> Callable[[], object]:
    """A gather from a memory-mapped array, or libjpeg over bytes that are in memory."""
    if store.attrs["patch_encoding"] == "raw":
        store.patches().tofile(folder / "patches.bin")
        mapped = np.memmap(folder / "patches.bin", np.uint8, "r", shape=(store.n_spots, PX, PX, 3))
        return lambda: consume(mapped[index] for index in epoch)
    with h5py.File(store.path) as file:
        places = patch_places(file)
        encoded = [[data.copy() for _, data in patch_bytes(file, places, index)] for index in epoch]

    def decode() -> None:
        for patches in encoded:
            np.stack(
                [np.asarray(Image.open(io.BytesIO(p.tobytes())).convert("RGB")) for p in patches]
            )

    return decode


def workers_part(folder: Path, counts: list[int]) -> Iterator[str]:
    """Rows of whole runs: best of three in turn, and the load that other jobs made meanwhile."""
    rows = [cell_slide(folder, f"w{i}", 4608, 100.0) for i in range(4)]
    for row in rows:
        assert row.image is not None
        write_pyramid(row.image, tissue(4608), 0.5)
    spots, turns = [0], itertools.count()

    def run(workers: int) -> None:
        report = prepare(rows, folder / f"workers{next(turns)}", workers=workers)
        assert not report.failed, str(report)
        spots[0] = sum(row.n_spots for row in report.rows)

    load = os.getloadavg()[0]
    found = best(*(lambda n=n: run(n) for n in counts))
    yield f"{os.cpu_count()} cores, load before {load:.1f}, after {os.getloadavg()[0]:.1f}\n"
    yield "| processes | seconds | slides/min | patches/s | speed-up |\n|---|---|---|---|---|"
    for workers, seconds in zip(counts, found, strict=True):
        yield (
            f"| {workers} | {seconds:.1f} | {60 * len(rows) / seconds:.0f} | "
            f"{spots[0] / seconds:,.0f} | {found[0] / seconds:.2f} |"
        )


def write_large(path: Path, side: int, part: int) -> None:
    """A pyramid of side x side pixels: texture in the corner of part x part pixels, else white."""
    texture = tissue(2048)

    def tiles(size: int, inside: int) -> Iterator[np.ndarray]:
        white = np.full((LARGE_TILE, LARGE_TILE, 3), 255, np.uint8)
        for y in range(0, size, LARGE_TILE):
            for x in range(0, size, LARGE_TILE):
                at = (y % 1536, x % 1536)
                tile = texture[at[0] : at[0] + LARGE_TILE, at[1] : at[1] + LARGE_TILE]
                yield tile if max(x, y) < inside else white

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for down in (1, 4, 16, 64):
            size = -(-side // down)
            tiff.write(
                tiles(size, part // down), shape=(size, size, 3), dtype=np.uint8,
                tile=(LARGE_TILE, LARGE_TILE), photometric="rgb", compression="jpeg",
                compressionargs={"level": 80}, subfiletype=down > 1, metadata=None,
                resolution=(20_000, 20_000), resolutionunit="CENTIMETER",
            )  # fmt: skip


def large_part(folder: Path, bins: int, side: int) -> Iterator[str]:
    """Time and peak memory of one slide, in this process; run this part alone."""
    across = round(bins**0.5)
    pixels = round(across * 16) + 300  # bins of 8 um at 0.5 um per pixel
    row = cell_slide(folder, "large", pixels, 8.0)
    assert row.image is not None
    write_large(row.image, side, pixels)
    yield f"slide file {row.image.stat().st_size / 1e6:,.0f} MB, {side} x {side} px"
    yield f"peak memory before preparing: {peak_megabytes():,.0f} MiB"
    begin = time.perf_counter()
    result = attempt_slide(SlideTask(row, folder / "large.h5", PatchConfig()))
    assert result.status == "done", result.reason
    seconds = time.perf_counter() - begin
    yield f"{result.n_spots} bins in {seconds:.0f} s: {result.n_spots / seconds:,.0f} patches/s"
    yield f"store {(folder / 'large.h5').stat().st_size / 1e6:,.0f} MB"
    yield f"peak memory: {peak_megabytes():,.0f} MiB"


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", nargs="+", default=["read", "store", "workers"])
    parser.add_argument("--slides", nargs="*", default=[], metavar="FILE=MPP")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--bins", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=100_000)
    options = parser.parse_args()
    slides = [(Path(text.split("=")[0]), float(text.split("=")[1])) for text in options.slides]
    with tempfile.TemporaryDirectory(prefix="hibio_prepare_") as name:
        folder = Path(name)
        parts = {
            "read": lambda: read_part(slides, folder),
            "store": lambda: store_part(folder),
            "workers": lambda: workers_part(folder, options.workers),
            "large": lambda: large_part(folder, options.bins, options.side),
        }
        for part in options.part:
            print(f"\n## {part}\n", flush=True)
            for line in parts[part]():
                print(line, flush=True)


if __name__ == "__main__":
    main()
