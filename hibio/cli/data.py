"""Commands on data: simulate, manifest, genes, prepare, features, qc, check."""

from __future__ import annotations

import argparse
from pathlib import Path

from hibio.cli.command import Command, add_folder, add_workers

#: Options of ``hibio simulate`` that are numbers: setting of `SimulateConfig`, type, words.
_SIMULATE: dict[str, tuple[str, type, str]] = {
    "--slides": ("n_slides", int, "slides (default 8)"),
    "--patients": ("n_patients", int, "patients (default 4)"),
    "--spots": ("n_spots", int, "spots a slide (300)"),
    "--genes": ("n_genes", int, "genes (default 800)"),
    "--seed": ("seed", int, "of everything (default 0)"),
    "--signal": (
        "signal",
        float,
        "share of the picture that expression drives, 0 (independent) to 1 (default 0.8)",
    ),
    "--contiguity": (
        "contiguity",
        float,
        "share of spots that have the tissue domain of their place, 0 (regions mean nothing) to 1 "
        "(default 1)",
    ),
    "--overlap": (
        "overlap",
        float,
        "share of its genes that a programme also takes from the next one, 0 (default) to 0.9; "
        "the gene sets do not say so",
    ),
    "--outcome-effect": (
        "outcome_effect",
        float,
        "share of the tissue that a planted niche takes in patients with outcome 1 (default 0: the "
        "outcome is independent of the tissue); 0.2 is found well",
    ),
}


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, "--out")
    add = parser.add_argument
    add(
        "--like",
        metavar="NAME",
        help="a cohort as hard as real sections: her2st (3 patients, 200 um pitch) or mob; the "
        "options below change it, their defaults are those of no preset",
    )
    for option, (setting, kind, text) in _SIMULATE.items():
        add(option, dest=setting, type=kind, metavar="N" if kind is int else "X", help=text)
    add(
        "--misregister",
        metavar="FAULT",
        help="lay every picture wrongly on its spots: flip_x, flip_y, rot90, rot180, rot270, "
        "transpose, transverse, shift:N (pitches) or other (another slide's picture)",
    )


def simulate(options: argparse.Namespace) -> int:
    """``hibio simulate``."""
    from pathways import load_pathways
    from preprocessing.simulate import SimulateConfig, simulate_cohort

    database = load_pathways("default")
    programmes = {name: list(database.genes_of(name)) for name in database.names}
    settings = [setting for setting, *_ in _SIMULATE.values()] + ["misregister"]
    given = {s: value for s in settings if (value := getattr(options, s)) is not None}
    if options.like is None:
        config = SimulateConfig(**given)
    else:
        config = SimulateConfig.like(options.like, **given)
    path = simulate_cohort(options.out, programmes, config)
    print(f"wrote {path}\nnext: hibio prepare {path} --out stores")
    return 0


def _manifest_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")


def manifest(options: argparse.Namespace) -> int:
    """``hibio manifest``."""
    from preprocessing.manifest import draft_manifest, guessed_patients, write_manifest

    rows = draft_manifest(options.folder)
    write_manifest(rows, options.out)
    pictured = sum(row.image is not None for row in rows)
    patients, guessed = {row.patient_id for row in rows}, guessed_patients(rows)
    size = f"{len(rows)} slides of {len(patients)} patients, {pictured} with images"
    print(f"wrote {options.out}: {size}")
    if guessed:
        shown = ", ".join(guessed[:4]) + ", ..." * (len(guessed) > 4)
        print(
            f"patient_id is a guess for {len(guessed)} slides ({shown}): no file names their "
            "patient, so each is one of its own. Splits are made by patient: give slides of one "
            "patient or animal one patient_id"
        )
    print(f"read it, correct it, then: hibio prepare {options.out} --out stores")
    return 0


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("manifest", type=Path, metavar="MANIFEST")
    add_folder(parser, "--out")
    add("--root", type=Path, metavar="DIR", help="what the paths are relative to")
    add(
        "--patch-um",
        type=float,
        metavar="UM",
        help="width of a patch (default: the pitch of each slide's array, 200 on first-generation "
        "arrays, 100 on Visium; 112 for bins and cells)",
    )
    add("--patch-px", type=int, default=224, metavar="PX", help="default 224")
    add(
        "--context-um",
        type=float,
        default=0.0,
        metavar="UM",
        help="store a second, wider patch of each spot too, e.g. 448 (default 0: none)",
    )
    add("--slide-backend", default="auto", metavar="B", help="openslide, pyvips, cucim")
    add_workers(parser, default=1)
    add("--minutes", type=float, default=120.0, metavar="N", help="give up a slide after (120)")
    add(
        "--gene-table",
        type=Path,
        metavar="FILE",
        help="TSV of id, symbol, organism, aliases, ortholog; genes are named by it",
    )
    add(
        "--gene-target",
        default="symbol",
        metavar="KIND",
        help="symbol (default), id, ortholog, or an organism of the table",
    )
    add(
        "--fix-registration",
        action="store_true",
        help="move spots that do not lie where the image shows them; look at `hibio check` first",
    )
    add(
        "--layout",
        choices=("stores", "hest"),
        default="stores",
        help="hest: write the stores in the layout of HEST-1k too, into OUT/hest",
    )


def prepare(options: argparse.Namespace) -> int:
    """``hibio prepare``."""
    from preprocessing.gene_ids import GeneMapConfig
    from preprocessing.patches import PatchConfig
    from preprocessing.run import prepare as prepare_stores

    genes = None
    if options.gene_table is not None:
        genes = GeneMapConfig(options.gene_table, options.gene_target)
    report = prepare_stores(
        options.manifest,
        options.out,
        root=options.root,
        patch=PatchConfig(options.patch_um, options.patch_px, options.context_um or None),
        workers=options.workers,
        scheduler=options.scheduler,
        minutes=options.minutes,
        backend=options.slide_backend,
        genes=genes,
        fix_registration=options.fix_registration,
    )
    print(report)
    if options.layout == "hest":
        _write_hest(options.out)
    return 1 if report.failed else 0


