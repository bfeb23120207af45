"""The ``hibio`` command: a table of groups, each with its arguments beside what runs them."""

from __future__ import annotations

from collections.abc import Sequence

from hibio.cli import config, data, demo, doctor, evaluation, model, pathways, runs
from hibio.cli.command import Command, run_line

#: Every command by name, in the order of the help.
COMMANDS: dict[str, Command] = {
    command.name: command
    for group in (data, pathways, config, model, evaluation, runs, demo, doctor)
    for command in group.COMMANDS
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (that of the process when None).

    Returns:
        0 done, 1 failed (message on stderr), 2 usage.
    """
    return run_line(arguments, COMMANDS)
