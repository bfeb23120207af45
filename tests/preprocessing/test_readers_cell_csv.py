"""Text tables of cells: joins, blocks, layouts; bad cells are named by row and column."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import DataError
from preprocessing.patches import PatchConfig
from preprocessing.readers.format import read_spots
from preprocessing.readers.tables import (
    number_column,
    read_header,
    read_table,
    read_typed,
    read_wide_table,
)
from preprocessing.run import prepare
from preprocessing.store import SlideStore
from tests.preprocessing.cell_sources import (
    BARCODES,
    CELLS,
    NAMES,
    cell_row,
    csv_pair,
    draw_counts,
    draw_xy,
    write_table,
)


@pytest.mark.parametrize("block", [4_000_000, 1])
def test_counts_join_their_cells(tmp_path: Path, monkeypatch, block: int):
    monkeypatch.setattr("preprocessing.readers.tables._BLOCK", block)
    counts_path, cells_path, counts = csv_pair(tmp_path, draw_counts(40, 3))
    lines = cells_path.read_text().splitlines()
    cells_path.write_text("\n".join([lines[0], *reversed(lines[1:])]))  # another order
    table = read_spots(cell_row(counts_path, "csv", spots=cells_path))
    np.testing.assert_array_equal(table.counts.toarray(), counts)
    np.testing.assert_allclose(table.xy_um, draw_xy(40) * 0.5)
    assert table.labels.columns.tolist() == ["kind"]
    assert table.labels["kind"].tolist()[:3] == ["a", "b", "a"]
    assert table.barcodes[39] == "c39"
    assert any("number columns left out (area)" in note for note in table.notes)


def test_several_id_columns_tabs_and_gzip(tmp_path: Path):
    counts = draw_counts(6, 3)
    keys = [(fov, cell) for fov in (1, 2) for cell in (1, 2, 3)]
    rows = [["x", *key, *row] for key, row in zip(keys, counts.tolist(), strict=True)]
    header = ["run", "fov", "cell_ID", "A", "B", "C"]
    first = write_table(tmp_path / "c.tsv.gz", header, rows, "\t")
    places = [[*key, i, i * i] for i, key in enumerate(keys)]
    second = write_table(tmp_path / "p.csv", ["fov", "cell_ID", "x_um", "y_um"], places)
    label_rows = [["2", "1", "mine"], ["1", "3", "yours"]]
    labels = write_table(tmp_path / "l.csv", ["fov", "cell_ID", "kind"], label_rows)
    table = read_spots(cell_row(first, "csv", spots=second, labels=labels, mpp=None))
    assert table.barcodes.tolist() == ["1_1", "1_2", "1_3", "2_1", "2_2", "2_3"]
    assert table.gene_names.tolist() == ["A", "B", "C"]
    np.testing.assert_array_equal(table.counts.toarray(), counts)
    assert table.labels["kind"].tolist() == ["", "", "yours", "mine", "", ""]
    assert table.xy_um[4].tolist() == [4, 16]


@pytest.mark.parametrize("header", [["", *NAMES], NAMES])
def test_r_tables_and_genes_by_cells(tmp_path: Path, header: list[str]):
    _, cells_path, counts = csv_pair(tmp_path)
    rows = [[name, *row] for name, row in zip(BARCODES, counts.tolist(), strict=True)]
    path = write_table(tmp_path / "r.tsv", header, rows, "\t")
    table = read_spots(cell_row(path, "csv", spots=cells_path))
    np.testing.assert_array_equal(table.counts.toarray(), counts)
    rows = [[name, *row] for name, row in zip(NAMES, counts.T.tolist(), strict=True)]
    path = write_table(tmp_path / "t.csv", ["gene", *BARCODES], rows)
    table = read_spots(cell_row(path, "csv", spots=cells_path))
    np.testing.assert_array_equal(table.counts.toarray(), counts)
    assert table.gene_names.tolist() == NAMES
    assert "counts were genes x cells; turned round" in table.notes


def test_coordinates_inside_the_counts_table(tmp_path: Path):
    xy, values = draw_xy(), np.random.default_rng(0).random((CELLS, 2)).round(3)
    rows = [[f"c{i}", "ab"[i % 2], 7, *xy[i], *values[i]] for i in range(CELLS)]
    path = write_table(tmp_path / "p.csv", ["id", "kind", "area", "X", "Y", "CD3", "CD8"], rows)
    table = read_spots(cell_row(path, "csv", modality="protein"))
    assert table.counts.dtype == np.float32
    np.testing.assert_allclose(table.counts.toarray(), values, rtol=1e-6)
    assert table.labels.columns.tolist() == ["kind"]
    np.testing.assert_allclose(table.xy_px0, xy)
    with pytest.raises(DataError, match=r"not non-negative integers.*'c0', 'CD3'.*modality"):
        read_spots(cell_row(path, "csv"))
    path = write_table(tmp_path / "q.csv", ["CD3", "x", "y"], [[1, 2, 3], [1, 3, 4]])
    with pytest.raises(DataError, match="no genes behind the columns x and y"):
        read_spots(cell_row(path, "csv"))
    path = write_table(tmp_path / "q.csv", ["id", "CD3"], [["a", 2], ["b", 3]])
    with pytest.raises(DataError, match=r"column spots\) has no columns of coord.*found id, CD3"):
        read_spots(cell_row(path, "csv"))


@pytest.mark.parametrize(
    ("line", "cell", "said"),
    [
        (2, "", r"counts\.csv: data row 2, column 'G1': '' is not a finite number"),
        (3, "nan", "data row 3, column 'G1': 'nan'"),
        (3, "NA", "data row 3, column 'G1': 'NA'"),
        (1, "inf", "data row 1, column 'G1': 'inf'"),
        (1, "many", "column 'G1': 'many'"),
        (1, "-3", r"\(first: -3.*'c0', 'G1'\)"),
        (1, "0.5", r"first: 0\.5, cell 'c0', 'G1'.*modality: protein"),
        (2, "1,1", "equally many cells"),
        (12, None, "data row 12, column 'G1'"),
    ],
)
@pytest.mark.parametrize("block", [4_000_000, 1])
def test_bad_cells_are_named(
    tmp_path: Path, monkeypatch, line: int, cell: str | None, said: str, block: int
):
    monkeypatch.setattr("preprocessing.readers.tables._BLOCK", block)
    counts_path, cells_path, _ = csv_pair(tmp_path)
    lines = counts_path.read_text().splitlines()
    cells = lines[line].split(",")
    cells[2:] = [] if cell is None else [cell, *cells[3:]]
    lines[line] = ",".join(cells)
    counts_path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=said):
        read_spots(cell_row(counts_path, "csv", spots=cells_path))


@pytest.mark.parametrize(
    ("counts", "cells", "said"),
    [
        ("cell_id,G0\n", "cell_id,x,y\na,1,2\n", "empty matrix: .*no rows"),
        ("cell_id,G0\na,1\nb,2\n", "cell_id,x,y\n", "cells.csv has no rows"),
        ("cell_id,G0\na,1\na,2\n", "cell_id,x,y\na,1,2\n", "counts.csv: 1 ids occur twice.*'a'"),
        ("cell_id,G0\na,1\nb,2\n", "cell_id,x,y\na,1,2\na,1,2\n", "cells.csv: 1 ids occur twice"),
        (
            "cell_id,G0\na,1\nb,2\n",
            "cell_id,x,y\nc,1,2\nd,1,3\n",
            r"no cell.*counts: a, b; cells: c",
        ),
        (
            "cell_id,G0\na,1\nb,2\n",
            "cell_id,u,v\na,1,2\n",
            "no columns of coord.*found cell_id, u, v",
        ),
        ("cell_id,G0\na,1\nb,2\n", "cell_id,x,y\na,1,2\nb,,3\n", "1 cells have no finite.*'b'"),
        ("cell_id,G0\na,1\nb,2\n", "cell_id,x,y\na,1,2\nb,one,3\n", "no finite.*'b'"),
        ("cell_id,G0\na,1\nb,2\n", "cell_id,x,y\na,1,2\nb,1,2\n", "same coordinates"),
        ("cell_id,G0\na,1\n", "cell_id,x,y\na,1,2\n", "has 1 cell"),
        ("cell_id,G0\na,1\nb,2\n", "cell_id,x,y\na,1,2\n", "has 1 cell"),
        ("cell_id,G0,\na,1,1\nb,2,2\n", "cell_id,x,y\na,1,2\n", "column 3 has no name"),
        ("cell_id,G0\n,1\nb,2\n", "cell_id,x,y\na,1,2\n", "data row 1 has no id"),
        ("counts", "cell_id,x,y\na,1,2\n", "no header of a table"),
        ("cell_id,G0\na,1\nb,2\n", "cell_id,x,y,x\na,1,2,3\n", "column 'x' occurs twice"),
        ("cell_id|G0\na|1\nb|2\n", "cell_id,x,y\na,1,2\n", "commas, tabs or semicolons"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, counts: str, cells: str, said: str):
    (tmp_path / "counts.csv").write_text(counts)
    (tmp_path / "cells.csv").write_text(cells)
    row = cell_row(tmp_path / "counts.csv", "csv", spots=tmp_path / "cells.csv")
    with pytest.raises(DataError, match=said):
        read_spots(row)


def test_damaged_gzip_and_no_text(tmp_path: Path):
    counts_path, cells_path, _ = csv_pair(tmp_path, draw_counts(400, 30))
    packed = gzip.compress(counts_path.read_bytes())
    row = cell_row(tmp_path / "c.csv.gz", "csv", spots=cells_path)
    row.counts_path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="damaged gzip"):
        read_spots(row)
    row.counts_path.write_bytes(b"cell_id,G0\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_spots(row)


def test_repeated_genes_are_summed(tmp_path: Path):
    first = write_table(tmp_path / "c.csv", ["id", "A", "B", "A"], [["a", 1, 2, 3], ["b", 0, 1, 0]])
    second = write_table(tmp_path / "p.csv", ["id", "x", "y"], [["a", 1, 2], ["b", 3, 4]])
    table = read_spots(cell_row(first, "csv", spots=second))
    assert table.gene_names.tolist() == ["A", "B"]
    assert table.counts.toarray().tolist() == [[4, 2], [0, 1]]


def test_number_columns_can_be_asked_for(tmp_path: Path):
    first = write_table(tmp_path / "c.csv", ["id", "A"], [["a", 1], ["b", 2], ["c", 3]])
    header = ["id", "x", "y", "activity:t", "leiden_cluster", "size", "free"]
    rows = [["a", 1, 2, 0.5, 0, 3, "NA"], ["b", 3, 4, "NA", 1, 4, "u"], ["c", 1, 1, 2, 1, 5, "u"]]
    second = write_table(tmp_path / "p.csv", header, rows)
    labels = read_spots(cell_row(first, "csv", spots=second)).labels
    assert labels.columns.tolist() == ["activity:t", "leiden_cluster", "free"]
    np.testing.assert_array_equal(labels["activity:t"], [0.5, np.nan, 2.0])
    assert labels["leiden_cluster"].tolist() == ["0", "1", "1"]
    assert labels["free"].tolist() == ["", "u", "u"]


NUMBER = st.one_of(st.integers(0, 2**31 - 1), st.floats(0, 2.0**100, width=32))
CELL = st.text("abcxyz019 .-_", min_size=1, max_size=6).map(str.strip).filter(bool)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Against a plain split of the lines, whatever the separator, block and packing."""
    columns = data.draw(st.lists(CELL, min_size=1, max_size=5))
    rows = data.draw(
        st.lists(
            st.tuples(CELL, st.lists(NUMBER, min_size=len(columns), max_size=len(columns))),
            min_size=1,
            max_size=40,
        )
    )
    separator = data.draw(st.sampled_from([",", "\t"]))
    path = tmp_path_factory.getbasetemp() / data.draw(st.sampled_from(["w.csv", "w.csv.gz"]))
    write_table(path, ["id", *columns], [[name, *values] for name, values in rows], separator)
    table = read_wide_table(read_header(path), 1)
    assert table.names.tolist() == columns
    assert table.ids["id"].tolist() == [name for name, _ in rows]
    np.testing.assert_allclose(table.values.toarray(), [v for _, v in rows], rtol=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(str.encode),
        st.lists(
            st.lists(
                st.sampled_from(["1", "a", "", '"', "nan", "1e400", "x", "\0", "é"]), max_size=4
            ),
            max_size=5,
        ).map(lambda rows: "\n".join(",".join(row) for row in [["id", "x", "y"], *rows]).encode()),
    )
)
def test_arbitrary_bytes_give_a_table_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    for read in (lambda: read_wide_table(read_header(path), 1), lambda: read_typed(path)):
        try:
            table = read()
        except DataError:
            continue
        assert len(getattr(table, "ids", table)) > 0


