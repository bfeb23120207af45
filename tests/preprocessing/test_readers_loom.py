"""Loom files: cells, labels and coordinates come out; what is missing is named."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from preprocessing import DataError
from preprocessing.readers.format import read_spots
from tests.preprocessing.cell_sources import (
    CELLS,
    NAMES,
    cell_row,
    draw_counts,
    draw_xy,
    write_loom,
)


def test_valid_cells_labels_and_places(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("preprocessing.readers.hdf5._BLOCK", 13)  # several blocks
    path = write_loom(tmp_path / "a.loom")
    table = read_spots(cell_row(path, "loom"))
    np.testing.assert_array_equal(table.counts.toarray(), draw_counts(CELLS, 5)[2:])
    assert table.gene_names.tolist() == NAMES
    assert table.barcodes[0] == "c2"
    np.testing.assert_allclose(table.xy_um, draw_xy()[2:] * 0.5)
    assert table.labels.columns.tolist() == ["Region"]
    assert table.labels["Region"].tolist()[:2] == ["down", "up"]
    assert "2 cells with Valid 0 left out" in table.notes
    assert any("number columns left out (Area)" in note for note in table.notes)


def test_without_valid_and_cell_names(tmp_path: Path):
    table = read_spots(cell_row(write_loom(tmp_path / "a.loom", Valid=None, CellID=None), "loom"))
    assert table.n_spots == CELLS
    assert table.barcodes.tolist()[:2] == ["0", "1"]
    ones = write_loom(tmp_path / "b.loom", Valid=np.ones(CELLS))
    assert not any("Valid" in note for note in read_spots(cell_row(ones, "loom")).notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"X": None}, r"a\.loom: col_attrs has no columns of coord.*found .*Region.*x_centroid"),
        ({"X": np.full(CELLS, np.nan)}, "10 cells have no finite coordinates.*'c2'"),
        ({"X": np.ones(CELLS), "Y": np.ones(CELLS)}, "all 10 cells have the same"),
        ({"Valid": np.arange(CELLS) == 3}, r"has 1 cell \(c3\)"),
        ({"Valid": np.zeros(CELLS)}, "empty matrix.*12 cells with Valid 0"),
        ({"CellID": ["c"] * CELLS}, "barcodes occur more than once"),
    ],
)
def test_bad_attributes_are_refused(tmp_path: Path, change: dict[str, object], said: str):
    path = write_loom(tmp_path / "a.loom", **change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=said):
        read_spots(cell_row(path, "loom"))


def test_bad_values_and_scale(tmp_path: Path):
    counts = draw_counts(CELLS, 5).astype(float)
    counts[5, 0] = np.nan
    path = write_loom(tmp_path / "a.loom", counts)
    with pytest.raises(DataError, match=r"a\.loom.*nan, cell 'c5', 'G0'"):
        read_spots(cell_row(path, "loom"))
    counts[5, 0] = -1
    with pytest.raises(DataError, match=r"not finite numbers from 0 on \(first: -1\.0, cell 'c5'"):
        read_spots(cell_row(write_loom(tmp_path / "b.loom", counts), "loom", modality="protein"))
    with pytest.raises(DataError, match="mpp is unknown"):
        read_spots(cell_row(write_loom(tmp_path / "c.loom"), "loom", mpp=None))


def test_damaged_files_are_refused(tmp_path: Path):
    path = write_loom(tmp_path / "a.loom")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"truncated or damaged.*loom"):
        read_spots(cell_row(path, "loom"))
    path.write_text("Gene,Cell\n")
    with pytest.raises(DataError, match="not an HDF5 file; expected a loom"):
        read_spots(cell_row(path, "loom"))
    path.write_bytes(whole)
    with h5py.File(path, "r+") as file:
        file["row_attrs"].move("Gene", "Nom")
    with pytest.raises(DataError, match="no row attribute of gene names; found Nom"):
        read_spots(cell_row(path, "loom"))
    with h5py.File(path, "r+") as file:
        file["row_attrs"].move("Nom", "Gene")
        del file["matrix"]
        file["matrix"] = np.ones((4, CELLS))
    with pytest.raises(DataError, match="matrix 4 x 12, but 5 gene names"):
        read_spots(cell_row(path, "loom"))
    with h5py.File(path, "r+") as file:
        del file["matrix"]
    with pytest.raises(DataError, match="has no matrix; expected a loom"):
        read_spots(cell_row(path, "loom"))
