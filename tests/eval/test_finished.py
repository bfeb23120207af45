"""An evaluation keeps the tasks that are done, and goes on with those of the same call alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from eval import run as module
from eval.results import Measure, Question, ResultTable, TaskRecord, TaskResult
from eval.run import FINISHED, MADE_OF, PAGE, RESULTS, TABLES, Finished, evaluate
from hibio.checkpoint import WEIGHTS, write_checksums
from hibio.config.files import ConfigError
from hibio.config.training import StageConfig
from hibio.data.splits import INDEX_NAME
from hibio.run import train_all
from preprocessing.errors import DataError
from preprocessing.files import locked
from preprocessing.store import SlideStore
from preprocessing.store.write import add_features
from tests.hibio.toy import SPOT, run_config

ASKED = ["retrieval", "regions"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A checkpoint, its stores, and what a whole evaluation of it wrote."""

    checkpoint: Path
    stores: Path
    out: Path


@pytest.fixture(scope="module")
def measured(toy_stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    root = tmp_path_factory.mktemp("finished")
    stages = (StageConfig("spot", 1, SPOT),)
    config = run_config(toy_stores, root / "run", stages=stages)
    train_all(config)
    found = Measured(root / "run", toy_stores, root / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "pictures", no_pictures)
        evaluate(found.checkpoint, found.stores, found.out, ASKED)
    return found


def no_pictures(*_: Any) -> list[Any]:
    """They take longer than the tasks."""
    return []


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each task is run."""
    monkeypatch.setattr(module, "pictures", no_pictures)
    count: Counter[str] = Counter()
    for name, task in module.TASKS.items():

        def run(fold: Any, config: Any, name: str = name, task: Any = task) -> TaskResult:
            count[name] += 1
            return task.run(fold, config)

        monkeypatch.setitem(module.TASKS, name, dataclasses.replace(task, run=run))
    return count


def tasks_of(out: Path) -> Any:
    return json.loads((out / RESULTS).read_text())["tasks"]


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_numbers(
    measured: Measured, tmp_path: Path, ran: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(fold: Any, config: Any) -> TaskResult:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        broken = dataclasses.replace(module.TASKS["regions"], run=killed)
        patch.setitem(module.TASKS, "regions", broken)
        with pytest.raises(KeyboardInterrupt):
            evaluate(measured.checkpoint, measured.stores, out, ASKED)
    assert ran == {"retrieval": 1}
    assert sorted(path.name for path in out.iterdir()) == [FINISHED]
    (out / FINISHED / ".regions.0badcafe-1-0123456789abcdef.part").touch()
    evaluate(measured.checkpoint, measured.stores, out, ASKED)
    assert ran == {"retrieval": 1, "regions": 1}
    assert tasks_of(out) == tasks_of(measured.out)
    evaluate(measured.checkpoint, measured.stores, out, ["retrieval"])  # nothing is left to do
    assert ran == {"retrieval": 1, "regions": 1}
    assert tasks_of(out) == {"retrieval": tasks_of(measured.out)["retrieval"]}


def test_what_is_read_back_is_what_was_kept() -> None:
    table = ResultTable(Question("t", "words", ("a", "b")))
    table.add("m", Measure("a", "unit", "low", ("a: x",), True), "f/0/s", 0.1 + 0.2, 1 / 3)
    table.add("m", Measure("b", "other"), "f/0/s", np.nan)
    table.row("m", "baseline", "what it does")
    table.note("a note")
    result = module.with_seen(table.result(), "patient")
    record = json.loads(json.dumps(result.to_json()).replace("NaN", "null"))
    found = module._read_result(TaskRecord("t", record))
    assert repr(found) == repr(result)


def test_results_of_something_else_are_not_mixed_in(
    measured: Measured, tmp_path: Path, ran: Counter[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(measured.out, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    others = tmp_path / "stores"
    shutil.copytree(measured.stores, others, ignore=shutil.ignore_patterns(INDEX_NAME))
    with SlideStore(others / "sim003.h5") as store:
        values = store.features("handcrafted")
    add_features(others / "sim003.h5", "another", values)
    other = tmp_path / "run"
    shutil.copytree(measured.checkpoint, other)
    (weights,) = other.rglob(WEIGHTS)
    state = load_file(weights)
    save_file({name: 2 * value for name, value in state.items()}, weights)
    write_checksums(weights.parent)
    settings = {"retrieval": {"fractions": [0.3]}}
    calls: list[tuple[dict[str, Any], str]] = [
        ({"settings": settings}, r"settings of tasks \(retrieval\)"),
        ({"data": others}, r"stores \(sim003\)"),
        ({"test": ["sim003"]}, r"--test \(sim003\)"),
        ({"peers": "bleep"}, r"--peers \(bleep\)"),
        ({"checkpoint": other}, r"checkpoints \(hibio/patient03/0\)"),
    ]
    for changes, told in calls:
        given = {"checkpoint": measured.checkpoint, "data": measured.stores, **changes}
        with pytest.raises(ConfigError, match=rf"holds results of other {told}; give another"):
            evaluate(out=out, tasks=ASKED, **given)
    with locked(out), pytest.raises(DataError, match="is in use"):
        evaluate(measured.checkpoint, measured.stores, out, ASKED)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not ran


def test_tasks_of_another_version_are_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now: dict[str, dict[str, Any]] = {"code": {"commit": "a"}, "settings of tasks": {"t": 1}}
    kept = Finished.opened(tmp_path, now).folder / "t-0.json"
    kept.touch()
    more = {**now, "settings of tasks": {"u": 2}}
    assert Finished.opened(tmp_path, more).folder == kept.parent  # another task joins
    assert kept.exists()
    with pytest.raises(ConfigError, match=r"other settings of tasks \(t\)"):
        Finished.opened(tmp_path, {**now, "settings of tasks": {"t": 3}})
    Finished.opened(tmp_path, {**more, "code": {"commit": "b"}})
    assert "t-0.json: of another version of HiBio; measured again" in capsys.readouterr().out
    assert not kept.exists()
    (kept.parent / MADE_OF).write_text("[")
    with pytest.raises(ConfigError, match=r"made_of\.json: cannot be read"):
        Finished.opened(tmp_path, now)


@pytest.mark.parametrize("name", [RESULTS, TABLES, PAGE])
def test_no_file_of_somebody_else_is_written_over(
    measured: Measured, tmp_path: Path, ran: Counter[str], name: str
) -> None:
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(DataError, match=rf"{name} is there and was not made by this command"):
        evaluate(measured.checkpoint, measured.stores, tmp_path, ASKED)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not ran
    (tmp_path / RESULTS).write_text('{"tasks": {}}')
    with pytest.raises(ConfigError, match=r"results of an older HiBio .* move or remove"):
        evaluate(measured.checkpoint, measured.stores, tmp_path, ASKED)


def test_the_folder_is_tried_before_the_data_are_read(measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        evaluate(measured.checkpoint, tmp_path / "no stores", tmp_path / "file" / "out")
    with pytest.raises(DataError, match="no stores"):
        evaluate(measured.checkpoint, tmp_path / "no stores", tmp_path / "a" / "out")
    assert not (tmp_path / "a").exists()