def _write_hest(stores: Path) -> None:
    from preprocessing.hest_layout import write_hest

    samples = write_hest(stores, stores / "hest")
    print(f"wrote {len(samples)} samples in the layout of HEST-1k to {stores / 'hest'}")
    for sample in samples:
        for note in sample.notes:
            print(f"  {sample.slide_id}: {note}")


def _genes_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="TABLE", help="of BioMart, HGNC, MGI, R, or features.tsv")
    add("--out", type=Path, required=True, metavar="FILE")
    add("--organism", default="", metavar="NAME", help="of all genes, such as mouse")
    add("--orthologs", type=Path, metavar="FILE", help="table of pairs: symbols of two organisms")


def genes(options: argparse.Namespace) -> int:
    """``hibio genes``."""
    from preprocessing.gene_ids.table import draft_gene_table

    table = draft_gene_table(options.source, options.out, options.organism, options.orthologs)
    aliases = sum(bool(gene.aliases) for gene in table.genes)
    orthologs = sum(bool(gene.orthologs) for gene in table.genes)
    print(
        f"wrote {options.out}: {len(table.genes):,} genes of {', '.join(table.organisms) or '?'}, "
        f"{aliases:,} with aliases, {orthologs:,} with orthologs\n"
        f"next: hibio prepare MANIFEST --gene-table {options.out} --out stores"
    )
    return 0


def _features_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("stores", type=Path, nargs="?", metavar="STORES", help="folder, or one store")
    add("--encoder", metavar="NAME", help="see --list; a timm name; hf-hub:ORG/NAME")
    add("--weights", type=Path, metavar="FILE", help="local weights of the encoder")
    add("--batch", type=int, default=64, metavar="N", help="patches a pass (64)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=int, default=1, metavar="N", help="that decode patches ahead (1)")
    add_workers(parser)
    add(
        "--scale",
        choices=("spot", "context", "both"),
        default="spot",
        help="which patches: the spot's (default), its context's, or both side by side",
    )
    add(
        "--stain",
        choices=("none", "macenko", "reinhard"),
        default="none",
        help="bring the patches of each slide to one stain before (default none)",
    )
    add(
        "--input-px",
        type=int,
        metavar="PX",
        help="side of the square that the encoder reads (default: what it was trained on)",
    )
    add("--list", action="store_true", help="show the known encoders")


def features(options: argparse.Namespace) -> int:
    """``hibio features``: prints the table; 1 when a store failed."""
    from hibio.backbones.features import features_report
    from hibio.backbones.registry import registry_table
    from hibio.config.files import ConfigError
    from preprocessing.errors import DataError

    if options.list:
        print(registry_table())
        return 0
    if options.stores is None or options.encoder is None:
        raise ConfigError(
            "give stores and an encoder: hibio features STORES --encoder NAME (hibio features "
            "--list shows the encoders)"
        )
    report = features_report(
        options.stores,
        options.encoder,
        weights=options.weights,
        batch=options.batch,
        device=options.device,
        threads=options.threads,
        workers=options.workers,
        scheduler=options.scheduler,
        scale=options.scale,
        stain=options.stain,
        input_px=options.input_px,
    )
    print(report)
    if all(row.status == "no image" for row in report.rows):
        raise DataError(f"no store of {options.stores} has patches; prepare slides with images")
    print(f"next: train with --set data.image={report.encoder}")
    return 1 if report.failed else 0


def _qc_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stores", type=Path, metavar="STORES")
    add_folder(parser, "--out")


def qc(options: argparse.Namespace) -> int:
    """``hibio qc``."""
    from preprocessing.qc import qc_folder

    print(f"wrote {qc_folder(options.stores, options.out)}")
    return 0


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="or a source of gene sets")


def check(options: argparse.Namespace) -> int:
    """``hibio check``."""
    from hibio.cli.check import check_any
    from hibio.cli.doctor import tell_findings

    return tell_findings(check_any(options.path))


COMMANDS = (
    Command(
        "simulate",
        "write a cohort with planted truth as real files",
        "hibio simulate --out cohort --slides 8 --patients 4",
        simulate,
        _simulate_arguments,
    ),
    Command(
        "manifest",
        "draft a manifest from a folder of samples",
        "hibio manifest her2st --out her2st.csv",
        manifest,
        _manifest_arguments,
    ),
    Command(
        "genes",
        "write a gene table, for prepare --gene-table, from one of Ensembl, HGNC or MGI",
        "hibio genes mart_export.txt --organism mouse --out mouse_genes.tsv",
        genes,
        _genes_arguments,
    ),
    Command(
        "prepare",
        "read slides and counts into stores, one file a slide",
        "hibio prepare cohort/manifest.csv --out stores",
        prepare,
        _prepare_arguments,
    ),
    Command(
        "features",
        "store the features of a frozen image encoder beside the patches",
        "hibio features stores --encoder uni2-h --weights pytorch_model.bin",
        features,
        _features_arguments,
    ),
    Command(
        "qc",
        "write a quality page a slide and a cohort summary",
        "hibio qc stores --out qc",
        qc,
        _qc_arguments,
    ),
    Command(
        "check",
        "verify a store, a folder of stores, a manifest, a checkpoint or gene sets",
        "hibio check stores",
        check,
        _check_arguments,
    ),
)
