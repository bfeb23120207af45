"""Damaged checkpoints and stores, full disks and kills: small parts of two benchmarks.

`benchmarks/fuzz_readers.py --runs` asks every command, `benchmarks/kill_commands.py` kills all.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import anndata
import numpy as np
import pytest

from hibio.checkpoint import refuse_model_folder
from hibio.cli.check import check_any
from preprocessing.files import locked
from tests.hibio.fuzz_runs import READERS, STORE, Lab, call, damaged, make_lab, start
from tests.hibio.toy import assert_refused


@pytest.fixture(scope="module")
def lab(toy_stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(toy_stores, tmp_path_factory.mktemp("lab") / "run")


def test_a_damaged_file_is_told_and_never_a_traceback(lab: Lab, tmp_path: Path) -> None:
    """`check` raises nothing whatever is damaged, and sees nearly all of it."""
    levels = []
    for number in range(2 * len(READERS)):
        base = list(READERS)[number % len(READERS)]
        copy = Lab(tmp_path / f"{number}s", tmp_path / f"{number}c")
        shutil.copytree(lab.checkpoint, copy.checkpoint)
        shutil.copytree(lab.stores, copy.stores)
        damaged(base, copy, np.random.default_rng([7, number]))
        path = copy.stores / "sim003.h5" if base == STORE else copy.checkpoint
        levels.append({finding.level for finding in check_any(path)})
    assert sum("FAIL" in found for found in levels) > len(levels) / 2


def options(lab: Lab, command: str, out: Path) -> list[str]:
    more = ["--gene-set", "default"] if command == "query" else []
    given = ["--checkpoint", lab.checkpoint, "--data", lab.stores / "sim003.h5", "--out", out]
    if command != "predict":
        given[3] = lab.stores
    return [command, *map(str, given), *more]


@pytest.mark.parametrize("command", ["query", "predict"])
def test_a_full_disk_is_told_and_leaves_nothing(lab: Lab, tmp_path: Path, command: str) -> None:
    log, out = tmp_path / "said.txt", tmp_path / "out"
    for most in (9_000, 60_000):
        child = start(options(lab, command, out), log, file_bytes=most)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1, log.read_text()
        assert "make room and run again" in log.read_text()
        assert list(out.iterdir()) == []


def test_predict_that_is_killed_goes_on(lab: Lab, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "said.txt"
    child = start(options(lab, "predict", out), log)
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for path in out.glob("[!.]*.h5ad"):
        anndata.read_h5ad(path)
    assert call(options(lab, "predict", out), log)[0] == "worked", log.read_text()
    assert [path.name for path in out.iterdir()] == ["sim003.predict.h5ad"]


@pytest.mark.parametrize("command", ["embed", "query", "predict", "index", "share", "eval"])
def test_no_results_in_the_folder_of_a_model_or_of_a_run(
    lab: Lab, tmp_path: Path, command: str, run
) -> None:
    asked = options(lab, command, tmp_path)[:-1] if command != "query" else []
    asked = asked or ["query", "--gene-set", "default", *options(lab, "embed", tmp_path)[1:-1]]
    if command == "share":
        del asked[3:5]
    folder = next(one for one in lab.checkpoint.parents if (one / "provenance.json").is_file())
    before = sorted(folder.rglob("*"))
    places = [lab.checkpoint, lab.checkpoint / "new", lab.checkpoint.parent]
    for out in [*places, folder]:
        words = "of the checkpoint" if out in places else "the folder of a run"
        there = command == "share" and out.exists()
        assert_refused(run(*asked, out), "not empty" if there else words, "another")
    (tmp_path / "model.safetensors").write_bytes(b"of an encoder")  # alone it is no checkpoint
    refuse_model_folder(tmp_path / "new")
    assert sorted(folder.rglob("*")) == before


def test_two_commands_do_not_write_into_one_folder(lab: Lab, tmp_path: Path, run) -> None:
    with locked(tmp_path):
        for command in ("embed", "index"):
            asked = options(lab, command, tmp_path)
            assert_refused(run(*asked), f"{tmp_path} is in use: process {os.getpid()}")


def test_share_into_the_working_folder_is_refused(lab: Lab, run) -> None:
    for out in (".", "", "./"):
        assert_refused(run("share", "--checkpoint", lab.checkpoint, "--out", out), "new folder")
