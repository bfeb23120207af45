"""Transforms of places: words, numbers and files; every word against the turned pixels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from preprocessing.errors import DataError
from preprocessing.image_transform import (
    TURNS,
    check_transform,
    image_matrix,
    moved,
    read_matrix,
    transform_text,
    turn_matrix,
)
from preprocessing.manifest import read_manifest, scan_manifest, write_manifest

SIZE = (7, 5)
ORACLES = {
    "flip_x": np.fliplr,
    "flip_y": np.flipud,
    "rot90": np.rot90,
    "rot180": lambda p: np.rot90(p, 2),
    "rot270": lambda p: np.rot90(p, 3),
    "transpose": lambda p: p.T,
    "transverse": lambda p: np.rot90(p.T, 2),
}


@pytest.mark.parametrize("name", TURNS)
def test_a_word_takes_each_pixel_to_its_place_in_the_turned_picture(name: str) -> None:
    before = np.arange(35).reshape(5, 7)
    after = ORACLES[name](before)
    matrix = turn_matrix(name, (after.shape[1], after.shape[0]))
    y, x = np.indices(before.shape)
    there = np.floor(moved(np.stack([x, y], -1).reshape(-1, 2) + 0.5, matrix)).astype(int)
    assert np.array_equal(after[there[:, 1], there[:, 0]], before.ravel())


@pytest.mark.parametrize("text", [*TURNS, "shift:3 -4.5", "affine:0.5 0.1 2 -0.1 0.5 3"])
def test_words_survive_the_way_through_a_matrix(text: str) -> None:
    assert transform_text(image_matrix(text, SIZE), SIZE, 1e-6) == text


def test_commas_may_stand_between_the_numbers() -> None:
    assert np.array_equal(image_matrix("shift:3,-4", SIZE), image_matrix("shift:3 -4", SIZE))


@pytest.mark.parametrize("text", ["rot45", "shift:3", "shift:a b", "affine:1 2 3", "shift:nan 1"])
def test_other_words_are_refused_and_the_choices_listed(text: str) -> None:
    with pytest.raises(DataError, match="flip_x"):
        check_transform(text)


def test_a_file_of_nine_numbers_and_one_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("0,1,5\n-1,0,7\n0,0,1\n")
    assert np.array_equal(read_matrix(path), [[0, 1, 5], [-1, 0, 7], [0, 0, 1]])
    for text in ("1,2\n3,4\n", "1,0,0\n0,1,0\n0.1,0,1\n", "0,0,1\n0,0,1\n0,0,1\n", "a,b,c\n"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"t\.csv"):
            read_matrix(path)


def test_the_manifest_column(tmp_path: Path) -> None:
    for name in ("c.csv", "i.tif", "t.csv"):
        (tmp_path / name).write_text("1 0 0\n0 1 0\n0 0 1\n")
    head = "slide_id,patient_id,counts,format,image,image_transform\n"
    path = tmp_path / "m.csv"
    rows = [
        f"{n},p,c.csv,csv,i.tif,{t}\n" for n, t in zip("abc", ("rot90", "t.csv", ""), strict=True)
    ]
    path.write_text(head + "".join(rows))
    found = read_manifest(path)
    assert [row.image_transform for row in found] == ["rot90", tmp_path / "t.csv", ""]
    write_manifest(found, tmp_path / "again.csv")
    assert read_manifest(tmp_path / "again.csv") == found
    path.write_text(
        head + "a,p,c.csv,csv,i.tif,rot91\nb,p,c.csv,csv,,rot90\nc,p,,image,i.tif,rot90\n"
    )
    problems = " ".join(scan_manifest(path)[1])
    assert all(word in problems for word in ("rot91", "without an image", "without counts"))
    lost = tmp_path / "lost.csv"
    write_manifest([replace(found[0], image_transform=tmp_path / "gone.csv")], lost)
    with pytest.raises(DataError, match=r"image_transform file .*gone\.csv does not exist"):
        read_manifest(lost)
