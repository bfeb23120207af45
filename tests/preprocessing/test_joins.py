"""Rows of two tables joined by their names, and by other spellings of them."""

import pytest

from preprocessing import DataError
from preprocessing.readers.joins import match_rows


def joined(keys: list[str], known: list[str]) -> tuple[list[int], list[int], list[str]]:
    notes: list[str] = []
    rows, places = match_rows(keys, known, "nothing joins", notes, "left out")
    return rows.tolist(), places.tolist(), notes


def test_rows_join_by_a_plain_loop_with_and_without_an_ending():
    keys, known = ["c", "a", "x", "b"], ["a", "b", "c"]
    loop = [(i, known.index(key)) for i, key in enumerate(keys) if key in known]
    rows, places, notes = joined(keys, known)
    assert list(zip(rows, places, strict=True)) == loop
    assert notes == ["1 left out"]
    told = "joined without the ending '-1', which one of the tables lacks"
    ended = [f"{key}-1" for key in keys]
    assert joined(ended, known) == (rows, places, [told, "1 left out"])
    assert joined(keys, [f"{key}-1" for key in known]) == (rows, places, [told, "1 left out"])
    assert joined(ended, ["a-1"])[2] == ["3 left out"]  # nothing is removed where names join


@pytest.mark.parametrize(
    ("keys", "known", "said"),
    [
        (["a-1", "b-1", "a-2"], ["a", "b"], r"\(-1, -2 here, none there\).*another section"),
        (["a-2", "b-2"], ["a-1", "b-1"], r"\(-2 here, -1 there\)"),
        ([f"cell-{i}" for i in range(9)], [f"cell-{i}" for i in range(9, 19)], "nothing joins$"),
    ],
)
def test_endings_of_several_sections_do_not_join(keys: list[str], known: list[str], said: str):
    with pytest.raises(DataError, match=said):
        joined(keys, known)


@pytest.mark.parametrize(
    ("keys", "known", "told"),
    [
        (["0", "1", "2"], ["2.0", "1.0", "0.0"], "with numbers as numbers"),
        (["002", "010", "001"], ["1", "2", "10"], "with numbers as numbers"),
        (["AC-1", "GT-1"], ["gt-1", "ac-1"], "whatever the case"),
        (["r1:a-1", "r1:b-1"], ["b", "a"], "without 'r1:', with which"),
        (["s1_a", "s1_b"], ["s2_a", "s2_b"], None),  # another sample's
        (["a", "A"], ["b", "c"], None),
        (["a.1", "b.1", "x", "y", "z"], ["a-1", "p", "q", "r"], None),  # too few
    ],
)
def test_rows_join_by_another_spelling(keys: list[str], known: list[str], told: str | None):
    if told is None:
        with pytest.raises(DataError, match="nothing joins"):
            joined(keys, known)
        return
    rows, places, notes = joined(keys, known)
    plain = [name.lower().removeprefix("r1:").removesuffix("-1") for name in (*keys, *known)]
    plain = [str(int(float(name))) if name[0].isdigit() else name for name in plain]
    assert rows == list(range(len(keys)))
    assert [plain[len(keys) :][i] for i in places] == plain[: len(keys)]
    assert told in notes[0]
