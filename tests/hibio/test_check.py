"""`hibio check` on checkpoints and runs (whole, unfinished, torn, no bank), and gene sets."""

import re
from pathlib import Path

import pytest

from hibio.checkpoint import CHECKSUMS, NAME, PREVIOUS
from hibio.cli import main
from hibio.cli.check import check_any, check_checkpoint
from hibio.config.training import StageConfig
from hibio.run import build, expand, train_all
from hibio.training.checkpoint import DAMAGED
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
    assert [finding.level for finding in findings] == ["PASS"] * 4
    text = " ".join(finding.message for finding in findings)
    assert "5 files are what was saved" in text
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
    assert [finding.level for finding in findings] == ["PASS", "PASS", "WARN", "WARN"]
    assert "--resume" in findings[2].fix
    assert "no reference bank" in findings[3].message


@pytest.mark.parametrize("name", ["config.yaml", "artifacts.h5", "model.safetensors"])
def test_a_torn_checkpoint_fails_with_the_fix(checkpoint, name):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    (finding,) = check_any(checkpoint)
    assert finding.level == "FAIL"
    assert name in finding.message
    assert ".previous" in finding.fix


@pytest.mark.parametrize("name", ["trainer.pt", "bank.h5"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_torn_part_that_embedding_does_not_need(checkpoint, name, listed):
    """It fails the check by its checksum; without, only the state of the trainer is a warning."""
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:50])
    if not listed:
        (checkpoint / CHECKSUMS).unlink()
    findings = check_any(checkpoint)
    read = "FAIL" if name == "bank.h5" else "WARN"
    expected = ["PASS", "PASS", "FAIL" if listed else "WARN", read]
    assert sorted(finding.level for finding in findings) == sorted(expected)
    told = [finding for finding in findings if name in finding.message + finding.subject]
    assert len(told) == (2 if listed else 1)
    assert all(finding.fix for finding in told)


@pytest.mark.parametrize("name", ["config.yaml", "artifacts.h5", "model.safetensors", "trainer.pt"])
def test_one_flipped_bit_fails_the_check(checkpoint, name):
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "FAIL" in [finding.level for finding in check_any(checkpoint.parents[3])]


def test_in_a_run_folder_the_one_before_and_a_damaged_one_are_told(toy_stores, tmp_path):
    (job,) = expand(run_config(toy_stores, tmp_path, checkpoint_every=1, bank=False))
    build(job).fit()
    newest, previous = job.folder / NAME, job.folder / PREVIOUS
    assert [f.subject for f in check_any(tmp_path)] == [str(newest)] * 4 + [str(previous)]
    (previous / "trainer.pt").write_bytes(b"")
    found = check_any(tmp_path)[-1]
    assert (found.level, found.subject) == ("FAIL", str(previous / "trainer.pt"))
    newest.rename(job.folder / DAMAGED)
    assert next("WARN" in f.level and "set aside" in f.message for f in check_any(tmp_path))


def test_anything_else_is_left_to_the_check_of_data(toy_stores, tmp_path):
    assert set(levels(toy_stores)) <= {"PASS", "WARN"}
    assert levels(toy_stores / "sim001.h5")[0] == "PASS"
    assert "FAIL" in levels(tmp_path)  # an empty folder
    assert "FAIL" in levels(tmp_path / "none.h5")


SOUND = "A\tna\tCD2\tCD3D\tTRAC\nB\tna\tCOL1A2\tFN1\tSPARC\n"


@pytest.mark.parametrize(
    ("name", "text", "level", "told"),
    [
        ("a.gmt", SOUND, "PASS", "2 sets of 6 genes, human gene symbols"),
        ("a.gmt", SOUND.replace("CD2", "1-Mar"), "WARN", "1 genes are dates (1-Mar): Excel"),
        ("a.gmx", "A\tB\nna\tna\nCD2\tFN1\n44256\tCD2\n", "WARN", "numbers of days (44256)"),
        ("a.csv", "source,target\nA,CD2\nA,Blank-12\nA,CD4\nA,CD5\n", "WARN", "(Blank-12)"),
        ("a.json", '{"A": ["CD2", "CD2", "FN1"]}', "WARN", "1 gene(s) written twice in the same"),
        ("a.gmt", SOUND + "C\tna\tTRAC\tCD3D\tCD2\n", "WARN", "the same genes (A = C)"),
        ("a.tsv", "source\ttarget\nA\tCD2,1.0\nA\tFN1\n", "WARN", "number behind a comma"),
        ("a.gmt", re.sub(r"(?<=[A-Z0-9])(?=[\t\n])", ",1.5", SOUND), "PASS", "symbols, weighted"),
        ("a.gmt", "A\tna\tCD2\tENSG00000000003\t123\n", "WARN", "identifiers of no one kind"),
        ("a.gmt", SOUND + "C\tna\n", "FAIL", "line 3: 2 field(s)"),
        ("a.grp", "# nothing\n", "FAIL", "has no genes"),
        ("a.gmt", SOUND.replace("TRAC", "TR\xc4C").encode("latin-1"), "FAIL", "is not UTF-8"),
        ("a.csv", "slide_id,patient_id\n", "FAIL", "column 'counts' is missing"),
    ],
)
def test_gene_sets_are_told_of_with_their_fix(tmp_path, capsys, name, text, level, told):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["check", str(tmp_path / name)]) == (level == "FAIL")
    lines = capsys.readouterr().out.splitlines()
    (place,) = [i for i, line in enumerate(lines) if told in line]
    assert lines[place].startswith(level)
    assert level == "PASS" or lines[place + 1].strip().startswith("fix: ")


def test_gene_sets_by_name_and_those_that_are_not_there(tmp_path):
    assert check_any(Path("default"))[0].level == "PASS"
    (tmp_path / "a.gmt").write_text(SOUND)
    both = check_any(Path(f"default+{tmp_path / 'a.gmt'}"))
    assert [finding.level for finding in both] == ["PASS"]
    for absent in ("nothing.gmt", "default+nothing.gmt", "no.module:function"):
        assert [finding.level for finding in check_any(Path(absent))] == ["FAIL"]
