"""Labels: joined by barcode or rounded array position, typed, nothing left out silently."""

from pathlib import Path

import numpy as np
import pytest

from preprocessing import DataError
from preprocessing.readers.labels import read_labels

BARCODES = np.array(["A-1", "B-1", "C-1"], dtype=object)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_columns_get_their_types_and_missing_values(tmp_path: Path):
    text = "score,barcode,layer,cluster\n0.5,B-1,L1,2\nNA,A-1,,10\n"
    frame, notes = read_labels(write(tmp_path / "l.csv", text), BARCODES)
    assert frame["layer"].tolist() == ["", "L1", ""]
    assert frame["cluster"].tolist() == ["10", "2", ""]
    np.testing.assert_array_equal(frame["score"], [np.nan, 0.5, np.nan])
    assert notes == ("labels: 1 of 3 spots have no row",)


def test_first_column_is_the_key_without_a_barcode_column(tmp_path: Path):
    for text in (
        "\tkind\nA-1\tundetermined\n",
        "kind\nA-1\tundetermined\n",
    ):
        frame, _ = read_labels(write(tmp_path / "l.tsv", text), BARCODES)
        assert frame["kind"].tolist() == ["undetermined", "", ""]


def test_barcodes_without_ending_are_joined_and_noted(tmp_path: Path):
    frame, notes = read_labels(write(tmp_path / "l.csv", "barcode,kind\nA,x\nC,y\nD,z\n"), BARCODES)
    assert frame["kind"].tolist() == ["x", "", "y"]
    assert len(notes) == 3
    assert "labels: 1 rows belong to no spot" in notes


def test_positions_are_rounded_and_rows_without_them_counted(tmp_path: Path):
    text = (
        "Row.names\tx\ty\tpixel_x\tpixel_y\tlabel\np\t1.98\t3.02\t7\t7\ttumour\nq\t\t\t1\t1\tfat\n"
    )
    array = np.array([[2, 3], [3, 3], [4, 4]])
    frame, notes = read_labels(write(tmp_path / "l.tsv", text), BARCODES, array)
    assert list(frame.columns) == ["label"]
    assert frame["label"].tolist() == ["tumour", "", ""]
    assert "labels: 1 rows without a key left out" in notes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("barcode,kind\n", "has no rows"),
        ("", "not a table"),
        ("barcode,kind\nX,1\n", "none of its 1 rows belongs"),
        ("barcode,kind\nA-1,x\nA-1,y\n", "two different rows.*A-1"),
        ("barcode,kind\nA-1,x,9,9\nB-1,y\n", "equally many cells"),
    ],
)
def test_bad_label_files_are_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(DataError, match=said):
        read_labels(write(tmp_path / "l.csv", text), BARCODES)


@pytest.mark.parametrize("column", ["spot", "name", "index", "EntityID", "Unnamed: 0", ""])
def test_a_key_keeps_its_commas_where_numbers_have_decimal_ones(tmp_path: Path, column: str):
    path = write(tmp_path / "l.csv", f"{column};score;x;y;n\n1,1;0,5;1,1;2;9\n1,2;2;2;3;8\n")
    barcodes = np.array(["1,1", "1,2"], dtype=object)
    frame, notes = read_labels(path, barcodes)
    assert (frame["score"].tolist(), notes) == ([0.5, 2.0], ())
    frame, _ = read_labels(path, np.array(["0,5_9", "2_8"], dtype=object), keys=("score", "n"))
    assert frame["x"].tolist() == [1.1, 2.0]
    frame, _ = read_labels(path, barcodes, np.array([[2, 3], [1, 2]]))  # by x and y, as numbers
    assert frame["score"].tolist() == [2.0, 0.5]


def test_repeated_equal_rows_count_once(tmp_path: Path):
    frame, _ = read_labels(write(tmp_path / "l.csv", "barcode,k\nA-1,x\nA-1,x\n"), BARCODES)
    assert frame["k"].tolist() == ["x", "", ""]
