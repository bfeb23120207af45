"""Slides without counts: the grid of windows over the tissue, their store, their checks."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.sparse import csr_matrix

from hibio.cli.check import check_path
from preprocessing import DataError, SlideStore, SpotTable, prepare, read_manifest
from preprocessing.handcrafted import FEATURE_NAMES
from preprocessing.manifest import write_manifest
from preprocessing.patches import PatchConfig, read_patch
from preprocessing.readers.format import read_slide_spots, read_spots, source_files
from preprocessing.run.preparation import prepare_slide
from preprocessing.run.sifting import SlideTask, drop_mask, drop_reasons
from preprocessing.slide_row import SlideRow
from preprocessing.slides import open_slide
from preprocessing.tissue import tissue_fraction, tissue_mask, tissue_pixels
from tests.preprocessing.sources import legacy_slide

SIDE = 20  # pixels of a window: 40 um at 2 um per pixel
PATCH = PatchConfig(40.0, 16)
WIDTH, HEIGHT = 209, 124  # 10 x 6 windows, 4.5 px and 2 px from the edges


def picture(seed: int = 0) -> np.ndarray:
    """Glass, a stained block and a stained disc."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    tissue = ((x < 93) & (y < 87)) | ((x - 150) ** 2 + (y - 80) ** 2 < 30**2)
    noise = np.random.default_rng(seed).integers(-30, 30, (HEIGHT, WIDTH, 1))
    stained = np.clip(np.array([190, 110, 170]) + noise, 0, 255)
    return np.where(tissue[..., None], stained, 255).astype(np.uint8)


@pytest.fixture
def row(tmp_path: Path) -> SlideRow:
    Image.fromarray(picture()).save(tmp_path / "he.png")
    return SlideRow("he", "P", None, "image", image=tmp_path / "he.png", mpp=2.0)


def read(row: SlideRow, patch_um: float = 40.0) -> SpotTable:
    assert row.image is not None
    with open_slide(row.image) as slide:
        return read_slide_spots(row, slide, PatchConfig(patch_um))[0]


def test_windows_are_those_a_slow_loop_finds(row: SlideRow):
    assert row.image is not None
    with open_slide(row.image) as slide:
        mask = tissue_mask(slide)
    assert mask.downsample == 1.0
    expected = {}
    for line in range(6):
        for column in range(10):
            x, y = 4.5 + SIDE * (column + 0.5), 2 + SIDE * (line + 0.5)
            rows = mask.mask[round(y - 10) : round(y + 10)].astype(float)
            left, right = int(x - 10), int(x + 10)  # x - 10 is a half: two columns count half
            area = rows[:, left + 1 : right].sum() + (rows[:, left] + rows[:, right]).sum() / 2
            if area / SIDE**2 >= 0.25:
                expected[f"x{column:04d}_y{line:04d}"] = (x, y)
    table = read(row)
    assert dict(zip(table.barcodes, map(tuple, table.xy_px0), strict=True)) == expected
    assert 15 < table.n_spots < 45
    assert table.counts.shape == (table.n_spots, 0)
    np.testing.assert_array_equal(table.xy_um, 2.0 * table.xy_px0)
    assert f"{60 - table.n_spots} of 60 windows left out: not on tissue" in table.notes


def test_only_the_size_in_pixels_decides_and_pitch_um_makes_it_dense(row: SlideRow):
    table, doubled = read(row), read(replace(row, mpp=4.0), 80.0)
    np.testing.assert_array_equal(table.xy_px0, doubled.xy_px0)
    np.testing.assert_array_equal(2 * table.xy_um, doubled.xy_um)
    dense = read(replace(row, pitch_um=20.0))
    assert np.diff(np.unique(dense.xy_um[:, 0])).min() == pytest.approx(20.0)
    assert 3 * table.n_spots < dense.n_spots < 5 * table.n_spots
    with pytest.raises(DataError, match=r"grid of \d+ x \d+ windows every 0.01 pixels"):
        read(replace(row, pitch_um=0.02))


def test_a_picture_smaller_than_a_window_gives_one(row: SlideRow):
    table = read(row, 300.0)
    assert table.barcodes.tolist() == ["x0000_y0000"]
    np.testing.assert_array_equal(table.xy_px0, [[WIDTH / 2, HEIGHT / 2]])


def test_the_store_is_an_ordinary_one_without_genes(row: SlideRow, tmp_path: Path, monkeypatch):
    sought: list[object] = []
    monkeypatch.setattr(
        "preprocessing.tissue.tissue_pixels", lambda small: sought.append(0) or tissue_pixels(small)
    )
    (result,) = prepare([row], tmp_path / "out", patch=PATCH, images="raw").rows
    assert (result.status, result.reason) == ("done", "27 of 60 windows left out: not on tissue")
    path = tmp_path / "out" / "he.h5"
    with SlideStore(path) as store, open_slide(tmp_path / "he.png") as slide:
        assert (store.n_spots, store.has_image, store.has_counts) == (result.n_spots, True, False)
        assert store.counts().shape == (result.n_spots, 0)
        assert store.patches().shape == (result.n_spots, 16, 16, 3)
        assert store.features("handcrafted").shape == (result.n_spots, 2 * len(FEATURE_NAMES))
        assert len(sought) == 1
        np.testing.assert_array_equal(
            store.tissue_fraction, tissue_fraction(tissue_mask(slide), store.xy_px0, 40.0, 2.0)
        )
        assert store.thumbnail is not None
        assert sorted(store.barcodes) == sorted(read(row).barcodes)
        spot = result.n_spots // 2
        patch = read_patch(slide, tuple(store.xy_px0[spot]), 2.0, 40.0, 16)
        np.testing.assert_array_equal(store.patches([spot])[0], patch)
    (finding,) = check_path(path)
    assert finding.level == "PASS"
    assert "image only, no counts" in finding.message
    (again,) = prepare([row], tmp_path / "out", patch=PATCH, images="raw").rows
    assert again.status == "skipped"
    (wider,) = prepare([row], tmp_path / "out", patch=PatchConfig(80.0, 16)).rows
    assert wider.status == "done"
    assert wider.n_spots < result.n_spots


