"""The options of ``hibio simulate``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_simulation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `hibio.cli.simulate` reads; every number has its range in the simulator."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR")
    add("--slides", type=int, default=8, metavar="N", help="slides (default 8)")
    add("--patients", type=int, default=4, metavar="N", help="patients (default 4)")
    add("--spots", type=int, default=300, metavar="N", help="spots a slide, about (300)")
    add("--genes", type=int, default=800, metavar="N", help="genes (default 800)")
    add("--seed", type=int, default=0, metavar="N")
    add(
        "--signal",
        type=float,
        default=0.8,
        metavar="X",
        help="share of the picture that expression drives, 0 (independent) to 1 (default 0.8)",
    )
    add(
        "--contiguity",
        type=float,
        default=1.0,
        metavar="X",
        help="share of spots that have the tissue domain of their place, 0 (regions mean nothing) "
        "to 1 (default 1)",
    )
    add(
        "--overlap",
        type=float,
        default=0.0,
        metavar="X",
        help="share of its genes that a programme also takes from the next one, 0 (default) to "
        "0.9; the gene sets do not say so",
    )
    add(
        "--outcome-effect",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the tissue that a planted niche takes in patients with outcome 1 (default "
        "0: the outcome is independent of the tissue); 0.2 is found well",
    )
