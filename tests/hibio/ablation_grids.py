"""Small grids for the tests of the ablation runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from eval.ablation.config import GridConfig, load_grid
from hibio.config.files import dump_config
from hibio.config.training import StageConfig
from tests.hibio.toy import OMICS, SPOT, run_config

QUICK = (StageConfig("spot", 1, SPOT),)
METRIC = "image_to_omics/recall@10%"
TABLED = {"retrieval": [METRIC]}
ROWS: dict[str, dict[str, Any]] = {
    "flat": {},
    "pathways": {"stages.0.weights.pathway/kl": 0.25},
}


def write_grid(folder: Path, stores: Path, **changes: Any) -> Path:
    """A run and a grid of two rows on it, as files; returns the grid's."""
    omics = {"name": "mlp", "width": OMICS.width, "heads": OMICS.heads, "layers": 1}
    dump_config(run_config(stores, folder / "run", stages=QUICK, bank=False), folder / "run.yaml")
    grid: dict[str, Any] = {
        "run": "run.yaml",
        "out": str(folder / "out"),
        "reference": "flat",
        "tasks": TABLED,
        "settings": {"model.omics": omics},
        "rows": ROWS,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**grid, **changes}, sort_keys=False))
    return path


def grid_of(folder: Path, stores: Path, **changes: Any) -> GridConfig:
    """The same, read."""
    return load_grid(write_grid(folder, stores, **changes))
