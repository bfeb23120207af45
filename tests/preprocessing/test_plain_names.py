"""Names of files and folders: what is refused, and what any text is turned into."""

import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibio.cli.check import check_path
from preprocessing import DataError, SlideStore, prepare
from preprocessing.errors import did_you_mean
from preprocessing.files import folder_part, plain_name, require_folder_part, require_plain_name
from preprocessing.manifest import draft_manifest, read_manifest
from preprocessing.store import verify_store
from preprocessing.store.read import stores_in
from tests.preprocessing.sources import legacy_slide
from tests.preprocessing.test_readers_hest import hest_root

BAD = ["", ".", "..", ".a", "-a", "a/b", "../a", "/a", "a\\b", "a\0", "a b", "é", "a\n", "x" * 129]
GOOD = ["A1", "_a", "a.b-c_d", "0", "x" * 128, "s1.h5"]
BAD_PARTS = ["", ".", "..", ".a", "a/b", "a\\b", "a\0", "a\tb", "\x7f", "x" * 129]
GOOD_PARTS = [*GOOD, "Ann, B", "10x data: é 3", "-a"]


@pytest.mark.parametrize("name", BAD)
def test_no_plain_name(name: str) -> None:
    with pytest.raises(DataError, match=r"^slide_id '.*is not a plain name; use letters"):
        require_plain_name("slide_id", name)


@pytest.mark.parametrize("name", BAD_PARTS)
def test_no_part_of_a_folder(name: str) -> None:
    with pytest.raises(DataError, match=r"^patient_id '.*cannot name a folder; use 1 to 128"):
        require_folder_part("patient_id", name)


def test_long_names_are_not_repeated_whole() -> None:
    with pytest.raises(DataError) as caught:
        require_plain_name("slide_id", "x" * 100_000)
    assert "(100000 characters)" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_names_that_are_right() -> None:
    assert [require_plain_name("a", name) for name in GOOD] == GOOD
    assert [require_folder_part("a", name) for name in GOOD_PARTS] == GOOD_PARTS
    assert [plain_name(name) for name in GOOD] == GOOD
    assert [folder_part(name) for name in GOOD_PARTS] == GOOD_PARTS


@given(st.text(max_size=300))
def test_any_text_is_turned_into_a_name(text: str) -> None:
    require_plain_name("slide_id", plain_name(text))
    require_folder_part("patient_id", folder_part(text))


@pytest.fixture
def store(toy_stores: Path, tmp_path: Path) -> Path:
    return Path(shutil.copyfile(stores_in(toy_stores)[0], tmp_path / "sim001.h5"))


@pytest.mark.parametrize("name", ["../../escaped", "", ".hidden", "a/b"])
def test_a_store_whose_slide_would_name_another_file(store: Path, name: str) -> None:
    with h5py.File(store, "r+") as file:
        file.attrs["slide_id"] = name
    with pytest.raises(DataError, match=r"sim001\.h5: slide_id .* is not a plain name"):
        SlideStore(store)
    assert [f.level for f in verify_store(store)] == ["FAIL"]
    assert any(f.level == "FAIL" for f in check_path(store))


def test_rows_given_in_python_are_checked_too(tmp_path: Path) -> None:
    row, _ = legacy_slide(tmp_path, "A1", image=False)
    with pytest.raises(DataError, match=r"slide_id '\.\./A1' is not a plain name"):
        prepare([replace(row, slide_id="../A1")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_patients_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("slide_id,patient_id,counts,format\ns,a/b,m.csv,csv\n")
    with pytest.raises(DataError, match="row 2: patient_id 'a/b' cannot name a folder"):
        read_manifest(tmp_path / "m.csv")


def test_patients_of_a_draft_can_name_folders(tmp_path: Path) -> None:
    """HEST-1k titles are free text."""
    hest_root(tmp_path, patient="P 1", dataset_title="Lung/liver ST")
    (row,) = draft_manifest(tmp_path)
    assert row.patient_id == "Lung_liver ST: P 1"


def test_a_name_in_other_letters_is_told_as_it_is_written():
    assert did_you_mean("erbb2", ["ABAT", "ERBB2", "Erbb2"]) == "; did you mean 'ERBB2'?"
    assert did_you_mean("Cd74", ["ABAT", "CD74", "CD7"], n=2).endswith("'CD74' or 'CD7'?")
    assert did_you_mean("zzz", ["ABAT"], otherwise="; none is alike") == "; none is alike"
