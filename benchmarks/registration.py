"""Planted registration faults: `python benchmarks/registration.py STORES [--cases right,shift]`.

STORES: folders of stores that `hibio prepare` wrote of right slides. Every slide is checked as it
is, changed harmlessly (counts thinned, half the genes, some spots, jitter, another stain, cropped),
shifted, flipped and turned, scaled, and under the picture of each other slide. Told for every case:
verdicts, corrections within one spot (median of the spots), median z as given, seconds of one core.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree

from preprocessing.image_transform import TURNS, moved, turn_matrix
from preprocessing.registration import Registration, register
from preprocessing.store import SlidePicture, SlideStore
from preprocessing.store.read import stores_in

CASES = ("right", "harmless", "shift", "turn", "scale", "other")


class Slide(NamedTuple):
    """What a check reads of a store; places in level-0 pixels."""

    name: str
    patient: str
    picture: SlidePicture
    xy: np.ndarray
    counts: csr_matrix

    @property
    def pitch(self) -> float:
        """Median distance to the nearest spot, level-0 pixels."""
        return float(np.median(cKDTree(self.xy).query(self.xy, k=2)[0][:, 1]))


class Try(NamedTuple):
    """One planted case: the slide with its fault, and where its spots belong (None: nowhere)."""

    case: str
    slide: Slide
    truth: np.ndarray | None


def load(path: Path) -> Slide | None:
    """A store; None without image or counts."""
    with SlideStore(path) as store:
        small, down = store.thumbnail, store.thumbnail_downsample
        if small is None or down is None or not store.has_counts:
            return None
        width, height = map(int, store.attrs["slide_size_px0"])
        picture = SlidePicture((width, height), small, down, store.left_out_px0)
        return Slide(store.slide_id, store.patient_id, picture, store.xy_px0, store.counts())


def with_pixels(slide: Slide, pixels: np.ndarray) -> Slide:
    """The slide under another thumbnail of the same scale."""
    down = slide.picture.downsample
    size = (round(pixels.shape[1] * down), round(pixels.shape[0] * down))
    return slide._replace(picture=SlidePicture(size, pixels, down))


def harmless(slide: Slide) -> Iterator[Try]:
    """Changes after which the picture is still that of the spots."""
    rng, xy, counts = np.random.default_rng(0), slide.xy, slide.counts
    for share in (0.25, 0.05):
        thin = counts.copy()
        thin.data = rng.binomial(thin.data, share)
        thin.eliminate_zeros()
        yield Try(f"counts thinned to {share:.0%}", slide._replace(counts=thin), xy)
    genes = rng.permutation(counts.shape[1])[: counts.shape[1] // 2]
    yield Try("half the genes", slide._replace(counts=counts[:, genes]), xy)
    kept = np.sort(rng.permutation(len(xy))[: 2 * len(xy) // 3])
    yield Try("2/3 of the spots", slide._replace(xy=xy[kept], counts=counts[kept]), xy[kept])
    jitter = rng.normal(0, 0.3 * slide.pitch, xy.shape)
    yield Try("jitter of 0.3 spots", slide._replace(xy=xy + jitter), xy)
    small, down = slide.picture.thumbnail, slide.picture.downsample
    density = -np.log((small + 1.0) / 256) * rng.uniform(0.7, 1.3, 3)
    stained = np.clip(256 * np.exp(-density) - 1, 0, 255).astype(np.uint8)
    yield Try("another stain", with_pixels(slide, stained), xy)
    low = np.floor(np.maximum(xy.min(axis=0) - slide.pitch, 0) / down).astype(int)
    high = np.ceil((xy.max(axis=0) + slide.pitch) / down).astype(int)
    cut = with_pixels(slide, small[low[1] : high[1], low[0] : high[0]])
    yield Try("cropped to the spots", cut._replace(xy=xy - low * down), xy - low * down)


def faults(slide: Slide, cases: set[str]) -> Iterator[Try]:
    """All that is planted into one slide."""
    xy = slide.xy
    if "right" in cases:
        yield Try("right", slide, xy)
    if "harmless" in cases:
        yield from harmless(slide)
    for spots in (1, 2, 4, 8) if "shift" in cases else ():
        for way in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            off = spots * slide.pitch * np.array(way)
            yield Try(f"shift {spots}", slide._replace(xy=xy + off), xy)
    for name in TURNS if "turn" in cases else ():
        linear = np.array(TURNS[name])
        small = slide.picture.thumbnail
        pixels = np.swapaxes(small, 0, 1) if linear[0, 0] == 0 else small
        x, y = linear.sum(axis=1)
        turned = with_pixels(slide, np.ascontiguousarray(pixels[::y, ::x]))
        yield Try("flip or turn", turned, moved(xy, turn_matrix(name, turned.picture.size_px0)))
    for scale in (0.5, 2.0) if "scale" in cases else ():
        yield Try("scale 0.5, 2", slide._replace(xy=xy * scale), xy)


def strangers(slides: list[Slide]) -> Iterator[Try]:
    """Every slide under the picture of every other one, spots as far apart there."""
    for one in slides:
        for other in slides:
            if one is other:
                continue
            xy = one.xy * (other.pitch / one.pitch)
            same = one.patient == other.patient
            name = "another section of the patient" if same else "another patient's picture"
            yield Try(name, one._replace(picture=other.picture, xy=xy), None)


def row(case: str, found: list[tuple[Registration, float, float]]) -> str:
    """One line of the table."""
    verdicts = Counter(result.verdict for result, _, _ in found)
    warned = sum(result.warns for result, _, _ in found)
    near = sum(off <= 1 for _, off, _ in found)
    told = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.most_common())
    z = float(np.median([result.z for result, _, _ in found]))
    seconds = float(np.mean([taken for _, _, taken in found]))
    return f"| {case} | {len(found)} | {warned} | {told} | {near} | {z:.1f} | {seconds:.1f} |"


def measure(one: Try) -> tuple[Registration, float, float]:
    """The answer, how far off its correction is (spots; inf: none), and seconds."""
    begin = time.process_time()
    slide = one.slide
    result = register(slide.picture, slide.xy, slide.counts)
    seconds = time.process_time() - begin
    off = np.inf
    if result.matrix is not None and one.truth is not None:
        there = moved(slide.xy, result.matrix)
        off = float(np.median(np.hypot(*(there - one.truth).T)))
        off /= float(np.median(cKDTree(one.truth).query(one.truth, k=2)[0][:, 1]))
    return result, off, seconds


def main() -> None:
    """Plant, check, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--cases", default=",".join(CASES), help="some of " + ", ".join(CASES))
    options = parser.parse_args()
    cases = set(options.cases.split(","))
    if cases - set(CASES):
        parser.error(f"cases are {', '.join(CASES)}")
    found = [load(path) for folder in options.stores for path in stores_in(folder)]
    slides = [slide for slide in found if slide is not None]
    tries = [one for slide in slides for one in faults(slide, cases)]
    tries += strangers(slides) if "other" in cases else []
    table: dict[str, list[tuple[Registration, float, float]]] = {}
    for one in tries:
        table.setdefault(one.case, []).append(measure(one))
    print(f"{len(slides)} slides: {', '.join(slide.name for slide in slides)}\n")
    print("| case | n | WARN | verdicts | corrected within 1 spot | z as given | s |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(row(case, rows) for case, rows in table.items()))


if __name__ == "__main__":
    main()
