"""AnnData files: counts, labels, coordinates and scale; bad files are refused, none unpickled."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_matrix, csr_matrix

from preprocessing import DataError
from preprocessing.readers.format import read_spots
from tests.preprocessing.cell_sources import (
    CELLS,
    NAMES,
    cell_row,
    draw_counts,
    draw_xy,
    toy_anndata,
    write_h5ad,
)
from tests.preprocessing.sources import hex_positions


def test_counts_labels_and_places(tmp_path: Path):
    table = read_spots(cell_row(write_h5ad(tmp_path, toy_anndata()), "h5ad"))
    np.testing.assert_array_equal(table.counts.toarray(), draw_counts(CELLS, 5))
    assert table.counts.dtype == np.int32
    assert table.gene_names.tolist() == NAMES
    assert table.barcodes.tolist()[:2] == ["c0", "c1"]
    np.testing.assert_array_equal(table.xy_px0, draw_xy())
    np.testing.assert_allclose(table.xy_um, draw_xy() * 0.5)
    assert table.mpp == 0.5
    assert table.labels.columns.tolist() == ["kind", "activity:one", "cluster"]
    assert table.labels["kind"].tolist()[:4] == ["a", "b", "", "a"]
    assert table.labels["cluster"].tolist()[:3] == ["0", "1", "0"]
    assert table.labels["activity:one"].dtype == np.float64
    assert "counts are X" in table.notes
    assert any("depth" in note and "activity:" in note for note in table.notes)


@pytest.mark.parametrize("layout", ["dense", "csr", "csc"])
def test_every_matrix_layout_reads_the_same(tmp_path: Path, layout: str, monkeypatch):
    monkeypatch.setattr("preprocessing.readers.hdf5._BLOCK", 11)  # several blocks
    data = toy_anndata()
    kinds = {"dense": lambda m: m.toarray(), "csr": csr_matrix, "csc": csc_matrix}
    data.X = kinds[layout](data.X)
    table = read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad"))
    np.testing.assert_array_equal(table.counts.toarray(), draw_counts(CELLS, 5))


def test_raw_counts_are_found_beside_a_normalised_matrix(tmp_path: Path):
    data = toy_anndata()
    data.raw = data
    data = data[:, 1:].copy()
    data.X = data.X.log1p()
    table = read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad"))
    assert table.gene_names.tolist() == NAMES  # those of raw
    assert "counts are raw.X" in table.notes
    data.layers["counts"] = csr_matrix(draw_counts(CELLS, 5)[:, 1:])
    table = read_spots(cell_row(write_h5ad(tmp_path, data, "b.h5ad"), "h5ad"))
    assert table.gene_names.tolist() == NAMES[1:]
    assert "counts are layers['counts']" in table.notes


def test_intensities_are_kept_as_float32(tmp_path: Path):
    data = toy_anndata(np.random.default_rng(0).random((CELLS, 4)))
    path = write_h5ad(tmp_path, data)
    with pytest.raises(DataError, match=r"a\.h5ad.*not non-negative integers.*modality: protein"):
        read_spots(cell_row(path, "h5ad"))
    table = read_spots(cell_row(path, "h5ad", modality="protein"))
    assert table.modality == "protein"
    assert table.counts.dtype == np.float32
    np.testing.assert_array_equal(table.counts.toarray(), data.X.toarray())
    data.X = -data.X
    with pytest.raises(DataError, match=r"not finite numbers from 0 on \(first: -0\..*'c0', 'G0'"):
        read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad", modality="protein"))


def test_feature_types_choose_the_modality(tmp_path: Path):
    data = toy_anndata()
    data.var["feature_types"] = ["Gene Expression"] * 3 + ["Antibody Capture"] * 2
    path = write_h5ad(tmp_path, data)
    table = read_spots(cell_row(path, "h5ad"))
    assert table.gene_names.tolist() == NAMES[:3]
    assert any("(2 Antibody Capture)" in note for note in table.notes)
    assert read_spots(cell_row(path, "h5ad", modality="protein")).gene_names.tolist() == NAMES[3:]


def test_symbols_and_ids(tmp_path: Path):
    data = toy_anndata()
    data.var["gene_ids"] = [f"ENSG{g}" for g in range(5)]
    table = read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad"))
    assert (table.gene_names[0], table.gene_ids[0]) == ("G0", "ENSG0")
    data = toy_anndata()
    data.var["feature_name"] = ["A", "B", "B", "", "E"]
    table = read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad"))
    assert table.gene_names.tolist() == ["A", "B", "B-1", "G3", "E"]  # other ids: other genes
    assert table.gene_ids.tolist() == NAMES


def test_repeated_genes_are_summed_and_proteins_renamed(tmp_path: Path):
    data = toy_anndata()
    data.var_names = ["A", "B", "A", "C", "A"]
    path = write_h5ad(tmp_path, data)
    table = read_spots(cell_row(path, "h5ad"))
    counts = draw_counts(CELLS, 5)
    assert table.gene_names.tolist() == ["A", "B", "C"]
    np.testing.assert_array_equal(table.counts.toarray()[:, 0], counts[:, [0, 2, 4]].sum(axis=1))
    np.testing.assert_array_equal(table.counts.toarray()[:, 1:], counts[:, [1, 3]])
    assert any("2 repeated genes were added" in note for note in table.notes)
    table = read_spots(cell_row(path, "h5ad", modality="protein"))
    assert table.gene_names.tolist() == ["A", "B", "A-1", "C", "A-2"]


def test_where_coordinates_and_scale_come_from(tmp_path: Path):
    table = read_spots(
        cell_row(write_h5ad(tmp_path, toy_anndata(spatial="spatial_um")), "h5ad", mpp=None)
    )
    assert table.mpp == 1.0
    np.testing.assert_array_equal(table.xy_um, draw_xy())
    with pytest.raises(DataError, match=r"in micrometres.*mpp 0\.5.*leave mpp empty"):
        read_spots(cell_row(tmp_path / "a.h5ad", "h5ad"))
    for x, y in (
        ("x", "y"),
        ("x_centroid", "y_centroid"),
        ("X", "Y"),
        ("pxl_col_in_fullres", "pxl_row_in_fullres"),
    ):
        data = toy_anndata(spatial=None)
        data.obs[x], data.obs[y] = draw_xy().T
        path = write_h5ad(tmp_path, data)
        np.testing.assert_array_equal(read_spots(cell_row(path, "h5ad")).xy_px0, draw_xy())
        with pytest.raises(DataError, match=r"mpp is unknown.*manifest column mpp.*x_um"):
            read_spots(cell_row(path, "h5ad", mpp=None))
    data = toy_anndata(spatial=None)
    for names in (["y", "x"], ["pxl_row_in_fullres", "pxl_col_in_fullres"], ["b", "a"]):
        data.obsm["spatial"] = pd.DataFrame(draw_xy()[:, ::-1], data.obs_names, names)
        found = read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad")).xy_px0
        turned = -1 if names != ["b", "a"] else 1  # x and y by their names, else in order
        np.testing.assert_array_equal(found, draw_xy()[:, ::-1][:, ::turned])
    data = toy_anndata(spatial="X_spatial")
    data.uns["spatial"] = {"lib": {"scalefactors": {"microns_per_pixel": 0.3}}}
    table = read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad", mpp=None))
    assert table.mpp == pytest.approx(0.3)


def test_a_visium_lattice_gives_the_scale(tmp_path: Path):
    array, xy = hex_positions(pitch_px=50.0)
    data = toy_anndata(draw_counts(len(array), 5))
    data.obs["array_row"], data.obs["array_col"] = array.T
    data.obsm["spatial"] = xy
    table = read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad", mpp=None))
    assert table.mpp == pytest.approx(2.0)


def test_missing_coordinates_list_what_was_found(tmp_path: Path):
    path = write_h5ad(tmp_path, toy_anndata(spatial=None))
    said = r"slide s1.*no obsm 'spatial_um'.*obs has no columns of coordinates; found kind, depth"
    with pytest.raises(DataError, match=said):
        read_spots(cell_row(path, "h5ad"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.X.data.__setitem__(3, np.nan), r"\(first: nan, cell 'c0', 'G3'\)"),
        (lambda d: d.X.data.__setitem__(0, -2), r"\(first: -2\.0, cell 'c0', 'G0'\)"),
        (lambda d: d.X.data.__setitem__(0, 1.5), "modality: protein"),
        (lambda d: d.obsm["spatial"].__setitem__(4, np.nan), "1 cells have no finite.*'c4'"),
        (lambda d: d.obsm["spatial"].__setitem__(slice(None), 7), "all 12 cells have the same"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, change, said: str):
    data = toy_anndata(draw_counts(CELLS, 5) + 1)
    change(data)
    with pytest.raises(DataError, match=said) as caught:
        read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad"))
    assert "a.h5ad" in str(caught.value)


def test_one_cell_none_and_no_genes(tmp_path: Path):
    for cells, genes, said in ((1, 5, "has 1 cell .*c0"), (0, 5, "0 cells x 5"), (5, 0, "x 0 gen")):
        path = write_h5ad(tmp_path, toy_anndata(np.ones((cells, genes), dtype=int)))
        with pytest.raises(DataError, match=said):
            read_spots(cell_row(path, "h5ad"))


BOMB = b"cbuiltins\nexit\n(I3\ntR."  # ends the program when it is unpickled


def test_nothing_is_unpickled(tmp_path: Path):
    path = tmp_path / "a.h5ad"
    path.write_bytes(BOMB)
    with pytest.raises(DataError, match="not an HDF5 file; expected an AnnData file"):
        read_spots(cell_row(path, "h5ad"))
    write_h5ad(tmp_path, toy_anndata())
    with h5py.File(path, "r+") as file:
        blob = np.void(BOMB)
        file["obs"]["blob"] = np.array([blob] * CELLS)
        objects = h5py.vlen_dtype(np.uint8)
        file["obs"].create_dataset("objects", CELLS, dtype=objects)
        order = [*file["obs"].attrs["column-order"], "blob", "objects"]
        file["obs"].attrs["column-order"] = order
    table = read_spots(cell_row(path, "h5ad"))
    assert any("blob, objects" in note for note in table.notes)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", (CELLS, 5), dtype=h5py.vlen_dtype(np.uint8))
    with pytest.raises(DataError, match=r"/X holds values of type object.*not\s+unpickled"):
        read_spots(cell_row(path, "h5ad"))


def test_damaged_files_are_refused(tmp_path: Path):
    path = write_h5ad(tmp_path, toy_anndata())
    whole = path.read_bytes()
    for size in (9, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.h5ad.*(truncated or damaged|not an HDF5)"):
            read_spots(cell_row(path, "h5ad"))
    path.write_bytes(whole)
    with h5py.File(path, "r+") as file:
        file["X/indices"][:] = 99
    with pytest.raises(DataError, match="damaged sparse matrix"):
        read_spots(cell_row(path, "h5ad"))
    with h5py.File(path, "w") as file:
        file["matrix"] = np.ones(3)
    with pytest.raises(DataError, match=r"no obs and var \(matrix\)"):
        read_spots(cell_row(path, "h5ad"))


def test_lengths_that_do_not_fit(tmp_path: Path):
    path = write_h5ad(tmp_path, toy_anndata())
    with h5py.File(path, "r+") as file:
        del file["var/_index"]
        file["var/_index"] = np.array(["G0", "G1"], dtype="S")
    with pytest.raises(DataError, match="2 gene names for a matrix of 5 columns"):
        read_spots(cell_row(path, "h5ad"))


def test_tables_of_old_versions(tmp_path: Path):
    """As AnnData wrote them before 0.7: compound obs and var, attributes h5sparse."""
    path, counts, xy = tmp_path / "old.h5ad", csr_matrix(draw_counts(CELLS, 5)), draw_xy()
    obs = np.zeros(CELLS, dtype=[("index", "S3"), ("x", "f8"), ("y", "f8"), ("kind", "S1")])
    obs["index"], obs["x"], obs["y"] = [f"c{i}" for i in range(CELLS)], xy[:, 0], xy[:, 1]
    obs["kind"] = b"k"
    var = np.zeros(5, dtype=[("index", "S3")])
    var["index"] = NAMES
    with h5py.File(path, "w") as file:
        file["obs"], file["var"] = obs, var
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", counts.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name)
    table = read_spots(cell_row(path, "h5ad"))
    assert (table.counts != counts).nnz == 0
    assert table.labels["kind"].unique().tolist() == ["k"]
    np.testing.assert_array_equal(table.xy_px0, xy)


def test_an_image_sets_the_pixels(tmp_path: Path):
    row = cell_row(write_h5ad(tmp_path, toy_anndata()), "h5ad", image=tmp_path / "i.png")
    table = read_spots(row)
    np.testing.assert_allclose(table.xy_um, draw_xy() * 0.5)
    scaled = cell_row(row.counts, "h5ad", image=row.image, image_scale=0.25)
    np.testing.assert_allclose(read_spots(scaled).xy_px0, draw_xy() * 0.25)
    in_um = write_h5ad(tmp_path, toy_anndata(spatial="spatial_um"), "um.h5ad")
    table = read_spots(cell_row(in_um, "h5ad", image=row.image))
    np.testing.assert_allclose(table.xy_um, draw_xy())
    np.testing.assert_allclose(table.xy_px0, draw_xy() / 0.5)
    with pytest.raises(DataError, match=r"image_scale 3 x mpp 0\.5 must be 1"):
        read_spots(cell_row(in_um, "h5ad", image=row.image, image_scale=3.0))
    with pytest.raises(DataError, match="neither the image"):
        read_spots(cell_row(row.counts, "h5ad", image=row.image, mpp=None))


def test_a_labels_table_adds_to_the_cells(tmp_path: Path):
    path = write_h5ad(tmp_path, toy_anndata())
    labels = pd.DataFrame({"barcode": ["c1", "c0"], "kind": ["new", "x"], "score": [0.5, 2.0]})
    labels.to_csv(tmp_path / "l.csv", index=False)
    table = read_spots(cell_row(path, "h5ad", labels=tmp_path / "l.csv"))
    assert table.labels["kind"].tolist()[:3] == ["x", "new", ""]
    assert table.labels["score"].tolist()[:2] == [2.0, 0.5]
    assert any("kind taken from l.csv" in note for note in table.notes)
