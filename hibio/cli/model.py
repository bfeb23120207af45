"""Commands on models: train, embed, query, predict, share, view, index, search."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hibio.cli.command import Command, add_config, add_folder, add_format, add_workers


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="continue the run in this folder"
    )
    parser.add_argument(
        "--test",
        nargs="+",
        metavar="SLIDE",
        help="slides that are never trained on, as with role test in the manifest; they may be of "
        "a patient whose other slides are trained on (marked in results). Sets data.test",
    )
    parser.add_argument(  # the deepspeed launcher adds it; LOCAL_RANK says the same
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )


def train(options: argparse.Namespace) -> int:
    """``hibio train``."""
    import dataclasses

    from hibio.config.files import load_config
    from hibio.config.run import RunConfig
    from hibio.fit import write_readouts
    from hibio.run import train_all
    from hibio.training.process_group import end_processes

    said = [] if options.test is None else [f"data.test={json.dumps(options.test)}"]
    config = load_config(RunConfig, options.config, [*options.set, *said])
    if options.resume is not None:
        config = dataclasses.replace(config, out=options.resume)
    checkpoints = train_all(config, resume=options.resume is not None)
    if end_processes() > 0:
        return 0  # another process of the run tells
    write_readouts(checkpoints)
    print(f"trained {len(checkpoints)} checkpoint(s) in {config.out}")
    stores, out = config.data.stores, config.out / "eval"
    print(f"next: hibio eval --checkpoint {config.out} --data {stores} --out {out}")
    return 0


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, "--checkpoint")
    add_folder(parser, "--data", "stores")
    add_folder(parser, "--out")
    add_workers(parser)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """One command at a time writes what describes a whole folder, which is not that of a model."""
    from hibio.checkpoint import refuse_model_folder
    from preprocessing.files import locked

    refuse_model_folder(out)
    with locked(out):
        yield


def _where(options: argparse.Namespace) -> dict[str, Any]:
    return {"workers": options.workers, "scheduler": options.scheduler}


def _embed_arguments(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    add_format(parser)
    parser.add_argument(
        "--fold-in",
        type=Path,
        metavar="DIR",
        help="stores that measure the model's genes beside genes of yours that it never saw",
    )


def embed(options: argparse.Namespace) -> int:
    """``hibio embed``."""
    from eval.embed import embed_folder

    with _writing(options.out):
        written = embed_folder(
            options.checkpoint,
            options.data,
            options.out,
            options.fold_in,
            form=options.format,
            **_where(options),
        )
    print(f"wrote {len(written)} files to {options.out}")
    return 0


def _query_arguments(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    add_format(parser)
    parser.add_argument("--gene-set", required=True, metavar="NAME_OR_FILE")
    parser.add_argument(
        "--readout", choices=("default", "ridge", "retrieval", "anchor"), default="default"
    )


def query(options: argparse.Namespace) -> int:
    """``hibio query``."""
    from eval import query_folder

    written = query_folder(
        options.checkpoint,
        options.data,
        options.gene_set,
        options.out,
        options.readout,
        form=options.format,
        **_where(options),
    )
    print("\n".join(f"wrote {path}" for path in written))
    return 0


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_folder(parser, "--checkpoint")
    add(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="stores, slide images, or folders of either",
    )
    add_folder(parser, "--out")
    add(
        "--genes",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help="all (default), a file with one a line, or names",
    )
    add("--gene-sets", metavar="SOURCE", help="score these sets too: default, hallmark, my.gmt ...")
    add(
        "--min-reliability",
        type=float,
        default=0.1,
        metavar="R",
        help="genes below are written and marked (held-out Pearson, default 0.1)",
    )
    add("--labels", action="store_true", help="predict the labels of the training slides too")
    add("--regions", action="store_true", help="write the regions of the image, level by level")
    add("--mpp", type=float, metavar="UM", help="micrometres a pixel of images that do not say it")
    add("--weights", type=Path, metavar="FILE", help="of the frozen encoder, for slide images")
    add_format(parser)
    add_workers(parser)


def predict(options: argparse.Namespace) -> int:
    """``hibio predict``."""
    from eval.predict import Wanted, predict_folder

    wanted = Wanted(
        genes=tuple(options.genes),
        gene_sets=options.gene_sets,
        min_reliability=options.min_reliability,
        mpp=options.mpp,
        labels=options.labels,
        regions=options.regions,
        weights=options.weights,
        form=options.format,
    )
    written = predict_folder(
        options.checkpoint, options.data, options.out, wanted, **_where(options)
    )
    print("\n".join(f"wrote {path}" for path in written))
    return 0


def _share_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_folder(parser, "--checkpoint")
    add_folder(parser, "--out", "new folder; its name is that of the model")
    add("--licence", default="", metavar="ID", help="of the weights, such as apache-2.0")
    add("--results", type=Path, metavar="FILE", help="results.json for the card, if moved")
    add("--push", metavar="ORG/NAME", help="upload it to the hub as well")
    add("--public", action="store_true", help="for everybody to see; else --push makes it private")
    add(
        "--keep-ids",
        action="store_true",
        help="leave ids of slides and patients, and paths, as they are; else hashes take their "
        "place, and a folder in which one is left is refused",
    )


def share(options: argparse.Namespace) -> int:
    """``hibio share``."""
    from eval.embed import one_checkpoint
    from hibio.share import push_folder, require_hub_name, share_checkpoint

    if options.public and not options.push:
        options.refuse("--public goes with --push ORG/NAME")
    if options.push:
        require_hub_name(options.push)
    folder = share_checkpoint(
        one_checkpoint(options.checkpoint),
        options.out,
        keep_ids=options.keep_ids,
        licence=options.licence,
        results=options.results,
    )
    print(f"wrote {folder}; read its README.md before you pass it on")
    if options.push:
        print(f"uploaded {push_folder(folder, options.push, private=not options.public)}")
    return 0


def _view_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, "--checkpoint")
    add_folder(parser, "--data", "stores")
    add = parser.add_argument
    add(
        "--slides",
        type=Path,
        metavar="DIR",
        help="folder of the slide images; without it the small pictures in the stores are shown",
    )
    add(
        "--predictions",
        type=Path,
        metavar="DIR",
        help="show these files of `hibio predict`; without it the page predicts by itself",
    )
    add(
        "--embeddings",
        type=Path,
        metavar="DIR",
        help="read embeddings and regions from these files of `hibio embed`; without it the page "
        "makes those that are asked for",
    )
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="SLIDE",
        help="slides to show, or 'unseen': those that were never trained on (default: all)",
    )
    add("--gene-sets", metavar="SOURCE", help="sets to choose from; default: the checkpoint's own")
    text = "where to listen (default: this machine alone); another one asks for a token"
    add("--host", metavar="HOST", help=text)
    add("--port", type=int, metavar="N", help="default 8000; 0: any that is free")
    add("--export", type=Path, metavar="DIR", help="write the page as files instead of serving it")
    add(
        "--names",
        nargs="+",
        default=[],
        metavar="NAME",
        help="genes and gene sets that --export writes (default: the genes of the largest "
        "reliability, and the sets)",
    )


def view(options: argparse.Namespace) -> int:
    """``hibio view``."""
    listening = {name: getattr(options, name) for name in ("host", "port")}
    listening = {name: value for name, value in listening.items() if value is not None}
    if options.names and options.export is None:
        options.refuse("--names goes with --export DIR; a served page shows every name")
    for name in listening if options.export is not None else ():
        options.refuse(f"--{name} does not go with --export, which writes files and serves nothing")
    from eval.view.cohort import Cohort
    from eval.view.export import export_page
    from eval.view.server import serve

    cohort = Cohort(
        options.checkpoint,
        options.data,
        slides=options.slides,
        predictions=options.predictions,
        embeddings=options.embeddings,
        sets=options.gene_sets,
        only=options.only,
    )
    if options.export is None:
        serve(cohort, **listening)
    else:
        print(f"wrote {export_page(cohort, options.export, options.names)}")
    return 0


def index(options: argparse.Namespace) -> int:
    """``hibio index``."""
    from eval.index import index_folder

    with _writing(options.out):
        found = index_folder(options.checkpoint, options.data, options.out, **_where(options))
    print("\n".join(map(str, found)))
    return 0


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("index", type=Path, metavar="INDEX", help="what `hibio index` wrote")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--like", metavar="NAME", help="SLIDE:BARCODE, or a region, of the index")
    asked.add_argument("--genes", nargs="+", metavar="GENE", help="a list of genes")
    asked.add_argument("--patch", type=Path, metavar="FILE", help="a picture of a patch")
    sides = ("image", "omics")
    add("--by", choices=sides, help="what of --like asks (default image)")
    add("--find", choices=sides, help="what is compared (default: omics, of a gene list image)")
    add("--level", default="spot", metavar="NAME", help="spot (default), or regions: 600um")
    add(
        "--where",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="only rows with these: slide_id, patient_id, tissue, organism, technology, or a "
        "label; values of one key are alternatives",
    )
    add("--top", type=int, default=10, metavar="K", help="so many (10)")
    add("--checkpoint", type=Path, metavar="DIR", help="needed for --genes and --patch")
    add_folder(parser, "--out")


def search(options: argparse.Namespace) -> int:
    """``hibio search``."""
    if options.like is None and options.by is not None:
        asked = "--genes" if options.genes else "--patch"
        options.refuse(f"--by goes with --like: what {asked} asks by is known")
    if options.like is not None and options.checkpoint is not None:
        options.refuse("--checkpoint does not go with --like, whose embedding is in the index")
    from eval.search import search as run

    print("\n".join(f"wrote {path}" for path in run(options)))
    return 0


COMMANDS = (
    Command(
        "train",
        "train every fold, seed and variant of a configuration",
        "hibio train --config configs/her2st.yaml --set seeds=[0,1]",
        train,
        _train_arguments,
    ),
    Command(
        "embed",
        "write one .h5ad a slide with image, omics and region embeddings",
        "hibio embed --checkpoint runs/demo --data stores --out embeddings",
        embed,
        _embed_arguments,
    ),
    Command(
        "query",
        "score any gene set over the tissue from H&E alone",
        "hibio query --checkpoint runs/demo --data stores --gene-set my.gmt --out query",
        query,
        _query_arguments,
    ),
    Command(
        "predict",
        "write the expression of every spot of a slide from H&E alone, with its reliability",
        "hibio predict --checkpoint runs/demo --data slide.svs --genes ERBB2 --out predictions",
        predict,
        _predict_arguments,
    ),
    Command(
        "share",
        "write a model to pass on: without ids, with a model card; also to the Hugging Face hub",
        "hibio share --checkpoint runs/demo/hibio --out my-model --licence cc-by-4.0",
        share,
        _share_arguments,
    ),
    Command(
        "view",
        "look at genes, gene sets, regions and spots over the slides, in a browser",
        "hibio view --checkpoint runs/demo --data stores --slides slides",
        view,
        _view_arguments,
    ),
    Command(
        "index",
        "index the spots and regions of a cohort for `hibio search`",
        "hibio index --checkpoint runs/demo --data stores --out index",
        index,
        _add_checkpoint,
    ),
    Command(
        "search",
        "find the spots or regions of a cohort that are nearest to one, to genes or to a patch",
        "hibio search index --like A1:spot007 --find omics --where tissue=breast --out found",
        search,
        _search_arguments,
    ),
)
