"""Alignment files of Loupe and Space Ranger: from the pixels of the places to those at hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from hibio.cli.check import check_path
from preprocessing import prepare
from preprocessing.errors import DataError
from preprocessing.image_transform import moved
from preprocessing.manifest import write_manifest
from preprocessing.patches import PatchConfig
from preprocessing.readers.alignment import aligned, find_alignments, read_alignment
from preprocessing.readers.format import source_files
from preprocessing.readers.visium import read_positions
from preprocessing.scale import Statement
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable
from preprocessing.store import SlideStore
from tests.preprocessing.sources import (
    NO_REAL_DATA,
    REAL_DATA,
    hex_positions,
    tissue_image,
    visium_folder,
)

#: Pixels of the microscope (0.5 um) to those of the instrument (5 um): smaller, turned and moved.
TO_CYTASSIST = np.array([[0.0, -0.1, 1500.0], [0.1, 0.0, 300.0], [0, 0, 1]])
ARRAY, _XY = hex_positions(30, 20, 200.0)
MICRO = _XY + 3000.0
CYTA = moved(MICRO, TO_CYTASSIST)
SMALL, LARGE = (3000, 2800), (20000, 16000)  # pictures of the instrument, of the microscope
BACK = np.linalg.inv(TO_CYTASSIST)


def loupe(path: Path, matrix=TO_CYTASSIST, spots=CYTA, *, kind="spots", **more) -> Path:
    """Write a file as Loupe does: of Visium with its spots, of Visium HD, or of pictures alone."""
    told: dict[str, object] = {"serialNumber": "V1-2", "area": "A1", "fiducial": [], "oligo": []}
    if kind == "spots":
        places = zip(ARRAY.tolist(), spots.tolist(), strict=True)
        told["oligo"] = [
            {"row": r, "col": c, "imageX": x, "imageY": y, "dia": 3.0} for (r, c), (x, y) in places
        ]
    if kind == "hd":
        told |= {"oligo": "AAAA", "transform": [0.2, 0, 7, 0, 0.2, 9, 0, 0, 1]}
    if matrix is not None:
        told["cytAssistInfo"] = {"transformImages": np.asarray(matrix).tolist()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told | more))
    return path


def spots_at(xy: np.ndarray, own: float | None = None, *, array: bool = True) -> SpotTable:
    """Spots at places whose pixels are ``own`` um wide, by a file."""
    names = np.array([f"s{i}" for i in range(len(xy))], dtype=object)
    mpp = own or 1.0
    return SpotTable(
        csr_matrix(np.ones((len(xy), 2), dtype=np.int32)),
        names[:2],
        names[:2],
        names,
        xy,
        xy * mpp,
        mpp,
        scale=() if own is None else (Statement(own, "scale factors"),),
        array=ARRAY if array else None,
    )


def sample(folder: Path, image: str = "s_tissue_image.tif", **more) -> SlideRow:
    return SlideRow("s", "p", folder, "visium", image=folder / image, **more)


@pytest.mark.parametrize("kind", ["spots", "hd"])
@pytest.mark.parametrize(
    ("places", "size", "there"),
    [(MICRO, LARGE, MICRO), (MICRO, SMALL, CYTA), (CYTA, LARGE, MICRO), (CYTA, SMALL, CYTA)],
    ids=["m-m", "m-c", "c-m", "c-c"],
)
def test_places_of_one_picture_on_the_other(tmp_path, kind, places, size, there) -> None:
    """Which is which is told by spots or um per pixel, by the picture's size, by what is inside."""
    own = {"spots": None, "hd": 5.0 if places is CYTA else 0.5}[kind]
    loupe(tmp_path / "s_alignment_file.json", kind=kind)
    table = spots_at(places, own, array=kind == "spots")
    found = aligned(sample(tmp_path), table, size, None)
    assert np.abs(found.xy_px0 - there).max() < 1e-6
    assert "s_alignment_file.json" in found.notes[-1]
    assert (found.image_transform is None) == (there is places)
    if own is not None:
        assert found.mpp == pytest.approx(5.0 if there is CYTA else 0.5)
        np.testing.assert_allclose(found.xy_um, found.xy_px0 * found.mpp)


