"""CONTRIBUTING's recipe for a reader, to the letter: one file and one line; nothing else knows."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from preprocessing import DataError, SlideStore, prepare, read_manifest
from preprocessing.manifest import draft_manifest, write_manifest
from preprocessing.readers import READERS
from preprocessing.readers.format import format_of, source_files

READER = '''
"""Format `mine`: a text file "x y count" a spot, micrometres; genes are called A."""

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.readers.cells import Cells, cell_format, cell_table
from preprocessing.readers.coordinates import Scale
from preprocessing.slide_row import drafted_row


def read_mine(row, image_mpp=None):
    table = np.loadtxt(row.counts_path, ndmin=2)
    if table.shape[1] != 3:
        raise DataError(f"{row.counts_path}: {table.shape[1]} numbers a line; expected x, y, count")
    names = np.array(["A"], dtype=object)
    barcodes = np.array([f"s{i}" for i in range(len(table))], dtype=object)
    columns = pd.DataFrame(index=pd.RangeIndex(len(table)))
    cells = Cells(csr_matrix(table[:, 2:]), barcodes, names, names, table[:, :2], columns)
    return cell_table(row, cells, Scale(in_um=True), image_mpp)


FORMAT = cell_format(
    "mine",
    read_mine,
    detect=lambda counts, spots: counts.suffix == ".mine",
    discover=lambda folder: [drafted_row(p.stem, p, "mine") for p in folder.glob("*.mine")],
    layout=".mine files",
)
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One file in a package of somebody else, one line in the table; a slide of two spots."""
    package = tmp_path / "lab_readers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text(textwrap.dedent(READER))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(READERS, "mine", "lab_readers.mine")
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / "one.mine").write_text("0 0 3\n100 50 7\n")
    return slides


@pytest.mark.parametrize("form", ["mine", ""])
def test_a_new_format_is_accepted_detected_and_prepared(mine: Path, form: str) -> None:
    (mine / "m.csv").write_text(f"slide_id,patient_id,counts,format\none,p,one.mine,{form}\n")
    (row,) = read_manifest(mine / "m.csv")
    assert row.format == "mine"
    assert source_files(row) == {"counts": mine / "one.mine"}
    report = prepare(mine / "m.csv", mine / "out")
    assert [one.status for one in report.rows] == ["done"], str(report)
    with SlideStore(mine / "out" / "one.h5") as store:
        assert sorted(store.counts().toarray().ravel().tolist()) == [3, 7]
        assert np.ptp(store.xy_um, axis=0).tolist() == [100.0, 50.0]
    again = prepare(mine / "m.csv", mine / "out")
    assert [one.status for one in again.rows] == ["skipped"]
    (mine / "one.mine").write_text("0 0 3\n100 50 8\n")
    changed = prepare(mine / "m.csv", mine / "out")
    assert [one.status for one in changed.rows] == ["done"]  # its source decides


def test_a_new_format_is_drafted_and_its_rules_hold(mine: Path) -> None:
    write_manifest(draft_manifest(mine), mine / "m.csv")
    (row,) = read_manifest(mine / "m.csv")
    assert (row.slide_id, row.format) == ("one", "mine")
    (mine / "m.csv").write_text(
        "slide_id,patient_id,counts,format,spots,bin_um\none,p,one.mine,mine,one.mine,8\n"
        "two,p,one.mine,mein,,\n"
    )
    with pytest.raises(DataError) as caught:
        read_manifest(mine / "m.csv")
    assert "format mine brings its own coordinates; leave the column 'spots'" in str(caught.value)
    assert "format mine has no bins of Visium HD" in str(caught.value)
    assert "unknown format 'mein' (did you mean 'mine'?)" in str(caught.value)


def test_what_its_reader_refuses_is_told_with_the_slide(mine: Path) -> None:
    (mine / "one.mine").write_text("1 2\n3 4\n")
    (mine / "m.csv").write_text("slide_id,patient_id,counts,format\none,p,one.mine,mine\n")
    (failed,) = prepare(mine / "m.csv", mine / "out").failed
    assert "slide one: " in failed.reason
    assert "expected x, y, count" in failed.reason


def test_without_its_line_it_is_unknown(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(READERS, "mine")
    (mine / "m.csv").write_text("slide_id,patient_id,counts,format\none,p,one.mine,mine\n")
    with pytest.raises(DataError, match="unknown format 'mine'"):
        read_manifest(mine / "m.csv")


def test_every_format_of_the_table_is_called_by_its_name() -> None:
    assert [format_of(name).name for name in READERS] == list(READERS)


def test_finding_and_opening_stores_imports_no_reader(mine: Path) -> None:
    (mine / "m.csv").write_text("slide_id,patient_id,counts,format\none,p,one.mine,mine\n")
    prepare(mine / "m.csv", mine / "out")
    code = (
        "import sys, preprocessing.store\n"
        "from preprocessing.store.read import stores_in\n"
        "(path,) = stores_in(sys.argv[1])\n"
        "preprocessing.store.SlideStore(path).close()\n"
        "found = [n for n in sys.modules if n.startswith('preprocessing.readers')]\n"
        "sys.exit(', '.join(found) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(mine / "out")],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
