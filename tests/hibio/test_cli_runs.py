"""`hibio runs`: the state of runs as they begin, stop, end, are measured, held and broken."""

import json
import os

import pytest

from hibio import cli
from hibio.cli.runs import format_rows, run_rows
from hibio.config.files import ConfigError
from hibio.run import expand, train_all
from hibio.training.trainer import Trainer
from preprocessing.files import LOCK, holder, locked
from tests.hibio.toy import run_config

RESULTS = {
    "tasks": {
        "retrieval": {
            "models": {"hibio": {"recall": {"mean": 0.25}}, "ridge": {"recall": {"mean": 0.5}}},
            "rows": {"hibio": {"role": "model"}, "ridge": {"role": "baseline"}},
            "short": ["recall"],
        }
    }
}


def told(folder) -> tuple[str, str, str, str]:
    (row,) = run_rows(folder)
    return row.state, row.jobs, row.headline, row.next


def test_a_run_from_its_stop_to_its_report(toy_stores, tmp_path, monkeypatch, capsys):
    config = run_config(toy_stores, tmp_path / "mine", folds=("patient03", "patient02"))
    expand(config)
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, until_step=None: fit(self, 2))
    with pytest.raises(InterruptedError):
        train_all(config)
    resume = f"hibio train --config {config.out}/config.yaml --resume {config.out}"
    assert told(tmp_path) == ("stopped", "0/2", "", resume)
    monkeypatch.setattr(Trainer, "fit", fit)
    train_all(config, resume=True)
    measure = f"hibio eval --checkpoint {config.out} --data {toy_stores} --out {config.out}/eval"
    assert told(tmp_path) == ("trained", "2/2", "", measure)
    (row,) = run_rows(tmp_path)
    assert row.seconds > 0
    (config.out / "eval").mkdir()
    (config.out / "eval" / "results.json").write_text(json.dumps(RESULTS))
    report = f"{config.out}/eval/report.html"
    assert told(tmp_path) == ("measured", "2/2", "retrieval recall 0.250", report)
    assert cli.main(["runs", str(tmp_path)]) == 0
    head, line, then = capsys.readouterr().out.splitlines()[-3:]
    assert head.split() == ["run", "state", "jobs", "seconds", "headline"]
    assert line.split()[1:3] == ["measured", "2/2"]
    assert then.strip() == report
    with locked(config.out):
        state, *_, owner = told(tmp_path)
        assert (state, owner.split()[:2]) == ("running", ["process", str(os.getpid())])
    saved = config.out / "config.yaml"
    saved.write_text(saved.read_text().replace("\ngenes:\n", "\ngenes:\n  graph_spots: 9\n"))
    assert "graph_spots" in saved.read_text()  # a key that only an older HiBio had
    assert told(tmp_path)[0] == "measured"
    saved.write_text("stages: 5\n")
    assert told(tmp_path)[0] == "broken"


def test_a_grid_is_one_row(tmp_path):
    grid = tmp_path / "grid"
    (grid / "all" / "fold-A" / "seed-0").mkdir(parents=True)
    (grid / "all" / "fold-A" / "seed-0" / "log.jsonl").write_text('{"step": 0, "seconds": 1.5}\n')
    (grid / "grid.yaml").write_text("")
    (grid / "provenance.json").write_text(json.dumps({"command": "hibio ablate --config g"}))
    assert told(tmp_path) == ("stopped", "?/?", "", "hibio ablate --config g")
    results = {**RESULTS, "data": {"n_jobs": 4, "n_missing": 1}}
    (grid / "results.json").write_text(json.dumps(results))
    assert told(tmp_path)[:3] == ("stopped", "3/4", "retrieval recall 0.250")
    results["data"]["n_missing"] = 0
    (grid / "results.json").write_text(json.dumps(results))
    assert told(tmp_path)[1::2] == ("4/4", f"{grid}/report.html")
    (row,) = run_rows(tmp_path)
    assert row.seconds == 1.5
    assert len(list(format_rows([row]))) == 3


def test_a_damaged_log_breaks_one_row_and_not_the_list(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "grid.yaml").touch()
    (tmp_path / "a" / "log.jsonl").write_text("[1]\n{}\n")
    one, other = run_rows(tmp_path)
    assert (one.state, other.state) == ("broken", "stopped")
    assert f"{tmp_path}/a/log.jsonl: line 1" in one.next


def test_no_run_is_told(tmp_path):
    with pytest.raises(ConfigError, match="no run there; give the 'out'"):
        run_rows(tmp_path)


def test_a_lock_whose_process_is_gone_holds_nothing(tmp_path):
    assert holder(tmp_path) is None
    with locked(tmp_path):
        owner = json.loads((tmp_path / LOCK).read_text())
        assert f"process {os.getpid()} on" in (holder(tmp_path) or "")
        (tmp_path / LOCK).write_text(json.dumps({**owner, "started": "1"}))
        assert holder(tmp_path) is None
