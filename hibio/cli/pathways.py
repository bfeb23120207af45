"""``hibio pathways``: databases by name, their sets, and what of them a cohort measures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from hibio.config.files import ConfigError
from pathways import fetch, list_databases, load_pathways
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in


def run(options: argparse.Namespace) -> int:
    """Run the action that was asked for."""
    return ACTIONS[options.action](options)


def _list(options: argparse.Namespace) -> int:
    for entry in list_databases():
        place = "shipped" if entry.shipped else f"hibio pathways fetch {entry.name}"
        print(f"{entry.name:<10} {entry.summary} ({entry.version}; {entry.licence}) - {place}")
    print("also: ./file.gmt, ./table.tsv (source, target, weight), pkg.mod:function, a+b")
    return 0


def _show(options: argparse.Namespace) -> int:
    database = load_pathways(options.name)
    print(f"{database.name} {database.version}: {len(database.names)} sets, {database.licence}")
    for name in database.names:
        genes = database.genes_of(name)
        print(f"{name}\t{len(genes)}\t{database.descriptions.get(name, '')}\t{' '.join(genes)}")
    return 0


def _coverage(options: argparse.Namespace) -> int:
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
    return 0


def _fetch(options: argparse.Namespace) -> int:
    path = fetch(options.name, Path(options.out))
    print(f"wrote {path}; use it as pathways.source: {path}")
    return 0


ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "list": _list,
    "show": _show,
    "coverage": _coverage,
    "fetch": _fetch,
}
