"""What a command of `hibio` is, the parser of them all, and how a user's error is told."""

from __future__ import annotations

import argparse
import os
import select
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from hibio import __version__
from hibio.keys import TABLES

STOPPED = 3  # exit code of a command that a signal stopped; a chain of commands ends there
LONGEST = 300  # characters of an unexpected error that are shown


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: as it is typed.
        text: what it does, for the help.
        example: a command line.
        run: options -> exit code; imports what is heavy inside.
        add_arguments: declares the options on the command's parser.
    """

    name: str
    text: str
    example: str
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def add_folder(parser: argparse.ArgumentParser, option: str, text: str | None = None) -> None:
    """Declare a folder that must be given."""
    parser.add_argument(option, type=Path, required=True, metavar="DIR", help=text)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declare a configuration file and its overrides."""
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="FILE",
        help="YAML, or the name of a shipped one (hibio config list)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", help="override a key"
    )


def add_workers(parser: argparse.ArgumentParser, default: int = 0, unit: str = "slide") -> None:
    """Declare where the work of a command is done, a slide or a job at a time."""
    add = parser.add_argument
    text = f"processes, each on one {unit} at a time (default {default or '0: in this one'})"
    add("--workers", type=int, default=default, metavar="N", help=text)
    text = "of a Dask cluster that takes the place of --workers"
    add("--scheduler", metavar="ADDRESS", help=text)


def add_format(parser: argparse.ArgumentParser) -> None:
    """Declare the format of the tables of slides that a command writes."""
    text = "AnnData as h5ad (default) or zarr, or spatialdata: with picture, spots and regions"
    parser.add_argument("--format", choices=tuple(TABLES), default="h5ad", help=text)


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of ``hibio``; what it parses has ``run`` and ``commands``, the table itself.

    It also has ``refuse``, which ends a command by a sentence on its usage.
    """
    parser = argparse.ArgumentParser(
        prog="hibio",
        description="Pretrain on pairs of whole-slide images and spatial transcriptomics: "
        "spots, pathways and regions in one embedding space.",
        epilog="Start with `hibio demo`; check the machine with `hibio doctor`.",
    )
    parser.add_argument("--version", action="version", version=f"hibio {__version__}")
    actions = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in commands.items():
        one = actions.add_parser(
            name,
            help=command.text,
            description=command.text[0].upper() + command.text[1:] + ".",
            epilog=f"Example: {command.example}",
        )
        command.add_arguments(one)
        one.set_defaults(run=command.run, commands=commands, refuse=one.error)
    return parser


def run_line(arguments: Sequence[str] | None, commands: Mapping[str, Command]) -> int:
    """Parse and run one command line.

    Returns:
        0 done, 1 failed (message on stderr), 2 usage, 3 stopped by a signal with all saved.
    """
    parser = build_parser(commands)
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions, and argcomplete gives them
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    return guarded(lambda: options.run(options))


def guarded(work: Callable[[], int]) -> int:
    """The exit code of ``work``; what stops it is told in one line, a bug with its log."""
    from hibio.config.files import ConfigError
    from pathways.errors import PathwayError
    from preprocessing.errors import DataError

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _tell_warning  # catch_warnings puts the old one back
            code = work()
        sys.stdout.flush()
        return code
    except InterruptedError as stopped:
        _tell(stopped)
        return STOPPED
    except KeyboardInterrupt:
        _tell("stopped; whatever was finished is on disk")
        return 1
    except BrokenPipeError as error:
        if not _nobody_reads():
            _tell(error)
        return 1
    except (ConfigError, PathwayError, DataError, MemoryError, OSError) as error:
        _tell(error)
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort: told in one line, kept in a log
        _tell(
            f"unexpected {type(error).__name__}: {str(error)[:LONGEST]}; an input is not what it "
            f"should be, or this is a bug. What was done is in {_write_log()}; `hibio check` looks "
            "at stores and checkpoints"
        )
        return 1


def _nobody_reads() -> bool:
    """Whether the pipe that broke is that of stdout (`hibio ... | head`), which is no fault."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # it is no file
        return False
    if os.name != "nt":  # where pipes cannot be looked at
        watch = select.poll()
        watch.register(stdout, select.POLLOUT)
        gone = select.POLLERR | select.POLLHUP  # Linux says the one of a pipe, the BSDs the other
        if not any(event & gone for _, event in watch.poll(0)):
            return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def _write_log() -> str:
    """Write the error that is being handled to a new file of its own; its path."""
    command = " ".join(sys.argv)
    with tempfile.NamedTemporaryFile(
        "w", prefix="hibio-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        file.write(f"{command}\n\n{traceback.format_exc()}")
    return file.name


def _tell(message: object) -> None:
    print(f"hibio: {' '.join(str(message).split())}", file=sys.stderr)


def _tell_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line; the user did not write the line of code that it comes from."""
    name = "" if issubclass(category, UserWarning) else f"{category.__name__}: "
    text = " ".join(str(message).split())
    tqdm.write(f"hibio: warning: {name}{text}", file=sys.stderr)
