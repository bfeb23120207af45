"""Stereo-seq GEF: bins equal those of the GEM of the same counts, cells a loop; damage is named."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from preprocessing import DataError
from preprocessing.manifest import draft_manifest
from preprocessing.readers import stereoseq
from preprocessing.readers.format import detect_format, read_spots, source_files
from preprocessing.slide_row import SlideRow

NAMES, IDS = ["B", "A", "A"], ["ENSG2", "ENSG1", "ENSG3"]


def records(seed: int = 0) -> np.ndarray:
    """(60, 4) gene, x, y, count, gene after gene."""
    rng = np.random.default_rng(seed)
    places = rng.integers(0, 250, (60, 2))
    return np.column_stack([np.sort(rng.integers(0, 3, 60)), places, rng.integers(1, 4, 60)])


def structured(columns: dict[str, tuple[str, object]]) -> np.ndarray:
    found = np.zeros(
        len(next(iter(columns.values()))[1]), [(n, t) for n, (t, _) in columns.items()]
    )
    for name, (_, values) in columns.items():
        found[name] = values
    return found


def genes(new: bool, **more) -> np.ndarray:
    """As geftools writes them: gene in old files, geneID and geneName in new ones."""
    named = (
        {"geneID": ("S64", IDS), "geneName": ("S64", NAMES)} if new else {"gene": ("S32", NAMES)}
    )
    return structured(named | more)


def write_bins(path: Path, new: bool = True, nm: int | None = 500, scale: str = "u1") -> Path:
    lines = records()
    count = np.bincount(lines[:, 0], minlength=3)
    offset = np.concatenate([[0], np.cumsum(count)[:-1]])
    with h5py.File(path, "w") as file:
        file["geneExp/bin1/gene"] = genes(new, offset=("u4", offset), count=("u4", count))
        table = {n: ("u4", lines[:, i]) for i, n in enumerate("xy", start=1)}
        data = file.create_dataset(
            "geneExp/bin1/expression", data=structured(table | {"count": (scale, lines[:, 3])})
        )
        data.attrs["minX"] = np.array([900], dtype=np.int32)
        if nm is not None:
            data.attrs["resolution"] = np.array([nm], dtype=np.uint32)
        file["geneExp/bin50/expression"] = structured({"x": ("u4", [0])})
    return path


def write_cells(path: Path) -> dict[tuple[str, int], int]:
    """Six cells of uneven numbers of genes; returns (cell, gene) -> count."""
    rng = np.random.default_rng(1)
    held = [np.sort(rng.permutation(3)[: 1 + i % 3]) for i in range(6)]
    count = rng.integers(1, 300, sum(map(len, held)))
    number = np.array(list(map(len, held)))
    table = {
        "id": ("u4", np.arange(6) + 11),
        "x": ("i4", np.arange(6) * 30),
        "y": ("i4", np.arange(6) ** 2),
        "offset": ("u4", np.cumsum(number) - number),
        "geneCount": ("u2", number),
    }
    with h5py.File(path, "w") as file:
        file["cellBin/cell"] = structured(table)
        file["cellBin/gene"] = genes(True)
        whole = {"geneID": ("u4", np.concatenate(held)), "count": ("u2", count)}
        file["cellBin/cellExp"] = structured(whole)
    cells = np.repeat(np.arange(6) + 11, number)
    places = zip(cells, np.concatenate(held), count, strict=True)
    return {(str(cell), int(gene)): int(n) for cell, gene, n in places}


@pytest.mark.parametrize("bin_um", [None, 2.5])
@pytest.mark.parametrize("new", [True, False])
def test_bins_are_those_of_the_gem(tmp_path: Path, new: bool, bin_um, monkeypatch) -> None:
    monkeypatch.setattr(stereoseq, "_LINES", 7)  # blocks end inside of genes
    columns = "geneID\tgeneName" if new else "geneID"
    lines = [f"#OffsetX=900\n{columns}\tx\ty\tMIDCount"]
    for gene, *numbers in records().tolist():
        named = [IDS[gene], NAMES[gene]] if new else [NAMES[gene]]
        lines.append("\t".join(map(str, [*named, *numbers])))
    (tmp_path / "a.gem").write_text("\n".join(lines) + "\n")
    gem = SlideRow("a", "p", tmp_path / "a.gem", "stereoseq", bin_um=bin_um)
    gef = replace(gem, counts=write_bins(tmp_path / "a.tissue.gef", new))
    one, other = read_spots(gem), read_spots(gef)
    assert (one.counts != other.counts).nnz == 0
    assert one.counts.sum() == records()[:, 3].sum()
    for name in ("gene_names", "gene_ids", "barcodes", "xy_px0", "xy_um"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert (one.pitch_um, one.notes) == (other.pitch_um, other.notes)
    for row in (gem, gef):
        (doubt,) = read_spots(replace(row, image=tmp_path / "whole.tif", mpp=0.5)).warnings
        assert "begin at DNB 900, 0 of the chip" in doubt.message
        assert "shift:900 0" in doubt.fix
    assert detect_format(gef.counts, None, None) == "stereoseq"
    assert source_files(gef) == {"counts": gef.counts}


def test_the_step_of_a_chip_is_what_the_file_says(tmp_path: Path) -> None:
    row = SlideRow("a", "p", write_bins(tmp_path / "a.gef", nm=715, scale="u2"), "stereoseq")
    table = read_spots(row)
    assert table.mpp == pytest.approx(0.715)
    assert table.pitch_um == pytest.approx(71.5)
    with pytest.raises(DataError, match=r"no multiple of 0\.715 um"):
        read_spots(replace(row, bin_um=50.0))
    assert read_spots(replace(row, bin_um=7.15)).pitch_um == pytest.approx(7.15)
    bare = replace(row, counts=write_bins(tmp_path / "b.gef", nm=None))
    assert read_spots(bare).pitch_um == 50.0


def test_cells_are_those_of_a_loop(tmp_path: Path) -> None:
    wanted = write_cells(tmp_path / "a.cellbin.gef")
    row = SlideRow("a", "p", tmp_path / "a.cellbin.gef", "stereoseq")
    table = read_spots(row)
    dense = table.counts.toarray()
    ids = table.gene_ids.tolist()
    assert {
        (str(b), IDS.index(i)): dense[r, ids.index(i)]
        for r, b in enumerate(table.barcodes)
        for i in ids
        if dense[r, ids.index(i)]
    } == wanted
    assert sorted(table.gene_names) == ["A", "A-1", "B"]
    np.testing.assert_allclose(
        table.xy_um, np.column_stack([np.arange(6) * 15, np.arange(6) ** 2 / 2])
    )
    assert table.pitch_um is None
    with pytest.raises(DataError, match=r"cells and no bins; leave bin_um empty.*tissue\.gef"):
        read_spots(replace(row, bin_um=50.0))


def test_one_row_a_chip_is_drafted(tmp_path: Path) -> None:
    write_cells(tmp_path / "C1.cellbin.gef")
    write_cells(tmp_path / "C2.cellbin.gef")
    for name in ("C2.gef", "C2.tissue.gef"):
        write_bins(tmp_path / name)
    (tmp_path / "C3.gem.gz").touch()
    drafted = {row.slide_id: row.counts for row in draft_manifest(tmp_path)}
    found = {name: path.name for name, path in drafted.items() if path is not None}
    assert found == {"C1": "C1.cellbin.gef", "C2": "C2.tissue.gef", "C3": "C3.gem.gz"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.pop("geneExp/bin1"), "bin50, neither geneExp/bin1"),
        (lambda f: f.pop("geneExp/bin1/gene"), "bin1/gene has the columns none"),
        (lambda f: swap(f, "gene", genes(True)), "columns geneID, geneName; expected offset"),
        (lambda f: swap(f, "expression", f["geneExp/bin1/expression"][:-1]), "do not cover"),
        (
            lambda f: f["geneExp/bin1/expression"].attrs.update(resolution=0),
            "resolution 0 nm",
        ),
        (
            lambda f: swap(f, "gene", structured({n: ("u4", [1]) for n in ("offset", "count")})),
            "without a name|do not cover",
        ),
    ],
)
def test_what_is_no_gef_is_refused_by_name(tmp_path: Path, change, words: str) -> None:
    path = write_bins(tmp_path / "a.gef")
    with h5py.File(path, "r+") as file:
        change(file)
    row = SlideRow("a", "p", path, "stereoseq")
    with pytest.raises(DataError, match=words) as told:
        read_spots(row)
    assert "a.gef" in str(told.value)
    path.write_bytes(b"geneID\tx\ty")
    with pytest.raises(DataError, match="not an HDF5 file; expected a GEF"):
        read_spots(row)


def swap(file: h5py.File, name: str, values: np.ndarray) -> None:
    del file[f"geneExp/bin1/{name}"]
    file[f"geneExp/bin1/{name}"] = values


def test_cells_that_do_not_fit_together(tmp_path: Path) -> None:
    write_cells(tmp_path / "a.cellbin.gef")
    row = SlideRow("a", "p", tmp_path / "a.cellbin.gef", "stereoseq")
    with h5py.File(tmp_path / "a.cellbin.gef", "r+") as file:
        counts = file["cellBin/cellExp"][:]
        counts["geneID"][2] = 3
        del file["cellBin/cellExp"]
        file["cellBin/cellExp"] = counts
    with pytest.raises(DataError, match="gene 3 of 3 genes"):
        read_spots(row)
