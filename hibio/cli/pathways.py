"""``hibio pathways``: databases by name, their sets, and what of them a cohort measures."""

from __future__ import annotations

import argparse
from pathlib import Path

from hibio.cli.command import Command, add_folder


def _list(options: argparse.Namespace) -> None:
    from pathways import list_databases

    for entry in list_databases():
        place = "shipped" if entry.shipped else f"hibio pathways fetch {entry.name}"
        print(f"{entry.name:<10} {entry.summary} ({entry.version}; {entry.licence}) - {place}")
    print("also: ./file.gmt, ./table.tsv (source, target, weight), pkg.mod:function, a+b")


def _show(options: argparse.Namespace) -> None:
    from pathways import load_pathways

    database = load_pathways(options.name)
    print(f"{database.name} {database.version}: {len(database.names)} sets, {database.licence}")
    for name in database.names:
        genes = database.genes_of(name)
        print(f"{name}\t{len(genes)}\t{database.descriptions.get(name, '')}\t{' '.join(genes)}")


def _coverage(options: argparse.Namespace) -> None:
    from hibio.config.files import ConfigError
    from pathways import load_pathways
    from preprocessing.store import SlideStore
    from preprocessing.store.read import stores_in

    database = load_pathways(options.name)
    paths = stores_in(options.data)
    if not paths:
        raise ConfigError(f"{options.data}: no store there; run `hibio prepare` first")
    names: set[str] = set()
    for path in paths:
        with SlideStore(path) as store:
            names |= set(store.gene_names)
    if not names:
        raise ConfigError(f"{options.data}: no slide with counts, so no set has a gene there")
    _, report = database.restrict(sorted(names))
    print(report)


def _fetch(options: argparse.Namespace) -> None:
    from pathways import fetch

    path = fetch(options.name, options.out)
    print(f"wrote {path}; use it as pathways.source: {path}")


def _export(options: argparse.Namespace) -> None:
    from pathways import load_pathways, write_gmt
    from preprocessing.files import not_ours

    if options.out.exists():
        raise not_ours(options.out)
    write_gmt(options.out, load_pathways(options.name).plain_sets())
    print(f"wrote {options.out}")


#: Action -> help, and what runs it.
ACTIONS = {
    "list": ("databases by name", _list),
    "show": ("the sets of a database", _show),
    "coverage": ("how many of its genes the stores measure", _coverage),
    "export": ("write them as GMT that every program reads: no blanks in a field", _export),
    "fetch": ("download a database whose checksum is known", _fetch),
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    for action, (text, _) in ACTIONS.items():
        one = verbs.add_parser(action, help=text)
        if action != "list":
            one.add_argument("name", help="name, file, pkg.mod:function, or a+b")
        if action == "coverage":
            add_folder(one, "--data")
        if action == "export":
            one.add_argument("--out", type=Path, required=True, metavar="FILE.gmt")
        if action == "fetch":
            one.add_argument("--out", type=Path, default=Path(), metavar="DIR")


def run(options: argparse.Namespace) -> int:
    """Run the action that was asked for."""
    ACTIONS[options.action][1](options)
    return 0


COMMANDS = (
    Command(
        "pathways",
        "list, show, measure the coverage of, export or fetch gene-set databases",
        "hibio pathways coverage default+./my.gmt --data stores",
        run,
        _arguments,
    ),
)
