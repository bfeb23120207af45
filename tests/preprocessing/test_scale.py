"""Statements of the scale are compared in one place: who wins, what is an error, what a warning."""

import json
from collections.abc import Callable
from html import unescape
from pathlib import Path

import anndata
import numpy as np
import pytest
import tifffile
from PIL import Image

from hibio.cli.check import check_path
from preprocessing.errors import DataError
from preprocessing.manifest import write_manifest
from preprocessing.patches import PatchConfig
from preprocessing.qc import qc_folder
from preprocessing.readers.format import read_slide_spots, read_spots
from preprocessing.run import prepare
from preprocessing.scale import (
    Statement,
    check_patch,
    check_ranges,
    compare_scale,
    hexagonal_spacing,
    spacing_um,
)
from preprocessing.slide_row import SlideRow
from preprocessing.slides import open_slide
from preprocessing.store import SlideStore, verify_store
from tests.preprocessing.sources import draw_counts, hex_positions, tissue_image, visium_folder
from tests.preprocessing.test_slides_kept import picture
from tests.preprocessing.test_slides_kept import write as kept

FILE, ARRAY = Statement(0.5, "file", of_image=True), Statement(0.5, "array")
COLUMN = Statement(0.5, "column mpp", of_image=True, decides=True)


def said(one: Statement, mpp: float, **more: bool) -> Statement:
    return Statement(mpp, f"other {one.source}", one.of_image, **more)


@pytest.mark.parametrize(
    ("statements", "warned"),
    [
        ([FILE], False),
        ([FILE, said(ARRAY, 0.508)], False),
        ([FILE, said(ARRAY, 0.53)], True),
        ([FILE, ARRAY, said(ARRAY, 0.47)], True),
        ([COLUMN, said(FILE, 5.0)], True),
        ([COLUMN, said(FILE, 5.0), said(ARRAY, 0.05)], True),
        ([FILE, said(FILE, 0.25, replaced=True), ARRAY], True),
    ],
)
def test_small_differences_are_told(statements: list[Statement], warned: bool) -> None:
    found = compare_scale(statements)
    assert bool(found) == warned
    for warning in found:
        assert all(f"{one.mpp:.4g} by {one.source}" in warning.message for one in statements)
        assert "column" in warning.fix


@pytest.mark.parametrize(
    ("statements", "decides"),
    [
        ([FILE, said(ARRAY, 0.56)], "the manifest column mpp, which decides"),
        ([FILE, ARRAY, said(ARRAY, 0.44)], "the manifest column mpp, which decides"),
        ([FILE, said(FILE, 0.25, replaced=True)], "the manifest column mpp, which decides"),
        ([COLUMN, said(ARRAY, 1.0, decides=True)], "correct one, or leave it empty"),
    ],
)
def test_contradictions_show_all_and_who_decides(statements: list[Statement], decides: str) -> None:
    with pytest.raises(DataError, match=decides) as error:
        compare_scale(statements)
    assert all(f"{one.mpp:.4g} by {one.source}" in str(error.value) for one in statements)


def test_ranges() -> None:
    grid = np.argwhere(np.ones((8, 8))) * 100.0
    assert check_ranges(0.5, grid, [FILE]) == []
    assert check_ranges(None, grid, []) == []
    for mpp, xy in ((90.0, grid), (0.01, grid), (None, grid * 10), (0.5, grid / 1000)):
        with pytest.raises(DataError, match=r"not plausible.*manifest column mpp decides"):
            check_ranges(mpp, xy, [FILE])
        assert "not plausible" in check_ranges(mpp, xy, [COLUMN])[0].message
    assert check_patch(112.0, 0.5) == []
    assert "11.2 pixels" in check_patch(112.0, 10.0)[0].message
    with pytest.raises(DataError, match=r"3\.7 pixels of the image"):
        check_patch(112.0, 30.0)


def test_spacings_against_all_pairs() -> None:
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 1000, (60, 2))
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2) + np.diag(np.full(60, np.inf))
    assert spacing_um(xy) == pytest.approx(np.median(distance.min(axis=1)))
    assert spacing_um(np.vstack([xy, xy])) == pytest.approx(np.median(distance.min(axis=1)))
    assert spacing_um(xy[:1]) is None
    assert hexagonal_spacing(xy) is None
    lattice = hex_positions(8, 9, 40.0)[1]
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert hexagonal_spacing(3 * lattice @ turn + 7) == pytest.approx(120.0)
    assert hexagonal_spacing(np.argwhere(np.ones((9, 9))) * 40.0) is None


