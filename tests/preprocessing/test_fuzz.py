"""Damaged inputs of every kind are refused with a reason; benchmarks/fuzz_readers.py runs more."""

from pathlib import Path

import pytest

from tests.preprocessing.fuzz_cases import BAD, Case, draw_cases, outcome, run_cases

SLOW = ("gzip bomb", "one long line")  # seconds each; the benchmark has them


def test_the_cases_are_the_same_every_time_and_of_every_kind() -> None:
    cases = draw_cases(500)
    assert cases == draw_cases(500)
    assert cases[:70] == draw_cases(70)
    assert cases != draw_cases(500, seed=1)
    assert len({case.base for case in cases}) == 17
    assert len({case.damage for case in cases}) > 60


def test_damaged_inputs_are_refused_or_read(tmp_path: Path) -> None:
    cases = [case for case in draw_cases(90, seed=1) if case.damage not in SLOW]
    found = [
        (case, outcome(result), result.reason) for case, result in run_cases(cases, tmp_path, 1)
    ]
    assert len(found) == len(cases) > 70
    assert [row for row in found if row[1] in BAD] == []
    assert sum(word == "refused" for _, word, _ in found) > len(cases) / 3


@pytest.mark.parametrize(
    ("base", "damage", "words"),
    [
        ("csv", "slide_id '../../escaped'", "not a plain name"),
        ("csv", "counts '/dev/zero'", "not an ordinary file"),
        ("csv", "tissue '\\x00\\n\\r,'", "NUL"),
        ("h5ad", "HDF5 bomb", "GiB in 0 bytes of the file"),
        ("store", "HDF5 bomb", "check FAIL"),
        ("store", "a group instead", "check FAIL"),
        ("jpeg", "huge header", ""),
        ("tiled jpeg", "huge header", ""),
    ],
)
def test_single_cases(tmp_path: Path, base: str, damage: str, words: str) -> None:
    ((_, result),) = run_cases([Case(0, base, damage, 5)], tmp_path, 1)
    assert outcome(result) in ("refused", "prepared"), result.reason
    assert words in result.reason
