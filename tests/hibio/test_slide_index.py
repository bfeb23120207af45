"""The index of a folder of stores: what it spares, when it is left aside, what it never changes."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import h5py
import pytest

from hibio.data import splits as slide_index
from hibio.data.splits import INDEX_NAME, SlideEntry, indexed_entries, read_entry
from preprocessing.errors import DataError
from preprocessing.store.read import stores_in


@pytest.fixture
def folder(toy_stores, tmp_path, monkeypatch) -> Path:
    """Three stores of a folder whose index is worth a file from two on."""
    monkeypatch.setattr(slide_index, "INDEX_FROM", 2)
    shutil.copytree(toy_stores, tmp_path / "stores")
    (tmp_path / "stores" / INDEX_NAME).unlink(missing_ok=True)
    return tmp_path / "stores"


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the stores that were opened."""
    names: list[str] = []

    def counted(path: Path) -> SlideEntry:
        names.append(path.name)
        return read_entry(path)

    monkeypatch.setattr(slide_index, "read_entry", counted)
    return names


NAMES = ["sim001.h5", "sim002.h5", "sim003.h5"]


def test_a_second_start_opens_nothing_and_says_the_same(folder, opened):
    first = indexed_entries(stores_in(folder))
    assert opened == NAMES
    assert indexed_entries(stores_in(folder)) == first
    assert opened == NAMES
    assert [entry.slide_id for entry in first] == ["sim001", "sim002", "sim003"]
    assert all(entry.patch_um and entry.modality == "rna" for entry in first)
    assert stores_in(folder) == [folder / name for name in NAMES]  # the index is no store


def test_an_entry_is_what_the_store_says(folder):
    path = folder / "sim002.h5"
    with h5py.File(path, "a") as file:
        file.attrs.update({"technology": "Visium", "organism": "human", "tissue": "kidney"})
    entry = read_entry(path)
    assert (entry.technology, entry.organism, entry.tissue) == ("Visium", "human", "kidney")
    with h5py.File(path) as file:
        assert entry.n_spots == len(file["spots/barcode"])
        assert entry.patch_um == file.attrs["patch_um"]
    indexed_entries(stores_in(folder))
    assert indexed_entries([path]) == [entry]


def test_a_changed_store_is_opened_again_and_only_that(folder, opened):
    indexed_entries(stores_in(folder))
    with h5py.File(folder / "sim002.h5", "a") as file:
        file.attrs["tissue"] = "lung"
    state = (folder / "sim002.h5").stat()
    os.utime(folder / "sim002.h5", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    opened.clear()
    assert [entry.tissue for entry in indexed_entries(stores_in(folder))][1] == "lung"
    assert opened == ["sim002.h5"]


def test_a_store_replaced_within_one_tick_of_the_clock_is_opened_again(folder, opened):
    path, other = folder / "sim002.h5", folder / "other"
    patient = indexed_entries(stores_in(folder))[1].patient_id.encode()
    before = path.stat()
    other.write_bytes(path.read_bytes().replace(patient, patient[::-1]))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    opened.clear()
    assert [entry.patient_id.encode() for entry in indexed_entries([path])] == [patient[::-1]]
    assert opened == ["sim002.h5"]


def test_stores_that_come_and_go(folder, opened):
    indexed_entries(stores_in(folder))
    (folder / "sim001.h5").unlink()
    opened.clear()
    assert [e.slide_id for e in indexed_entries(stores_in(folder))] == ["sim002", "sim003"]
    assert opened == []
    with pytest.raises(DataError, match=r"sim001\.h5 does not exist"):
        indexed_entries([folder / "sim001.h5"])


def test_few_stores_leave_no_file(folder):
    indexed_entries(stores_in(folder)[:1])
    assert not (folder / INDEX_NAME).exists()


def test_a_part_of_the_folder_keeps_what_is_known_of_the_rest(folder, opened):
    indexed_entries(stores_in(folder)[:2])
    indexed_entries(stores_in(folder)[1:])
    opened.clear()
    indexed_entries(stores_in(folder)[:2])
    assert opened == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 3}',
        '{"version": 1, "stores": {}}',
        '{"version": 3, "stores": []}',
        '{"version": 3, "stores": {"sim001.h5": 3, "sim002.h5": [1, 2, 3]}}',
    ],
)
def test_an_index_that_cannot_be_used_is_left_aside(folder, opened, text):
    expected = indexed_entries(stores_in(folder))
    (folder / INDEX_NAME).write_text(text)
    opened.clear()
    assert indexed_entries(stores_in(folder)) == expected
    assert opened == NAMES
    assert json.loads((folder / INDEX_NAME).read_text())["version"] == 3  # and written anew


@pytest.mark.parametrize("change", [{"n_spots": "7"}, {"slide_id": None}, {"more": 1}])
def test_an_entry_of_another_kind_is_left_aside(folder, opened, change):
    indexed_entries(stores_in(folder))
    index = json.loads((folder / INDEX_NAME).read_text())
    index["stores"]["sim001.h5"][1] |= change
    (folder / INDEX_NAME).write_text(json.dumps(index))
    opened.clear()
    assert indexed_entries(stores_in(folder))[0].slide_id == "sim001"
    assert opened == ["sim001.h5"]


def test_a_folder_that_cannot_be_written_to(folder, opened, monkeypatch):
    """As root every folder can be written to, so the refusal is the test's own."""

    def refused(path):
        raise PermissionError(f"read-only: {path}")

    monkeypatch.setattr(slide_index, "atomic_path", refused)
    first = indexed_entries(stores_in(folder))
    assert indexed_entries(stores_in(folder)) == first
    assert opened == NAMES * 2
    assert not (folder / INDEX_NAME).exists()


def test_every_field_of_an_entry_is_in_the_index():
    names = {field.name for field in dataclasses.fields(SlideEntry)} - {"path"}
    assert names == slide_index._KINDS.keys()
