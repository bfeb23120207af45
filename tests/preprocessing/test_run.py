"""prepare: whole slides from files to stores, resuming, and slides that fail."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from hibio.cli.check import check_path
from preprocessing import DataError, SlideStore, prepare, stores_in
from preprocessing import run as run_module
from preprocessing.handcrafted import FEATURE_NAMES, handcrafted_batch
from preprocessing.manifest import draft_manifest, write_manifest
from preprocessing.patches import PatchConfig, read_patch
from preprocessing.run import preparation as slide_result
from preprocessing.run.preparation import prepare_slide
from preprocessing.run.sifting import SlideTask
from preprocessing.slide_row import SlideRow
from preprocessing.slides import open_slide
from preprocessing.store import verify_store
from tests.preprocessing.cell_sources import (
    cell_row,
    cosmx_folder,
    csv_pair,
    toy_anndata,
    write_h5ad,
    write_loom,
    xenium_folder,
)
from tests.preprocessing.sources import (
    NO_REAL_DATA,
    REAL_DATA,
    STEP_PX,
    draw_counts,
    legacy_slide,
    tissue_image,
    visium_folder,
    write_legacy_counts,
)

PATCH = PatchConfig(200.0, 16)


def statuses(report: run_module.PrepareReport) -> dict[str, str]:
    return {row.slide_id: row.status for row in report.rows}


def test_a_store_holds_patches_features_and_counts_of_each_spot(tmp_path: Path):
    row, truth = legacy_slide(tmp_path)
    report = prepare([row], tmp_path / "out", patch=PATCH, images="raw")
    assert (report.rows[0].status, report.rows[0].n_spots) == ("done", 30), str(report)
    assert row.image is not None
    with SlideStore(tmp_path / "out" / "A1.h5") as store, open_slide(row.image) as slide:
        place = [truth.barcodes.index(b) for b in store.barcodes]
        assert store.counts().toarray().tolist() == truth.counts[place].tolist()
        np.testing.assert_allclose(store.xy_um, truth.xy_px[place] * 5.0)
        features = store.features("handcrafted")
        assert features.shape == (30, 2 * len(FEATURE_NAMES))
        for i in (0, 11, 29):
            centre = (float(store.xy_px0[i, 0]), float(store.xy_px0[i, 1]))
            patch = read_patch(slide, centre, store.mpp, 200.0, 16)
            np.testing.assert_array_equal(store.patches([i])[0], patch)
            wide = (read_patch(slide, centre, store.mpp, um, 64) for um in (200.0, 600.0))
            both = handcrafted_batch(np.stack(list(wide))).ravel()
            np.testing.assert_allclose(features[i], both, rtol=2e-3, atol=1e-4)
    assert {f.level for f in verify_store(tmp_path / "out" / "A1.h5")} == {"WARN"}


def test_without_a_width_the_patch_follows_the_array_and_the_table_says_so(tmp_path: Path):
    row, _ = legacy_slide(tmp_path)
    report = prepare([row], tmp_path / "out", patch=PatchConfig(patch_px=16))
    prepare([row], tmp_path / "given", patch=PATCH)
    assert report.rows[0].patch_um == 200.0
    assert "200.0" in str(report).splitlines()[1]
    assert "a model reads one width" not in str(report)  # all of one width
    with (
        SlideStore(tmp_path / "out" / "A1.h5") as ours,
        SlideStore(tmp_path / "given" / "A1.h5") as other,
    ):
        np.testing.assert_array_equal(ours.patches(), other.patches())
        assert ours.attrs["patch_um"] == 200.0
        assert "patches are 200 um wide, the pitch of the array" in ours.attrs["notes"]
        assert not any(note.startswith("patches") for note in other.attrs["notes"])
    again = prepare([row], tmp_path / "out", patch=PatchConfig(patch_px=16))
    assert (again.rows[0].status, again.rows[0].patch_um) == ("skipped", 200.0)


def test_spots_lie_along_a_curve(tmp_path: Path):
    row, _ = legacy_slide(tmp_path, columns=16, rows=16, image=False)
    prepare([row], tmp_path / "out", patch=PATCH)
    with SlideStore(tmp_path / "out" / "A1.h5") as store:
        steps = np.linalg.norm(np.diff(store.xy_um, axis=0), axis=1)
        assert not store.has_image
    assert np.median(steps) == pytest.approx(200.0)


def test_skipping_depends_on_sources_and_settings(tmp_path: Path):
    row, _ = legacy_slide(tmp_path)
    out = tmp_path / "out"
    assert statuses(prepare([row], out, patch=PATCH)) == {"A1": "done"}
    before = (out / "A1.h5").read_bytes()
    again = prepare([row], out, patch=PATCH)
    assert (again.rows[0].status, again.rows[0].n_spots) == ("skipped", 30)
    assert (out / "A1.h5").read_bytes() == before
    assert statuses(prepare([row], out, patch=PatchConfig(150.0, 16))) == {"A1": "done"}
    assert statuses(prepare([replace(row, mpp=4.9)], out, patch=PATCH)) == {"A1": "done"}
    assert statuses(prepare([replace(row, mpp=4.9)], out, patch=PATCH)) == {"A1": "skipped"}
    assert row.image is not None
    tissue_image(row.image, 7 * STEP_PX, 6 * STEP_PX, seed=5)
    assert statuses(prepare([replace(row, mpp=4.9)], out, patch=PATCH)) == {"A1": "done"}
    (out / "A1.h5").write_bytes(before[:-500])
    assert statuses(prepare([row], out, patch=PATCH)) == {"A1": "done"}


def test_left_out_spots_are_counted_in_the_report_and_the_store(tmp_path: Path):
    row, truth = legacy_slide(tmp_path)
    counts = truth.counts.copy()
    counts[4] = 0
    write_legacy_counts(row.counts, counts, truth.barcodes, truth.genes)
    assert row.spots is not None
    text = row.spots.read_text().splitlines()
    cells = text[1].split("\t")
    text[1] = "\t".join([*cells[:4], "1.0", "1.0", "1"])  # on the white margin
    row.spots.write_text("\n".join(text))
    report = prepare([row], tmp_path / "out", patch=PatchConfig(50.0, 16))
    result = report.rows[0]
    assert (result.status, result.n_spots) == ("done", 28)
    assert "1 spots left out: zero counts" in result.reason
    assert "1 spots left out: off tissue" in str(report)
    with SlideStore(tmp_path / "out" / "A1.h5") as store:
        assert store.attrs["dropped"] == {"zero counts": 1, "off tissue": 1}
        assert {truth.barcodes[0], truth.barcodes[4]}.isdisjoint(store.barcodes)


def test_one_bad_slide_never_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good, _ = legacy_slide(tmp_path, "A1", image=False)
    outside, _ = legacy_slide(tmp_path, "B1")
    assert outside.image is not None
    tissue_image(outside.image, 60, 60)
    gone = replace(good, slide_id="C1", counts=tmp_path / "gone.tsv")
    odd = replace(good, slide_id="D1")
    write_manifest([outside, gone, odd, good], tmp_path / "manifest.csv")

    def failing(task: SlideTask) -> object:
        if task.row.slide_id == "D1":
            raise ZeroDivisionError("division by zero")
        return prepare_slide(task)

    monkeypatch.setattr(slide_result, "prepare_slide", failing)
    report = prepare(tmp_path / "manifest.csv", tmp_path / "out", patch=PATCH)
    assert [row.slide_id for row in report.rows] == ["B1", "C1", "D1", "A1"]
    assert [row.status for row in report.rows] == ["failed", "failed", "failed", "done"]
    reasons = [row.reason for row in report.failed]
    assert "lie outside the picture" in reasons[0]
    assert "gone.tsv does not exist" in reasons[1]
    assert reasons[2] == "unexpected ZeroDivisionError: division by zero"
    assert all("\n" not in row.reason for row in report.rows)
    assert [p.name for p in stores_in(tmp_path / "out")] == ["A1.h5"]


def test_worker_processes_give_the_same_stores(tmp_path: Path):
    visium_folder(tmp_path / "V1")
    rows = [SlideRow("V1", "V", tmp_path / "V1", "visium"), legacy_slide(tmp_path, "A1")[0]]
    bad = replace(rows[1], slide_id="X1", spots=tmp_path / "none.tsv")
    alone = prepare([*rows, bad], tmp_path / "one", patch=PATCH)
    pooled = prepare([*rows, bad], tmp_path / "two", patch=PATCH, workers=2)
    assert statuses(alone) == statuses(pooled) == {"V1": "done", "A1": "done", "X1": "failed"}
    for first, second in zip(stores_in(tmp_path / "one"), stores_in(tmp_path / "two"), strict=True):
        with SlideStore(first) as a, SlideStore(second) as b:
            assert a.barcodes.tolist() == b.barcodes.tolist()
            assert (a.counts() != b.counts()).nnz == 0
            if a.has_image:
                np.testing.assert_array_equal(a.patches(), b.patches())


def test_ctrl_c_leaves_whole_stores_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [legacy_slide(tmp_path, name)[0] for name in ("A1", "B1")]
    real = slide_result.prepare_slide

    def interrupted(task: SlideTask) -> object:
        if task.row.slide_id == "B1":

            def broken(*given: object, **named: object) -> None:
                raise KeyboardInterrupt

            monkeypatch.setattr(h5py.Dataset, "resize", broken)
        return real(task)

    monkeypatch.setattr(slide_result, "prepare_slide", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(rows, tmp_path / "out", patch=PATCH)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["A1.h5"]


def test_bad_arguments_and_manifests(tmp_path: Path):
    row, _ = legacy_slide(tmp_path, image=False)
    with pytest.raises(DataError, match="workers is -1"):
        prepare([row], tmp_path / "out", workers=-1)
    with pytest.raises(DataError, match="minutes is 0"):
        prepare([row], tmp_path / "out", minutes=0)
    with pytest.raises(DataError, match="choose jpeg or raw"):
        prepare([row], tmp_path / "out", images="png")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="same slide_id"):
        prepare([row, row], tmp_path / "out")
    (tmp_path / "m.csv").write_text("slide_id,patient_id,counts,format\n../x,A,c,visium\n")
    with pytest.raises(DataError, match="not a plain name"):
        prepare(tmp_path / "m.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_slide_fails_with_its_reason(tmp_path: Path):
    row, truth = legacy_slide(tmp_path, image=False)
    write_legacy_counts(row.counts, 0 * draw_counts(30, 12), truth.barcodes, truth.genes)
    (result,) = prepare([row], tmp_path / "out").rows
    assert result.status == "failed"
    assert "no spot of 30 is left (30 zero counts)" in result.reason


def test_cells_of_every_format_become_stores(tmp_path: Path):
    first, second, _ = csv_pair(tmp_path)
    xenium_folder(tmp_path / "xenium")
    cosmx_folder(tmp_path / "cosmx")
    rows = [
        cell_row(first, "csv", spots=second),
        cell_row(first, "csv", spots=second, modality="protein", outcome="1"),
        cell_row(write_h5ad(tmp_path, toy_anndata()), "h5ad"),
        cell_row(write_loom(tmp_path / "a.loom"), "loom"),
        cell_row(tmp_path / "xenium", "xenium", mpp=None),
        cell_row(tmp_path / "cosmx", "cosmx"),
        cell_row(first, "csv", spots=second, mpp=None),
    ]
    rows = [replace(row, slide_id=f"s{i}") for i, row in enumerate(rows)]
    report = prepare(rows, tmp_path / "out")
    assert list(statuses(report).values()) == ["done"] * 6 + ["failed"], str(report)
    assert [row.n_spots for row in report.rows] == [12, 12, 12, 10, 12, 10, 0]
    assert "mpp is unknown" in report.rows[6].reason
    with SlideStore(tmp_path / "out" / "s1.h5") as store:
        assert (store.modality, store.outcome) == ("protein", "1")
        assert store.counts().dtype == np.float32
        order = [int(name[1:]) for name in store.barcodes]
        np.testing.assert_array_equal(store.counts().toarray(), draw_counts(12, 5)[order])
    assert all(
        f.level != "FAIL" for path in stores_in(tmp_path / "out") for f in verify_store(path)
    )
    assert statuses(prepare(rows[:2], tmp_path / "out")) == {"s0": "skipped", "s1": "skipped"}
    changed = replace(rows[1], outcome="0")
    assert statuses(prepare([changed], tmp_path / "out")) == {"s1": "done"}


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_real_sections_become_valid_stores(tmp_path: Path):
    wanted = ("A1", "B4", "E1")
    rows = [r for r in draft_manifest(REAL_DATA / "her2st") if r.slide_id in wanted]
    report = prepare(rows, tmp_path, patch=PatchConfig(200.0, 64))
    assert set(statuses(report).values()) == {"done"}, str(report)
    spots = {"A1": 346, "B4": 283, "E1": 587}
    for path in stores_in(tmp_path):
        with SlideStore(path) as store:
            dropped = sum(store.attrs["dropped"].values())
            assert store.n_spots + dropped == spots[store.slide_id]
            assert dropped <= 5
            if store.slide_id == "A1":
                assert "black background read as white" in store.attrs["notes"]
                assert (store.patches().mean(axis=(1, 2, 3)) < 250).all()
        assert all(f.level != "FAIL" for f in verify_store(path))


def test_what_a_slide_is_for_is_taken_over_without_preparing_it_again(tmp_path: Path, monkeypatch):
    row, _ = legacy_slide(tmp_path)
    out = tmp_path / "out"
    prepare([row], out, patch=PATCH)
    with SlideStore(out / "A1.h5") as store:
        parts, seal = store.parts(), store.attrs["content_sha256"]
        assert store.role == ""
    assert {"counts", "genes", "coordinates", "patches", "features/handcrafted"} == set(parts)
    monkeypatch.setattr(slide_result, "_write", lambda *_: pytest.fail("the slide is read again"))
    said = replace(row, role="test", patient_id="P9", outcome="1")
    (result,) = prepare([said], out, patch=PATCH).rows
    assert result.status == "done"
    assert "same content; patient_id is now 'P9', role is now 'test'" in result.reason
    with SlideStore(out / "A1.h5") as store:
        assert (store.role, store.patient_id, store.outcome) == ("test", "P9", "1")
        assert store.parts() == parts
        assert store.attrs["content_sha256"] != seal
    assert {f.level for f in verify_store(out / "A1.h5")} == {"WARN"}
    assert statuses(prepare([said], out, patch=PATCH)) == {"A1": "skipped"}


def test_parts_tell_what_was_replaced(tmp_path: Path):
    row, _ = legacy_slide(tmp_path)
    prepare([row], tmp_path / "one", patch=PATCH)
    prepare([replace(row, slide_id="again")], tmp_path / "one", patch=PATCH)
    prepare([row], tmp_path / "wide", patch=PatchConfig(150.0, 16))
    with (
        SlideStore(tmp_path / "one" / "A1.h5") as first,
        SlideStore(tmp_path / "one" / "again.h5") as copy,
        SlideStore(tmp_path / "wide" / "A1.h5") as wide,
    ):
        assert first.parts() == copy.parts()
        assert {k for k, v in first.parts().items() if wide.parts()[k] != v} == {
            "patches",
            "features/handcrafted",
        }
    with h5py.File(tmp_path / "one" / "again.h5", "r+") as file:  # as an older version wrote it
        kept = dict(file["spots/xy_um"].attrs)
        del file["spots/xy_um"].attrs["sha256"]
    assert "sha256" in kept
    with SlideStore(tmp_path / "one" / "again.h5") as copy:
        assert copy.parts() == parts_of(tmp_path / "one" / "A1.h5")


def parts_of(path: Path) -> dict[str, str]:
    with SlideStore(path) as store:
        return store.parts()


@pytest.mark.parametrize("cropped", ["left", "right"])
def test_spots_beyond_the_picture_are_left_out_and_said(tmp_path: Path, cropped: str):
    """A picture cut by one column of spots; cut to less than half it is another picture."""
    row, truth = legacy_slide(tmp_path)
    picture = Image.open(row.image)
    width, height = picture.size
    left = 60 if cropped == "left" else 0
    picture.crop((left, 0, left + width - 60, height)).save(row.image)
    row = replace(row, image_transform=f"shift:{-left} 0")
    inside = (truth.xy_px[:, 0] > left) & (truth.xy_px[:, 0] < left + width - 60)
    gone = int((~inside).sum())
    report = prepare([row], tmp_path / "out", patch=PATCH)
    said = f"{gone} of 30 spots are left out: centre beyond the edge of the picture of "
    said += f"{width - 60} x {height} pixels"
    assert 0 < gone < 15
    assert said in str(report)
    with SlideStore(tmp_path / "out" / "A1.h5") as store:
        assert sorted(store.barcodes) == sorted(np.array(truth.barcodes)[inside])
        assert gone in store.attrs["dropped"].values()
        assert said in store.warnings[0].message
    write_manifest([row], tmp_path / "m.csv")
    assert any(said in finding.message for finding in check_path(tmp_path / "m.csv"))
    picture.crop((left, 0, left + 70, height)).save(row.image)
    assert "lie outside the picture" in prepare([row], tmp_path / "out").failed[0].reason
