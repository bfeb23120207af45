"""`hibio check` on checkpoints and runs: whole, unfinished, torn, without a bank."""

import pytest

from hibio.check import check_any, check_checkpoint
from hibio.run import build, expand, train_all
from hibio.training.checkpoint import NAME
from hibio.training.stages import StageConfig
from tests.hibio.toy import SPOT, run_config


@pytest.fixture
def checkpoint(toy_stores, tmp_path):
    (path,) = train_all(
        run_config(toy_stores, tmp_path / "run", stages=(StageConfig("spot", 1, SPOT),))
    )
    return path


def levels(path) -> list[str]:
    return [finding.level for finding in check_any(path)]


def test_a_whole_checkpoint_passes(checkpoint):
    findings = check_checkpoint(checkpoint)
    assert [finding.level for finding in findings] == ["PASS"] * 3
    text = " ".join(finding.message for finding in findings)
    assert "400 genes, 24 pathways" in text
    assert "training is finished" in text
    assert "reference bank of 140 spots" in text


def test_a_run_folder_is_the_check_of_its_checkpoints(checkpoint):
    run = checkpoint.parents[3]
    assert [f.message for f in check_any(run)] == [f.message for f in check_any(checkpoint)]
    assert {finding.subject for finding in check_any(run)} == {str(checkpoint)}


def test_an_unfinished_run_and_a_missing_bank_are_warnings_with_a_fix(toy_stores, tmp_path):
    (job,) = expand(run_config(toy_stores, tmp_path))
    build(job).fit(until_step=1)
    findings = check_checkpoint(job.folder / NAME)
    assert [finding.level for finding in findings] == ["PASS", "WARN", "WARN"]
    assert "--resume" in findings[1].fix
    assert "no reference bank" in findings[2].message


@pytest.mark.parametrize("name", ["config.yaml", "artifacts.h5", "model.safetensors"])
def test_a_torn_checkpoint_fails_with_the_fix(checkpoint, name):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    (finding,) = check_any(checkpoint)
    assert finding.level == "FAIL"
    assert name in finding.message
    assert ".previous" in finding.fix


@pytest.mark.parametrize("name", ["trainer.pt", "bank.h5"])
def test_a_torn_part_that_embedding_does_not_need_is_a_warning(checkpoint, name):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:50])
    findings = check_any(checkpoint)
    assert sorted(finding.level for finding in findings) == ["PASS", "PASS", "WARN"]
    (warning,) = [finding for finding in findings if finding.level == "WARN"]
    assert name in warning.message
    assert warning.fix


def test_anything_else_is_left_to_the_check_of_data(toy_stores, tmp_path):
    assert set(levels(toy_stores)) <= {"PASS", "WARN"}
    assert levels(toy_stores / "sim001.h5")[0] == "PASS"
    assert "FAIL" in levels(tmp_path)  # an empty folder
    assert "FAIL" in levels(tmp_path / "none.h5")
