"""The ``hibio`` command: one small function a subcommand, heavy imports inside."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from hibio.cli.parser import Commands, build_parser

if TYPE_CHECKING:
    from preprocessing.gene_ids import GeneMapConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn an error of the user's input into one line on stderr.

    Returns:
        0 done, 1 failed (message on stderr), 2 usage.
    """
    options = build_parser(COMMANDS).parse_args(arguments)
    return _guarded(lambda: options.run(options))


def _guarded(command: Callable[[], int]) -> int:
    from hibio.config.files import ConfigError
    from pathways.errors import PathwayError
    from preprocessing.errors import DataError

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _tell_warning  # catch_warnings puts the old one back
            return command()
    except InterruptedError as stopped:
        print(f"hibio: {_one_line(stopped)}", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print("hibio: stopped; whatever was finished is on disk", file=sys.stderr)
        return 1
    except (ConfigError, PathwayError, DataError, MemoryError, OSError) as error:
        print(f"hibio: {_one_line(error)}", file=sys.stderr)
        return 1


def _tell_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line; the user did not write the line of code that it comes from."""
    name = "" if category is UserWarning else f"{category.__name__}: "
    text = " ".join(str(message).split())
    tqdm.write(f"hibio: warning: {name}{text}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def simulate(options: argparse.Namespace) -> int:
    """``hibio simulate``."""
    from pathways import load_pathways
    from preprocessing.simulate import SimulateConfig, simulate_cohort

    database = load_pathways("default")
    programmes = {name: list(database.genes_of(name)) for name in database.names}
    config = SimulateConfig(
        n_slides=options.slides,
        n_patients=options.patients,
        n_spots=options.spots,
        n_genes=options.genes,
        seed=options.seed,
        signal=options.signal,
        contiguity=options.contiguity,
        overlap=options.overlap,
        outcome_effect=options.outcome_effect,
    )
    path = simulate_cohort(options.out, programmes, config)
    print(f"wrote {path}\nnext: hibio prepare {path} --out stores")
    return 0


def manifest(options: argparse.Namespace) -> int:
    """``hibio manifest``."""
    from preprocessing.discovery import draft_manifest
    from preprocessing.manifest import write_manifest

    rows = draft_manifest(options.folder)
    write_manifest(rows, options.out)
    pictured = sum(row.image is not None for row in rows)
    print(f"wrote {options.out}: {len(rows)} slides, {pictured} with images")
    print(f"read it, correct it, then: hibio prepare {options.out} --out stores")
    return 0


def prepare(options: argparse.Namespace) -> int:
    """``hibio prepare``."""
    from preprocessing.patches import PatchConfig
    from preprocessing.run import prepare as prepare_stores

    report = prepare_stores(
        options.manifest,
        options.out,
        root=options.root,
        patch=PatchConfig(options.patch_um, options.patch_px, options.context_um or None),
        workers=options.workers,
        scheduler=options.scheduler,
        minutes=options.minutes,
        backend=options.slide_backend,
        genes=_gene_map(options),
    )
    print(report)
    if options.layout == "hest":
        _write_hest(options.out)
    return 1 if report.failed else 0


def _gene_map(options: argparse.Namespace) -> GeneMapConfig | None:
    from preprocessing.gene_ids import GeneMapConfig

    if options.gene_table is None:
        return None
    return GeneMapConfig(options.gene_table, options.gene_target)


def _write_hest(stores: Path) -> None:
    from preprocessing.hest_layout import write_hest

    samples = write_hest(stores, stores / "hest")
    print(f"wrote {len(samples)} samples in the layout of HEST-1k to {stores / 'hest'}")
    for sample in samples:
        for note in sample.notes:
            print(f"  {sample.slide_id}: {note}")


def features_command(options: argparse.Namespace) -> int:
    """``hibio features``."""
    from hibio.cli.features import run

    return run(options)


def qc(options: argparse.Namespace) -> int:
    """``hibio qc``."""
    from preprocessing.qc.cohort import qc_folder

    print(f"wrote {qc_folder(options.stores, options.out)}")
    return 0


def check_command(options: argparse.Namespace) -> int:
    """``hibio check``."""
    from hibio.cli.check import check_any
    from hibio.cli.doctor import format_findings
    from preprocessing.findings import failed

    findings = check_any(options.path)
    print(format_findings(findings))
    return 1 if failed(findings) else 0


def doctor_command(options: argparse.Namespace) -> int:
    """``hibio doctor``."""
    from hibio.cli.doctor import diagnose, format_findings
    from preprocessing.findings import failed

    findings = diagnose()
    print(format_findings(findings))
    return 1 if failed(findings) else 0


def pathways_command(options: argparse.Namespace) -> int:
    """``hibio pathways``."""
    from hibio.cli.pathways import run

    return run(options)


def train(options: argparse.Namespace) -> int:
    """``hibio train``."""
    import dataclasses

    from hibio.config.files import load_config
    from hibio.config.run import RunConfig
    from hibio.run import train_all
    from hibio.training.process_group import end_processes

    config = load_config(RunConfig, options.config, options.set)
    if options.resume is not None:
        config = dataclasses.replace(config, out=options.resume)
    checkpoints = train_all(config, resume=options.resume is not None)
    if end_processes() > 0:
        return 0  # another process of the run tells
    print(f"trained {len(checkpoints)} checkpoint(s) in {config.out}")
    stores, out = config.data.stores, config.out / "eval"
    print(f"next: hibio eval --checkpoint {config.out} --data {stores} --out {out}")
    return 0


def embed(options: argparse.Namespace) -> int:
    """``hibio embed``."""
    from eval.embed import embed_folder

    written = embed_folder(options.checkpoint, options.data, options.out, options.fold_in)
    print(f"wrote {len(written)} files to {options.out}")
    return 0


def query(options: argparse.Namespace) -> int:
    """``hibio query``."""
    from eval.query import query_folder

    written = query_folder(
        options.checkpoint, options.data, options.gene_set, options.out, options.readout
    )
    print("\n".join(f"wrote {path}" for path in written))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """``hibio eval``."""
    from eval.compare.against import run

    print(run(options))
    return 0


def hest_bench(options: argparse.Namespace) -> int:
    """``hibio hest-bench``."""
    from eval.hest_bench import HestBenchConfig
    from eval.hest_bench import hest_bench as run

    config = HestBenchConfig(
        encoders=tuple(options.encoder),
        checkpoint=options.checkpoint,
        tasks=tuple(options.tasks),
        weights=options.weights,
        embeddings=options.embeddings,
        metadata=options.metadata,
        stores=options.stores,
        strict=options.strict,
        device=options.device,
        batch=options.batch,
    )
    print(run(options.folder, options.out, config))
    print(f"wrote {options.out / 'results.json'}\nreport: {options.out / 'report.html'}")
    return 0


def ablate(options: argparse.Namespace) -> int:
    """``hibio ablate``."""
    from eval.ablation.run import run

    return run(options)


def demo_command(options: argparse.Namespace) -> int:
    """``hibio demo``: the whole way on a simulated cohort."""
    from hibio.cli.demo import steps

    plan = steps(options.out)
    for number, (text, arguments) in enumerate(plan, start=1):
        print(f"\n[{number}/{len(plan)}] {text}: hibio {' '.join(arguments)}", flush=True)
        code = main(arguments)
        if code:
            return code
    print(f"\nreport: {options.out / 'eval' / 'report.html'}")
    return 0


COMMANDS: Commands = {
    "simulate": simulate,
    "manifest": manifest,
    "prepare": prepare,
    "features": features_command,
    "qc": qc,
    "check": check_command,
    "pathways": pathways_command,
    "train": train,
    "embed": embed,
    "query": query,
    "eval": evaluate,
    "hest-bench": hest_bench,
    "ablate": ablate,
    "demo": demo_command,
    "doctor": doctor_command,
}

if __name__ == "__main__":
    sys.exit(main())
