"""Times of `hibio view`: `python -m benchmarks.view --checkpoint RUN --data STORES --out DIR`.

One slide of the folder is laid side by side until it has 5,000, 50,000 and 500,000 spots, and the
bank is repeated to 20,000. Each size is served on this machine and asked as the page asks. Above
100,000 spots omics embeddings and regions are random: they alone would take minutes. Told is the
time on the clock and, in brackets, that of the processor, which a busy machine lengthens little.
With Chromium and OpenSeadragon so is the time in the page, from the question to the drawn heatmap.

Legend: S spots.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks.timing import peak_megabytes
from eval.view.cohort import Cohort
from eval.view.page import has_openseadragon
from preprocessing.patches import PatchConfig
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable, hilbert_order
from preprocessing.store import SlidePicture, SlideStore, write_store
from tests.eval.chromium import CHROMIUM, Browser, served

SIZES, BANK, EMBEDDED = (5_000, 50_000, 500_000), 20_000, 100_000
PATCH_PX = 8


def enlarged(source: Path, folder: Path, n_spots: int) -> Path:
    """A store of so many spots: copies of one slide, side by side."""
    with SlideStore(source) as store:
        times = -(-n_spots // store.n_spots)
        across = int(np.ceil(np.sqrt(times)))
        pick = np.tile(np.arange(store.n_spots), times)[:n_spots]
        copy = np.repeat(np.arange(times), store.n_spots)[:n_spots]
        size = np.ptp(store.xy_um, axis=0) + 100.0
        xy_um = store.xy_um[pick] + np.stack([copy % across, copy // across], axis=1) * size
        order = hilbert_order(xy_um)
        pick, xy_um = pick[order], xy_um[order]
        table = SpotTable(
            counts=store.counts()[pick],
            gene_ids=store.gene_ids,
            gene_names=store.gene_names,
            barcodes=np.array([f"b{i}" for i in range(n_spots)], dtype=object),
            xy_px0=xy_um / store.mpp,
            xy_um=xy_um,
            mpp=store.mpp,
            labels=store.labels().iloc[pick].reset_index(drop=True),
            diameter_um=float(store.attrs["diameter_um"]),
        )
        features = {name: store.features(name)[pick] for name in store.feature_names}
        patch_um = float(store.attrs["patch_um"])
    width, height = (int(one) + 200 for one in (xy_um / table.mpp).max(axis=0))
    down = max(width, height) / 1000
    small = np.full((int(height / down), int(width / down), 3), 235, dtype=np.uint8)
    target = folder / f"s{n_spots}.h5"
    blank = np.zeros((PATCH_PX, PATCH_PX, 3), dtype=np.uint8)
    write_store(
        target,
        table,
        SlideRow(target.stem, "p", None, "csv"),
        patches=((i, blank) for i in range(n_spots)),
        patch=PatchConfig(patch_um, PATCH_PX),
        features=features,
        encoding="raw",
        picture=SlidePicture((width, height), small, down),
    )
    return target


def viewed(checkpoint: Path, folder: Path) -> Cohort:
    """The cohort of one large slide, behind a large bank."""
    cohort = Cohort(checkpoint, folder)
    bank = cohort.model.bank
    assert bank is not None
    rows = np.arange(BANK) % len(bank.image)
    rng, shape = np.random.default_rng(0), (BANK, bank.image.shape[1])
    cohort.model.bank = dataclasses.replace(
        bank,
        image=bank.image[rows] + np.float32(0.01) * rng.standard_normal(shape, dtype=np.float32),
        tfidf=sparse.csr_matrix(bank.tfidf[rows]),
        slide=bank.slide[rows],
        patient=bank.patient[rows],
    )
    for slide_id, entry in cohort.entries.items():
        if entry.n_spots > EMBEDDED:
            width = cohort.model.checkpoint.model.config.embed_dim
            omics = rng.standard_normal((entry.n_spots, width)).astype(np.float32)
            regions = np.tile(np.arange(entry.n_spots) // 64, (len(cohort.model.levels), 1))
            vars(cohort._embedded[slide_id])["_rest"] = (omics, regions)
    return cohort


def spent(action: Callable[[], Any]) -> np.ndarray:
    """Milliseconds of one call: on the clock, and of the processor (server and asker)."""
    clock, processor = time.perf_counter(), time.process_time()
    action()
    return 1e3 * np.array([time.perf_counter() - clock, time.process_time() - processor])


def times(cohort: Cohort, address: str, slide_id: str) -> dict[str, np.ndarray]:
    """Milliseconds of every question, the first one of a kind and the median of others."""
    root = f"{address}data/slides/{slide_id}"
    genes, sets = list(cohort.model.genes), cohort.model.database
    n = cohort.entries[slide_id].n_spots

    def ask(path: str, data: bytes | None = None) -> Callable[[], Any]:
        return lambda: urllib.request.urlopen(f"{root}/{path}", data).read()

    def heat(name: str, kind: str) -> Callable[[], Any]:
        return ask("heat?" + urllib.parse.urlencode({"q": name, "kind": kind}))

    found = {"slide": spent(ask("slide.json"))}

    def of_spots(*parts: str) -> None:
        for what in parts:
            asked_of = [spent(ask(f"{what}/{i}.json")) for i in range(0, n, n // 9)]
            found[f"{what}, first"], found[what] = asked_of[0], np.median(asked_of[1:], axis=0)

    of_spots("spots", "near/image")
    listed = [", ".join(sets.genes_of(name)) for name in sets.names[:6]]
    asked = {"gene": genes[:9], "set": sets.names[:9], "list": listed}
    for what, names in asked.items():
        for kind in ("measured", "predicted"):
            found[f"{what} {kind}, first"] = spent(heat(names[0], kind))
            others = [spent(heat(name, kind)) for name in names[1:]]
            found[f"{what} {kind}"] = np.median(others, axis=0)
    of_spots("near/omics", "within")
    for level in cohort.model.levels[:1]:
        found[f"regions {level}, first"] = spent(ask(f"regions/{level}"))
        found[f"regions {level}"] = spent(ask(f"regions/{level}"))
    area = json.dumps({"spots": list(range(n // 10))}).encode()
    found["area of a tenth"] = np.median([spent(ask("area", area)) for _ in range(3)], axis=0)
    return found


DRAWN = """(async () => {
    const began = performance.now(), gl = panes[0].layer.gl;
    await typed('a', '%s');
    if (gl) gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4));
    return performance.now() - began;
})()"""  # a pixel is there when all is drawn


def in_the_page(cohort: Cohort, address: str) -> float:
    """Milliseconds from a question to the last pixel of it, median of 5, in Chromium."""
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        try:
            first, *genes = list(cohort.model.genes)[20:26]
            browser.go(f"{address}#a={first}")
            taken = []
            for gene in genes:
                taken.append(float(browser.value(DRAWN % gene)))
        finally:
            browser.close()
    return statistics.median(taken)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--checkpoint", "--data", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    columns: dict[int, dict[str, str]] = {}
    for size in options.sizes:
        folder = options.out / str(size)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / f"s{size}.h5").exists():
            enlarged(sorted(options.data.glob("*.h5"))[0], folder, size)
        cohort = viewed(options.checkpoint, folder)
        with served(cohort) as address:
            found = times(cohort, address, f"s{size}")
            columns[size] = {name: f"{a:,.0f} ({b:,.0f})" for name, (a, b) in found.items()}
            if CHROMIUM and has_openseadragon():
                columns[size]["gene measured, in the page"] = f"{in_the_page(cohort, address):.0f}"
        columns[size]["peak memory, MB"] = f"{peak_megabytes():,.0f}"
    print(f"milliseconds | {' | '.join(f'{size:,} spots' for size in columns)}")
    for name in columns[options.sizes[0]]:
        print(f"{name} | {' | '.join(of.get(name, '-') for of in columns.values())}", flush=True)


if __name__ == "__main__":
    main()