def test_numbers_with_a_decimal_comma(tmp_path: Path):
    """Read where semicolons separate the cells; elsewhere the message says what to do."""
    path = tmp_path / "cells.csv"
    path.write_text("id;kind;x_um;y_um;A;B\nc,1;1,2;0,5;10;0;1,5e1\nc,2;x;1,25;20;2,5;\n")
    with pytest.raises(DataError, match="'' is not a finite number"):
        read_wide_table(read_header(path), 4)
    path.write_text(path.read_text().replace("2,5;\n", "2.5;3\n"))
    table = read_spots(cell_row(path, "csv", modality="protein", mpp=None))
    assert table.barcodes.tolist() == ["c,1", "c,2"]
    assert table.xy_um.tolist() == [[0.5, 10.0], [1.25, 20.0]]
    assert table.labels["kind"].tolist() == ["1,2", "x"]
    assert table.counts.toarray().tolist() == [[0.0, 15.0], [2.5, 3.0]]
    path.write_text("id;x, um;note;n\n1,1;0,5;-;1,050\n1,2;1,25;-;4,5\n")
    typed = read_typed(path, ("id",))
    assert typed["x, um"].tolist() == [0.5, 1.25]
    assert typed["note"].tolist() == ["-", "-"]  # of nothing, and no number
    assert typed["n"].tolist() == [1.05, 4.5]
    texts = read_table(path)
    assert typed["id"].tolist() == texts["id"].tolist() == ["1,1", "1,2"]
    assert texts["n"].tolist() == ["1,050", "4,5"]  # texts, unless the caller says otherwise
    assert read_table(path, ids=lambda names: names[:3])["n"].tolist() == ["1.050", "4.5"]
    path.write_text(path.read_text().replace("4,5", "4,500"))
    with pytest.warns(UserWarning, match=r"'1,050' is read as 1\.050; if its comma separates"):
        read_typed(path, ("id",))
    path.write_text("id;x_um;y_um;A\n1,1;0,5;10;1\n1,2;1,25;20;2\n")
    assert read_spots(cell_row(path, "csv", mpp=None)).barcodes.tolist() == ["1,1", "1,2"]
    path.write_text(path.read_text().replace(";", "\t").replace("2\n", "2,5e1\n"))
    with pytest.raises(DataError, match=r"column 'A': '2,5e1'.*; for decimals write a point"):
        read_spots(cell_row(path, "csv", modality="protein", mpp=None))
    with pytest.raises(DataError, match=r"'x_um'.*'0,5'.*; for decimals write a point"):
        number_column(read_table(path), "x_um", path)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("x, px;y, px;area, um\n1,5;2,5;3\n", ("x, px", "y, px", "area, um")),
        ("x, px;y, px\nc1;1,5;2\n", ("row_name", "x, px", "y, px")),
        ("a,b;c,d\n1,2;3,4\n", ("a", "b;c", "d")),  # both cut alike, and commas are more
        ("a;b, um\n1;2,5\n", ("a", "b, um")),
        ('"a;b",c\n1,2\n', ("a;b", "c")),
    ],
)
def test_commas_in_a_header_of_semicolons(tmp_path: Path, text: str, names: tuple[str, ...]):
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert read_header(path).names == names
    assert tuple(read_table(path).columns) == names


