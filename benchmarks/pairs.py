"""Two rows of results, paired: `python benchmarks/pairs.py RESULTS.json TASK METRIC ROW OTHER`.

RESULTS.json is of `hibio eval` or `hibio ablate`; any two rows, where a report has differences to
its reference alone. Seeds are averaged first; units are slides of a fold. Told are both means, the
mean difference, its 95 % bootstrap interval, in how many units the row is better, and how many
units it takes to see such a difference with power .8: (2.8 standard deviations / mean) squared.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from eval.measures.intervals import paired_bootstrap


def by_unit(entry: dict[str, list[str] | list[float]]) -> dict[str, float]:
    """Mean over seeds of every ``fold/slide``, of keys ``fold/seed/slide``."""
    values = defaultdict(list)
    for key, value in zip(entry["keys"], entry["values"], strict=True):
        fold, _, slide = str(key).split("/", 2)
        values[f"{fold}/{slide}"].append(value)
    return {unit: float(np.mean(found)) for unit, found in values.items()}


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    for name in ("task", "metric", "row", "other"):
        parser.add_argument(name)
    options = parser.parse_args()
    models = json.loads(options.results.read_text())["tasks"][options.task]["models"]
    row, other = (by_unit(models[name][options.metric]) for name in (options.row, options.other))
    units = sorted(row)
    a, b = (np.array([side[unit] for unit in units]) for side in (row, other))
    found, gain = paired_bootstrap(a, b), a - b
    needed = (2.8 * gain.std(ddof=1) / max(abs(gain.mean()), 1e-9)) ** 2
    many = f"{needed:,.0f}" if needed < 10_000 else "over 10,000"
    print(
        f"{options.row} {a.mean():.4f}, {options.other} {b.mean():.4f}: {gain.mean():+.4f} "
        f"({found.low:+.4f} to {found.high:+.4f}), better in {(gain > 0).sum()} of {len(gain)}; "
        f"{many} units for power .8"
    )


if __name__ == "__main__":
    main()
