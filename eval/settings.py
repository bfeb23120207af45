"""Settings of tasks and peers from outside: ``TASK.key=value`` and ``peers.NAME.key=value``.

They are the fields of the config dataclasses, of peers the fields of the peer itself, checked as
the keys of a configuration are. What was set stands in results.json, so that only results of the
same settings are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from eval.errors import FoldError
from eval.peers import PEERS
from eval.peers.peer import Peer
from eval.results import Task
from eval.tasks import TASKS
from hibio.config.files import ConfigError
from hibio.config.schema import SchemaError, build_section
from preprocessing.errors import did_you_mean

#: Section of the settings of peers, by name.
OF_PEERS = "peers"
#: Fields of a peer that say which one it is.
_FIXED = ("name", "source")

C = TypeVar("C")


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        FoldError: unknown name; the choices and the nearest one are listed.
    """
    if name in TASKS:
        return TASKS[name]
    hint = did_you_mean(name, TASKS)
    raise FoldError(f"unknown task {name!r}; tasks are {sorted(TASKS)}{hint}")


def task_configs(given: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, Any]:
    """The config of every task that is run; defaults where nothing is given.

    Args:
        given: task -> its settings, as `hibio.config.files.apply_overrides` makes them.
        tasks: names of the tasks.

    Raises:
        ConfigError: an unknown key, a value that does not fit, or a task that is not run.
    """
    tasks = list(tasks)
    _refuse_unread(given, [*tasks, OF_PEERS], [*TASKS, OF_PEERS], "task")
    return {name: _built(TASKS[name].config, given.get(name, {}), (name,)) for name in tasks}


def configured_peers(given: Mapping[str, Any], peers: Sequence[Peer]) -> tuple[Peer, ...]:
    """The fitted peers with their settings from outside, those under ``peers`` by name.

    Raises:
        ConfigError: an unknown key, a value that does not fit, or a peer that is not fitted.
    """
    settings = given.get(OF_PEERS, {})
    _refuse_unread(settings, [peer.name for peer in peers], list(PEERS), "peer")
    return tuple(
        _built(type(peer), settings[peer.name], (OF_PEERS, peer.name), peer)
        if peer.name in settings
        else peer
        for peer in peers
    )


def _refuse_unread(given: Any, used: Sequence[str], known: Sequence[str], kind: str) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"settings of a {kind} are NAME.key=value, found {given!r}")
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"settings of the unknown {kind} {name!r}{hint} ({', '.join(known)})")
        if name not in used:
            raise ConfigError(
                f"settings of the {kind} {name!r}, which is not run; add it to --{kind}s, or leave "
                "them out"
            )


def _built(cls: type[C], data: Any, key: tuple[str, ...], default: C | None = None) -> C:
    fixed = [name for name in _FIXED if default is not None and name in data]
    if fixed:
        raise ConfigError(f"{'.'.join(key)}.{fixed[0]} says which peer it is and is not a setting")
    try:
        return build_section(cls, data, key, default)
    except SchemaError as problem:
        raise ConfigError(str(problem)) from problem
