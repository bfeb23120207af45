"""Commands that measure: eval, hest-bench, ablate; export."""

from __future__ import annotations

import argparse
from pathlib import Path

from hibio.cli.command import Command, add_config, add_folder, add_workers


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="needed without --against")
    add("--data", type=Path, metavar="DIR", help="stores; needed with a checkpoint")
    add_folder(parser, "--out")
    add("--tasks", nargs="+", metavar="TASK", help="default: all that the data allow")
    add(
        "--test",
        nargs="+",
        metavar="SLIDE",
        help="measure these slides alone, also of patients whose other slides were trained on "
        "(rows marked 'seen patient'); default: every slide that was not trained on",
    )
    add(
        "--peers",
        default="none",
        metavar="NAMES",
        help="published methods to fit on the same folds: all, none (default), or names with "
        "commas between, such as bleep,triplex (docs/baselines.md)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="TASK.key=value",
        help="override a setting of a task, such as retrieval.item=niche, or of a peer: "
        "peers.NAME.key=value",
    )
    add(
        "--readout",
        choices=("plain", "full"),
        default="plain",
        help="full: all that lifts an embedding in retrieval and expression at once, the seeds as "
        "one, combined with ridge and Sinkhorn (transductive), beside the random-graph control",
    )
    add(
        "--against",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="compare with these: folders with results.json, or checkpoints and runs, which are "
        "measured first; without --checkpoint the first one is compared with the others",
    )
    add(
        "--metrics",
        nargs="+",
        metavar="TASK:METRIC",
        help="what --against compares (default: the headline metric of every task)",
    )
    add("--model", metavar="NAME", help="row that --against compares (default: the run's)")


def evaluate(options: argparse.Namespace) -> int:
    """``hibio eval``."""
    from eval.against import run

    print(run(options))
    return 0


def _hest_bench_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="the benchmark, or one task of it")
    add(
        "--encoder",
        nargs="+",
        default=[],
        metavar="NAME",
        help="handcrafted (default), handcrafted_patch, any encoder of `hibio features --list`, a "
        "timm name, hf-hub:ORG/NAME, or a name in --embeddings",
    )
    add("--checkpoint", type=Path, metavar="CKPT", help="its image tower is measured")
    add("--out", type=Path, default=Path("hest_bench"), metavar="DIR")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="default: all")
    add("--weights", type=Path, metavar="FILE", help="local weights of the encoder")
    add(
        "--embeddings",
        type=Path,
        metavar="DIR",
        help="embeddings that are there: TASK/NAME/SAMPLE.h5, as the published tool writes them",
    )
    add("--metadata", type=Path, metavar="FILE", help="table of HEST-1k with id and patient")
    add("--stores", type=Path, metavar="DIR", help="what the checkpoint was trained on, if moved")
    add("--strict", action="store_true", help="refuse where the audit finds a leak")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch", type=int, default=64, metavar="N", help="patches a pass (64)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="override a setting of the published protocol, such as n_components=64",
    )


def hest_bench(options: argparse.Namespace) -> int:
    """``hibio hest-bench``."""
    from eval.hest_bench import HestBenchConfig
    from eval.hest_bench import hest_bench as run
    from eval.hest_bench.protocol import protocol_of

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
        protocol=protocol_of(options.set),
    )
    print(run(options.folder, options.out, config))
    print(f"wrote {options.out / 'results.json'}\nreport: {options.out / 'report.html'}")
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("kind", choices=("qc", "regions", "heatmap"), help="which objects")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="qc: stores; regions: what `hibio embed` wrote; heatmap: also what `query` wrote",
    )
    add_folder(parser, "--out")
    add(
        "--format",
        choices=("geojson", "tmap"),
        default="geojson",
        help="as QuPath reads it (default), or a TissUUmaps project",
    )
    add(
        "--names",
        nargs="+",
        default=[],
        metavar="NAME",
        help="genes or gene sets of a heatmap, levels (600um) of regions; default: all",
    )


def export(options: argparse.Namespace) -> int:
    """``hibio export``."""
    from eval.export import export_folder

    asked = (options.kind, options.data, options.out, options.names, options.format)
    written = export_folder(*asked)
    print("\n".join(f"wrote {path}" for path in written))
    return 0


def _ablate_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="stores; not for a grid that simulates cohorts")
    add("--out", type=Path, metavar="DIR", help="default: the 'out' of the grid")
    add("--index", type=int, metavar="I", help="run only job I, from 1 (a scheduler's array)")
    add("--parts", type=int, metavar="N", help="with --index: run part I of N, not one job")
    add("--list", action="store_true", help="show the jobs with their numbers")
    add("--report-only", action="store_true", help="run nothing, table what is done")
    add_workers(parser, unit="job")


def ablate(options: argparse.Namespace) -> int:
    """``hibio ablate``."""
    from eval.ablation import ablate as run

    return run(options)


COMMANDS = (
    Command(
        "eval",
        "measure checkpoints against their baselines on held-out patients, or against each other",
        "hibio eval --checkpoint runs/demo --data stores --out results",
        evaluate,
        _eval_arguments,
    ),
    Command(
        "hest-bench",
        "run HEST-Bench by its published protocol on a folder in its layout, with a leakage audit",
        "hibio hest-bench bench_data --encoder handcrafted resnet50 --checkpoint runs/demo/hibio",
        hest_bench,
        _hest_bench_arguments,
    ),
    Command(
        "export",
        "write quality, regions or heatmaps for QuPath (GeoJSON) or TissUUmaps",
        "hibio export regions --data embeddings --out qupath",
        export,
        _export_arguments,
    ),
    Command(
        "ablate",
        "train and measure a grid of settings, and table what each part is worth",
        "hibio ablate --config configs/ablation/regions.yaml --data stores",
        ablate,
        _ablate_arguments,
    ),
)