def test_a_new_picture_aligned_after_the_run(tmp_path) -> None:
    """The places are of a picture that no file knows: the array of spots leads there."""
    older = MICRO * 0.7 + np.array([50.0, -20.0])
    table = spots_at(older, 0.5 / 0.7)
    path = loupe(tmp_path / "spatial" / "V1-2-A1.json")
    found = aligned(sample(tmp_path), table, LARGE, 0.5)
    assert np.abs(found.xy_px0 - MICRO).max() < 1e-3
    assert aligned(sample(tmp_path), table, LARGE, 0.5 / 0.7).image_transform is None  # as before
    with pytest.raises(DataError, match="in 2 ways"):
        aligned(sample(tmp_path), table, LARGE, None)
    other = tmp_path / "pictures" / "b.tif"  # elsewhere, and no name says that it is its own
    row = replace(sample(tmp_path / "run"), image=other)
    path.rename(loupe(other.with_name("V1-2-A1.json")))
    found = aligned(row, table, LARGE, None)
    assert (found.warnings, found.notes) == ((), ())
    found = aligned(row, table, SMALL, None)
    assert np.array_equal(found.xy_px0, older)
    assert "V1-2-A1.json may be of another slide" in found.warnings[0].message
    assert "image_transform" in found.warnings[0].fix
    found = aligned(
        replace(row, image_transform=other.with_name("V1-2-A1.json")), table, LARGE, 0.5
    )
    assert np.abs(found.xy_px0 - MICRO).max() < 1e-3


def test_a_file_about_the_instrument_alone_moves_nothing_on_the_microscope(tmp_path) -> None:
    """Space Ranger laid the two pictures over one another itself: there is no transform."""
    path = tmp_path / "s-fiducials-image-registration.json"
    for kind, array in (("spots", True), ("hd", False)):
        loupe(path, None, kind=kind)
        found = aligned(sample(tmp_path), spots_at(MICRO, 0.5, array=array), LARGE, None)
        assert np.array_equal(found.xy_px0, MICRO)
        assert found.warnings == ()
    loupe(path, None)
    found = aligned(sample(tmp_path, "cytassist_image.tiff"), spots_at(MICRO, 0.5), SMALL, None)
    assert np.abs(found.xy_px0 - CYTA).max() < 1e-3  # where the spots of the file lie


def test_two_pictures_of_a_visium_hd_slide(tmp_path) -> None:
    """Old and new alignment: pixels of the first run to those of the finer picture."""
    finer = np.array([[2.0, 0, 30.0], [0, 2.0, -10.0], [0, 0, 1]])
    loupe(tmp_path / "old-registration_alignment.json", kind="hd")
    loupe(tmp_path / "new_alignment.json", TO_CYTASSIST @ np.linalg.inv(finer), kind="hd")
    table = spots_at(MICRO, 0.5, array=False)
    found = aligned(sample(tmp_path), table, (40000, 32000), 0.25)
    assert np.abs(found.xy_px0 - moved(MICRO, finer)).max() < 1e-6
    assert found.mpp == pytest.approx(0.25)
    assert aligned(sample(tmp_path), table, LARGE, 0.5).image_transform is None


