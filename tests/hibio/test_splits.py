"""Splits: a patient is on one side only, whatever the data; what a user is told about a typo."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibio.config.files import ConfigError
from hibio.data.splits import (
    SlideEntry,
    copies,
    expand_folds,
    limited,
    read_entries,
    said_for_test,
    split_by_patient,
    with_images,
)
from preprocessing.store.read import stores_in


def entry(slide: str, patient: str, has_image: bool = True, **more) -> SlideEntry:
    return SlideEntry(Path(f"{slide}.h5"), slide, patient, has_image, 10, **more)


COHORT = [entry(f"s{i}", patient) for i, patient in enumerate("AABCCD")]

patients = st.sampled_from(["A", "B", "C", "P1", "P10", "P11", "patient-2"])


@given(st.lists(patients, min_size=1, max_size=20), st.data())
def test_no_patient_is_on_both_sides(drawn, data):
    entries = [entry(f"s{i}", patient) for i, patient in enumerate(drawn)]
    known = sorted(set(drawn))
    held_out = data.draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
    if len(held_out) == len(known):
        with pytest.raises(ConfigError, match="no patient to train on"):
            split_by_patient(entries, "+".join(held_out))
        return
    split = split_by_patient(entries, "+".join(held_out))
    assert {e.patient_id for e in split.test} == set(held_out)
    assert not {e.patient_id for e in split.train} & set(held_out)
    assert sorted(split.train + split.test, key=lambda e: e.slide_id) == sorted(
        entries, key=lambda e: e.slide_id
    )


def test_none_trains_on_all():
    split = split_by_patient(COHORT, "none")
    assert split.train == tuple(COHORT)
    assert split.test == ()


def ids(entries) -> str:
    return " ".join(entry.slide_id for entry in entries)


def test_a_test_slide_is_never_trained_on_and_its_patient_is_told():
    cohort = [entry("a1", "A"), entry("a2", "A", role="test"), entry("b", "B"), entry("c", "C")]
    split = split_by_patient(cohort, "B")
    assert (ids(split.train), ids(split.test), ids(split.seen_patients)) == ("a1 c", "a2 b", "a2")
    split = split_by_patient(cohort, "A")
    assert (ids(split.train), ids(split.test), ids(split.seen_patients)) == ("b c", "a1 a2", "")
    split = split_by_patient(cohort, "none")
    assert (ids(split.train), ids(split.test)) == ("a1 b c", "a2")
    said = said_for_test(cohort, ["c"])
    assert ids(split_by_patient(said, "none").test) == "a2 c"
    with pytest.raises(ConfigError, match=r"test slide 'a3' is not among the 4 slides"):
        said_for_test(cohort, ["a3"])
    with pytest.raises(ConfigError, match=r"leaves no patient to train on.*the role 'test'"):
        split_by_patient([entry("a", "A", role="test")], "none")


def test_a_training_slide_is_never_held_out():
    cohort = [entry("a", "A", role="train"), entry("b", "B"), entry("c", "C", role="test")]
    assert expand_folds(cohort, ["each"]) == ["B"]
    with pytest.raises(ConfigError, match=r"holds out the patient of a, whose role is 'train'"):
        split_by_patient(cohort, "A+B")
    said = [entry("a", "A", role="train"), entry("c", "A", role="test")]
    assert expand_folds(said, ["each"]) == ["none"]  # the roles are the split
    one = [entry("m1", "M"), entry("m2", "M", role="test")]
    assert expand_folds(one, ["each"]) == ["none"]
    assert ids(split_by_patient(one, "none").seen_patients) == "m2"


def test_one_section_under_two_ids():
    twin = {"counts": "x", "coordinates": "y"}
    cohort = [entry("a", "A", parts=twin), entry("again", "B", parts=twin), entry("c", "C")]
    assert ids(split_by_patient(cohort, "C").test) == "c"  # both on one side
    with pytest.raises(ConfigError, match=r"'again' has the counts of .*'a', .* same section"):
        split_by_patient(cohort, "B")
    known = {"a": {"patient": "A", **twin}, "old": {"patient": "A"}}
    assert copies(known, cohort) == [("a", "again")]
    assert copies(known, [entry("image", "B", parts=twin, has_counts=False)]) == []


def test_an_unknown_patient_names_the_nearest():
    entries = [entry("s0", "patient01"), entry("s1", "patient02")]
    with pytest.raises(ConfigError, match=r"'patent02'.*did you mean 'patient02'\?"):
        split_by_patient(entries, "patent02")
    with pytest.raises(ConfigError, match=r"patients: A, B, C, D"):
        split_by_patient(COHORT, "A+zzz")


def test_each_is_every_patient_with_an_image():
    entries = [entry("s0", "B"), entry("s1", "A"), entry("s2", "C", has_image=False)]
    assert expand_folds(entries, ["each"]) == ["A", "B"]
    blind = [entry(f"s{i}", patient, has_image=False) for i, patient in enumerate("BCB")]
    assert expand_folds(blind, ["each"]) == ["B", "C"]
    assert expand_folds(entries, ["B+C", "none"]) == ["B+C", "none"]


def test_entries_of_stores(toy_stores):
    entries = read_entries(stores_in(toy_stores))
    assert [e.slide_id for e in entries] == ["sim001", "sim002", "sim003"]
    assert [e.patient_id for e in entries] == ["patient01", "patient02", "patient03"]
    assert all(e.has_image and e.n_spots == 70 for e in entries)


def test_one_slide_id_in_two_stores(toy_stores, tmp_path):
    for name in ("a.h5", "b.h5"):
        (tmp_path / name).write_bytes((toy_stores / "sim001.h5").read_bytes())
    with pytest.raises(ConfigError, match=r"'sim001' is in .*a\.h5 and in .*b\.h5"):
        read_entries(stores_in(tmp_path))


def test_fewer_training_patients_are_the_first_by_name_and_nested():
    split = split_by_patient(COHORT, "B")
    kept = [limited(split, n) for n in (1, 2, 3)]
    assert [{e.patient_id for e in one.train} for one in kept] == [{"A"}, {"A", "C"}, {*"ACD"}]
    assert all(one.test == split.test for one in kept)
    assert kept[2] == split
    with pytest.raises(ConfigError, match=r"train_patients is 4, but fold B leaves 3"):
        limited(split, 4)


def test_slides_without_an_image_are_left_out_and_told(capsys: pytest.CaptureFixture[str]):
    blind = [entry(f"b{i}", "E", has_image=False) for i in range(5)]
    assert with_images([*COHORT, *blind], "query") == tuple(COHORT)
    told = "query: 5 of 11 slides skipped, no image: b0, b1, b2, b3, ...\n"
    assert capsys.readouterr().out == told
    assert with_images(COHORT, "query") == tuple(COHORT)
    assert with_images(blind, "query") == ()  # which is refused in words of its own
    assert capsys.readouterr().out == ""
