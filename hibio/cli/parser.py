"""The parser of `hibio` and the arguments of its commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path


def add_ablation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `eval.ablation.run` reads."""
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE")
    add("--data", type=Path, metavar="DIR", help="stores; not for a grid that simulates cohorts")
    add("--out", type=Path, metavar="DIR", help="default: the 'out' of the grid")
    add("--set", action="append", default=[], metavar="a.b=value", help="override a key")
    add("--index", type=int, metavar="I", help="run only job I, from 1 (a scheduler's array)")
    add("--parts", type=int, metavar="N", help="with --index: run part I of N, not one job")
    add("--list", action="store_true", help="show the jobs with their numbers")
    add("--report-only", action="store_true", help="run nothing, table what is done")


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


Commands = Mapping[str, Callable[[argparse.Namespace], int]]


def build_parser(commands: Commands) -> argparse.ArgumentParser:
    """The parser of ``hibio``.

    Args:
        commands: subcommand -> what runs it; must name every subcommand.
    """
    parser = argparse.ArgumentParser(
        prog="hibio",
        description="Pretrain on pairs of whole-slide images and spatial transcriptomics: "
        "spots, pathways and regions in one embedding space.",
        epilog="Start with `hibio demo`; check the machine with `hibio doctor`.",
    )
    actions = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        _add_data_commands,
        _add_pathways,
        _add_model_commands,
        _add_ablate,
        _add_help_commands,
    ):
        add(actions, commands)
    return parser


def _command(
    actions: argparse._SubParsersAction,
    commands: Commands,
    name: str,
    text: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"Example: {example}",
    )
    parser.set_defaults(run=commands[name])
    return parser


def _add_data_commands(actions: argparse._SubParsersAction, commands: Commands) -> None:
    p = _command(
        actions,
        commands,
        "simulate",
        "write a cohort with planted truth as real files",
        "hibio simulate --out cohort --slides 8 --patients 4",
    )
    add_simulation_arguments(p)
    p = _command(
        actions,
        commands,
        "manifest",
        "draft a manifest from a folder of samples",
        "hibio manifest her2st --out her2st.csv",
    )
    p.add_argument("folder", type=Path, metavar="DIR")
    p.add_argument("--out", type=Path, required=True, metavar="FILE")
    _add_prepare(actions, commands)
    _add_features(actions, commands)
    _add_qc(actions, commands)
    p = _command(
        actions,
        commands,
        "check",
        "verify a store, a folder of stores, a manifest or a checkpoint",
        "hibio check stores",
    )
    p.add_argument("path", type=Path, metavar="PATH")


def _add_prepare(actions: argparse._SubParsersAction, commands: Commands) -> None:
    p = _command(
        actions,
        commands,
        "prepare",
        "read slides and counts into stores, one file a slide",
        "hibio prepare cohort/manifest.csv --out stores",
    )
    p.add_argument("manifest", type=Path, metavar="MANIFEST")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--root", type=Path, metavar="DIR", help="what the paths are relative to")
    p.add_argument("--patch-um", type=float, default=112.0, metavar="UM", help="default 112")
    p.add_argument("--patch-px", type=int, default=224, metavar="PX", help="default 224")
    p.add_argument(
        "--context-um",
        type=float,
        default=0.0,
        metavar="UM",
        help="store a second, wider patch of each spot too, e.g. 448 (default 0: none)",
    )
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    p.add_argument("--slide-backend", default="auto", metavar="B", help="openslide, pyvips, cucim")
    p.add_argument(
        "--scheduler", metavar="ADDRESS", help="of a Dask cluster that takes the place of --workers"
    )
    p.add_argument(
        "--minutes", type=float, default=120.0, metavar="N", help="give up a slide after (120)"
    )
    p.add_argument(
        "--gene-table",
        type=Path,
        metavar="FILE",
        help="TSV of id, symbol, organism, aliases, ortholog; genes are named by it",
    )
    p.add_argument(
        "--gene-target",
        default="symbol",
        metavar="KIND",
        help="symbol (default), id, ortholog, or an organism of the table",
    )
    p.add_argument(
        "--layout",
        choices=("stores", "hest"),
        default="stores",
        help="hest: write the stores in the layout of HEST-1k too, into OUT/hest",
    )