def test_names_and_um_per_pixel_decide_where_sizes_do_not(tmp_path) -> None:
    near = np.array([[0.5, 0, 40.0], [0, 0.5, 30.0], [0, 0, 1]])
    loupe(tmp_path / "s_alignment.json", near, kind="plain")
    table = spots_at(CYTA, array=False)
    with pytest.raises(DataError, match=r"in 3 ways; .*image_transform.*shift:0 0.*affine:"):
        aligned(sample(tmp_path), table, LARGE, None)
    table = spots_at(CYTA, 5.0, array=False)
    for mpp, there in ((5.0, CYTA), (2.5, moved(CYTA, np.linalg.inv(near)))):
        assert np.allclose(aligned(sample(tmp_path), table, LARGE, mpp).xy_px0, there)
        row = sample(tmp_path, mpp=mpp)  # the column goes before the file of the image
        assert np.allclose(aligned(row, table, LARGE, 77.0).xy_px0, there)
    loupe(tmp_path / "s_alignment.json", near, kind="hd")
    found = aligned(
        sample(tmp_path, "cytassist_image.tiff"), spots_at(CYTA, 2.5, array=False), LARGE, None
    )
    assert np.allclose(found.xy_px0, moved(CYTA, near))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("{", "is not JSON"),
        ("{}", "neither a transform between pictures"),
        ('{"cytAssistInfo": {"transformImages": [1, 2]}}', "is no alignment of Loupe"),
        ('{"cytAssistInfo": {"transformImages": [0, 0, 0, 0, 0, 0, 0, 0, 1]}}', "not a transform"),
        ('{"cytAssistInfo": {"transformImages": [1,0,0,0,1,0,1e-4,0,1]}}', "no affine one"),
    ],
)
def test_one_that_cannot_be_used_is_named_with_its_reason(tmp_path, told, words) -> None:
    (tmp_path / "s_alignment_file.json").write_text(told)
    table = spots_at(MICRO, 0.5, array=False)
    found = aligned(sample(tmp_path), table, LARGE, 0.5)
    assert np.array_equal(found.xy_px0, MICRO)
    (warning,) = found.warnings
    assert words in warning.message
    assert "s_alignment_file.json" in warning.message
    assert "image_transform" in warning.fix
    row = sample(tmp_path, image_transform=tmp_path / "s_alignment_file.json")
    with pytest.raises(DataError, match=words):
        aligned(row, table, LARGE, 0.5)


def test_one_that_contradicts_what_is_known(tmp_path) -> None:
    path = loupe(tmp_path / "s_alignment_file.json", kind="hd")
    table = spots_at(MICRO, 0.5, array=False)
    (warning,) = aligned(sample(tmp_path), table, LARGE, 2.0).warnings
    assert "no way by it leads the places (0.5 um a pixel)" in warning.message
    assert "20000 x 16000 pixels of 2 um" in warning.message
    loupe(path, None, kind="hd")
    with pytest.raises(DataError, match=r"s_alignment_file\.json is about other pictures"):
        aligned(sample(tmp_path, image_transform=path), table, LARGE, 0.5)


def test_the_file_of_slide_10_is_not_that_of_slide_1(tmp_path) -> None:
    (tmp_path / "S1").mkdir()
    row = SlideRow("S1", "p", tmp_path / "S1", "visium", image=tmp_path / "S1.tif")
    other = loupe(tmp_path / "S10_alignment_file.json")
    assert find_alignments(row) == ([other.resolve()], False)
    own = loupe(tmp_path / "S1_alignment_file.json")
    assert find_alignments(row) == ([own.resolve()], True)


def test_what_the_manifest_says_goes_before_files(tmp_path) -> None:
    loupe(tmp_path / "s_alignment_file.json")
    loupe(tmp_path / "other_alignment.json", area="B1")
    table = spots_at(CYTA)
    for row in (
        sample(tmp_path, image_transform="flip_x"),
        sample(tmp_path, image_scale=1.0),
        sample(tmp_path, "tissue_hires_image.png"),
    ):
        assert aligned(row, table, LARGE, None) is table
    found = aligned(sample(tmp_path), table, LARGE, None)  # of two the one named as the image
    assert np.abs(found.xy_px0 - MICRO).max() < 1e-6
    row = replace(sample(tmp_path), image=tmp_path / "t.tif", slide_id="t")
    found = aligned(row, spots_at(MICRO, 0.5, array=False), LARGE, None)
    assert "are of several slides" in found.warnings[0].message


def test_a_transform_that_is_hardly_bent(tmp_path) -> None:
    bent = np.array([[0.1, 0, 10], [0, 0.1, 20], [1e-9, -1e-9, 1]])
    loupe(tmp_path / "s_alignment.json", bent, kind="hd")
    found = aligned(sample(tmp_path), spots_at(MICRO, 0.5, array=False), SMALL, None)
    there = np.column_stack([MICRO, np.ones(len(MICRO))]) @ bent.T
    assert np.abs(found.xy_px0 - there[:, :2] / there[:, 2:]).max() < 0.05
    assert read_alignment(tmp_path / "s_alignment.json").mpp == pytest.approx(5.0)


