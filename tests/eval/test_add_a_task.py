"""A task added as CONTRIBUTING says: one file, one line, and everything else finds it."""

import importlib
import json

import pytest

from eval.report import write_report
from eval.report.markdown import write_markdown
from eval.results import Task, write_results
from eval.settings import find_task, task_configs
from eval.tasks import TASKS
from hibio.config.files import ConfigError, apply_overrides

FILE = '''"""How far apart the rows of an embedding lie."""

from dataclasses import dataclass

import numpy as np

from eval.results import Measure, Question, ResultTable

QUESTION = Question("spread", "Do the rows of an embedding differ?", ("spread",))
SPREAD = Measure("spread", "mean deviation per slide", "low", ("spread: of the rows",))


@dataclass(frozen=True)
class SpreadConfig:
    """Settings: how many dimensions are read."""

    dimensions: int = 4


def run(fold, config):
    table = ResultTable(QUESTION)
    table.row("nothing", "control", "rows that are all equal")
    for slide in fold.test:
        table.add("nothing", SPREAD, fold.key(slide.slide_id), 0.0, chance=1.0)
        for model in fold.models:
            if model.omics is not None:
                rows = model.rows("omics", [slide])[0][:, : config.dimensions]
                value = float(np.std(rows, axis=0).mean())
                table.add(model.name, SPREAD, fold.key(slide.slide_id), value, chance=1.0)
    return table.result(fold.models)
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The file in a package of its own, and the line in the table."""
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks/__init__.py").touch()
    (tmp_path / "my_tasks/spread.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_tasks.spread")
    monkeypatch.setitem(TASKS, "spread", Task(module.SpreadConfig, module.run))
    return module


def test_it_runs_for_every_row_and_is_shown(added, toy_fold, tmp_path):
    result = find_task("spread").run(toy_fold, task_configs({}, ["spread"])["spread"])
    rows = {model.name for model in toy_fold.models if model.omics is not None}
    assert set(result.models) == rows | {"nothing"}
    body = write_results(tmp_path / "results.json", {}, {}, [result])
    written = json.loads((tmp_path / "results.json").read_text())["tasks"]["spread"]
    assert written["models"]["nothing"]["spread"]["mean"] == 0
    assert written["models"]["nothing"]["spread"]["chance"] == 1
    assert written["metrics"]["spread"]["better"] == "low"
    assert written["rows"]["nothing"]["role"] == "control"
    write_markdown(tmp_path / "results.md", body)
    assert "| nothing | 0.000 ± 0.000 (n=2) |" in (tmp_path / "results.md").read_text()
    page = write_report(tmp_path / "report.html", body, []).read_text()
    assert "Do the rows of an embedding differ?" in page
    assert "rows that are all equal" in page


def test_its_settings_are_reached_from_outside(added, toy_fold):
    given = apply_overrides({}, ["spread.dimensions=1"])
    config = task_configs(given, ["spread"])["spread"]
    one = find_task("spread").run(toy_fold, config)
    all_of_them = find_task("spread").run(toy_fold, added.SpreadConfig())
    assert one.models["hibio"]["spread"].mean != all_of_them.models["hibio"]["spread"].mean
    with pytest.raises(ConfigError, match=r"dimensions"):
        task_configs(apply_overrides({}, ["spread.dimension=1"]), ["spread"])