def test_memory_does_not_grow_with_the_number_of_windows(row: SlideRow, tmp_path: Path):
    """At most a batch of pictures exists at a time, however many windows there are."""
    peaks = []
    for number, pitch in enumerate((20.0, 8.0)):
        tracemalloc.start()
        small = SlideTask(replace(row, pitch_um=pitch), tmp_path / f"{number}.h5", PATCH)
        peaks.append((prepare_slide(small).n_spots, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
    (few, low), (many, high) = peaks
    assert many > 5 * few
    assert few > 64
    features = many * 2 * len(FEATURE_NAMES) * 4
    assert high - low < 4 * features + 2**20


def test_mpp_comes_from_the_manifest_else_from_the_file(row: SlideRow, tmp_path: Path):
    with pytest.raises(DataError, match=r"slide he: mpp is unknown.*manifest column mpp"):
        read(replace(row, mpp=None))
    stated = tmp_path / "stated.tif"
    tifffile.imwrite(stated, picture(), resolution=(5000, 5000), resolutionunit="CENTIMETER")
    own = replace(row, image=stated, mpp=None)
    assert read(own).mpp == pytest.approx(2.0)
    other = read(replace(own, mpp=1.0), 20.0)
    assert other.mpp == 1.0
    assert "1 by the manifest column mpp; 2 by the TIFF res" in other.warnings[0].message


def test_a_slide_of_glass_is_refused(row: SlideRow, tmp_path: Path):
    glass = replace(row, image=tmp_path / "glass.png")
    Image.fromarray(np.full((80, 80, 3), 250, np.uint8)).save(tmp_path / "glass.png")
    with pytest.raises(DataError, match=r"none of its 16 windows of 40 um holds 25% .*--patch-um"):
        read(glass)
    (result,) = prepare([glass], tmp_path, patch=PATCH).failed
    assert result.reason.startswith("slide he: ")
    with pytest.raises(DataError, match="format image needs the column 'image'"):
        read_spots(replace(row, image=None))


def test_labels_join_by_the_names_of_the_windows(row: SlideRow, tmp_path: Path):
    (tmp_path / "labels.csv").write_text("barcode,kind\nx0000_y0000,tumour\nx0009_y0000,glass\n")
    table = read(replace(row, labels=tmp_path / "labels.csv"))
    named = dict(zip(table.barcodes, table.labels["kind"], strict=True))
    assert named["x0000_y0000"] == "tumour"
    assert set(named.values()) == {"tumour", ""}
    assert "labels: 1 rows belong to no spot" in table.notes


HEADER = "slide_id,patient_id,counts,format,image,mpp,spots,image_scale"


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ("he,P,,image,,2,,", "row 2: format image needs the column 'image'"),
        ("he,P,he.png,image,he.png,2,,", "row 2: format image lays its own grid; .*'counts' empty"),
        ("he,P,,image,he.png,2,he.png,0.5", "'spots' empty; row 2: .*'image_scale' empty"),
        ("he,P,,visium,he.png,2,,", "row 2: counts is empty; .*the format 'image'"),
        ("he,P,,legacy_st,he.png,2,,", "counts is empty.*legacy_st needs the column 'spots'"),
        ("he,P,,imag,he.png,2,,", "unknown format 'imag' .did you mean 'image'"),
    ],
)
def test_rows_that_contradict_themselves(row: SlideRow, tmp_path: Path, cells: str, said: str):
    (tmp_path / "m.csv").write_text(f"{HEADER}\n{cells}\n")
    with pytest.raises(DataError, match=said):
        read_manifest(tmp_path / "m.csv")


def test_a_manifest_goes_round_and_is_checked(row: SlideRow, tmp_path: Path):
    write_manifest([row], tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv") == [row]
    assert source_files(row) == {"image": row.image}
    (finding,) = check_path(tmp_path / "m.csv")
    assert finding.level == "PASS"
    assert "image only, no counts: " in finding.message


def test_beside_slides_with_counts(row: SlideRow, tmp_path: Path):
    paired, _ = legacy_slide(tmp_path / "in")
    prepare([row, paired], tmp_path / "out", patch=PATCH)
    found = [str(f) for f in check_path(tmp_path / "out")]
    assert any("only 12 genes are on all slides" in text for text in found)
    assert [text[:4] for text in found if "he.h5" in text] == ["PASS"]


def test_no_genes_are_an_error_for_every_other_format(row: SlideRow):
    table = read(row)
    with pytest.raises(DataError, match=f"empty matrix: {table.n_spots} spots x 0 genes"):
        replace(table, image_only=False)
    with pytest.raises(DataError, match="empty matrix: 0 spots"):
        table.take(np.zeros(0, dtype=np.int64))
    with pytest.raises(DataError, match="gene_ids"):
        replace(table, counts=csr_matrix((table.n_spots, 3), dtype=np.int32))


def test_quality_leaves_out_no_window_for_want_of_counts(row: SlideRow):
    table = read(row)
    assert not drop_mask(table).any()
    fraction = np.ones(table.n_spots)
    fraction[:2] = 0.0
    reasons = drop_reasons(table, fraction)
    assert {name: int(mask.sum()) for name, mask in reasons.items()} == {
        "zero counts": 0,
        "off tissue": 2,
    }
