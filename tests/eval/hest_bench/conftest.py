"""A benchmark folder of one task, three folds, made from the simulator once a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.eval.hest_bench.bench_folder import TASK, write_bench


@pytest.fixture(scope="session")
def bench_once(toy_stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder; tests that change it take `bench`."""
    folder = tmp_path_factory.mktemp("bench") / "bench_data"
    write_bench(toy_stores, folder)
    return folder


@pytest.fixture
def bench(bench_once: Path, tmp_path: Path) -> Path:
    """A copy of the folder."""
    return shutil.copytree(bench_once, tmp_path / "bench_data")


@pytest.fixture
def task(bench: Path) -> Path:
    """The folder of the task in the copy."""
    return bench / TASK