def test_commas_that_may_be_of_thousands_are_told_in_the_result_once_a_file(
    tmp_path: Path, monkeypatch, recwarn
):
    """By `prepare` and by the store, not as Python warns; of all blocks of rows once."""
    monkeypatch.setattr("preprocessing.readers.tables._BLOCK", 1)
    counts, labels = tmp_path / "c.csv", tmp_path / "l.csv"
    lines = [f"c{i};{i};{i};1,{800 + i};2,500" for i in range(40)]
    counts.write_text("\n".join(["id;x_um;y_um;A;B", *lines]))
    labels.write_text("\n".join(["id;depth", *(f"c{i};7,{100 + i}" for i in range(40))]))
    row = cell_row(counts, "csv", modality="protein", mpp=None, labels=labels)
    (result,) = prepare([row], tmp_path / "out", patch=PatchConfig(50.0, 8)).rows
    assert result.status == "done"
    assert "c.csv: '1,800' is read as 1.800" in result.reason
    with SlideStore(tmp_path / "out" / f"{row.slide_id}.h5") as store:
        doubts = [warning for warning in store.warnings if "is read as" in warning.message]
    assert [one.message.partition(":")[0] for one in doubts] == ["c.csv", "l.csv"]
    assert {one.fix for one in doubts} == {"if its comma separates thousands, take the commas out"}
    assert not [one for one in recwarn if "is read as" in str(one.message)]