def test_from_a_folder_to_its_store(tmp_path) -> None:
    """Places of a Space Ranger run on the instrument's picture; a broken file is doubted."""
    truth = visium_folder(tmp_path / "s")
    array, whole = hex_positions()
    to_cyta = np.array([[0.2, 0, 100.0], [0, 0.2, 90.0], [0, 0, 1]])
    spots = [
        {"row": int(r), "col": int(c), "imageX": x, "imageY": y}
        for (r, c), (x, y) in zip(array, moved(whole, to_cyta), strict=True)
    ]
    path = tmp_path / "s" / "spatial" / "s-fiducials-image-registration.json"
    path.write_text(
        json.dumps({"oligo": spots, "cytAssistInfo": {"transformImages": to_cyta.tolist()}})
    )
    image = tmp_path / "s" / "spatial" / "cytassist_image.png"
    tissue_image(image, 260, 240)
    row = SlideRow("s", "p", tmp_path / "s", "visium", image=image)
    assert source_files(row)[f"alignment/0/{path.name}"].name == path.name
    (result,) = prepare([row], tmp_path / "out", patch=PatchConfig(100.0, 16)).rows
    with SlideStore(tmp_path / "out" / "s.h5") as store:
        assert store.mpp == pytest.approx(10.0)
        order = [truth.barcodes.index(name) for name in store.barcodes]
        assert np.allclose(store.xy_px0[:], moved(truth.xy_px, to_cyta)[order], atol=1e-6)
        assert any(path.name in note for note in store.attrs["notes"])
    path.write_text("[]")
    plain = replace(row, image=tmp_path / "s" / "he.png", slide_id="t")
    tissue_image(tmp_path / "s" / "he.png", 500, 360)
    (result,) = prepare([plain], tmp_path / "out", patch=PatchConfig(100.0, 16)).rows
    assert f"{path.name} is not a JSON object" in result.reason
    write_manifest([plain], tmp_path / "m.csv")
    for place in (tmp_path / "m.csv", tmp_path / "out" / "t.h5"):
        told = [f.message for f in check_path(place) if f.level == "WARN"]
        assert any(f"{path.name} is not a JSON object" in one for one in told)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_a_real_cytassist_array(tmp_path) -> None:
    """4,992 places in pixels of the real instrument picture, on a microscope's as if it was one."""
    frame = read_positions(REAL_DATA / "visium_cytassist_mouse/spatial/tissue_positions.csv")
    xy = frame[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    array = frame[["array_row", "array_col"]].to_numpy()
    angle = np.deg2rad(178.3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    told = np.vstack([np.column_stack([0.117 * turn, [2900.0, 2500.0]]), [0, 0, 1]])
    spots = [
        {"row": int(r), "col": int(c), "imageX": x, "imageY": y}
        for (r, c), (x, y) in zip(array, xy.round(3), strict=True)
    ]
    about = {"oligo": spots, "cytAssistInfo": {"transformImages": told.tolist()}}
    (tmp_path / "s_alignment_file.json").write_text(json.dumps(about))
    assert read_alignment(tmp_path / "s_alignment_file.json").mpp == pytest.approx(4.68, abs=0.03)
    table = replace(spots_at(xy, 4.68, array=False), array=array)
    there = moved(xy, np.linalg.inv(told))
    found = aligned(sample(tmp_path), table, (25000, 21000), None)
    assert np.abs(found.xy_px0 - there).max() < 0.05
    assert found.mpp == pytest.approx(4.68 * 0.117)
    found = aligned(sample(tmp_path, "cytassist_image.tiff"), table, (3000, 3000), None)
    assert found.image_transform is None
    found = aligned(sample(tmp_path), replace(table, xy_px0=there), (25000, 21000), None)
    assert found.image_transform is None
