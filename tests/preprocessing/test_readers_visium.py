"""The Space Ranger reader: layouts of all versions, scale, damaged files."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from preprocessing import DataError
from preprocessing.readers import parquet
from preprocessing.readers.coordinates import hex_pitch_px
from preprocessing.readers.format import read_spots, source_files
from preprocessing.readers.visium import read_positions, read_visium
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable
from tests.preprocessing.sources import Truth, hex_positions, visium_folder


def row_of(folder: Path, **more: object) -> SlideRow:
    return SlideRow("S1", "P1", folder, "visium", **more)  # type: ignore[arg-type]


def assert_is(table: SpotTable, truth: Truth, mpp: float) -> None:
    order = [truth.barcodes.index(b) for b in table.barcodes]
    assert sorted(order) == list(range(len(truth.barcodes)))
    assert table.counts.toarray().tolist() == truth.counts[order].tolist()
    np.testing.assert_allclose(table.xy_px0, truth.xy_px[order])
    np.testing.assert_allclose(table.xy_um, truth.xy_px[order] * mpp)
    assert table.mpp == pytest.approx(mpp)


@pytest.mark.parametrize("h5", [True, False])
@pytest.mark.parametrize("header", [True, False])
def test_all_layouts_give_the_same_table(tmp_path: Path, h5: bool, header: bool):
    truth = visium_folder(tmp_path / "outs", h5=h5, header=header)
    matrix = tmp_path / "outs" / f"filtered_feature_bc_matrix{'.h5' if h5 else ''}"
    for given in (tmp_path / "outs", tmp_path, matrix):
        table = read_spots(row_of(given))
        assert_is(table, truth, mpp=2.0)  # neighbours 50 px apart are 100 um
    assert table.diameter_um == pytest.approx(55.0)
    assert table.gene_names.tolist() == [*truth.genes[:-1], "GENE0-1"]
    assert len(set(table.gene_ids)) == len(truth.genes)
    notes = " / ".join(table.notes)
    assert "1 features that are not Gene Expression" in notes
    assert "1 repeated gene names" in notes
    assert "2 spots outside the tissue" in notes
    assert len(source_files(row_of(tmp_path))) == (3 if h5 else 5)


def test_scaled_images_are_known_by_name(tmp_path: Path):
    truth = visium_folder(tmp_path)
    image = tmp_path / "spatial" / "tissue_lowres_image.png"
    table = read_spots(row_of(tmp_path, image=image))
    full = read_spots(row_of(tmp_path))
    np.testing.assert_allclose(table.xy_px0, full.xy_px0 * 0.25)
    np.testing.assert_allclose(table.xy_um, full.xy_um)
    assert table.mpp == pytest.approx(8.0)
    assert table.diameter_um == pytest.approx(55.0)
    other = read_spots(row_of(tmp_path, image=image, image_scale=0.1))
    np.testing.assert_allclose(other.xy_px0, full.xy_px0 * 0.1)
    (tmp_path / "spatial" / "scalefactors_json.json").unlink()
    with pytest.raises(DataError, match="tissue_lowres_scalef is not known"):
        read_spots(row_of(tmp_path, image=image))
    assert_is(read_spots(row_of(tmp_path)), truth, mpp=2.0)


def test_order_of_the_ways_to_know_mpp(tmp_path: Path):
    visium_folder(tmp_path)
    factors = tmp_path / "spatial" / "scalefactors_json.json"
    factors.write_text(json.dumps({"microns_per_pixel": 0.5, "tissue_hires_scalef": 0.5}))
    row = row_of(tmp_path)
    assert read_visium(replace(row, mpp=0.3, pitch_um=60.0), 0.7).mpp == 0.3
    assert read_visium(replace(row, pitch_um=60.0), 0.7).mpp == pytest.approx(1.2)
    assert read_visium(row, 0.7).mpp == 0.7
    assert read_visium(row).mpp == 0.5
    hires = read_visium(replace(row, image=tmp_path / "tissue_hires_image.png"))
    assert hires.mpp == pytest.approx(1.0)
    with pytest.raises(DataError, match=r"0\.5 by microns_per_pixel.*2 by 100 um between"):
        read_spots(row)
    assert read_spots(replace(row, pitch_um=60.0)).warnings[0].message.startswith("mpp: its sou")


def test_a_square_grid_needs_a_stated_scale(tmp_path: Path):
    truth = visium_folder(tmp_path, hexagonal=False)
    with pytest.raises(DataError, match=r"S1.*mpp is unknown.*mpp.*pitch_um"):
        read_spots(row_of(tmp_path))
    assert_is(read_spots(row_of(tmp_path, pitch_um=100.0)), truth, mpp=2.0)


def test_hex_pitch_is_of_hexagons_only():
    array, xy = hex_positions()
    assert hex_pitch_px(array, xy) == pytest.approx(50.0)
    turned = xy @ np.array([[0.0, -1.0], [1.0, 0.0]])
    assert hex_pitch_px(array, turned) == pytest.approx(50.0)
    assert hex_pitch_px(array, array * 30.0) is None  # a checkerboard
    assert hex_pitch_px(array + np.array([0, 1]), xy) is None
    assert hex_pitch_px(array[:1], xy[:1]) is None


def test_parquet_positions_without_pyarrow_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    visium_folder(tmp_path)
    positions = tmp_path / "spatial" / "tissue_positions.csv"
    positions.rename(positions.with_suffix(".parquet"))
    monkeypatch.setattr(parquet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install .hibio\[parquet"):
        read_spots(row_of(tmp_path))


def change_h5(folder: Path, key: str, values: object) -> None:
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "r+") as file:
        del file[f"matrix/{key}"]
        if values is not None:
            file[f"matrix/{key}"] = values


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("barcodes", None, "not a complete 10x matrix"),
        ("features", None, "not a complete 10x matrix"),
        ("indptr", np.array([0, 5]), "damaged sparse matrix|matrix is"),
        ("shape", np.array([3, 3]), "damaged sparse matrix|matrix is"),
        ("barcodes", np.array(["X-1"], dtype="S"), "matrix is 11 x 48, but"),
        ("features/name", np.array(["A"], dtype="S"), "11 ids, 1 names and 11 types"),
    ],
)
def test_damaged_h5_matrices_are_refused(tmp_path: Path, key: str, values: object, said: str):
    visium_folder(tmp_path)
    change_h5(tmp_path, key, values)
    with pytest.raises(DataError, match=said):
        read_spots(row_of(tmp_path))


def test_fractional_and_empty_counts_are_refused(tmp_path: Path):
    visium_folder(tmp_path)
    with h5py.File(tmp_path / "filtered_feature_bc_matrix.h5", "r") as file:
        data = file["matrix/data"][:]
    change_h5(tmp_path, "data", data + 0.25)
    with pytest.raises(DataError, match="give the raw counts"):
        read_spots(row_of(tmp_path))
    text = tmp_path / "spatial" / "tissue_positions.csv"
    lines = [line.replace(",1,", ",0,", 1) for line in text.read_text().splitlines()]
    text.write_text("\n".join(lines))
    change_h5(tmp_path, "data", data)
    with pytest.raises(DataError, match="empty matrix: 0 spots"):
        read_spots(row_of(tmp_path))


def test_text_named_h5_and_truncated_files(tmp_path: Path):
    visium_folder(tmp_path)
    matrix = tmp_path / "filtered_feature_bc_matrix.h5"
    whole = matrix.read_bytes()
    matrix.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a complete 10x matrix"):
        read_spots(row_of(tmp_path))
    matrix.write_text("<html>not found</html>")
    with pytest.raises(DataError, match="is not an HDF5 file"):
        read_spots(row_of(tmp_path))


def test_damaged_mex_is_refused(tmp_path: Path):
    visium_folder(tmp_path, h5=False)
    matrix = tmp_path / "filtered_feature_bc_matrix" / "matrix.mtx"
    lines = matrix.read_text().splitlines()
    matrix.write_text("\n".join(lines[:-20]))
    with pytest.raises(DataError, match="not a complete Matrix Market"):
        read_spots(row_of(tmp_path))
    matrix.unlink()
    with pytest.raises(DataError, match=r"has no matrix.mtx"):
        read_spots(row_of(tmp_path))


def test_missing_parts_of_the_folder_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no filtered_feature_bc_matrix.h5"):
        read_spots(row_of(tmp_path))
    visium_folder(tmp_path)
    (tmp_path / "spatial" / "scalefactors_json.json").write_text('{"tissue_hires_scalef": -1}')
    said = "scale factors that are no positive numbers not used: tissue_hires_scalef -1"
    assert said in read_spots(row_of(tmp_path)).notes
    with pytest.raises(DataError, match="tissue_hires_scalef is not known"):
        read_spots(row_of(tmp_path, image=tmp_path / "tissue_hires_image.png"))
    (tmp_path / "spatial" / "scalefactors_json.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_spots(row_of(tmp_path))
    (tmp_path / "spatial" / "scalefactors_json.json").unlink()
    positions = tmp_path / "spatial" / "tissue_positions.csv"
    positions.write_text(positions.read_text().replace("BC", "XX"))
    with pytest.raises(DataError, match=r"no barcode of .* different slides"):
        read_spots(row_of(tmp_path))
    positions.unlink()
    with pytest.raises(DataError, match=r"none of tissue_positions.csv"):
        read_spots(row_of(tmp_path))


def test_unknown_format(tmp_path: Path):
    with pytest.raises(DataError, match="formats are visium, visium_hd, legacy_st"):
        read_spots(replace(row_of(tmp_path), format="merfish"))


@pytest.mark.parametrize("how", ["semicolons", "decimal comma", "capitals"])
def test_positions_as_spreadsheets_write_them(tmp_path: Path, how: str):
    truth = visium_folder(tmp_path)
    path = tmp_path / "spatial" / "tissue_positions.csv"
    frame = pd.read_csv(path)
    if how == "capitals":
        frame.rename(columns=str.upper).to_csv(path, index=False)
    else:
        frame.to_csv(path, sep=";", decimal="," if how == "decimal comma" else ".", index=False)
    assert_is(read_visium(row_of(tmp_path)), truth, 2.0)


def test_barcodes_of_seurat_keep_their_commas(tmp_path: Path):
    path = tmp_path / "coordinates.csv"
    path.write_text("spot;tissue;row;col;imagerow;imagecol\n1,1;1;0;2;10,5;20,25\n")
    (found,) = read_positions(path).to_dict("records")
    assert list(found.values()) == ["1,1", 1, 0, 2, 10.5, 20.25]
