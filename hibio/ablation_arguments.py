"""The options of ``hibio ablate``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_ablation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `hibio.ablation.command` reads."""
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE")
    add("--data", type=Path, metavar="DIR", help="stores; not for a grid that simulates cohorts")
    add("--out", type=Path, metavar="DIR", help="default: the 'out' of the grid")
    add("--set", action="append", default=[], metavar="a.b=value", help="override a key")
    add("--index", type=int, metavar="I", help="run only job I, from 1 (a scheduler's array)")
    add("--parts", type=int, metavar="N", help="with --index: run part I of N, not one job")
    add("--list", action="store_true", help="show the jobs with their numbers")
    add("--report-only", action="store_true", help="run nothing, table what is done")
