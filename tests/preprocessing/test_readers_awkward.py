"""Space Ranger's files as R, GEO, Seurat, Macs and hands leave them: read right, or refused.

Every case is the folder of `visium_folder`, changed as its function says.
"""

import gzip
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.io import mmread, mmwrite

from preprocessing import DataError
from preprocessing.manifest import draft_manifest, missing_files, read_manifest, scan_manifest
from preprocessing.readers.format import read_spots, source_files
from preprocessing.slide_row import SlideRow
from preprocessing.store.read import stores_in
from tests.preprocessing.cell_sources import (
    NAMES,
    cell_row,
    csv_pair,
    draw_xy,
    merscope_folder,
    toy_anndata,
    write_h5ad,
    write_loom,
)
from tests.preprocessing.sources import Truth, draw_counts, visium_folder
from tests.preprocessing.test_readers_visium import assert_is

APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(80)
MEX = "filtered_feature_bc_matrix"
POSITIONS = "spatial/tissue_positions.csv"


def row_of(counts: Path, **more: object) -> SlideRow:
    return replace(SlideRow("s", "s", counts, "visium", mpp=2.0), **more)  # type: ignore[arg-type]


def lines_of(path: Path, change: Callable[[str], str]) -> None:
    """Change every line of a text, gzipped or not."""
    packed = path.suffix == ".gz"
    text = gzip.decompress(path.read_bytes()).decode() if packed else path.read_text()
    text = "\n".join(map(change, text.splitlines())) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())


def quoted(line: str) -> str:
    return "\t".join(f'"{cell}"' for cell in line.split("\t"))


def in_words(folder: Path) -> None:
    """in_tissue as R prints a logical."""
    frame = pd.read_csv(folder / POSITIONS)
    frame["in_tissue"] = np.where(frame["in_tissue"] == 1, "TRUE", "FALSE")
    frame.to_csv(folder / POSITIONS, index=False)


def in_quotes(folder: Path) -> None:
    """Matrix files written again by R's write.table."""
    for name in ("features", "barcodes"):
        lines_of(folder / MEX / f"{name}.tsv.gz", quoted)


def without_ending(folder: Path) -> None:
    lines_of(folder / MEX / "barcodes.tsv.gz", lambda line: line.removesuffix("-1"))


def positions_without_ending(folder: Path) -> None:
    lines_of(folder / POSITIONS, lambda line: line.replace("-1,", ",", 1))


def of_seurat(folder: Path) -> None:
    """write.csv of the coordinates of a Seurat object."""
    frame = pd.read_csv(folder / POSITIONS, index_col=0)
    frame.columns = pd.Index(["tissue", "row", "col", "imagerow", "imagecol"])
    frame.index.name = None
    frame.to_csv(folder / POSITIONS, quoting=2)


def broken_factors(folder: Path) -> None:
    path = folder / "spatial/scalefactors_json.json"
    path.write_text(path.read_text().replace("}", ', "regist_target_img_scalef": 0.0}'))


