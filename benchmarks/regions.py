"""Region trees against scikit-learn's Ward: `python benchmarks/regions.py [--large 1000000]`.

A slide of random cells, 6 neighbours, 20 smooth features with noise: `fit_region_tree` (higra) and
`ward_tree` on the same graph and features, in turn in one run; both trees are the same (checked).
Then one large slide alone: tree, three levels cut from it, and the peak memory of its process.
"""

from __future__ import annotations

import argparse
import os
import time
from importlib.metadata import version

import numpy as np
from sklearn.cluster import ward_tree
from timing import in_own_process, in_turn, peak_megabytes, seconds

from hibio.regions import DIAMETERS_UM, RegionTree, fit_region_tree, region_levels
from preprocessing.graphs import KNNGraph, SpotGraph

FEATURES = 20


def draw(n_spots: int) -> tuple[np.ndarray, np.ndarray, SpotGraph]:
    """Centres (S, 2) about 20 um apart, features (S, 20) and the graph."""
    rng = np.random.default_rng(0)
    xy_um = rng.uniform(0, 20.0 * np.sqrt(n_spots), (n_spots, 2))
    wave = rng.normal(scale=1 / 200, size=(2, FEATURES))  # periods of about a millimetre
    feature = np.sin(xy_um @ wave) + 0.3 * rng.normal(size=(n_spots, FEATURES))
    return xy_um, feature, KNNGraph(k=6, prune=np.inf).build(xy_um)


def same(tree: RegionTree, feature: np.ndarray, graph: SpotGraph) -> None:
    """Refuse to time what is not equal."""
    children, *_, height = ward_tree(feature, connectivity=graph.matrix(), return_distance=True)
    np.testing.assert_array_equal(np.sort(tree.children), np.sort(children))
    np.testing.assert_allclose(tree.height, np.maximum.accumulate(height), rtol=1e-9)


def compare(n_spots: int, rounds: int) -> None:
    """One line: both, in turn."""
    _, feature, graph = draw(n_spots)
    same(fit_region_tree(feature, graph), feature, graph)
    matrix = graph.matrix()
    taken = in_turn(
        {
            "higra": lambda: fit_region_tree(feature, graph),
            "scikit-learn": lambda: ward_tree(feature, connectivity=matrix, return_distance=True),
        },
        rounds,
        warm=False,
    )
    one, other = (1e6 * min(every) / n_spots for every in taken.values())
    every = "; ".join(", ".join(f"{value:.2f}" for value in values) for values in taken.values())
    print(f"| {n_spots:,} | {one:.0f} | {other:.0f} | {other / one:.1f} | {every} |", flush=True)


def large(n_spots: int) -> str:
    """Seconds of the parts and peak memory of one slide, in a process of its own."""
    xy_um, feature, graph = draw(n_spots)
    before, worked, trees = peak_megabytes(), time.process_time(), []
    taken = seconds(lambda: trees.append(fit_region_tree(feature, graph)))
    worked, peak = time.process_time() - worked, peak_megabytes()
    levels: list[np.ndarray] = []
    cut = seconds(lambda: levels.extend(region_levels(trees[0], xy_um, graph, DIAMETERS_UM)))
    regions = ", ".join(f"{level.max() + 1:,}" for level in levels)
    return (
        f"{n_spots:,} spots: tree {taken:.1f} s ({1e6 * taken / n_spots:.0f} us a spot), of the "
        f"processor {worked:.1f} s; levels of {regions} regions {cut:.1f} s; memory before "
        f"{before:,.0f} MB, peak {peak:,.0f} MB"
    )


def main() -> None:
    """Print the table and the large slide."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 30_000])
    parser.add_argument("--large", type=int, default=1_000_000, help="0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("higra", "scikit-learn"))
    print(f"{os.cpu_count()} cores, {versions}")
    print("| spots | higra, us a spot | scikit-learn | ratio | seconds of each round |")
    print("|---|---|---|---|---|")
    for n_spots in given.sizes:
        compare(n_spots, given.rounds)
    if given.large:
        print(in_own_process(large, given.large))


if __name__ == "__main__":
    main()
