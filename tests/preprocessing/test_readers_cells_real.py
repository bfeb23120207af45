"""The single-cell files of ../shared/data and configs/manifests/single_cell.csv.

Everything is compared with a plain reading by h5py or pandas. Scales in that manifest:

- osmFISH 0.065 um per pixel: the file gives the area of each cell in pixels and in um2.
- STARmap 0.078: assumed, the file does not say. Cortex from the border of the white matter to the
  pia (deepest excitatory cells to the edge of the picture, 10,800 pixels) is then 0.84 mm thick,
  as in mouse visual cortex, and nearest cells lie 11 um apart.
- CosMx 0.18: fields of view lie 5472.2 pixels apart, which are 0.985 mm in the 2022 lung data
  (0.12028 holds for commercial instruments, whose fields are 4256 pixels wide).
"""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_matrix
from scipy.spatial import cKDTree

from preprocessing import SlideStore, SpotTable, prepare, read_manifest
from preprocessing.manifest import draft_manifest
from preprocessing.readers.format import read_spots
from preprocessing.store import verify_store
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA

FOLDER = REAL_DATA / "single_cell"
MANIFEST = Path(__file__).resolve().parents[2] / "configs" / "manifests" / "single_cell.csv"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=NO_REAL_DATA)


def read(slide: str) -> SpotTable:
    rows = {row.slide_id: row for row in read_manifest(MANIFEST, REAL_DATA)}
    return read_spots(rows[slide])


def nearest_um(table: SpotTable) -> float:
    distance = cKDTree(table.xy_um).query(table.xy_um, k=2)[0][:, 1]
    return float(np.median(distance))


def test_starmap_equals_the_file():
    table = read("starmap_v1")
    with h5py.File(FOLDER / "starmap_visual_cortex.h5ad") as file:
        parts = [file["X"][name][:] for name in ("data", "indices", "indptr")]
        counts = csc_matrix(tuple(parts), (1549, 1020))
        genes = [name.decode() for name in file["var/_index"][:]]
        xy = np.column_stack([file["obs/x"][:], file["obs/y"][:]])
        names = [name.decode() for name in file["obs/__categories/cluster_name"][:]]
        kinds = [names[code] if code >= 0 else "" for code in file["obs/cluster_name"][:]]
    assert table.counts.shape == (1549, 1020)
    assert (table.counts != counts.tocsr()).nnz == 0
    assert table.gene_names.tolist() == genes
    assert table.labels["cluster_name"].tolist() == kinds
    assert len(set(kinds) - {""}) == 16
    np.testing.assert_array_equal(table.xy_px0, xy)
    np.testing.assert_allclose(table.xy_um, xy * 0.078)
    assert 8 < nearest_um(table) < 15


def test_osmfish_equals_the_file():
    table = read("osmfish_s1")
    with h5py.File(FOLDER / "osmFISH_SScortex_mouse_all_cells.loom") as file:
        columns = {name: file["col_attrs"][name][:] for name in file["col_attrs"]}
        counts, genes = file["matrix"][:].T, file["row_attrs/Gene"][:].astype(str)
    good = columns["Valid"] == 1
    assert table.counts.shape == (4839, 33)
    np.testing.assert_array_equal(table.counts.toarray(), counts[good])
    assert table.gene_names.tolist() == genes.tolist()
    assert table.barcodes.tolist() == columns["CellID"][good].astype(str).tolist()
    for name, kinds in (("Region", 12), ("ClusterName", 32)):
        assert table.labels[name].tolist() == columns[name][good].astype(str).tolist()
        assert table.labels[name].nunique() <= kinds
    xy = np.column_stack([columns["X"], columns["Y"]])[good]
    np.testing.assert_array_equal(table.xy_px0, xy)
    um_per_px = np.sqrt(columns["size_um2"][good] / columns["size_pix"][good])
    np.testing.assert_allclose(um_per_px, table.mpp)
    assert "1632 cells with Valid 0 left out" in table.notes


def test_cosmx_equals_the_file():
    table = read("cosmx_lung12")
    counts = pd.read_csv(FOLDER / "cosmx_lung12" / "cell_by_gene.csv.gz").set_index(
        ["fov", "cell_ID"]
    )
    cells = pd.read_csv(FOLDER / "cosmx_lung12" / "cells.csv").set_index(["fov", "cell_ID"])
    controls = [name for name in counts.columns if name.startswith("NegPrb")]
    assert (counts.shape, len(controls)) == ((120, 980), 20)
    genes = counts.drop(columns=controls)
    keys = [tuple(map(int, name.split("_"))) for name in table.barcodes]
    assert table.counts.shape == (120, 960)
    np.testing.assert_array_equal(table.counts.toarray(), genes.loc[keys].to_numpy())
    assert table.gene_names.tolist() == genes.columns.tolist()
    xy = cells.loc[keys, ["x_global_px", "y_global_px"]].to_numpy()
    np.testing.assert_allclose(table.xy_um, xy * 0.18)
    assert any("20 control probes left out" in note for note in table.notes)


def test_the_manifest_prepares_all_three(tmp_path: Path):
    report = prepare(MANIFEST, tmp_path, root=REAL_DATA)
    assert [row.status for row in report.rows] == ["done"] * 3, str(report)
    assert [row.n_spots for row in report.rows] == [1549, 4839, 120]
    for path in sorted(tmp_path.glob("*.h5")):
        assert {f.level for f in verify_store(path)} == {"WARN"}
    with SlideStore(tmp_path / "osmfish_s1.h5") as store:
        whole = store.counts()
        assert (store.counts(slice(100, 300)) != whole[100:300]).nnz == 0
        assert store.modality == "rna"
    again = prepare(MANIFEST, tmp_path, root=REAL_DATA)
    assert [row.status for row in again.rows] == ["skipped"] * 3


def test_the_draft_finds_all_three():
    rows = {row.slide_id: row for row in draft_manifest(FOLDER)}
    assert {name: (row.format, row.mpp) for name, row in rows.items()} == {
        "cosmx_lung12": ("cosmx", 0.18),
        "osmFISH_SScortex_mouse_all_cells": ("loom", None),
        "starmap_visual_cortex": ("h5ad", None),
    }
    assert read_spots(rows["cosmx_lung12"]).n_spots == 120
