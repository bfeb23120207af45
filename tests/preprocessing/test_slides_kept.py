"""The picture that an AnnData file keeps in uns['spatial'] is a last resort, and said to be one."""

from dataclasses import replace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.patches import PatchConfig
from preprocessing.run.preparation import prepare_slide
from preprocessing.run.sifting import SlideTask
from preprocessing.slide_row import SlideRow
from preprocessing.slides import open_slide
from preprocessing.slides.kept import kept_picture
from preprocessing.store import SlideStore

MPP, SCALE, STEP = 0.5, 0.2, 200.0  # um a pixel; picture's pixels per pixel; pixels between spots


def spots():
    return np.array([(x, y) for y in range(1, 6) for x in range(1, 7)]) * STEP


def picture():
    """(240, 280, 3) uint8, the colour of a place told by its column and row of spots."""
    y, x = np.mgrid[:240, :280] / SCALE / STEP
    shade = [120 + 10 * np.round(x), 40 + 10 * np.round(y), np.full(x.shape, 150)]
    return np.dstack(shade).astype(np.uint8)


def write(path, images, scales=None, libraries=1, xy=None):
    xy = spots() if xy is None else xy
    data = anndata.AnnData(
        csr_matrix(np.ones((len(xy), 4), np.float32)),
        obs=pd.DataFrame(index=[f"s{i}" for i in range(len(xy))]),
        var=pd.DataFrame(index=list("ABCD")),
    )
    data.obsm["spatial"] = xy
    scales = {"tissue_hires_scalef": SCALE} if scales is None else scales
    one = {"images": images, "scalefactors": scales}
    data.uns["spatial"] = {f"lib{i}": one for i in range(libraries)}
    data.write_h5ad(path)
    return SlideRow(path.stem, "p", path, "h5ad", mpp=MPP)


def prepared(row, folder, um=100.0):
    """What became of the slide, and its store's patches by spot, warnings and notes."""
    task = SlideTask(row, folder / f"{row.slide_id}.h5", PatchConfig(um, 32), images="raw")
    result = prepare_slide(task)
    with SlideStore(task.store) as store:
        patches = store.patches(range(store.n_spots)) if store.has_image else None
        return result, patches, store.xy_px0[:], store.warnings, store.attrs["notes"]


@pytest.mark.parametrize(
    ("kind", "turn"),
    [
        ("uint8", lambda p: p),
        ("float", lambda p: (p / np.float32(255)).astype(np.float32)),
        ("opaque", lambda p: np.dstack([p, np.full(p.shape[:2], 255, np.uint8)])),
        ("deep", lambda p: p.astype(np.uint16) * 257),
    ],
)
def test_it_is_read_with_the_colours_of_the_places(tmp_path, kind, turn):
    write(tmp_path / "a.h5ad", {"hires": turn(picture()), "lowres": turn(picture())[::3, ::3]})
    with open_slide(tmp_path / "a.h5ad") as slide:
        assert slide.level_dimensions == ((280, 240),)
        assert np.array_equal(slide.read_region((0, 0), 0, (280, 240)), picture())


def test_it_is_the_last_resort_and_warned_of(tmp_path):
    row = write(tmp_path / "a.h5ad", {"hires": picture()})
    result, patches, xy, warnings, notes = prepared(row, tmp_path)
    assert "WARN: the column image is empty" in result.reason
    assert any("hires (280 x 240 pixels)" in one.message for one in warnings)
    assert any("0.2 of full resolution" in note for note in notes)
    column, line = np.rint(xy / SCALE / STEP).T
    middle = np.stack([patch[16, 16] for patch in patches])
    assert np.array_equal(middle[:, 0], 120 + 10 * column)
    assert np.array_equal(middle[:, 1], 40 + 10 * line)
    assert prepared(row, tmp_path)[0].status == "skipped"
    with SlideStore(tmp_path / "a.h5") as store:
        assert store.mpp == pytest.approx(MPP / SCALE)
        assert np.allclose(store.xy_um[:], store.xy_px0[:] * MPP / SCALE)
    named = replace(row, slide_id="b", image=row.counts, mpp=MPP / SCALE)  # mpp of the image
    result, others, *_ = prepared(named, tmp_path)
    assert "WARN" not in result.reason
    assert np.array_equal(others, patches)


@pytest.mark.parametrize(
    ("um", "shift", "word"), [(7.0, 0.0, "pixels of the image"), (100.0, 9e4, "outside|beyond")]
)
def test_one_that_does_not_fit_leaves_the_counts_and_a_warning(tmp_path, um, shift, word):
    row = write(tmp_path / "a.h5ad", {"hires": picture()}, xy=spots() + shift)
    result, patches, _, warnings, _ = prepared(row, tmp_path, um)
    assert (result.status, result.n_spots) == ("done", 30)
    assert patches is None
    (told,) = [one.message for one in warnings if "is not used" in one.message]
    assert any(one in told for one in word.split("|"))


@pytest.mark.parametrize("case", ["no scale", "two libraries", "no picture", "text"])
def test_none_is_taken_where_none_can_be_placed(tmp_path, case):
    images = {} if case == "no picture" else {"hires": picture()}
    scales = {} if case == "no scale" else None
    row = write(tmp_path / "a.h5ad", images, scales, 2 if case == "two libraries" else 1)
    if case == "text":
        with h5py.File(row.counts, "r+") as file:
            del file["uns/spatial/lib0/images/hires"]
            file["uns/spatial/lib0/images/hires"] = "hires.png"
    assert kept_picture(row.counts) is None
    with pytest.raises(DataError, match="column image"):
        open_slide(row.counts)


def test_values_that_are_no_light_are_refused(tmp_path):
    write(tmp_path / "a.h5ad", {"hires": picture().astype(np.float32) * 4})
    with pytest.raises(DataError, match=r"not 0\.\.1 or 0\.\.255"):
        open_slide(tmp_path / "a.h5ad")
