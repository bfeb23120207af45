"""check_path: stores, folders of stores and manifests, with FAIL, WARN and PASS."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hibio.cli.check import check_path
from preprocessing import prepare
from preprocessing.findings import Finding, failed
from preprocessing.manifest import write_manifest
from preprocessing.patches import PatchConfig
from tests.preprocessing.cell_sources import cell_row, csv_pair
from tests.preprocessing.sources import draw_counts, legacy_slide, tissue_image, write_legacy_counts
from tests.preprocessing.test_slides_kept import picture, spots, write

PATCH = PatchConfig(200.0, 16)


def messages(findings: list[Finding], level: str) -> str:
    return " / ".join(str(f) for f in findings if f.level == level)


def test_a_store_and_a_folder(tmp_path: Path):
    row, _ = legacy_slide(tmp_path / "in")
    prepare([row], tmp_path / "out", patch=PATCH)
    single = check_path(tmp_path / "out" / "A1.h5")
    assert not failed(single)
    assert "only 12 genes" in messages(single, "WARN")
    (tmp_path / "out" / "B1.h5").write_text("text")
    folder = check_path(tmp_path / "out")
    assert failed(folder)
    assert "B1.h5" in messages(folder, "FAIL")
    assert "only 12 genes" in messages(folder, "WARN")


def test_genes_that_excel_made_dates_of(tmp_path: Path):
    row, truth = legacy_slide(tmp_path / "in")
    genes = ["1-Mar", "2-Sep", *(f"G{i}" for i in range(398))]
    write_legacy_counts(row.counts, draw_counts(30, 400), truth.barcodes, genes)
    assert "2 genes are dates" in str(prepare([row], tmp_path / "out", patch=PATCH))
    write_manifest([row], tmp_path / "m.csv")
    for path in (tmp_path / "out", tmp_path / "m.csv"):
        assert "2 genes are dates (1-Mar, 2-Sep): Excel" in messages(check_path(path), "WARN")


def test_a_whole_slide_passes(tmp_path: Path):
    row, truth = legacy_slide(tmp_path / "in")
    genes = [f"G{i}" for i in range(400)]
    write_legacy_counts(row.counts, draw_counts(30, 400), truth.barcodes, genes)
    prepare([row], tmp_path / "out", patch=PATCH)
    assert [f.level for f in check_path(tmp_path / "out")] == ["PASS"]
    write_manifest([row], tmp_path / "m.csv")
    (finding,) = check_path(tmp_path / "m.csv")
    assert finding.level == "PASS"
    assert "30 spots x 400 genes, 5 um per pixel" in finding.message


def test_stores_of_a_folder_must_fit_together(tmp_path: Path):
    first, _ = legacy_slide(tmp_path / "in", "A1")
    second, _ = legacy_slide(tmp_path / "in", "B1")
    prepare([first], tmp_path / "out", patch=PATCH)
    prepare([second], tmp_path / "out", patch=PatchConfig(100.0, 16))
    (tmp_path / "out" / "C1.h5").write_bytes((tmp_path / "out" / "A1.h5").read_bytes())
    found = messages(check_path(tmp_path / "out"), "FAIL")
    assert "'A1' is in two stores" in found
    assert "100 um / 16 px, 200 um / 16 px" in found


def test_a_manifest_names_each_bad_slide(tmp_path: Path):
    good, _ = legacy_slide(tmp_path, "A1", image=False)
    outside, _ = legacy_slide(tmp_path, "B1")
    assert outside.image is not None
    tissue_image(outside.image, 60, 60)
    rows = [
        good,
        outside,
        replace(good, slide_id="C1", pitch_um=None),
        replace(good, slide_id="D1", counts=tmp_path / "gone.tsv"),
    ]
    write_manifest(rows, tmp_path / "m.csv")
    findings = check_path(tmp_path / "m.csv")
    fails = {f.subject: f.message for f in findings if f.level == "FAIL"}
    assert set(fails) == {"B1", "C1", "D1"}
    assert "lie outside" in fails["B1"]
    assert "mpp is unknown" in fails["C1"]
    assert "gone.tsv does not exist" in fails["D1"]
    assert "A1: no image" in messages(findings, "WARN")
    assert all(f.fix for f in findings)


def test_tables_of_cells_and_of_proteins(tmp_path: Path):
    first, second, counts = csv_pair(tmp_path, draw_counts(30, 12))
    cells = cell_row(first, "csv", spots=second)
    proteins = replace(cells, slide_id="s2", modality="protein")
    lost = replace(cells, slide_id="s3", mpp=None)
    write_manifest([cells, proteins, lost], tmp_path / "m.csv")
    findings = check_path(tmp_path / "m.csv")
    fails = {f.subject: f.message for f in findings if f.level == "FAIL"}
    assert list(fails) == ["s3"]
    assert "mpp is unknown" in fails["s3"]
    assert "s1: only 12 genes" in messages(findings, "WARN")
    assert "s2: only" not in messages(findings, "WARN")
    prepare([cells, proteins], tmp_path / "out")
    findings = check_path(tmp_path / "out")
    assert not failed(findings)
    assert "only 12 genes are on all slides" in messages(findings, "WARN")
    assert "proteins are on all slides" not in messages(findings, "WARN")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.csv", "slide_id,patient\n", "unknown column 'patient'"),
        ("m.csv", "slide_id,patient_id,counts,format\n../x,A,c,visium\n", "not a plain name"),
        ("s.h5", "text", "not a complete HDF5 file"),
    ],
)
def test_bad_files_fail(tmp_path: Path, name: str, content: str, said: str):
    (tmp_path / name).write_text(content)
    findings = check_path(tmp_path / name)
    assert failed(findings)
    assert said in findings[0].message


def test_nothing_there(tmp_path: Path):
    assert "does not exist" in check_path(tmp_path / "none")[0].message
    assert "holds no store" in check_path(tmp_path)[0].message


def test_it_tells_of_a_row_what_prepare_tells(tmp_path: Path):
    """Kept pictures, spots that are left out, and errors that only the picture shows."""
    kept = write(tmp_path / "kept.h5ad", {"hires": picture()})
    beside = write(tmp_path / "beside.h5ad", {"hires": picture()}, xy=spots() + 9e4)
    empty, truth = legacy_slide(tmp_path, "empty")
    counts = draw_counts(30, 400)
    counts[:2] = 0
    write_legacy_counts(empty.counts, counts, truth.barcodes, [f"G{i}" for i in range(400)])
    white, _ = legacy_slide(tmp_path, "white")
    Image.new("RGB", (280, 240), "white").save(white.image)
    rows = [kept, beside, empty, white]
    write_manifest(rows, tmp_path / "m.csv")
    findings = check_path(tmp_path / "m.csv")
    made = {one.slide_id: one for one in prepare(rows, tmp_path / "out", patch=PATCH).rows}
    told = {
        row.slide_id: messages([f for f in findings if f.subject == row.slide_id], "WARN")
        for row in rows
    }
    assert "read is the small picture hires (280 x 240 pixels)" in told["kept"]
    assert "no image: only" not in told["kept"]
    assert "hires (280 x 240 pixels) of uns['spatial'] is not used" in told["beside"]
    assert "no image: only counts can be used" in told["beside"]
    for name, words in (("kept", "read is the small"), ("beside", "is not used")):
        assert made[name].reason.count(words) == told[name].count(words) == 1
    assert "2 spots left out: zero counts" in made["empty"].reason
    assert "2 spots left out: zero counts" in messages(findings, "PASS")
    (failure,) = [f for f in findings if f.level == "FAIL"]
    assert (failure.subject, made["white"].status) == ("white", "failed")
    assert failure.message == made["white"].reason
