"""`hibio demo`: the whole way on a simulated cohort, as the commands that a user would type."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hibio import __version__
from hibio.cli.command import STOPPED, Command, run_line


def steps(out: Path) -> list[tuple[str, list[str]]]:
    """What ``hibio demo`` runs: (explanation, arguments of ``hibio``), in order."""
    from eval.view.page import has_openseadragon

    cohort, stores, run = str(out / "cohort"), str(out / "stores"), str(out / "run")
    resume = ["--resume", run] if (out / "run").exists() else []
    settings = ["--set", f"data.stores={stores}", "--set", f"out={run}"]
    trained = ["--checkpoint", str(out / "run" / "hibio"), "--data", stores]
    page = ["--slides", f"{cohort}/slides", "--only", "unseen", "--export", str(out / "viewer")]
    plan = [
        ("simulate a cohort with planted truth", ["simulate", "--out", cohort]),
        (
            "slides and counts to stores",
            ["prepare", f"{cohort}/manifest.csv", "--out", stores, "--workers", "2"],
        ),
        (
            "pretrain through all stages, with two baselines",
            ["train", "--config", "demo", *settings, *resume],
        ),
        ("embeddings as AnnData", ["embed", *trained, "--out", str(out / "embeddings")]),
        (
            "a gene set over the tissue from H&E alone",
            ["query", *trained, "--gene-set", "default", "--out", str(out / "query")],
        ),
        (
            "expression of every spot from H&E alone, with its reliability",
            ["predict", *trained, "--out", str(out / "predictions")],
        ),
        (
            "evaluate on the held-out patient and report",
            ["eval", "--checkpoint", run, "--data", stores, "--out", str(out / "eval")],
        ),
    ]
    if has_openseadragon():
        plan.append(("a page to look at the held-out slides with", ["view", *trained, *page]))
    return plan


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR")


def _of_another_version(run: Path) -> bool:
    """Whether another version of HiBio, or of its code, began a run; False where none says so."""
    from hibio.checkpoint import PROVENANCE, provenance

    now = provenance()
    try:
        known = json.loads((run / PROVENANCE).read_text(encoding="utf-8"))
        made = known["packages"]["hibio"], known["commit"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return bool(made != (now["packages"]["hibio"], now["commit"]))


def demo(options: argparse.Namespace) -> int:
    """``hibio demo``."""
    from eval.view.page import has_openseadragon

    plan, older = steps(options.out), _of_another_version(options.out / "run")
    for number, (text, arguments) in enumerate(plan, start=1):
        print(f"\n[{number}/{len(plan)}] {text}: hibio {' '.join(arguments)}", flush=True)
        code = run_line(arguments, options.commands)
        if code:
            if code != STOPPED and older:
                print(
                    f"hibio: another version of HiBio began {options.out}. Two ways out: begin in "
                    f"another folder, hibio demo --out {options.out}-{__version__}; or remove "
                    f"{options.out} and give the same command again",
                    file=sys.stderr,
                )
            return code
    there = str(options.out / "viewer" / "index.html")
    print(f"\nviewer: {there if has_openseadragon() else 'left out; first `make view-assets`'}")
    print(f"report: {options.out / 'eval' / 'report.html'}")
    return 0


COMMANDS = (
    Command(
        "demo",
        "simulate, prepare, train, embed, evaluate and report, on a CPU",
        "hibio demo --out demo",
        demo,
        _arguments,
    ),
)
