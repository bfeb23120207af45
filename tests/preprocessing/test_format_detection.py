"""The format of a row that names none, by its files; the explicit one always wins."""

from dataclasses import replace
from pathlib import Path

import pytest

from preprocessing import DataError, read_manifest
from preprocessing.manifest import draft_manifest, write_manifest
from preprocessing.readers import READERS
from preprocessing.readers.format import detect_format
from preprocessing.readers.visium import CELL_MATRIX as MATRIX
from tests.preprocessing.cell_sources import (
    cosmx_folder,
    csv_pair,
    merscope_folder,
    toy_anndata,
    write_h5ad,
    write_loom,
    xenium_folder,
)
from tests.preprocessing.hd_cell_sources import segmented_folder
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA, legacy_slide, visium_folder
from tests.preprocessing.test_readers_visium_hd import hd_sample, write_bins


def zarr_folder(folder: Path) -> Path:
    (folder / "tables" / "table" / "X").mkdir(parents=True)
    return folder


def test_every_format(tmp_path: Path) -> None:
    xenium_folder(tmp_path / "xenium")
    cosmx_folder(tmp_path / "cosmx")
    merscope_folder(tmp_path / "merscope")
    (tmp_path / "a.gem.gz").touch()
    (tmp_path / "puck").mkdir()
    for name in ("MappedDGEForR.csv", "BeadLocationsForR.csv"):
        (tmp_path / "puck" / name).touch()
    visium_folder(tmp_path / "v" / "outs")
    visium_folder(tmp_path / "mex", h5=False)
    hd_sample(tmp_path / "hd", (8,))
    write_bins(tmp_path / "bins", 8)
    segmented_folder(tmp_path / "cells" / "outs" / "segmented_outputs")
    segmented_folder(tmp_path / "hd" / "outs" / "segmented_outputs")
    (tmp_path / "hest" / "metadata").mkdir(parents=True)
    st = write_h5ad(tmp_path / "hest" / "st", toy_anndata())
    zarr = zarr_folder(tmp_path / "s.zarr")
    legacy, _ = legacy_slide(tmp_path / "st")
    counts, cells, _ = csv_pair(tmp_path / "csv")
    found = {
        tmp_path / "xenium": "xenium",
        tmp_path / "cosmx": "cosmx",
        tmp_path / "merscope": "merscope",
        tmp_path / "puck": "slideseq",
        tmp_path / "a.gem.gz": "stereoseq",
        tmp_path / "v": "visium",
        tmp_path / "v" / "outs" / "filtered_feature_bc_matrix.h5": "visium",
        tmp_path / "mex": "visium",
        tmp_path / "mex" / "filtered_feature_bc_matrix": "visium",
        tmp_path / "hd": "visium_hd",
        tmp_path / "bins": "visium_hd",
        tmp_path / "cells": "visium_hd_cells",
        tmp_path / "hd" / "outs" / "segmented_outputs": "visium_hd_cells",
        tmp_path / "cells" / "outs" / "segmented_outputs" / f"{MATRIX}.h5": "visium_hd_cells",
        tmp_path / "bins" / "filtered_feature_bc_matrix.h5": "visium_hd",
        st: "hest",
        tmp_path / "hest": "hest",
        write_h5ad(tmp_path / "plain", toy_anndata()): "h5ad",
        write_loom(tmp_path / "l.loom"): "loom",
        zarr: "spatialdata",
        zarr / "tables" / "table": "spatialdata",
        counts: "csv",
        tmp_path: None,
        tmp_path / "missing": None,
        tmp_path / ("x" * 5000): None,
    }
    assert {path: detect_format(path, None, None) for path in found} == found
    assert detect_format(legacy.counts, legacy.image, legacy.spots) == "legacy_st"
    assert detect_format(counts, None, cells) == "csv"
    assert detect_format(None, legacy.image, None) == "image"
    assert detect_format(None, None, None) is None
    assert set(READERS) == {f for f in found.values() if f} | {"legacy_st", "image"}


def test_rows_without_a_format(tmp_path: Path) -> None:
    visium_folder(tmp_path / "v")
    legacy, _ = legacy_slide(tmp_path, "A1")
    (tmp_path / "a.svs").write_bytes(b"")
    text = "slide_id,patient_id,counts,image,spots\nv,v,v,,\nA1,A,A1.tsv.gz,,A1_selection.tsv\n"
    (tmp_path / "m.csv").write_text(f"{text}a,a,,a.svs,\n")
    assert [row.format for row in read_manifest(tmp_path / "m.csv")] == [
        "visium",
        "legacy_st",
        "image",
    ]
    (tmp_path / "m.csv").write_text(f"{text}b,b,nothing,,\nc,c,,,\n")
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path / "m.csv")
    assert "row 4: the format of nothing does not show; check the path" in str(caught.value)
    assert "row 5: it names neither counts nor an image" in str(caught.value)
    (tmp_path / "m.csv").write_text("slide_id,patient_id,counts,format\nv,v,v,h5d\n")
    with pytest.raises(DataError, match=r"1 problem: row 2: unknown format 'h5d'"):
        read_manifest(tmp_path / "m.csv")


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_the_shared_data_show_their_formats(tmp_path: Path) -> None:
    rows = draft_manifest(REAL_DATA)
    write_manifest([replace(row, format="") for row in rows], tmp_path / "m.csv")
    found = read_manifest(tmp_path / "m.csv")
    assert [row.format for row in found] == [row.format for row in rows]