def tiff(path: Path, mpp: float | None, ome: float | None = None) -> Path:
    """A stained picture that states its scale in the tags, and in OME."""
    tissue_image(path.with_suffix(".png"), 520, 340)
    pixels = np.asarray(Image.open(path.with_suffix(".png")))
    options = {} if mpp is None else {"resolution": (1e4 / mpp,) * 2, "resolutionunit": 3}
    if ome is not None:
        options["metadata"] = {"axes": "YXS", "PhysicalSizeX": ome, "PhysicalSizeY": ome}
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(128, 128), **options)
    return path


@pytest.mark.parametrize("backend", ["auto", "openslide"])
def test_what_a_picture_says(tmp_path: Path, backend: str) -> None:
    with open_slide(tiff(tmp_path / "he.tif", 0.5), backend=backend) as slide:
        assert [one.mpp for one in slide.scale] == pytest.approx([0.5])
        assert slide.scale[0].of_image
        assert "TIFF resolution" in slide.scale[0].source
    if backend == "auto":
        with open_slide(tiff(tmp_path / "he.ome.tif", 0.25, 0.5)) as slide:
            assert slide.mpp == 0.5
            assert [one.mpp for one in slide.scale] == pytest.approx([0.5, 0.25])


def visium(folder: Path) -> SlideRow:
    visium_folder(folder)  # 50 px a spot: 2 um a pixel
    return SlideRow("S1", "P1", folder, "visium", technology="Visium")


def h5ad(folder: Path) -> SlideRow:
    array, xy = hex_positions()
    data = anndata.AnnData(draw_counts(len(array), 9).astype(np.float32))
    data.obs_names = [f"BC{i}-1" for i in range(len(array))]
    data.obsm["spatial"] = xy
    data.uns["spatial"] = {"a": {"scalefactors": {"spot_diameter_fullres": 27.5}}}
    data.write_h5ad(folder / "a.h5ad")
    return SlideRow("S1", "P1", folder / "a.h5ad", "h5ad")


def read(row: SlideRow) -> object:
    if row.image is None:
        return read_spots(row)
    with open_slide(row.image) as slide:
        return read_slide_spots(row, slide, PatchConfig(112.0))[0]


@pytest.mark.parametrize("write", [visium, h5ad])
def test_a_picture_against_the_lattice(tmp_path: Path, write) -> None:
    row = write(tmp_path)
    assert read(row).mpp == pytest.approx(2.0)
    for mpp, says in ((2.0, 0), (2.1, 1)):
        image = tiff(tmp_path / f"he{mpp}.tif", mpp)
        table = read(SlideRow(**(vars(row) | {"image": image})))
        assert table.mpp == pytest.approx(mpp)
        assert len(table.warnings) == says
    image = tiff(tmp_path / "he.tif", 1.0)
    with pytest.raises(DataError, match=r"1 by the TIFF resolution.*2 by 100 um between neigh"):
        read(SlideRow(**(vars(row) | {"image": image})))
    decided = read(SlideRow(**(vars(row) | {"image": image, "mpp": 2.0})))
    assert decided.mpp == 2.0
    assert len(decided.warnings) == 1


def test_the_pictures_own_statements_are_compared(tmp_path: Path) -> None:
    row = SlideRow(
        "S1", "P1", visium(tmp_path).counts, "visium", tiff(tmp_path / "a.ome.tif", 1, 2)
    )
    with pytest.raises(DataError, match=r"2 by PhysicalSize \(OME\).*1 by the TIFF resolution"):
        read(row)


def test_scale_of_coordinates_follows_a_transform_that_enlarges(tmp_path: Path) -> None:
    """Without a word of the image the lattice gives the scale: on a picture twice as fine, half."""
    row = visium(tmp_path)
    image = tmp_path / "he.png"
    tissue_image(image, 1040, 680)
    bare = read(row)
    turned = SlideRow(**(vars(row) | {"image": image, "image_transform": "affine:2 0 0 0 2 0"}))
    table = read(turned)
    assert table.mpp == pytest.approx(1.0)
    np.testing.assert_allclose(table.xy_px0, 2 * bare.xy_px0)
    np.testing.assert_allclose(table.xy_um, bare.xy_um)
    assert table.diameter_um == pytest.approx(bare.diameter_um)
    stated = tiff(tmp_path / "he.tif", 1.0)  # and a statement of the picture agrees with it
    assert read(SlideRow(**(vars(turned) | {"image": stated}))).warnings == ()


