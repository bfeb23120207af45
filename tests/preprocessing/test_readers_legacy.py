"""The legacy ST reader: joins, scale, labels, and what it says about bad files."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import DataError
from preprocessing.readers.coordinates import row_step, step_px
from preprocessing.readers.format import read_spots, source_files
from preprocessing.readers.legacy_st import read_count_table, read_legacy_st
from tests.preprocessing.sources import STEP_PX, legacy_slide, write_legacy_counts


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_counts_coordinates_and_scale(tmp_path: Path):
    row, truth = legacy_slide(tmp_path)
    table = read_spots(row)
    assert table.counts.toarray().tolist() == truth.counts.tolist()
    assert table.barcodes.tolist() == truth.barcodes
    assert table.gene_names.tolist() == truth.genes
    assert table.mpp == pytest.approx(200 / STEP_PX)
    np.testing.assert_allclose(table.xy_px0, truth.xy_px)
    np.testing.assert_allclose(table.xy_um, truth.xy_px * 5.0)
    assert source_files(row) == {"counts": row.counts, "spots": row.spots, "image": row.image}


def test_a_scaled_image_changes_pixels_but_not_micrometres(tmp_path: Path):
    row, truth = legacy_slide(tmp_path)
    full, small = read_spots(row), read_spots(replace(row, image_scale=0.25))
    np.testing.assert_allclose(small.xy_px0, truth.xy_px * 0.25)
    np.testing.assert_allclose(small.xy_um, full.xy_um)
    assert small.mpp == pytest.approx(full.mpp * 4)


def test_mpp_of_the_manifest_goes_before_pitch_and_image(tmp_path: Path):
    row, _ = legacy_slide(tmp_path)
    assert read_legacy_st(replace(row, mpp=1.5), 0.3).mpp == 1.5
    with pytest.raises(DataError, match=r"1\.5 by the manifest column mpp; 5 by the man.*pitch_um"):
        read_spots(replace(row, mpp=1.5))
    assert read_spots(row, 0.3).mpp == pytest.approx(5.0)
    assert read_spots(replace(row, pitch_um=None), 0.3).mpp == 0.3
    with pytest.raises(DataError, match=r"slide A1.*mpp is unknown.*pitch_um"):
        read_spots(replace(row, pitch_um=None))


def test_spots_that_do_not_join_are_counted(tmp_path: Path):
    row, truth = legacy_slide(tmp_path)
    assert row.spots is not None
    lines = row.spots.read_text().splitlines()
    lines[1] = lines[1][:-1] + "0"  # the first spot is not selected
    lines[2] = "77\t77\t77\t77\t5\t5\t1"  # no counts; the second count row loses its spot
    row.spots.write_text("\n".join(lines))
    table = read_spots(row)
    assert table.barcodes.tolist() == truth.barcodes[2:]
    assert table.counts.toarray().tolist() == truth.counts[2:].tolist()
    assert [note.split()[0] for note in table.notes] == ["1", "1", "1"]


def test_genes_by_spots_tables_are_turned_round_and_names_made_unique(tmp_path: Path):
    path = tmp_path / "t.tsv"
    write_legacy_counts(path, np.array([[1, 0], [2, 3], [4, 5]]), ["G", "H", "G"], ["1x1", "2x1"])
    counts, names, genes, notes = read_count_table(path)
    assert counts.toarray().tolist() == [[1, 2, 4], [0, 3, 5]]
    assert names.tolist() == ["1x1", "2x1"]
    assert genes.tolist() == ["G", "H", "G-1"]
    assert len(notes) == 2


@pytest.mark.parametrize("header", ["\tA\tB", "A\tB", "spot\tA\tB"])
def test_headers_with_and_without_a_first_cell(tmp_path: Path, header: str):
    path = write(tmp_path / "c.tsv", f"{header}\n1x1\t3\t0\n1x2\t2.0\t1e1\n")
    counts, _, genes, _ = read_count_table(path)
    assert counts.toarray().tolist() == [[3, 0], [2, 10]]
    assert genes.tolist() == ["A", "B"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty matrix|header"),
        ("\tA\tB\n", "empty matrix"),
        ("\tA\tB\n1x1\t1\n", "header has 3 cells and the first row 1"),
        ("\tA\tB\n1x1\t1\t2\n1x2\t1\n", "line 3: 1 values, expected 2"),
        ("\tA\tB\n1x1\t1\tmany\n", "line 2.*many"),
        ("\tA\tB\n1x1\t1\t\n", "line 2"),
        ("\tA\tB\n1x1\t1\t0.5\n", "0.5.*raw counts"),
        ("\tA\tB\n1x1\t1\t-2\n", "-2"),
        ("\tA\tB\n1x1\t1\t99999999999999999999\n", "not non-negative integers"),
        ("\tA\tB\nAAACC-1\t1\t2\n", "'AAACC-1' is not an array position"),
        ("\tA\tB\n1x1\t1\t2\n1x1\t1\t2\n", "'1x1' occurs twice"),
        ("A,B\n1x1,1,2\n", "tab-separated"),
    ],
)
def test_bad_count_tables_are_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(DataError, match=said):
        read_count_table(write(tmp_path / "c.tsv", text))


def test_damaged_gzip_and_missing_files_are_named(tmp_path: Path):
    row, _ = legacy_slide(tmp_path)
    whole = row.counts.read_bytes()
    row.counts.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"A1.tsv.gz is a damaged gzip"):
        read_spots(row)
    with pytest.raises(DataError, match="does not exist"):
        read_spots(replace(row, counts=tmp_path / "none.tsv"))
    with pytest.raises(DataError, match="needs the column 'spots'"):
        read_spots(replace(row, spots=None))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x\ty\n1\t1\n", "column pixel_x, pixel_y is missing"),
        ("x\ty\tpixel_x\tpixel_y\n", "lists no spots"),
        ("x\ty\tpixel_x\tpixel_y\n3\t3\t\t5\n", "pixel_x.*data row 1"),
        ("x\ty\tpixel_x\tpixel_y\n3.2\t3\t5\t5\n", "whole array positions"),
        ("x\ty\tpixel_x\tpixel_y\n3\t3\t5\t5\n3\t3\t6\t6\n", "taken more than once"),
        (
            "x\ty\tpixel_x\tpixel_y\n90\t3\t5\t5\n91\t3\t6\t5\n92\t3\t7\t5\n93\t3\t8\t5\n",
            "no row of",
        ),
        ("x\ty\tpixel_x\tpixel_y\n3\t3\t5\t5\n9\t3\t6\t5\n", "too few neighbouring spots"),
    ],
)
def test_bad_spot_tables_are_refused(tmp_path: Path, text: str, said: str):
    row, _ = legacy_slide(tmp_path)
    with pytest.raises(DataError, match=said):
        read_spots(replace(row, spots=write(tmp_path / "s.tsv", text)))


def test_a_checkerboard_has_half_the_two_unit_step():
    array = np.array([(x, y) for x in range(8) for y in range(8) if (x + y) % 2 == 0])
    assert step_px(array, array * 22.5) == pytest.approx(22.5)
    turned = array @ np.array([[0.6, -0.8], [0.8, 0.6]]) * 22.5
    assert step_px(array, turned) == pytest.approx(22.5)
    assert row_step(array) == 2  # so the pitch along a row is twice the array's unit
    assert row_step(np.argwhere(np.ones((4, 4)))) == 1


VALUES = st.one_of(st.integers(-2, 50).map(str), st.text(max_size=4), st.floats().map(str))


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=120),
        st.text(max_size=120),
        st.lists(st.lists(VALUES, min_size=3, max_size=3), max_size=4).map(
            lambda rows: (
                "\tA\tB\tC\n" + "\n".join("\t".join([f"1x{i}", *row]) for i, row in enumerate(rows))
            )
        ),
    ),
    st.booleans(),
)
def test_arbitrary_files_give_counts_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: str | bytes, packed: bool
):
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    path = tmp_path_factory.getbasetemp() / "arbitrary.tsv"
    path.write_bytes(gzip.compress(data) if packed else data)
    try:
        counts, names, genes, _ = read_count_table(path)
    except DataError:
        return
    assert counts.shape == (len(names), len(genes))
    assert counts.nnz == 0 or counts.data.min() > 0
