"""Visium HD: the choice of bins, positions in batches, blocks of the matrix."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix

from preprocessing import DataError
from preprocessing.readers import parquet, tenx
from preprocessing.readers import visium_hd as hd_bins
from preprocessing.readers.format import read_spots, source_files
from preprocessing.readers.visium_hd import bin_places, match_bins, read_bins
from preprocessing.slide_row import SlideRow
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA, draw_counts

GENES, FINE = 6, 16  # bins of 2 um along one edge
PX = 4.0  # pixels per um; the grid is turned a little, as on real slides
TURN = np.array([[np.cos(0.02), np.sin(0.02)], [-np.sin(0.02), np.cos(0.02)]])


def hd_counts(um: int) -> np.ndarray:
    """Counts (n, n, GENES) of the bins of one size: those of 2 um, summed."""
    step = um // 2
    fine = draw_counts(FINE * FINE, GENES).reshape(FINE, FINE, GENES)
    return fine.reshape(FINE // step, step, FINE // step, step, GENES).sum(axis=(1, 3))


def write_bins(folder: Path, um: int, *, form: str = "csv", hd_names: bool = True) -> None:
    """One square_XXXum folder; the first row of bins is outside the tissue."""
    counts = hd_counts(um)
    side = len(counts)
    array = np.array([(r, c) for r in range(side) for c in range(side)])
    names = [
        f"s_{um:03d}um_{r:05d}_{c:05d}-1" if hd_names else f"B{r:02d}{c:02d}-1" for r, c in array
    ]
    xy = (array[:, ::-1] + 0.5) * um * PX @ TURN + 50
    folder.mkdir(parents=True)
    matrix = csc_matrix(counts.reshape(-1, GENES)[side:].T)
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(matrix, key)
        group["shape"] = matrix.shape
        group["barcodes"] = np.array(names[side:], dtype="S")
        kinds = ["Gene Expression"] * (GENES - 1) + ["Negative Control"]
        genes = [f"G{g}" for g in range(GENES)]
        for key, values in (("id", genes), ("name", genes), ("feature_type", kinds)):
            group[f"features/{key}"] = np.array(values, dtype="S")
    order = np.random.default_rng(2).permutation(len(array))
    frame = pd.DataFrame(
        {
            "barcode": names,
            "in_tissue": (array[:, 0] > 0).astype(np.int32),
            "array_row": array[:, 0].astype(np.int32),
            "array_col": array[:, 1].astype(np.int32),
            "pxl_row_in_fullres": xy[:, 1],
            "pxl_col_in_fullres": xy[:, 0],
        }
    ).iloc[order]
    (folder / "spatial").mkdir()
    if form == "parquet":
        frame.to_parquet(folder / "spatial" / "tissue_positions.parquet", index=False)
    else:
        frame.to_csv(folder / "spatial" / "tissue_positions.csv", index=False)
    factors = {"bin_size_um": float(um), "microns_per_pixel": 1 / PX, "tissue_hires_scalef": 0.5}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))


def hd_sample(root: Path, sizes: tuple[int, ...] = (2, 8, 16), **options: object) -> SlideRow:
    for um in sizes:
        write_bins(root / "outs" / "binned_outputs" / f"square_{um:03d}um", um, **options)  # type: ignore[arg-type]
    return SlideRow("h1", "p1", root, "visium_hd")


def assert_bins(row: SlideRow, um: int) -> None:
    table = read_spots(row)
    counts = hd_counts(um)[1:].reshape(-1, GENES)[:, :-1]
    assert table.counts.toarray().tolist() == counts.tolist()
    assert table.gene_names.tolist() == [f"G{g}" for g in range(GENES - 1)]
    side = FINE * 2 // um
    array = np.array([(r, c) for r in range(1, side) for c in range(side)])
    np.testing.assert_allclose(table.xy_px0, (array[:, ::-1] + 0.5) * um * PX @ TURN + 50)
    assert table.mpp == pytest.approx(1 / PX)
    assert table.diameter_um == um
    assert f"bins of {um} um" in table.notes


@pytest.mark.parametrize("given_root", ["", "outs", "outs/binned_outputs"])
def test_the_bins_are_chosen(given_root: str, tmp_path: Path) -> None:
    row = replace(hd_sample(tmp_path), counts=tmp_path / given_root)
    assert_bins(row, 8)
    for um in (2, 16):
        assert_bins(replace(row, bin_um=float(um)), um)
    folder = tmp_path / "outs" / "binned_outputs" / "square_016um"
    assert_bins(replace(row, counts=folder), 16)
    assert set(source_files(row)) == {"counts", "spots", "scale_factors"}
    assert "square_008um" in str(source_files(row)["counts"])
    with pytest.raises(
        DataError, match=r"bins of 8 um by the manifest's bin_um, 16 um by the fold"
    ):
        read_spots(replace(row, counts=folder, bin_um=8.0))


def test_missing_bins_and_wrong_formats(tmp_path: Path) -> None:
    row = hd_sample(tmp_path, (8,))
    with pytest.raises(DataError, match=r"no bins of 2 um, but of 8 um; choose one"):
        read_spots(replace(row, bin_um=2.0))
    with pytest.raises(DataError, match="write format visium_hd"):
        read_spots(replace(row, format="visium", counts=tmp_path / "outs"))
    positions = source_files(row)["spots"]
    text = positions.read_text()
    positions.write_text(text.replace(",1,", ",0,"))
    with pytest.raises(DataError, match="no bin in tissue"):
        read_spots(row)
    positions.write_text(text.replace("s_008um", "s_016um"))
    assert read_spots(row).n_spots == 12  # row and column tell the bin
    positions.write_text(text.replace("s_008um_0", "x"))
    with pytest.raises(DataError, match=r"no barcode of .* is a bin in tissue"):
        read_spots(row)


@pytest.mark.parametrize("hd_names", [True, False])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_blocks_and_batches(
    hd_names: bool, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    monkeypatch.setattr(tenx, "_BLOCK", 7)
    monkeypatch.setattr(hd_bins, "_BATCH", 5)
    row = hd_sample(tmp_path, (8, 2), form=form, hd_names=hd_names)
    assert_bins(row, 8)
    assert_bins(replace(row, bin_um=2.0), 2)
    names = read_bins(source_files(row)["spots"]).names
    assert (names is None) == hd_names


def test_scale_without_scale_factors(tmp_path: Path) -> None:
    row = hd_sample(tmp_path, (8,))
    source_files(row)["scale_factors"].unlink()
    assert read_spots(row).mpp == pytest.approx(1 / PX)  # 8 um over 32 pixels
    assert read_spots(replace(row, mpp=0.5)).mpp == 0.5
    told = read_spots(replace(row, mpp=0.5)).warnings[0].message
    assert "0.5 by the manifest column mpp; 0.25 by the distance of bins of 8 um" in told
    picture = tmp_path / "outs" / "tissue_hires_image.png"
    with pytest.raises(DataError, match="tissue_hires_scalef is not known"):
        read_spots(replace(row, image=picture))


def test_hires_image_is_known_by_name(tmp_path: Path) -> None:
    row = hd_sample(tmp_path, (8,))
    full, half = (
        read_spots(row),
        read_spots(replace(row, image=tmp_path / "tissue_hires_image.png")),
    )
    np.testing.assert_allclose(half.xy_px0, full.xy_px0 / 2)
    np.testing.assert_allclose(half.xy_um, full.xy_um)


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = hd_sample(tmp_path, (8,))
    positions = source_files(row)["spots"]
    positions.rename(positions.with_suffix(".parquet"))
    monkeypatch.setattr(parquet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install .hibio\[parquet"):
        read_spots(row)


def test_damaged_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    row = hd_sample(tmp_path, (8,), form="parquet")
    positions = source_files(row)["spots"]
    whole = positions.read_bytes()
    for content in (whole[: len(whole) // 2], b"PAR1", b"text"):
        positions.write_bytes(content)
        with pytest.raises(DataError, match="not a complete parquet file"):
            read_spots(row)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 99_999), st.integers(0, 99_999)), min_size=1, max_size=30),
    st.sampled_from([2, 8, 16]),
)
def test_barcodes_name_row_and_column(places: list[tuple[int, int]], um: int) -> None:
    names = np.array([f"s_{um:03d}um_{r:05d}_{c:05d}-1" for r, c in places], dtype=object)
    found = bin_places(names)
    assert found is not None
    assert found.tolist() == [list(place) for place in places]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=25))
def test_other_barcodes_are_no_bins(text: str) -> None:
    assert bin_places(np.array(["s_008um_00437_00602-1", text], dtype=object)) is None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_matching_equals_a_dictionary(data: st.DataObject) -> None:
    place = st.tuples(st.integers(0, 9), st.integers(0, 9))
    there = data.draw(st.lists(place, min_size=1, max_size=30, unique=True))
    asked = data.draw(st.lists(place, min_size=1, max_size=30))
    where = {key: i for i, key in enumerate(there)}
    names = np.array([f"s_008um_{r:05d}_{c:05d}-1" for r, c in asked], dtype=object)
    array = np.array(there, dtype=np.int32)
    bins = hd_bins.BinPositions(array, array.astype(float), None, 0)
    assert match_bins(names, bins).tolist() == [where.get(key, -1) for key in asked]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_the_real_sample() -> None:
    """Its barcodes are no bins (its authors put two files together): they are joined as texts."""
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    folder = REAL_DATA / "reader_samples" / "visium_hd_square_008um"
    row = SlideRow("s", "s", folder, "visium_hd")
    with pytest.raises(DataError, match=r"0\.2738 by microns_per_pixel.*0\.1369 by the distance"):
        read_spots(row)
    table = read_spots(replace(row, mpp=0.27376126715315274))
    assert len(table.warnings) == 1
    with h5py.File(folder / "filtered_feature_bc_matrix.h5") as file:
        parts = tuple(file["matrix"][key][:] for key in ("data", "indices", "indptr"))
        expected = csc_matrix(parts, tuple(file["matrix/shape"][:])).T.tocsr()
        barcodes = [name.decode() for name in file["matrix/barcodes"][:]]
    frame = pd.read_parquet(folder / "spatial" / "tissue_positions.parquet").set_index("barcode")
    inside = [i for i, name in enumerate(barcodes) if frame["in_tissue"].get(name, 0) == 1]
    assert table.counts.shape == (len(inside), 100) == (1368, 100)
    assert table.barcodes.tolist() == [barcodes[i] for i in inside]
    assert (table.counts != expected[inside]).nnz == 0
    xy = frame.loc[table.barcodes, ["pxl_col_in_fullres", "pxl_row_in_fullres"]]
    np.testing.assert_array_equal(table.xy_px0, xy.to_numpy())