def of_two_scales(folder: Path) -> SlideRow:
    return SlideRow(**(vars(visium(folder)) | {"image": tiff(folder / "he.tif", 2.1)}))


def beyond_the_picture(folder: Path) -> SlideRow:
    row = SlideRow(**(vars(visium(folder)) | {"image": tiff(folder / "he.tif", 2.0), "mpp": 2.0}))
    tifffile.imwrite(row.image, tifffile.imread(row.image)[:, :400], photometric="rgb")
    return row


def of_another_alignment(folder: Path) -> SlideRow:
    row = of_two_scales(folder)
    (folder / "S1_alignment_file.json").write_text("{")
    return row


def changed(folder: Path, change: Callable[[anndata.AnnData], None]) -> SlideRow:
    row = h5ad(folder)
    data = anndata.read_h5ad(row.counts)
    change(data)
    data.write_h5ad(row.counts)
    return row


def normalised(folder: Path) -> SlideRow:
    def change(data: anndata.AnnData) -> None:
        data.X = np.rint(data.X / data.X.sum(1, keepdims=True) * 1e4).astype(np.float32)

    return changed(folder, change)


def mostly_empty(folder: Path) -> SlideRow:
    def change(data: anndata.AnnData) -> None:
        data.X[:8] = 0

    return changed(folder, change)


def of_a_spreadsheet(folder: Path) -> SlideRow:
    def change(data: anndata.AnnData) -> None:
        data.var_names = ["1-Mar", "2-Sep", *map(str, data.var_names[2:])]

    return changed(folder, change)


def of_a_small_picture(folder: Path) -> SlideRow:
    return kept(folder / "S1.h5ad", {"hires": picture()})


@pytest.mark.parametrize(
    ("write", "told", "fix"),
    [
        (of_two_scales, "sources differ by 5%", "manifest column mpp"),
        (
            beyond_the_picture,
            "are left out: centre beyond the edge of the picture of 400 x 340",
            "image_scale",
        ),
        (of_another_alignment, "is not JSON", "image_transform"),
        (normalised, "all spots have a total of about 10,000", "give the raw counts"),
        (mostly_empty, "8 of 48 spots are left out: zero counts", "`hibio qc`"),
        (of_a_spreadsheet, "2-Sep", "name"),
        (of_a_small_picture, "read is the small picture hires", "column image"),
    ],
)
def test_warnings_are_shown_everywhere(tmp_path: Path, write, told: str, fix: str) -> None:
    row, out = write(tmp_path), tmp_path / "stores"
    for status in ("done", "skipped")[: 2 if write is of_two_scales else 1]:
        report = prepare([row], out, patch=PatchConfig(112.0, 32))
        assert report.rows[0].status == status, report
        assert told in str(report)
        assert fix in str(report)
        assert "spots left out: " not in str(report)  # the warning says it
    with SlideStore(out / "S1.h5") as store:
        warnings, notes = store.warnings, store.attrs["notes"]
    assert [told in one.message for one in warnings].count(True) == 1
    assert json.loads(json.dumps(warnings)) == [list(one) for one in warnings]
    found = [one for one in verify_store(out / "S1.h5") if told in one.message]
    assert [(one.level, fix in one.fix) for one in found] == [("WARN", True)]
    write_manifest([row], tmp_path / "m.csv")
    found = check_path(tmp_path / "m.csv")
    assert any(told in one.message and one.level == "WARN" for one in found)
    index = qc_folder(out, tmp_path / "qc")
    for name in ("index.html", "S1.qc.html", "qc.csv"):
        assert told in unescape((index.parent / name).read_text()), name
    for note in notes:  # what was done, such as spots outside the tissue that are left out
        assert note in str(report)
        assert note in unescape((index.parent / "S1.qc.html").read_text())
    if write is of_two_scales:
        assert "2 spots outside the tissue (in_tissue 0) left out" in notes
        head, line = (index.parent / "qc.csv").read_text().splitlines()[:2]
        shown = dict(zip(head.split(","), line.split(","), strict=False))
        assert shown["registration"] == "unknown"
