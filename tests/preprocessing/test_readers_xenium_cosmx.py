"""Folders of Xenium and CosMx: files are found, joined and cleared of controls."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from preprocessing import DataError
from preprocessing.readers.format import read_spots, source_files
from preprocessing.slide_row import SlideRow
from tests.preprocessing.cell_sources import (
    BARCODES,
    NAMES,
    cell_row,
    cosmx_folder,
    draw_xy,
    write_table,
    xenium_folder,
)


@pytest.mark.parametrize("h5", [True, False])
def test_xenium_genes_in_micrometres(tmp_path: Path, h5: bool):
    counts = xenium_folder(tmp_path, h5=h5)
    row = cell_row(tmp_path, "xenium", mpp=None)
    table = read_spots(row)
    np.testing.assert_array_equal(table.counts.toarray(), counts[:, :5])
    assert table.gene_names.tolist() == NAMES
    assert table.gene_ids[0] == "ENSG0"
    assert table.barcodes.tolist() == BARCODES
    np.testing.assert_allclose(table.xy_um, draw_xy())
    assert table.mpp == 1.0
    assert table.labels["segmentation_method"].tolist()[:2] == ["stain", "nucleus"]
    assert any("1 Negative Control Probe, 1 Protein Expression" in note for note in table.notes)
    assert len(source_files(row)) == (2 if h5 else 4)
    protein = read_spots(cell_row(tmp_path, "xenium", mpp=None, modality="protein"))
    assert protein.gene_names.tolist() == ["CD3"]
    assert protein.counts.dtype == np.float32
    with pytest.raises(DataError, match=r"in micrometres.*mpp 0\.2125.*leave mpp empty"):
        read_spots(cell_row(tmp_path, "xenium", mpp=0.2125))


def test_xenium_on_a_picture_taken_after_the_run(tmp_path: Path):
    xenium_folder(tmp_path)
    (tmp_path / "experiment.xenium").write_text('{"pixel_size": 0.25}')
    told = np.array([[0, -2, 900.0], [2, 0, -40], [0, 0, 1]])  # picture to morphology, pixels
    np.savetxt(tmp_path / "s_he_imagealignment.csv", told, delimiter=",")
    image = tmp_path / "s_he_image.ome.tif"
    row = cell_row(tmp_path, "xenium", mpp=None, image=image)
    table = read_spots(row)
    assert table.mpp == pytest.approx(0.5)  # 2 pixels of 0.25 um
    back = np.column_stack([table.xy_px0, np.ones(table.n_spots)]) @ told.T
    np.testing.assert_allclose(back[:, :2] * 0.25, draw_xy())
    assert "s_he_imagealignment.csv" in " ".join(table.notes)
    assert source_files(row)["alignment"].name == "s_he_imagealignment.csv"
    naive = read_spots(replace(row, image_transform="flip_x", mpp=0.5))  # the column decides
    np.testing.assert_allclose(naive.xy_px0, draw_xy() / 0.5)
    again = np.column_stack([naive.xy_px0, np.ones(table.n_spots)]) @ table.image_transform.T
    np.testing.assert_allclose(again[:, :2], table.xy_px0)
    np.testing.assert_allclose(
        read_spots(replace(row, image=tmp_path / "morphology.ome.tif", mpp=0.5)).xy_px0,
        draw_xy() / 0.5,
    )
    (doubt,) = naive_warnings(replace(row, image=tmp_path / "morphology.tif", mpp=0.5), "he.tif")
    assert "no *imagealignment.csv of he.tif was found" in doubt
    free = tmp_path / "elsewhere" / "alignment_of_explorer.csv"  # named: as if it lay beside
    free.parent.mkdir()
    (tmp_path / "s_he_imagealignment.csv").rename(free)
    named = replace(row, image_transform=free)
    np.testing.assert_array_equal(read_spots(named).xy_px0, table.xy_px0)
    assert source_files(named)["image_transform"] == free
    for name in ("matrix.csv", "s_he_image_matrix.csv", "s_he_image_alignment_files/matrix.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(free.read_text())
        np.testing.assert_array_equal(read_spots(row).xy_px0, table.xy_px0)
        (tmp_path / name).unlink()
    free.rename(tmp_path / "s_he_imagealignment.csv")
    with pytest.raises(DataError, match="leave image_scale empty"):
        read_spots(replace(row, image_scale=2.0))
    np.savetxt(tmp_path / "s_if_imagealignment.csv", told, delimiter=",")
    with pytest.raises(DataError, match="image_transform"):
        read_spots(replace(row, image=tmp_path / "other.tif"))


def naive_warnings(row: SlideRow, name: str) -> list[str]:
    """Doubts of a picture that has no alignment file; none of the morphology image."""
    assert read_spots(row).warnings == ()
    assert row.counts is not None
    folder = row.counts / "pictures"
    alignment = next(row.counts.glob("*imagealignment.csv"))
    alignment.rename(alignment.with_suffix(".off"))
    found = [one.message for one in read_spots(replace(row, image=folder / name)).warnings]
    alignment.with_suffix(".off").rename(alignment)
    return found


def test_xenium_files_that_are_missing_or_do_not_fit(tmp_path: Path):
    row = cell_row(tmp_path / "x", "xenium", mpp=None)
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match=r"no cell_feature_matrix\.h5 and no folder"):
        source_files(row)
    xenium_folder(tmp_path / "x")
    cells = tmp_path / "x" / "cells.csv.gz"
    cells.unlink()
    with pytest.raises(DataError, match=r"none of cells\.csv\.gz, cells\.csv, cells\.parquet"):
        read_spots(row)
    write_table(cells, ["cell_id", "x", "y"], [["c0", 1, 2]])
    with pytest.raises(DataError, match="x_centroid, y_centroid is missing; found cell_id, x, y"):
        read_spots(row)
    header = ["cell_id", "x_centroid", "y_centroid"]
    write_table(cells, header, [["other", 1, 2]])
    with pytest.raises(DataError, match=r"no cell of .*matrix: c0, c1; cells: other"):
        read_spots(row)
    write_table(cells, header, [["c0", 1, 2], ["c0", 1, 2]])
    with pytest.raises(DataError, match="cell 'c0' occurs twice"):
        read_spots(row)
    write_table(cells, header, [["c0", 1, 2], ["c1", "", 2], ["c2", 1, 1]])
    with pytest.raises(DataError, match=r"1 cells have no finite coordinates.*'c1'"):
        read_spots(row)
    write_table(cells, header, [["c0", 1, 2], ["c1", 3, 2]])
    table = read_spots(row)
    assert table.n_spots == 2
    assert "10 cells without a place left out" in table.notes


def test_parquet_cells_need_pyarrow(tmp_path: Path):
    xenium_folder(tmp_path)
    (tmp_path / "cells.csv.gz").unlink()
    (tmp_path / "cells.parquet").write_bytes(b"PAR1")
    there = importlib.util.find_spec("pyarrow") is not None
    said = "not a complete parquet file" if there else r"needs pyarrow: pip install .hibio\[parquet"
    with pytest.raises(DataError, match=said):
        read_spots(cell_row(tmp_path, "xenium", mpp=None))


def test_cosmx_without_background_and_controls(tmp_path: Path):
    counts = cosmx_folder(tmp_path)
    table = read_spots(cell_row(tmp_path, "cosmx", mpp=0.12))
    np.testing.assert_array_equal(table.counts.toarray(), counts)
    assert table.gene_names.tolist() == ["G0", "G1", "G2"]
    assert table.barcodes.tolist()[4:6] == ["1_5", "2_1"]
    np.testing.assert_allclose(table.xy_um, draw_xy(10) * 0.12)
    assert any("1 control probes left out (NegPrb1;" in note for note in table.notes)
    assert any("2 cells of S_exprMat_file.csv without a place" in n for n in table.notes)


def test_cosmx_background_with_a_place_is_left_out(tmp_path: Path):
    write_table(
        tmp_path / "cell_by_gene.csv.gz",
        ["fov", "cell_ID", "A"],
        [[1, 0, 9], [1, 1, 2], [1, 10, 4]],
    )
    cells = [[1, 0, 5, 5], [1, 1, 6, 6], [1, 10, 7, 7]]
    write_table(tmp_path / "cells.csv", ["fov", "cell_ID", "x_global_px", "y_global_px"], cells)
    table = read_spots(cell_row(tmp_path, "cosmx"))
    assert table.barcodes.tolist() == ["1_1", "1_10"]
    assert "1 rows of cell_ID 0 (outside cells) left out" in table.notes


def test_cosmx_scale(tmp_path: Path):
    cosmx_folder(tmp_path)
    row = cell_row(tmp_path, "cosmx", mpp=None)
    with pytest.raises(DataError, match=r"mpp is unknown.*0\.12028 um.*0\.18 um"):
        read_spots(row)
    fields = tmp_path / "S_fov_positions_file.csv"
    write_table(fields, ["fov", "x_global_px", "y_global_px"], [[1, 0, 0], [2, 5472, 0]])
    with pytest.raises(DataError, match="mpp is unknown"):
        read_spots(row)
    header = ["FOV", "x_global_px", "y_global_px", "x_global_mm", "y_global_mm"]
    write_table(fields, header, [[1, 0, 100, 0, 1], [2, 4256, 100, 0.511912, 1]])
    assert read_spots(row).mpp == pytest.approx(0.12028, rel=1e-5)
    assert source_files(row)["fields"] == fields


def test_cosmx_files_that_are_missing_or_do_not_fit(tmp_path: Path):
    write_table(tmp_path / "S_exprMat_file.csv", ["fov", "A"], [[1, 1]])
    row = cell_row(tmp_path, "cosmx")
    with pytest.raises(DataError, match=r"found S_exprMat_file\.csv; give the folder of the CosMx"):
        source_files(row)
    write_table(
        tmp_path / "S_metadata_file.csv",
        ["fov", "cell_ID", "CenterX_global_px", "CenterY_global_px"],
        [[1, 1, 2, 3]],
    )
    with pytest.raises(DataError, match="column cell_ID is missing; found fov, A"):
        read_spots(row)
