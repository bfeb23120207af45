"""draft_manifest finds the known layouts, also an unchanged clone of almaan/her2st."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hibio.cli import main
from preprocessing import DataError, SlideStore, prepare, read_manifest
from preprocessing.manifest import draft_manifest, guessed_patients, write_manifest
from preprocessing.patches import PatchConfig
from preprocessing.readers.format import read_spots
from tests.preprocessing.cell_sources import (
    cosmx_folder,
    toy_anndata,
    write_h5ad,
    write_loom,
    write_table,
    xenium_folder,
)
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA, legacy_slide, visium_folder
from tests.preprocessing.test_readers_visium_hd import hd_sample, write_bins


def fake_clone(root: Path) -> Path:
    """Lay out two generated sections as the repository almaan/her2st does."""
    for name in ("A1", "B1"):
        row, truth = legacy_slide(root / "made", name)
        assert row.image is not None
        assert row.spots is not None
        places = {
            row.counts: root / f"her2st/data/ST-cnts/{name}.tsv.gz",
            row.spots: root / f"her2st/data/ST-spotfiles/{name}_selection.tsv",
            row.image: root / f"her2st/data/ST-imgs/{name[0]}/{name}/HE_BT{name}.png",
        }
        for source, target in places.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    labels = ["Row.names\tx\ty\tpixel_x\tpixel_y\tlabel"]
    for barcode in truth.barcodes:
        x, y = barcode.split("x")
        labels.append(f"{x}9x{y}9\t{int(x) + 0.02}\t{int(y) - 0.01}\t1\t2\tkind{int(x) % 2}")
    labels.append("odd\tNA\t\t1\t2\tkind1")
    target = root / "her2st/data/ST-pat/lbl/A1_labeled_coordinates.tsv"
    target.parent.mkdir(parents=True)
    target.write_text("\n".join(labels) + "\n")
    return root / "her2st"


def test_a_draft_that_was_corrected_stays(tmp_path: Path):
    rows, path = draft_manifest(fake_clone(tmp_path)), tmp_path / "manifest.csv"
    write_manifest(rows, path)
    write_manifest(rows, path)
    path.write_text(path.read_text().replace("A1", "mine"))
    with pytest.raises(DataError, match=r"manifest\.csv is there, with other content"):
        write_manifest(rows, path)
    assert "mine" in path.read_text()


@pytest.mark.parametrize("below", ["", "data"])
def test_a_her2st_clone_is_prepared_unchanged(tmp_path: Path, below: str):
    clone = fake_clone(tmp_path)
    write_manifest(draft_manifest(clone / below), tmp_path / "manifest.csv")
    rows = read_manifest(tmp_path / "manifest.csv")
    assert [(r.slide_id, r.patient_id, r.pitch_um) for r in rows] == [
        ("A1", "A", 200.0),
        ("B1", "B", 200.0),
    ]
    report = prepare(tmp_path / "manifest.csv", tmp_path / "out", patch=PatchConfig(200.0, 16))
    assert [row.status for row in report.rows] == ["done", "done"], str(report)
    with SlideStore(tmp_path / "out" / "A1.h5") as store:
        assert store.mpp == pytest.approx(5.0)
        names = zip(store.barcodes, store.labels()["label"], strict=True)
        assert all(label == f"kind{int(name.split('x')[0]) % 2}" for name, label in names)
        assert any("1 rows without a key" in note for note in store.attrs["notes"])


def test_alignment_tables_are_checkerboards(tmp_path: Path):
    row, _ = legacy_slide(tmp_path, "MOB1")
    assert row.spots is not None
    row.spots.rename(tmp_path / "alignment_table_MOB1.tsv")
    (found,) = draft_manifest(tmp_path)
    assert (found.slide_id, found.patient_id, found.pitch_um) == ("MOB1", "MOB1", 100.0)
    assert found.image == tmp_path / "MOB1.png"


def test_space_ranger_folders_and_equal_names(tmp_path: Path):
    visium_folder(tmp_path / "one" / "S1" / "outs")
    visium_folder(tmp_path / "two" / "S2", h5=False, header=False)
    (tmp_path / "two" / "S2" / "layer_labels.csv").write_text("barcode,layer\n")
    rows = draft_manifest(tmp_path)
    assert [(r.slide_id, r.format) for r in rows] == [("S1", "visium"), ("S2", "visium")]
    assert rows[1].labels == tmp_path / "two" / "S2" / "layer_labels.csv"
    visium_folder(tmp_path / "three" / "S2")
    assert [r.slide_id for r in draft_manifest(tmp_path)] == ["S1", "three_S2", "two_S2"]


def test_cell_tables(tmp_path: Path):
    xenium_folder(tmp_path / "x1")
    cosmx_folder(tmp_path / "c1")
    header = ["fov", "x_global_px", "y_global_px"]
    write_table(tmp_path / "c1" / "S_fov_positions_file.csv", header, [[1, 0, 9], [2, 4256, 9]])
    write_h5ad(tmp_path / "files", toy_anndata(), "a b.h5ad")
    write_h5ad(tmp_path / "files", toy_anndata(spatial=None), "no_places.h5ad")
    write_loom(tmp_path / "files" / "l.loom")
    (tmp_path / "files" / "note.loom").write_text("no HDF5")
    damaged = tmp_path / "files" / "cut.h5ad"
    damaged.write_bytes((tmp_path / "files" / "a b.h5ad").read_bytes()[:3000])
    for name in ("a b.png", "a b.tif", "no_places.tif"):
        (tmp_path / "files" / name).write_bytes(b"")
    write_table(tmp_path / "files" / "cells.csv", ["id", "x"], [["a", 1]])
    write_table(tmp_path / "files" / "cell_by_gene.csv", ["id", "A"], [["a", 1]])
    drafted = draft_manifest(tmp_path)
    images = {row.slide_id: row.image for row in drafted if row.image is not None}
    assert images == {"a_b": tmp_path / "files" / "a b.tif"}
    rows = {row.slide_id: (row.format, row.mpp) for row in drafted}
    assert rows == {
        "a_b": ("h5ad", None),
        "c1": ("cosmx", 0.12028),
        "cut": ("h5ad", None),  # prepare says what is wrong with it
        "l": ("loom", None),
        "x1": ("xenium", None),
    }


def test_bins_of_visium_hd(tmp_path: Path):
    hd_sample(tmp_path / "S1", (2, 8, 16))
    hd_sample(tmp_path / "S2", (2, 16))
    write_bins(tmp_path / "one_size", 16)
    rows = {row.slide_id: row for row in draft_manifest(tmp_path)}
    assert {name: (row.format, row.bin_um) for name, row in rows.items()} == {
        "S1": ("visium_hd", 8.0),
        "S2": ("visium_hd", 2.0),
        "one_size": ("visium_hd", 16.0),
    }
    write_manifest(list(rows.values()), tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv") == [rows["S1"], rows["S2"], rows["one_size"]]
    (row,) = draft_manifest(tmp_path / "S1" / "outs")
    assert row.slide_id == "S1"


def test_slide_images_that_belong_to_nothing(tmp_path: Path):
    row, _ = legacy_slide(tmp_path, "MOB1")
    assert row.spots is not None
    assert row.image is not None
    row.spots.rename(tmp_path / "alignment_table_MOB1.tsv")
    row.image.rename(tmp_path / "MOB1.svs")
    for name in ("b one.ndpi", "c.SVS", "d.jpg"):
        (tmp_path / name).write_bytes(b"")
    rows = {r.slide_id: r for r in draft_manifest(tmp_path)}
    assert {name: r.format for name, r in rows.items()} == {
        "MOB1": "legacy_st",
        "b_one": "image",
        "c": "image",
    }
    assert rows["c"].counts is None


def test_files_that_an_archive_renamed(tmp_path: Path):
    for name in ("S1", "S2"):
        visium_folder(tmp_path / name)
    folder = tmp_path / "S1"
    for path in [*folder.glob("*.h5"), *(folder / "spatial").glob("tissue_positions*")]:
        path.rename(path.with_name(f"GSM1_{path.name}"))
    (folder / "spatial" / "scalefactors_json.json").rename(
        folder / "spatial" / "GSM1_scalefactors_json.json"
    )
    first, second = (read_spots(row) for row in draft_manifest(tmp_path))
    assert (first.counts != second.counts).nnz == 0
    assert first.diameter_um == second.diameter_um
    shutil.copy(
        tmp_path / "S2" / "filtered_feature_bc_matrix.h5",
        folder / "GSM2_filtered_feature_bc_matrix.h5",
    )
    first, second = draft_manifest(folder)
    assert (first.slide_id, second.slide_id) == ("GSM1", "GSM2")
    assert read_spots(first).n_spots == 46
    with pytest.raises(DataError, match=r"spatial holds none of tissue_positions"):
        read_spots(second)  # those of GSM1 have the same barcodes, and are not its own
    with pytest.raises(DataError, match=r"holds 2 files \*filtered_feature_bc_matrix.h5 \(GSM1_"):
        read_spots(replace(first, counts=folder, spots=None))


def test_nothing_found_names_the_layouts(tmp_path: Path):
    with pytest.raises(DataError, match=r"no known layout.*spotfiles"):
        draft_manifest(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        draft_manifest(tmp_path / "none")


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_shared_her2st_and_mob():
    rows = {row.slide_id: row for row in draft_manifest(REAL_DATA / "her2st")}
    assert len(rows) == 29
    assert sum(row.image is not None for row in rows.values()) == 7
    assert rows["A1"].image_scale == pytest.approx(2000 / 6954, rel=1e-5)
    assert rows["A2"].image_scale == pytest.approx(2000 / 6966, rel=1e-5)
    assert {i for i, row in rows.items() if row.labels} == {"A1", "B1", "C1", "D1", "E1", "G2"}
    assert {row.patient_id for row in rows.values()} == set("ABCDEG")
    mob = draft_manifest(REAL_DATA / "st_mob")
    assert [row.pitch_um for row in mob] == [100.0, 100.0]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_all_shared_data_are_drafted_and_in_the_manifest():
    """configs/manifests/shared_data.csv; mpp of the TCGA slide and pitch of DCIS are assumed."""
    found = draft_manifest(REAL_DATA)
    path = Path(__file__).resolve().parents[2] / "configs" / "manifests" / "shared_data.csv"
    rows = read_manifest(path, REAL_DATA)
    assert len(found) == len(rows) == 41
    place = {row.counts or row.image: row.format for row in found}
    assert {row.counts or row.image: row.format for row in rows} == place
    used = {row.format for row in rows}
    assert used == {"legacy_st", "visium", "visium_hd", "image", "cosmx", "h5ad", "loom"}
    assert all(row.patient_id.startswith("her2st_") for row in rows if "her2st" in str(row.counts))


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_some_of_the_shared_data_are_prepared(tmp_path: Path):
    names = {"A3": 359, "cosmx_lung12": 120, "CMU-1-Small-Region": 58}
    path = Path(__file__).resolve().parents[2] / "configs" / "manifests" / "shared_data.csv"
    rows = [row for row in read_manifest(path, REAL_DATA) if row.slide_id in names]
    report = prepare(rows, tmp_path, patch=PatchConfig(112.0, 16))
    assert {row.slide_id: row.n_spots for row in report.rows} == names, str(report)


def test_a_patient_is_what_files_say_or_a_guess_that_is_told(tmp_path: Path, capsys):
    """Names that begin alike say nothing, and no patient is called as a machine calls folders."""
    for number in (1, 2, 4):
        row, _ = legacy_slide(tmp_path / "mob", f"MOB{number}")
        assert row.spots is not None
        row.spots.rename(tmp_path / "mob" / f"alignment_table_MOB{number}.tsv")
    visium_folder(tmp_path / "one" / "lung" / "visium" / "outs")
    visium_folder(tmp_path / "two" / "lung" / "Visium")
    xenium_folder(tmp_path / "x7" / "outs")
    write_h5ad(tmp_path / "atlas", toy_anndata(), "adata.h5ad")
    rows = draft_manifest(tmp_path)
    assert {row.slide_id: row.patient_id for row in rows} == {
        name: name for name in ("MOB1", "MOB2", "MOB4", "atlas", "one_lung", "two_lung", "x7")
    }
    assert main(["manifest", str(tmp_path), "--out", str(tmp_path / "m.csv")]) == 0
    told = capsys.readouterr().out
    assert "7 slides of 7 patients" in told
    assert "patient_id is a guess for 7 slides (MOB1, MOB2, MOB4, atlas, ...)" in told


def test_a_stated_patient_is_no_guess(tmp_path: Path):
    clone = fake_clone(tmp_path)
    assert guessed_patients(draft_manifest(clone)) == []