def _add_features(actions: argparse._SubParsersAction, commands: Commands) -> None:
    p = _command(
        actions,
        commands,
        "features",
        "store the features of a frozen image encoder beside the patches",
        "hibio features stores --encoder uni2-h --weights pytorch_model.bin",
    )
    p.add_argument("stores", type=Path, nargs="?", metavar="STORES", help="folder, or one store")
    p.add_argument("--encoder", metavar="NAME", help="see --list; a timm name; hf-hub:ORG/NAME")
    p.add_argument("--weights", type=Path, metavar="FILE", help="local weights of the encoder")
    p.add_argument("--batch", type=int, default=64, metavar="N", help="patches a pass (64)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--workers", type=int, default=1, metavar="N", help="decoding threads (1)")
    p.add_argument(
        "--scale",
        choices=("spot", "context", "both"),
        default="spot",
        help="which patches: the spot's (default), its context's, or both side by side",
    )
    p.add_argument(
        "--stain",
        choices=("none", "macenko", "reinhard"),
        default="none",
        help="bring the patches of each slide to one stain before (default none)",
    )
    p.add_argument("--list", action="store_true", help="show the known encoders")


def _add_qc(actions: argparse._SubParsersAction, commands: Commands) -> None:
    p = _command(
        actions,
        commands,
        "qc",
        "write a quality page a slide and a cohort summary",
        "hibio qc stores --out qc",
    )
    p.add_argument("stores", type=Path, metavar="STORES")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")


def _add_pathways(actions: argparse._SubParsersAction, commands: Commands) -> None:
    p = _command(
        actions,
        commands,
        "pathways",
        "list, show, measure the coverage of, or fetch gene-set databases",
        "hibio pathways coverage default+./my.gmt --data stores",
    )
    verbs = p.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    verbs.add_parser("list", help="databases by name")
    for name, text in (
        ("show", "the sets of a database"),
        ("coverage", "how many of its genes the stores measure"),
        ("fetch", "download a database whose checksum is known"),
    ):
        action = verbs.add_parser(name, help=text)
        action.add_argument("name", help="name, file, pkg.mod:function, or a+b")
        if name == "coverage":
            action.add_argument("--data", type=Path, required=True, metavar="DIR")
        if name == "fetch":
            action.add_argument("--out", type=Path, default=Path(), metavar="DIR")


def _add_model_commands(actions: argparse._SubParsersAction, commands: Commands) -> None:
    p = _command(
        actions,
        commands,
        "train",
        "train every fold, seed and variant of a configuration",
        "hibio train --config configs/her2st.yaml --set seeds=[0,1]",
    )
    p.add_argument("--config", type=Path, required=True, metavar="FILE")
    p.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a key")
    p.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in this folder")
    p.add_argument(  # the deepspeed launcher adds it; LOCAL_RANK says the same
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )
    p = _command(
        actions,
        commands,
        "embed",
        "write one .h5ad a slide with image, omics and region embeddings",
        "hibio embed --checkpoint runs/demo --data stores --out embeddings",
    )
    _checkpoint_arguments(p)
    p.add_argument(
        "--fold-in",
        type=Path,
        metavar="DIR",
        help="stores that measure the model's genes beside genes of yours that it never saw",
    )
    p = _command(
        actions,
        commands,
        "query",
        "score any gene set over the tissue from H&E alone",
        "hibio query --checkpoint runs/demo --data stores --gene-set my.gmt --out query",
    )
    _checkpoint_arguments(p)
    p.add_argument("--gene-set", required=True, metavar="NAME_OR_FILE")
    p.add_argument(
        "--readout", choices=("default", "ridge", "retrieval", "anchor"), default="default"
    )
    add_evaluation_commands(lambda *text: _command(actions, commands, *text))


def _add_ablate(actions: argparse._SubParsersAction, commands: Commands) -> None:
    p = _command(
        actions,
        commands,
        "ablate",
        "train and measure a grid of settings, and table what each part is worth",
        "hibio ablate --config configs/ablation/regions.yaml --data stores",
    )
    add_ablation_arguments(p)


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="stores")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def _add_help_commands(actions: argparse._SubParsersAction, commands: Commands) -> None:
    p = _command(
        actions,
        commands,
        "demo",
        "simulate, prepare, train, embed, evaluate and report, on a CPU",
        "hibio demo --out demo",
    )
    p.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR")
    _command(
        actions,
        commands,
        "doctor",
        "versions, devices and optional parts, each with its fix",
        "hibio doctor",
    )