def apple(folder: Path) -> None:
    """An AppleDouble file beside every file."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(APPLE)


def named_features(folder: Path) -> None:
    path = folder / MEX / "features.tsv.gz"
    told = gzip.decompress(path.read_bytes()).decode()
    path.write_bytes(gzip.compress(f"gene_id\tgene_name\ttype\n{told}".encode()))


def turned_matrix(folder: Path) -> None:
    path = folder / MEX / "matrix.mtx"
    mmwrite(path, mmread(path).T.tocoo(), field="integer")


def marked_positions(folder: Path) -> None:
    lines_of(folder / POSITIONS, lambda line: f"S1_{line}" if line.startswith("BC") else line)


def positions_of_r(folder: Path) -> None:
    lines_of(folder / POSITIONS, lambda line: line.replace("-1,", ".1,", 1))


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        (named_features, "first line of the features left out"),
        (turned_matrix, "matrix was barcodes x features; turned round"),
        (marked_positions, "joined without 'S1_', with which all names of one of the tables"),
        (positions_of_r, "joined with '-' for '.' before the last number"),
        (in_words, "2 spots outside the tissue"),
        (in_quotes, ""),
        (without_ending, "joined without the ending '-1'"),
        (positions_without_ending, "joined without the ending '-1'"),
        (of_seurat, "2 spots outside the tissue"),
        (broken_factors, "not used: regist_target_img_scalef 0"),
        (apple, ""),
    ],
)
def test_read_as_the_folder_before_the_change(
    tmp_path: Path, change: Callable[[Path], None], noted: str
):
    truth = visium_folder(tmp_path / "s", h5=False)
    change(tmp_path / "s")
    table = read_spots(row_of(tmp_path / "s"))
    if change in (without_ending, positions_without_ending, marked_positions, positions_of_r):
        bare = [str(name).removesuffix("-1") for name in table.barcodes]
        assert bare == [name.removesuffix("-1") for name in truth.barcodes]
        table = replace(table, barcodes=np.array(truth.barcodes, dtype=object))
    assert_is(table, truth, mpp=2.0)
    assert any(noted in note for note in table.notes)
    (drafted,) = draft_manifest(tmp_path)
    assert drafted.counts == tmp_path / "s"


def flat(folder: Path, marks: tuple[str, ...]) -> list[Truth]:
    """The flat folder of a GEO series: every file with the mark of its sample."""
    truths = []
    folder.mkdir()
    for number, mark in enumerate(marks):
        made = folder.parent / f"made{number}"
        truths.append(visium_folder(made, h5=False, header=False))
        matrix = made / MEX / "matrix.mtx"
        mmwrite(matrix, mmread(matrix) * (number + 1), field="integer")
        for path in [*(made / MEX).iterdir(), *(made / "spatial").iterdir()]:
            shutil.copy(path, folder / f"{mark}{path.name}")
        truths[-1].counts[:] *= number + 1
    return truths


def test_the_flat_folder_of_geo(tmp_path: Path):
    (truth,) = flat(tmp_path / "one", ("GSM1_A_",))
    assert_is(read_spots(row_of(tmp_path / "one")), truth, mpp=2.0)
    (row,) = draft_manifest(tmp_path / "one")
    assert row.slide_id == "GSM1_A"
    assert {path.name.partition("A_")[0] for path in source_files(row).values()} == {"GSM1_"}


def test_several_samples_in_a_flat_folder_are_rows_of_their_own(tmp_path: Path):
    truths = flat(tmp_path / "two", ("GSM1_A_", "GSM2_B_"))
    with pytest.raises(DataError, match="prefixes of their names; write one row a sample"):
        read_spots(row_of(tmp_path / "two"))
    rows = draft_manifest(tmp_path / "two")
    assert [row.slide_id for row in rows] == ["GSM1_A", "GSM2_B"]
    for row, truth in zip(rows, truths, strict=True):
        assert_is(read_spots(replace(row, mpp=2.0)), truth, mpp=2.0)
    alone = row_of(tmp_path / "two" / "GSM2_B_matrix.mtx")  # its positions have its mark
    assert_is(read_spots(alone), truths[1], mpp=2.0)
    (tmp_path / "two" / "GSM1_A_barcodes.tsv.gz").unlink()
    with pytest.raises(DataError, match=r"no GSM1_A_barcodes\.tsv"):
        read_spots(rows[0])


@pytest.mark.parametrize("kind", ["int", "bool", "category", "text"])
def test_in_tissue_of_cells_is_that_of_positions(tmp_path: Path, kind: str):
    data = toy_anndata()
    inside = np.arange(data.n_obs) % 3 > 0
    data.obs["in_tissue"] = {
        "int": inside.astype(int),
        "bool": inside,
        "category": pd.Categorical(inside.astype(int).astype(str)),
        "text": np.where(inside, "TRUE", "FALSE"),
    }[kind]
    table = read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad"))
    assert list(table.barcodes) == list(data.obs_names[inside])
    assert "4 spots outside the tissue (in_tissue 0) left out" in table.notes
    assert "in_tissue" not in table.labels
    data.obs["in_tissue"] = ["maybe", *["1"] * (data.n_obs - 1)]
    with pytest.raises(DataError, match=r"'in_tissue' are neither 1 nor 0.*data row 1, 'maybe'"):
        read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad"))


def test_hidden_files_are_no_stores(tmp_path: Path):
    for name in ("a.h5", "._a.h5"):
        (tmp_path / name).write_bytes(APPLE)
    assert [path.name for path in stores_in(tmp_path)] == ["a.h5"]


def in_layer(folder: Path, name: str) -> tuple[Path, np.ndarray]:
    """An AnnData file whose X is log-normalised, with the counts in a layer."""
    data = toy_anndata()
    counts = data.X.toarray()
    data.layers[name] = data.X.copy()
    data.layers["scaled"] = np.log1p(counts)
    data.X = np.log1p(counts)
    return write_h5ad(folder, data), counts


@pytest.mark.parametrize("name", ["raw_counts", "UMI", "spliced"])
def test_counts_in_a_layer(tmp_path: Path, name: str):
    path, counts = in_layer(tmp_path, name)
    told = rf"Its layers are {name}, scaled; write {name} into the manifest column layer"
    with pytest.raises(DataError, match=told if name < "scaled" else "Its layers are scaled"):
        read_spots(cell_row(path, "h5ad"))
    table = read_spots(cell_row(path, "h5ad", layer=name))
    np.testing.assert_array_equal(table.counts.toarray(), counts)
    assert f"counts are layers['{name}']" in table.notes
    for other, said in (("X", "not non-negative integers"), ("coumts", "no layer 'coumts'")):
        with pytest.raises(DataError, match=said):
            read_spots(cell_row(path, "h5ad", layer=other))


def test_a_layer_of_loom_and_a_format_without_layers(tmp_path: Path):
    path = write_loom(tmp_path / "a.loom")
    with h5py.File(path, "r+") as file:
        file["layers/raw"] = file["matrix"][:] * 3
    plain = read_spots(cell_row(path, "loom"))
    layer = read_spots(cell_row(path, "loom", layer="raw"))
    assert (layer.counts != plain.counts * 3).nnz == 0
    with pytest.raises(DataError, match="no layer 'rawr'"):
        read_spots(cell_row(path, "loom", layer="rawr"))
    text = tmp_path / "m.csv"
    text.write_text("slide_id,patient_id,counts,format,layer\na,a,x.csv,csv,raw\n")
    with pytest.raises(DataError, match="format csv has no layers; leave the column 'layer' empty"):
        read_manifest(text, check_files=False)


@pytest.mark.parametrize("form", ["<f2", ">f2", ">f4", ">i4"])
@pytest.mark.parametrize("dense", [True, False])
def test_numbers_of_other_machines(tmp_path: Path, form: str, dense: bool):
    data = toy_anndata()
    counts = data.X.toarray()
    data.X = counts if dense else data.X
    path = write_h5ad(tmp_path, data)
    with h5py.File(path, "r+") as file:
        for key in ("X",) if dense else ("X/data", "X/indices", "X/indptr"):
            old, attrs = file[key][:], dict(file[key].attrs)
            del file[key]
            file[key] = old.astype(form if key in ("X", "X/data") else ">i8")
            file[key].attrs.update(attrs)
    np.testing.assert_array_equal(read_spots(cell_row(path, "h5ad")).counts.toarray(), counts)


def test_a_filter_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lacks(node: object) -> None:
        raise OSError("Can't synchronously read data (can't open directory (/usr/lib/plugin))")

    monkeypatch.setattr("preprocessing.readers.h5ad.read_matrix", lacks)
    with pytest.raises(DataError, match=r"filter that this HDF5 lacks.*pip install .hibio\[hdf5\]"):
        read_spots(cell_row(write_h5ad(tmp_path, toy_anndata()), "h5ad"))


def with_names(folder: Path, names: list[str]) -> Path:
    data = toy_anndata()
    data.var_names = names
    return write_h5ad(folder, data)


def test_names_of_genomes(tmp_path: Path):
    path = with_names(tmp_path / "a", [f"GRCh38_{name}" for name in NAMES[:4]] + ["EGFP"])
    table = read_spots(cell_row(path, "h5ad"))
    assert table.gene_names.tolist() == [*NAMES[:4], "EGFP"]
    told = "names of genes begin with their genome (GRCh38: 4 genes): prefix removed"
    assert told in table.notes
    mixed = ["GRCh38_G0", "mm10___G1", "GRCh38_G2", "mm10___G3", "EGFP"]
    of_seurat = [name.replace("_", "-") for name in mixed]
    table = read_spots(cell_row(with_names(tmp_path / "d", of_seurat), "h5ad", organism="human"))
    assert table.gene_names.tolist() == ["G0", "G2", "EGFP"]
    path = with_names(tmp_path / "b", mixed)
    with pytest.raises(DataError, match=r"2 genomes.*GRCh38: 2, mm10: 2.*human or mouse.*organism"):
        read_spots(cell_row(path, "h5ad"))
    all_counts = toy_anndata().X.toarray()
    for organism, columns in (("Mouse", [1, 3, 4]), ("Homo sapiens", [0, 2, 4])):
        table = read_spots(cell_row(path, "h5ad", organism=organism))
        np.testing.assert_array_equal(table.counts.toarray(), all_counts[:, columns])
        assert [name.removeprefix("G") for name in table.gene_names[:2]] == list(
            map(str, columns[:2])
        )
    few = ["GRCh38_G0", *NAMES[1:]]  # a name like another, and no reference of several species
    assert read_spots(cell_row(with_names(tmp_path / "c", few), "h5ad")).gene_names[0] == few[0]


def test_control_probes_are_no_genes(tmp_path: Path):
    names = ["NegControlProbe_00042", "BLANK_0001", "deprecated_ENSG1", "BLNK", "NEGR1"]
    table = read_spots(cell_row(with_names(tmp_path / "a", names), "h5ad"))
    assert table.gene_names.tolist() == ["BLNK", "NEGR1"]
    np.testing.assert_array_equal(table.counts.toarray(), toy_anndata().X.toarray()[:, 3:])
    assert any("3 control probes left out (NegControlProbe_00042, BLA" in n for n in table.notes)
    path = with_names(tmp_path / "b", [f"Blank-{i}" for i in range(5)])
    with pytest.raises(DataError, match="5 genes and all are control probes"):
        read_spots(cell_row(path, "h5ad"))


def test_values_that_were_normalised_and_rounded_are_doubted(tmp_path: Path):
    counts = draw_counts(30, 9)
    data = toy_anndata(np.rint(counts / counts.sum(1, keepdims=True) * 1e4))
    (warning,) = read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad")).warnings
    assert "all spots have a total of about 10,000" in warning.message
    assert "raw counts" in warning.fix
    assert read_spots(cell_row(write_h5ad(tmp_path, toy_anndata(counts)), "h5ad")).warnings == ()


def test_tables_in_utf_16(tmp_path: Path):
    first, second, counts = csv_pair(tmp_path)
    row = cell_row(first, "csv", spots=second)
    wanted = read_spots(row)
    for path in (first, second):
        path.write_bytes(path.read_bytes().decode().encode("utf-16"))
    found = read_spots(row)
    np.testing.assert_array_equal(found.counts.toarray(), counts)
    np.testing.assert_array_equal(found.xy_um, wanted.xy_um)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.rds", "an R object; in R, write"),
        ("a.tar.gz", "packed; unpack it and name"),
        ("a.h5ad.gz", "packed; unpack it with gunzip"),
        ("a.XLSX", "a spreadsheet; save it as CSV"),
        ("a.h5mu", "a MuData file; write one modality"),
    ],
)
def test_files_of_other_programs_are_named_with_what_to_do(tmp_path: Path, name: str, words: str):
    (tmp_path / name).write_bytes(b"abc")
    (tmp_path / "m.csv").write_text(f"slide_id,patient_id,counts,format\ns,p,{name},\n")
    problems = scan_manifest(tmp_path / "m.csv")[1] or missing_files(
        cell_row(tmp_path / name, "h5ad")
    )
    assert f"{name} is {words}" in problems[0]
    assert missing_files(cell_row(tmp_path / name, "visium"))[0].endswith(problems[0][-20:])


def test_merscope_on_its_mosaic(tmp_path: Path):
    merscope_folder(tmp_path / "region_0")
    told = np.array([[9.0, 0.5, -40], [0, -9.0, 700], [0, 0, 1]])
    image = tmp_path / "region_0" / "images" / "mosaic_PolyT_z3.tif"
    image.parent.mkdir()
    np.savetxt(image.with_name("micron_to_mosaic_pixel_transform.csv"), told)
    row = SlideRow("s", "p", tmp_path / "region_0", "merscope", image=image)
    table = read_spots(row)
    np.testing.assert_allclose(table.xy_px0, draw_xy() @ told[:2, :2].T + told[:2, 2])
    assert table.mpp == pytest.approx(1 / 9)
    assert source_files(row)["alignment"].name == "micron_to_mosaic_pixel_transform.csv"
    moved = replace(row, image=tmp_path / "region_0" / "mosaic_DAPI_z0.tif")
    np.testing.assert_array_equal(read_spots(moved).xy_px0, table.xy_px0)
    other = replace(row, image=tmp_path / "region_0" / "he.tif", mpp=0.5)
    np.testing.assert_allclose(read_spots(other).xy_px0, draw_xy() * 2)


def test_merscope(tmp_path: Path):
    counts = merscope_folder(tmp_path / "run" / "region_0")
    (row,) = draft_manifest(tmp_path)
    assert (row.format, row.slide_id) == ("merscope", "run_region_0")
    table = read_spots(row)
    np.testing.assert_array_equal(table.counts.toarray(), counts)
    np.testing.assert_allclose(table.xy_um, draw_xy())
    assert table.gene_names.tolist() == NAMES
    assert len(table.barcodes[0]) == 19
    with pytest.raises(DataError, match=r"no cell_by_gene\.csv beside a cell_metadata\.csv"):
        read_spots(replace(row, counts=tmp_path))


@pytest.mark.parametrize("label", [None, "Unnamed: 0"])
@pytest.mark.parametrize("first", [0, 1])
def test_row_numbers_in_front_of_a_table_are_no_ids(tmp_path: Path, label: str | None, first: int):
    xy = draw_xy()
    table = pd.DataFrame({"cell": [f"c{i}" for i in range(len(xy))], "x_um": xy[:, 0]})
    table["y_um"], table["A"], table["B"] = xy[:, 1], range(1, len(xy) + 1), 2
    table.index += first
    table.to_csv(tmp_path / "a.csv", index_label=label)
    found = read_spots(cell_row(tmp_path / "a.csv", "csv", mpp=None))
    assert found.barcodes.tolist() == table["cell"].tolist()
    assert found.gene_names.tolist() == ["A", "B"]
    assert any("row numbers, the ids are 'cell'" in note for note in found.notes)
    table["cell"] = "same"  # then nothing else tells the cells apart
    table.to_csv(tmp_path / "a.csv", index_label=label)
    ids = read_spots(cell_row(tmp_path / "a.csv", "csv", mpp=None)).barcodes.tolist()
    assert ids == [str(first + i) for i in range(len(xy))]


def test_slideseq(tmp_path: Path):
    counts, xy = draw_counts(6, 4), draw_xy(6)
    beads = [f"BEAD{i}" for i in range(6)]
    table = pd.DataFrame(counts.T, pd.Index(list("ABCD"), name="GENE"), beads)
    table.to_csv(tmp_path / "P1.digital_expression.txt.gz", sep="\t")
    places = pd.DataFrame({"barcodes": beads, "xcoord": xy[:, 0], "ycoord": xy[:, 1]})
    places.to_csv(tmp_path / "P1_bead_locations.csv", index=False)
    (row,) = draft_manifest(tmp_path)
    assert row.format == "slideseq"
    with pytest.raises(DataError, match="pixels of the microscope, whose size its files lack"):
        read_spots(row)
    found = read_spots(replace(row, mpp=0.5))
    np.testing.assert_array_equal(found.counts.toarray(), counts)
    np.testing.assert_allclose(found.xy_um, xy / 2)
    assert found.gene_names.tolist() == list("ABCD")


@pytest.mark.parametrize("bin_um", [None, 1.0, 2.5])
@pytest.mark.parametrize("cells", [False, True])
def test_stereoseq_is_summed_as_by_a_loop(tmp_path: Path, bin_um: float | None, cells: bool):
    rng = np.random.default_rng(0)
    lines = [
        (f"G{g}", *map(int, rng.integers(0, 250, 2)), int(c))
        for g, c in zip(rng.integers(0, 3, 60), rng.integers(1, 4, 60), strict=True)
    ]
    head = "#FileFormat=GEMv0.1\n#OffsetX=7\ngeneID\tx\ty\tMIDCount"
    rows = ["\t".join(map(str, (*line, *([i % 5] * cells)))) for i, line in enumerate(lines)]
    text = "\n".join([head + "\tCellID" * cells, *rows]) + "\n"
    (tmp_path / "S.gem.gz").write_bytes(gzip.compress(text.encode()))
    wanted: dict[tuple[str, str], int] = {}
    step = int((bin_um or 50) / 0.5)
    for i, (gene, x, y, count) in enumerate(lines):
        spot = f"{x // step}_{y // step}" if bin_um or not cells else str(i % 5)
        if spot != "0" or bin_um or not cells:
            wanted[spot, gene] = wanted.get((spot, gene), 0) + count
    (row,) = draft_manifest(tmp_path)
    table = read_spots(replace(row, bin_um=bin_um))
    dense = table.counts.toarray()
    found = {
        (str(b), str(g)): int(dense[i, j])
        for i, b in enumerate(table.barcodes)
        for j, g in enumerate(table.gene_names)
        if dense[i, j]
    }
    assert found == wanted
    if bin_um or not cells:
        bins = np.array([list(map(int, b.split("_"))) for b in table.barcodes])
        np.testing.assert_allclose(table.xy_um, (bins + 0.5) * step * 0.5 - 0.25)
    else:
        own = np.array([line[1:3] for i, line in enumerate(lines) if i % 5 == 1])
        np.testing.assert_allclose(table.xy_um[list(table.barcodes).index("1")], own.mean(0) / 2)
    with pytest.raises(DataError, match=r"no multiple of 0\.5 um"):
        read_spots(replace(row, bin_um=0.7))
