"""The reference bank: what it holds, evenly capped, written and read back."""

import dataclasses

import h5py
import numpy as np
import pytest

from hibio.bank import Bank, build_bank, read_bank, write_bank
from hibio.config.files import ConfigError
from hibio.config.model import VisionConfig
from hibio.data.counts import align_columns
from hibio.data.dataset import PreparedSlides
from hibio.data.splits import read_entries
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from tests.hibio.toy import make_model, make_slide
from tests.preprocessing.full_disk import on_a_full_disk

WRITE = """
from pathlib import Path
from hibio.bank import read_bank, write_bank
bank = read_bank(Path(sys.argv[1]))
attempt(lambda: write_bank(Path(sys.argv[2]), bank))
"""


@pytest.fixture(scope="module")
def model(toy_artifacts):
    return make_model(toy_artifacts)


@pytest.fixture(scope="module")
def dataset(toy_stores, toy_artifacts):
    return PreparedSlides(read_entries(stores_in(toy_stores))[:2], toy_artifacts, "handcrafted")


@pytest.fixture(scope="module")
def bank(model, dataset) -> Bank:
    return build_bank(model, dataset)


def test_rows_are_embedding_profile_slide_and_patient_of_one_spot(
    bank, model, toy_stores, toy_artifacts
):
    assert bank.slide.tolist() == ["sim001"] * 70 + ["sim002"] * 70
    assert bank.patient.tolist() == ["patient01"] * 70 + ["patient02"] * 70
    slide = make_slide(toy_stores, toy_artifacts, "sim002")
    np.testing.assert_allclose(bank.image[70:], model.encode_slide(slide).image, atol=1e-6)
    with SlideStore(toy_stores / "sim002.h5") as store:
        counts = align_columns(store.counts(), store.gene_names, toy_artifacts.genes)
    assert abs(bank.tfidf[70:] - toy_artifacts.tfidf.transform(counts)).max() == 0


@pytest.mark.parametrize("max_spots", [20, 35, 139, 140])
def test_the_cap_is_kept_evenly_over_slides_and_tissue(
    bank, model, dataset, max_spots, monkeypatch
):
    monkeypatch.setattr("hibio.bank.MAX_SPOTS", max_spots)
    few = build_bank(model, dataset)
    counts = {name: int((few.slide == name).sum()) for name in ("sim001", "sim002")}
    assert len(few.image) == sum(counts.values()) <= max_spots
    assert len(few.image) >= max_spots - 2
    assert abs(counts["sim001"] - counts["sim002"]) <= 1
    for name in counts:
        whole = bank.image[bank.slide == name]
        rows = few.image[few.slide == name]
        place = np.array([int(np.abs(whole - row).sum(axis=1).argmin()) for row in rows])
        assert (place[0], place[-1]) == (0, 69)  # from one end of the tissue to the other
        assert np.ptp(np.diff(place)) <= 1
        np.testing.assert_allclose(rows, whole[place], atol=1e-6)


def test_a_round_trip_keeps_half_precision(bank, tmp_path):
    write_bank(tmp_path / "bank.h5", bank)
    back = read_bank(tmp_path / "bank.h5")
    np.testing.assert_array_equal(back.image, bank.image.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(back.tfidf.indices, bank.tfidf.indices)
    np.testing.assert_array_equal(back.tfidf.indptr, bank.tfidf.indptr)
    np.testing.assert_allclose(back.tfidf.data, bank.tfidf.data, rtol=1e-3)
    assert back.tfidf.shape == bank.tfidf.shape
    np.testing.assert_array_equal(back.slide, bank.slide)
    np.testing.assert_array_equal(back.patient, bank.patient)
    assert [path.name for path in tmp_path.iterdir()] == ["bank.h5"]


def test_there_is_no_bank_without_images_or_a_vision_tower(model, dataset, toy_artifacts):
    blind = [dataclasses.replace(entry, has_image=False) for entry in dataset.entries]
    assert build_bank(model, PreparedSlides(blind, toy_artifacts, None)) is None
    counts_only = make_model(toy_artifacts, vision=VisionConfig(name="none"))
    assert build_bank(counts_only, dataset) is None


def test_slides_without_an_image_are_left_out(model, dataset, toy_artifacts):
    entries = [dataclasses.replace(dataset.entries[0], has_image=False), dataset.entries[1]]
    mixed = build_bank(model, PreparedSlides(entries, toy_artifacts, "handcrafted"))
    assert set(mixed.slide) == {"sim002"}


@pytest.mark.parametrize("damage", ["missing", "truncated", "part"])
def test_a_bank_that_cannot_be_read_names_the_remedy(bank, tmp_path, damage):
    path = tmp_path / "bank.h5"
    if damage != "missing":
        write_bank(path, bank)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    if damage == "part":
        with h5py.File(path, "r+") as file:
            del file["tfidf/indptr"]
    with pytest.raises(ConfigError, match=r"no reference bank .*bank: true"):
        read_bank(path)


def test_a_full_disk_is_an_error_and_no_crash(bank, tmp_path):
    write_bank(tmp_path / "bank.h5", bank)
    (tmp_path / "out").mkdir()
    told = on_a_full_disk(WRITE, tmp_path / "bank.h5", tmp_path / "out" / "bank.h5", limit=9_000)
    assert "MiB are free: make room and run again" in told
    assert list((tmp_path / "out").iterdir()) == []


def other(name, change):
    """Replace a dataset of a file by a change of its values."""

    def craft(file: h5py.File) -> None:
        values = change(file[name][:])
        del file[name]
        file[name] = values

    return craft


def at(place: int, value: int):
    """A change of one value."""

    def change(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.int64)
        values[place] = value
        return values

    return change


@pytest.mark.parametrize(
    ("craft", "words"),
    [
        (other("tfidf/indptr", at(1, 10**6)), "no reference bank"),
        (other("tfidf/indptr", at(3, -5)), "no reference bank"),
        (other("tfidf/indices", at(0, 10**6)), "no reference bank"),
        (other("tfidf/indices", at(7, -1)), "no reference bank"),
        (other("tfidf/indptr", lambda v: v[:-1]), "tfidf/indptr has shape"),
        (other("tfidf/indices", lambda v: v[:-1]), "tfidf/indices has shape"),
        (other("tfidf/indices", lambda v: v.astype("f4")), "tfidf/indices holds values of type"),
        (other("image", lambda v: v[:-5]), "image has shape"),
        (other("image", lambda v: v[:, :5]), "image has shape"),
        (other("image", lambda v: v[:, 0]), "image has shape"),
        (other("image", lambda v: v * np.nan), "140 of 140 image embeddings"),
        (other("tfidf/data", lambda v: 9 * v), "tfidf has length 9, expected 1"),
        (other("tfidf/data", lambda v: 0 * v), "tfidf has length 0, expected 1"),
        (other("slide", lambda v: np.arange(len(v))), "slide holds values of type"),
        (other("patient", lambda v: v[:-1]), "patient has shape"),
        (lambda f: f["tfidf"].attrs.__setitem__("shape", (140, 3)), "another vocabulary"),
        (lambda f: f["tfidf"].attrs.__setitem__("shape", (10**12, 400)), "has shape"),
    ],
)
def test_a_crafted_bank_is_refused_before_it_is_used(bank, model, tmp_path, craft, words):
    path = tmp_path / "bank.h5"
    write_bank(path, bank)
    assert len(read_bank(path, model).image) == 140
    with h5py.File(path, "r+") as file:
        craft(file)
    with pytest.raises(ConfigError, match=words):
        read_bank(path, model)
