"""The readers on the real files of ../shared/data, against what its README states."""

import numpy as np
import pytest

from preprocessing import DataError
from preprocessing.manifest import draft_manifest
from preprocessing.readers.format import read_spots
from preprocessing.slide_row import SlideRow
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA

pytestmark = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)


def her2st(name: str) -> SlideRow:
    return next(row for row in draft_manifest(REAL_DATA / "her2st") if row.slide_id == name)


def test_her2st_a1_has_all_spots_genes_and_labels():
    table = read_spots(her2st("A1"))
    assert table.counts.shape == (346, 15045)
    assert (table.labels["label"] != "").all()
    assert table.mpp * 2000 / 6954 == pytest.approx(0.9203, rel=0.01)  # sections.csv
    assert table.xy_px0.max() < 2000 * 7435 / 6954
    assert {"invasive cancer", "undetermined"} <= set(table.labels["label"])


@pytest.mark.parametrize(("name", "spots", "mpp"), [("E1", 587, 0.6886), ("G2", 467, 0.6883)])
def test_her2st_without_image(name: str, spots: int, mpp: float):
    row = her2st(name)
    table = read_spots(row)
    assert row.image is None
    assert table.n_spots == spots
    assert (table.labels["label"] != "").all()
    assert table.mpp == pytest.approx(mpp, rel=0.01)
    assert any("8 rows without a key" in note for note in table.notes) == (name == "G2")


def test_mob_is_a_checkerboard_of_141_um():
    row = draft_manifest(REAL_DATA / "st_mob")[0]
    table = read_spots(row)
    assert table.counts.shape == (379, 1000)
    gap = np.linalg.norm(table.xy_um[:, None] - table.xy_um[None], axis=2)
    nearest = np.sort(gap, axis=1)[:, 1]
    assert np.median(nearest) == pytest.approx(100 * np.sqrt(2), rel=0.05)


def test_dlpfc_scale_comes_from_the_lattice():
    folder = REAL_DATA / "dlpfc_151510"
    row = SlideRow("d", "d", folder, "visium", labels=folder / "layer_labels.csv")
    table = read_spots(row)
    assert table.counts.shape == (4634, 500)
    assert (table.labels["layer"] != "").sum() == 4595
    assert table.mpp == pytest.approx(0.72, rel=0.01)
    gap = np.linalg.norm(table.xy_um[:200, None] - table.xy_um[None], axis=2)
    assert np.median(np.sort(gap, axis=1)[:, 1]) == pytest.approx(100, rel=0.02)
    image = folder / "spatial" / "tissue_lowres_image.png"
    low = read_spots(SlideRow("d", "d", folder, "visium", image=image))
    assert low.xy_px0.max() < 600
    np.testing.assert_allclose(low.xy_um, table.xy_um)


def test_dcis_grid_needs_its_scale():
    folder = REAL_DATA / "breast_dcis_grid"
    with pytest.raises(DataError, match="mpp is unknown"):
        read_spots(SlideRow("g", "g", folder, "visium"))
    table = read_spots(SlideRow("g", "g", folder, "visium", mpp=0.85))
    assert table.counts.shape == (2172, 36601)
    depth = np.asarray(table.counts.sum(axis=1)).ravel()
    assert np.median(depth) == pytest.approx(600, abs=10)
    pitch = read_spots(SlideRow("g", "g", folder, "visium", pitch_um=100.0))
    assert pitch.mpp == pytest.approx(100 / 117.647, rel=1e-3)


def test_cytassist_and_the_h5_sample():
    table = read_spots(SlideRow("c", "c", REAL_DATA / "visium_cytassist_mouse", "visium"))
    assert table.counts.shape == (2898, 19465)
    sample = REAL_DATA / "reader_samples" / "visium_v1_h5"
    table = read_spots(SlideRow("v", "v", sample, "visium"))
    assert table.counts.shape == (2695, 100)
    assert table.mpp == pytest.approx(100 / 138, rel=0.02)
