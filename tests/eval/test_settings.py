"""Settings of tasks and peers from the command line reach them, and wrong ones are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest

from eval.hest_bench.protocol import HestProtocol, protocol_of
from eval.peers import PEERS
from eval.settings import configured_peers, task_configs
from eval.tasks import TASKS, retrieval
from hibio.config.files import ConfigError, apply_overrides
from tests.hibio.test_ranges import number_in

EVERY = list(PEERS.values())


def test_without_settings_everything_is_as_published() -> None:
    assert task_configs({}, TASKS) == {name: task.config() for name, task in TASKS.items()}
    assert configured_peers({}, EVERY) == tuple(EVERY)
    assert protocol_of([]) == HestProtocol()


def test_a_setting_reaches_its_task_and_changes_its_numbers(toy_fold) -> None:
    given = apply_overrides({}, ["retrieval.item=niche", "retrieval.ridge.n_components=8"])
    config = task_configs(given, ["retrieval", "domains"])["retrieval"]
    assert (config.item, config.ridge.n_components) == ("niche", 8)
    spot = retrieval.run(toy_fold, retrieval.RetrievalConfig())
    niche = retrieval.run(toy_fold, config)
    assert "item: niche" in niche.notes[0]
    assert set(spot.models["hibio"]) != set(niche.models["hibio"])


def test_a_setting_reaches_its_peer_and_no_other() -> None:
    given = apply_overrides({}, ["peers.bleep.k=7"])
    before = {peer.name: peer for peer in EVERY}
    after = {peer.name: peer for peer in configured_peers(given, EVERY)}
    assert after.pop("bleep").k == 7
    del before["bleep"]
    assert after == before


def test_a_setting_reaches_the_protocol_of_hest_bench() -> None:
    assert protocol_of(["n_components=64"]) == HestProtocol(n_components=64)
    with pytest.raises(ConfigError, match="did you mean 'n_components'"):
        protocol_of(["n_component=64"])


def numbers_of(section: Any, above: str) -> Iterator[tuple[str, bool]]:
    """Key of every number of a settings object, and whether it has a range."""
    hints = get_type_hints(type(section), include_extras=True)
    for field in fields(section):
        key, value = f"{above}.{field.name}", getattr(section, field.name)
        if is_dataclass(value):
            yield from numbers_of(value, key)
        elif number_in(hints[field.name]) is not None:
            yield key, "Range" in str(hints[field.name])


def read_all(setting: str) -> None:
    if setting.startswith("hest."):
        protocol_of([setting.removeprefix("hest.")])
    else:
        given = apply_overrides({}, [setting])
        configured_peers(given, EVERY)
        task_configs(given, TASKS)


def test_every_number_has_a_range_and_what_means_nothing_is_refused_by_its_key() -> None:
    sections = {f"peers.{peer.name}": peer for peer in EVERY}
    sections |= {name: task.config() for name, task in TASKS.items()}
    found = {key: bound for name, one in sections.items() for key, bound in numbers_of(one, name)}
    found |= dict(numbers_of(HestProtocol(), "hest"))
    assert len(found) > 100
    assert [key for key, bound in found.items() if not bound] == []
    for key in found:
        for value in ("-1", ".nan"):
            listed = f"[{value}]" if key.endswith((".k", ".grid", "diameters_um")) else value
            with pytest.raises(ConfigError, match=re.escape(key.removeprefix("hest."))):
                read_all(f"{key}={listed}")


def read_both(given: dict[str, Any]) -> None:
    task_configs(given, ["retrieval"])
    configured_peers(given, [PEERS["bleep"]])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("retrival.item=niche", "unknown task 'retrival'; did you mean 'retrieval'"),
        ("retrieval.itm=niche", "did you mean 'retrieval.item'"),
        ("retrieval.item=cell", "must be 'spot' or 'niche'"),
        ("retrieval.ridge.n_components=many", "a whole number"),
        ("retrieval=3", "a section"),
        ("domains.rounds=2", "settings of the task 'domains', which is not run"),
        ("peers.blep.k=7", "unknown peer 'blep'; did you mean 'bleep'"),
        ("peers.triplex.lr=1", "settings of the peer 'triplex', which is not run"),
        ("peers.bleep.kk=7", "did you mean 'peers.bleep.k'"),
        ("peers.bleep.name=mine", "not a setting"),
        ("peers=3", "NAME.key=value"),
    ],
)
def test_settings_that_nothing_reads_are_refused(setting: str, words: str) -> None:
    given = apply_overrides({}, [setting])
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_both(given)


def test_a_list_of_which_nothing_would_come_is_refused() -> None:
    lists = [
        (name, field.name)
        for name, task in TASKS.items()
        for field in fields(task.config)
        if isinstance(field.default, tuple) and field.default
    ]
    assert ("retrieval", "k") in lists
    for name, key in lists:
        with pytest.raises(ConfigError, match=rf"{name}\.{key} is empty; give at least one"):
            task_configs({name: {key: []}}, [name])
    task_configs({"annotation": {"columns": []}}, ["annotation"])  # every column that there is
