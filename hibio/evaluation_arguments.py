"""The arguments of ``hibio eval`` and ``hibio hest-bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

#: (name, help, example) -> the parser of a subcommand.
MakeCommand = Callable[[str, str, str], argparse.ArgumentParser]


def add_evaluation_commands(make: MakeCommand) -> None:
    """Add both subcommands.

    Args:
        make: adds a subcommand.
    """
    p = make(
        "eval",
        "measure checkpoints against their baselines on held-out patients, or against each other",
        "hibio eval --checkpoint runs/demo --data stores --out results",
    )
    p.add_argument("--checkpoint", type=Path, metavar="DIR", help="needed without --against")
    p.add_argument("--data", type=Path, metavar="DIR", help="stores; needed with a checkpoint")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all that the data allow")
    p.add_argument(
        "--peers",
        default="none",
        metavar="NAMES",
        help="published methods to fit on the same folds: all, none (default), or names with "
        "commas between, such as bleep,triplex (docs/baselines.md)",
    )
    p.add_argument(
        "--against",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="compare with these: folders with results.json, or checkpoints and runs, which are "
        "measured first; without --checkpoint the first one is compared with the others",
    )
    p.add_argument(
        "--metrics",
        nargs="+",
        metavar="TASK:METRIC",
        help="what --against compares (default: the headline metric of every task)",
    )
    p.add_argument(
        "--model", metavar="NAME", help="row that --against compares (default: the run's)"
    )
    _add_hest_bench(make)


def _add_hest_bench(make: MakeCommand) -> None:
    p = make(
        "hest-bench",
        "run HEST-Bench by its published protocol on a folder in its layout, with a leakage audit",
        "hibio hest-bench bench_data --encoder handcrafted resnet50 --checkpoint runs/demo/hibio",
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="the benchmark, or one task of it")
    p.add_argument(
        "--encoder",
        nargs="+",
        default=[],
        metavar="NAME",
        help="handcrafted (default), handcrafted_patch, any encoder of `hibio features --list`, a "
        "timm name, hf-hub:ORG/NAME, or a name in --embeddings",
    )
    p.add_argument("--checkpoint", type=Path, metavar="CKPT", help="its image tower is measured")
    p.add_argument("--out", type=Path, default=Path("hest_bench"), metavar="DIR")
    p.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="default: all")
    p.add_argument("--weights", type=Path, metavar="FILE", help="local weights of the encoder")
    p.add_argument(
        "--embeddings",
        type=Path,
        metavar="DIR",
        help="embeddings that are there: TASK/NAME/SAMPLE.h5, as the published tool writes them",
    )
    p.add_argument(
        "--metadata", type=Path, metavar="FILE", help="table of HEST-1k with id and patient"
    )
    p.add_argument(
        "--stores", type=Path, metavar="DIR", help="what the checkpoint was trained on, if moved"
    )
    p.add_argument("--strict", action="store_true", help="refuse where the audit finds a leak")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--batch", type=int, default=64, metavar="N", help="patches a pass (64)")
