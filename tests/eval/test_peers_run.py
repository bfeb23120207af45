"""``hibio eval --peers``: peers stand beside the checkpoint, with their cost, in every output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hibio.cli import main
from hibio.config.run import RunConfig
from hibio.run import train_all


@pytest.fixture
def trained(toy_config: RunConfig) -> RunConfig:
    train_all(toy_config)
    return toy_config


def test_peers_are_fitted_and_shown(trained: RunConfig, tmp_path: Path) -> None:
    stores, out = str(trained.data.stores), tmp_path / "eval"
    asked = ["eval", "--checkpoint", str(trained.out), "--data", stores, "--out", str(out)]
    code = main([*asked, "--tasks", "expression", "domains", "--peers", "pca256_ridge,stagate"])
    assert code == 0
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert "pearson/top50_hvg" in results["tasks"]["expression"]["models"]["pca256_ridge"]
    assert "omics_ari/kmeans" in results["tasks"]["domains"]["models"]["stagate"]
    costs = {row["model"]: row for row in results["data"]["models"]}
    assert set(costs) == {"hibio", "pca256_ridge", "stagate"}
    assert all(row["n_parameters"] > 0 for row in costs.values())
    assert "STAGATE, Dong and Zhang 2022" in (out / "report.html").read_text()
    assert "## Models" in (out / "results.md").read_text()


def test_an_unknown_peer_is_refused(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = str(trained.data.stores)
    asked = ["eval", "--checkpoint", str(trained.out), "--data", stores, "--out", str(tmp_path)]
    assert main([*asked, "--peers", "triplx"]) == 1
    assert "did you mean 'triplex'" in capsys.readouterr().err
