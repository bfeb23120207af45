"""`hibio config`: the shipped configurations, and what a configuration may hold."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from hibio.cli.command import Command


def _list(options: argparse.Namespace) -> None:
    from hibio.config.files import find_config, shipped_names

    names = shipped_names()
    width = max(map(len, names))
    for name in names:
        lines = find_config(name).read_text(encoding="utf-8").splitlines()
        told = lines[1].lstrip("# ") if lines[1:2] and lines[1].startswith("# ") else ""
        print(f"{name:<{width}}  {told}".rstrip())


def _show(options: argparse.Namespace) -> None:
    from hibio.config.files import find_config

    print(find_config(options.name).read_text(encoding="utf-8"), end="")


def _copy(options: argparse.Namespace) -> None:
    from hibio.config.files import SHIPPED, ConfigError, find_config
    from preprocessing.files import atomic_path

    source = find_config(options.name)
    out: Path = options.out or Path(source.name)
    if out.exists():
        raise ConfigError(f"{out} is there already; name another file with --out")

    def by_name(found: re.Match[str]) -> str:
        """What it is based on lies beside the shipped file, and has a name from anywhere."""
        other, shipped = (source.parent / found[2]).resolve(), SHIPPED.resolve()
        if not other.is_relative_to(shipped):  # based on a file of the user's own
            return f"{found[1]}: {other}"
        return f"{found[1]}: {other.relative_to(shipped).with_suffix('')}"

    text = source.read_text(encoding="utf-8")
    if source.is_relative_to(SHIPPED):
        text = text.replace(f"configs/{source.relative_to(SHIPPED)}", str(out))
    with atomic_path(out) as temporary:
        temporary.write_text(re.sub(r"(?m)^(base|run): (\S+)", by_name, text), encoding="utf-8")
    print(f"wrote {out}")


def _schema(options: argparse.Namespace) -> None:
    from hibio.config.schema import json_schema

    if options.grid:
        from eval.ablation.config import GridConfig as File
    else:
        from hibio.config.run import RunConfig as File  # type: ignore[assignment]
    print(json.dumps(json_schema(File), indent=1))


#: Action -> help, and what runs it.
ACTIONS: dict[str, tuple[str, Callable[[argparse.Namespace], None]]] = {
    "list": ("what is shipped: runs, grids, manifests, job files", _list),
    "show": ("print one", _show),
    "copy": ("write one to a file of yours, to be changed", _copy),
    "schema": ("JSON Schema of a run's YAML, by which editors check and complete keys", _schema),
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    for action, (text, _) in ACTIONS.items():
        one = verbs.add_parser(action, help=text)
        if action in ("show", "copy"):
            one.add_argument("name", help="as `hibio config list` shows it")
        if action == "copy":
            one.add_argument("--out", type=Path, metavar="FILE", help="default: its own name, here")
        if action == "schema":
            one.add_argument("--grid", action="store_true", help="of a grid of `hibio ablate`")


def run(options: argparse.Namespace) -> int:
    """Run the action that was asked for."""
    ACTIONS[options.action][1](options)
    return 0


COMMANDS = (
    Command(
        "config",
        "list, show or copy the shipped configurations, or print the schema of one",
        "hibio config copy her2st --out my.yaml",
        run,
        _arguments,
    ),
)
