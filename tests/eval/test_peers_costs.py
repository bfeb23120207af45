"""Parameters and wall time of every fitted model stand in results, Markdown and report."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from eval.folds.fold import Cost, Fold, Representation
from eval.peers import PEERS
from eval.peers.peer import Budget
from eval.report import write_report
from eval.report.markdown import write_markdown
from eval.report.report import models_section
from eval.run import budget_of, checkpoint_cost, cost_table, verdict_rows
from hibio.checkpoint import TRAINER
from hibio.config.training import SamplerConfig
from hibio.training.curriculum import Verdict
from preprocessing.pages import Section, render


@dataclass(frozen=True)
class Trained:
    """The parts of a checkpoint that are read."""

    path: Path
    variant: str
    model: nn.Module
    run: SimpleNamespace
    fold: str = "A"
    seed: int = 0


def trained(folder: Path, steps: list[float] | None) -> Trained:
    (folder / "checkpoint").mkdir(parents=True)
    if steps is not None:
        lines = [json.dumps({"step": i, "seconds": s}) for i, s in enumerate(steps)]
        (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
        torch.save({"step": len(steps)}, folder / "checkpoint" / TRAINER)
    run = SimpleNamespace(sampler=SamplerConfig(batch_spots=30, batches_per_step=4))
    return Trained(folder / "checkpoint", "hibio", nn.Linear(4, 2), run)


def fold(seed: int, seconds: float) -> Fold:
    peer = Representation("triplex", cost=Cost("TRIPLEX", 100 + seed, seconds, 40 + seed))
    own = Representation("stagate", cost=Cost("STAGATE", 7, 1.0))
    bare = Representation("coordinates")
    return Fold("A", seed, np.array(["G"]), (), (), (bare, peer), per_slide=(own,))


def test_costs_are_joined_over_folds_and_seeds(tmp_path: Path) -> None:
    runs = [trained(tmp_path / "0", [1.0, 2.5]), trained(tmp_path / "1", None)]
    rows = cost_table(runs, [fold(0, 2.0), fold(1, 4.0)])  # type: ignore[arg-type]
    assert [row["model"] for row in rows] == ["hibio", "triplex", "stagate"]
    assert rows[0] == {
        "model": "hibio",
        "source": "this run",
        "n_parameters": 10,
        "fits": 2,
        "seconds": 3.5,
        "steps": 2.0,
    }
    assert [row["steps"] for row in rows[1:]] == [40.5, None]
    assert rows[1]["seconds"] == pytest.approx(3.0)
    assert rows[1]["n_parameters"] == 101
    assert checkpoint_cost(runs[1]).seconds is None  # type: ignore[arg-type]


def test_peers_get_the_steps_and_the_batch_of_the_run(tmp_path: Path, capsys) -> None:
    run = trained(tmp_path / "0", [1.0] * 7)
    assert budget_of(run) == Budget(steps=7, batch=120)  # type: ignore[arg-type]
    assert budget_of(trained(tmp_path / "1", None)) is None  # type: ignore[arg-type]
    assert "keeps no number of its steps" in capsys.readouterr().out


def test_the_report_and_the_markdown_show_them(tmp_path: Path) -> None:
    rows = [
        {"model": "hibio", "source": "this run", "n_parameters": 9, "fits": 1, "seconds": None},
        {"model": "a<b", "source": "X & Y", "n_parameters": 12345, "fits": 3, "seconds": 61.0},
    ]
    rows[1]["steps"] = 1500.0
    results = {"data": {"models": rows}, "tasks": {}, "config": {}}
    page = write_report(tmp_path / "r.html", results).read_text()
    for words in (
        "<h2>Models</h2>",
        "a&lt;b",
        "X &amp; Y",
        "12,345",
        "1,500",
        "1 min 1 s",
        'class="self"',
    ):
        assert words in page
    text = write_markdown(tmp_path / "r.md", results).read_text()
    assert "| hibio | this run | 9 | 1 | – | – |" in text
    assert "| a&lt;b | X &amp; Y | 12,345 | 3 | 1,500 | 61.0 |" in text
    assert "Models" not in write_report(tmp_path / "s.html", {"data": {}, "tasks": {}}).read_text()
    assert "No cost of a model" in render("", [Section(models_section({"data": {}}))])


def test_the_report_and_the_markdown_show_what_became_of_judged_stages(tmp_path: Path) -> None:
    verdict = Verdict.of("region", (0.4, 0.35, 0.25), "patient B")
    run = trained(tmp_path / "0", [1.0])
    state = {"step": 1, "verdicts": [verdict.plain()]}
    torch.save(state, run.path / TRAINER)
    rows = verdict_rows([dataclasses.replace(run, fold="A", seed=3)])  # type: ignore[list-item]
    assert rows == [{"model": "hibio", "fold": "A", "seed": 3, **verdict.plain()}]
    models = cost_table([run], [])  # type: ignore[list-item]
    results = {"data": {"models": models, "curriculum": rows}, "tasks": {}, "config": {}}
    page = write_report(tmp_path / "r.html", results).read_text()
    for words in ("Judged stages", "undone", "patient B", "0.400", "A rehearsal on fewer slides"):
        assert words in page
    line = "| hibio | A | 3 | region | undone | 0.400 | 0.350 | 0.250 | patient B |"
    assert line in write_markdown(tmp_path / "r.md", results).read_text()


def test_the_document_lists_every_peer_and_its_source() -> None:
    document = (Path(__file__).parents[2] / "docs" / "baselines.md").read_text()
    for name, peer in PEERS.items():
        assert f"| `{name}` |" in document
        assert peer.source.partition(",")[0] in document
