"""draft_manifest finds the known layouts, also an unchanged clone of almaan/her2st."""

import shutil
from pathlib import Path

import pytest

from preprocessing import DataError, SlideStore, prepare, read_manifest
from preprocessing.discovery import draft_manifest
from preprocessing.manifest import write_manifest
from preprocessing.patches import PatchConfig
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA, legacy_slide, visium_folder


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
    assert (found.slide_id, found.patient_id, found.pitch_um) == ("MOB1", "MOB", 100.0)
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
