"""HEST-1k: samples read where they lie, patches as a slide, and stores written back."""

import json
from dataclasses import replace
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy.sparse import csr_matrix

from preprocessing import DataError, SlideStore, prepare
from preprocessing.hest_layout import outlines, tissue_contours, write_hest
from preprocessing.manifest import draft_manifest, read_manifest, write_manifest
from preprocessing.patches import PatchConfig, iter_patches, read_patch
from preprocessing.readers.format import read_spots, source_files
from preprocessing.slide_row import SlideRow
from preprocessing.slides import open_slide
from preprocessing.slides.hest import HestPatches
from preprocessing.tissue import thumbnail
from tests.preprocessing.sources import draw_counts, legacy_slide

SPOTS, GENES, MPP, PX = 20, 7, 0.25, 224
SIDE = PX * 0.5 / MPP  # edge of a patch in the scan: 448 pixels


def picture(width: int = 2600, height: int = 2100) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = np.stack([120 + 60 * np.sin(x / 40), 90 + 40 * np.cos(y / 30), 140 + 0 * x], axis=2)
    return waves.astype(np.uint8)


def hest_root(root: Path, name: str = "TENX1", **metadata: object) -> np.ndarray:
    """Write one sample as HEST-1k publishes it; returns the centres (SPOTS, 2) in pixels."""
    array = np.array([(r, c) for r in range(4) for c in range(5)])
    centres = array[:, ::-1] * 450.0 + 300.3
    names = [f"{r:03d}x{c:03d}" for r, c in array]
    obs = pd.DataFrame(
        {
            "in_tissue": True,
            "array_row": array[:, 0],
            "array_col": array[:, 1],
            "pxl_col_in_fullres": centres[:, 0],
            "pxl_row_in_fullres": centres[:, 1],
            "total_counts": np.arange(SPOTS) * 1.5,
        },
        index=names,
    )
    counts = csr_matrix(draw_counts(SPOTS, GENES).astype(np.float32))
    var = pd.DataFrame({"mito": False}, index=[f"G{g}" for g in range(GENES)])
    data = anndata.AnnData(counts, obs=obs, var=var)
    data.obsm["spatial"] = centres
    scales = {"spot_diameter_fullres": 55 / MPP, "tissue_downscaled_fullres_scalef": 0.1}
    images = {"downscaled_fullres": np.zeros((21, 26, 3), dtype=np.uint8)}
    data.uns["spatial"] = {"ST": {"images": images, "scalefactors": scales}}
    for folder in ("st", "wsis", "patches", "metadata"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    data.write_h5ad(root / "st" / f"{name}.h5ad")
    pixels = picture()
    unit = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(root / "wsis" / f"{name}.tif", pixels, tile=(256, 256), **unit)
    known = {
        "id": name,
        "patient": "Patient 1",
        "dataset_title": "A study",
        "organ": "Breast",
        "species": "Homo sapiens",
        "st_technology": "Visium",
        "pixel_size_um_estimated": MPP,
        "pixel_size_um_embedded": float("nan"),
    } | metadata
    (root / "metadata" / f"{name}.json").write_text(json.dumps(known))
    write_patches(root / "patches" / f"{name}.h5", centres[:-1], names[:-1], pixels)
    return centres


def write_patches(path: Path, centres: np.ndarray, names: list[str], pixels: np.ndarray) -> None:
    corners = (centres - SIDE // 2).astype(int)
    cuts = [pixels[y : y + int(SIDE), x : x + int(SIDE)] for x, y in corners]
    images = [c.reshape(PX, 2, PX, 2, 3).mean(axis=(1, 3)).astype(np.uint8) for c in cuts]
    with h5py.File(path, "w") as file:
        file["img"] = np.stack(images)
        known = {"patch_size_src": SIDE, "pixel_size": MPP, "downsample": SIDE / PX}
        file["img"].attrs.update(known)
        file["coords"] = corners
        file["barcode"] = np.array([n.encode() for n in names])[:, None]


def row_of(root: Path, **more: object) -> SlideRow:
    return SlideRow("TENX1", "p", root, "hest", **more)  # type: ignore[arg-type]


def test_a_sample_is_read_where_it_lies(tmp_path: Path) -> None:
    centres = hest_root(tmp_path)
    for counts in (tmp_path, tmp_path / "st" / "TENX1.h5ad"):
        table = read_spots(row_of(counts, image=tmp_path / "wsis" / "TENX1.tif"), MPP)
        np.testing.assert_array_equal(table.counts.toarray(), draw_counts(SPOTS, GENES))
        np.testing.assert_allclose(table.xy_px0, centres)
        np.testing.assert_allclose(table.xy_um, centres * MPP)
        assert table.mpp == MPP
        assert table.diameter_um == pytest.approx(55.0)
        assert table.gene_names.tolist() == [f"G{g}" for g in range(GENES)]
    assert set(source_files(row_of(tmp_path))) == {"counts", "metadata"}
    with pytest.raises(DataError, match=r"no st/TENX2\.h5ad \(did you mean 'TENX1'\?\)"):
        read_spots(replace(row_of(tmp_path), slide_id="TENX2"))


@pytest.mark.parametrize(
    ("metadata", "mpp", "warned"),
    [
        ({"pixel_size_um_embedded": 0.26}, 0.25, True),
        ({"pixel_size_um_embedded": 0.5}, None, True),
        ({"pixel_size_um_estimated": None, "pixel_size_um_embedded": 0.3}, 0.3, False),
    ],
)
def test_pixel_sizes(
    metadata: dict[str, object], mpp: float | None, warned: bool, tmp_path: Path
) -> None:
    hest_root(tmp_path, **metadata)
    if mpp is None:
        with pytest.raises(DataError, match=r"0\.25 by pixel_size_um_est.*0\.5 by pixel"):
            read_spots(row_of(tmp_path))
    else:
        table = read_spots(row_of(tmp_path))
        assert (table.mpp, bool(table.warnings)) == (mpp, warned)
    assert read_spots(row_of(tmp_path, mpp=0.7)).mpp == 0.7


def test_damaged_metadata(tmp_path: Path) -> None:
    hest_root(tmp_path, pixel_size_um_estimated=-1)
    with pytest.raises(DataError, match=r"TENX1\.json: pixel_size_um_estimated is -1"):
        read_spots(row_of(tmp_path))
    for text, said in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "metadata" / "TENX1.json").write_text(text)
        with pytest.raises(DataError, match=said):
            read_spots(row_of(tmp_path))
    (tmp_path / "metadata" / "TENX1.json").unlink()
    with pytest.raises(DataError, match="mpp is unknown"):
        read_spots(row_of(tmp_path))


def test_the_draft_and_the_stores(tmp_path: Path) -> None:
    hest_root(tmp_path / "hest")
    hest_root(tmp_path / "hest", "TENX2", patient=float("nan"))
    (tmp_path / "hest" / "wsis" / "TENX2.tif").unlink()
    write_manifest(draft_manifest(tmp_path / "hest"), tmp_path / "m.csv")
    rows = {row.slide_id: row for row in read_manifest(tmp_path / "m.csv")}
    assert rows["TENX1"].patient_id == "A study: Patient 1"
    assert rows["TENX2"].patient_id == "TENX2"
    assert rows["TENX1"].image == tmp_path / "hest" / "wsis" / "TENX1.tif"
    assert rows["TENX2"].image == tmp_path / "hest" / "patches" / "TENX2.h5"
    first = rows["TENX1"]
    assert (first.format, first.tissue, first.organism) == ("hest", "Breast", "Homo sapiens")
    report = prepare(tmp_path / "m.csv", tmp_path / "out", patch=PatchConfig(112.0, PX))
    assert [row.status for row in report.rows] == ["done", "done"], str(report)
    with (
        SlideStore(tmp_path / "out" / "TENX1.h5") as slide,
        SlideStore(tmp_path / "out" / "TENX2.h5") as patches,
    ):
        assert (slide.n_spots, patches.n_spots) == (SPOTS, SPOTS - 1)  # the last has no patch
        rows_of = [slide.barcodes.tolist().index(name) for name in patches.barcodes]
        gap = np.abs(slide.patches(rows_of).astype(int) - patches.patches())
        assert gap.mean() < 3  # half a pixel and JPEG


def test_patches_are_a_slide(tmp_path: Path) -> None:
    centres = hest_root(tmp_path)
    path, pixels = tmp_path / "patches" / "TENX1.h5", picture()
    with h5py.File(path) as file:
        stored = file["img"][:]
    with open_slide(path) as slide:
        assert isinstance(slide, HestPatches)
        assert slide.level_downsamples == (1.0, 2.0, 16.0)
        assert slide.mpp == MPP
        for index in (0, 7, 18):
            centre = (float(centres[index, 0]), float(centres[index, 1]))
            patch = read_patch(slide, centre, MPP, 112.0, PX)
            np.testing.assert_array_equal(patch, stored[index])
        wide = slide.read_region((200, 200), 0, (900, 700)).astype(int)
        assert np.abs(wide - pixels[200:900, 200:1100])[:, :400].mean() < 4
        small = slide.read_region((0, 0), 2, slide.level_dimensions[2]).astype(int)
        own = pixels[320:1760, 320:1760].reshape(90, 16, 90, 16, 3).mean(axis=(1, 3))
        assert np.abs(small[20:110, 20:110] - own)[:60, :60].mean() < 12
        assert (slide.read_region((-900, -900), 1, (300, 300)) == 255).all()


@pytest.mark.parametrize("of_patches", [False, True])
@pytest.mark.parametrize("side", [224.0 / 2, 97.4, 224.0 / 9])
def test_enlarged_patches_come_back_bit_for_bit(
    side: float, of_patches: bool, tmp_path: Path
) -> None:
    """A scan coarser than 0.5 um a pixel: HEST-1k enlarged, and neighbours overlap.

    Files say the scan's um per pixel or the patches'.
    """
    rng, mpp = np.random.default_rng(0), 112.0 / side
    centres = np.array([(r, c) for r in range(4) for c in range(5)]) * side * 0.8 + 300.3
    stored = rng.integers(0, 256, (len(centres), PX, PX, 3)).astype(np.uint8)
    with h5py.File(tmp_path / "coarse.h5", "w") as file:
        file["img"] = stored
        size = 112.0 / PX if of_patches else mpp
        known = {"patch_size_src": round(side), "pixel_size": size, "downsample": side / PX}
        file["img"].attrs.update(known)
        file["coords"] = np.rint(centres - side / 2).astype(int)
        file["barcode"] = np.array([f"s{i}".encode() for i in range(len(centres))])[:, None]
    with open_slide(tmp_path / "coarse.h5") as slide:
        assert slide.mpp == pytest.approx(mpp)
        for index, patch in iter_patches(slide, centres, mpp, 112.0, PX):
            np.testing.assert_array_equal(patch, stored[index])
        small, down = thumbnail(slide, 64)
        assert max(small.shape) <= 64
        assert down > 1


def test_outlines_of_tissue_are_in_pixels_of_the_scan_with_holes() -> None:
    small = np.full((60, 80, 3), 255, dtype=np.uint8)
    small[10:40, 20:50] = (200, 60, 120)
    small[20:30, 30:40] = 255
    small[45:57, 60:75] = (200, 60, 120)
    found = tissue_contours(small, 16.0)["features"]
    assert [feature["properties"]["tissue_id"] for feature in found] == [0, 1]
    rings = [[np.array(r) for r in f["geometry"]["coordinates"]] for f in found]
    assert [len(own) for own in rings] == [2, 1]
    outer, hole = rings[0]
    tolerance = {"abs": 2 * 16.0}  # the cue is smoothed by 3 x 3
    assert outer.min(axis=0).tolist() == [pytest.approx(v, **tolerance) for v in (320, 160)]
    assert outer.max(axis=0).tolist() == [pytest.approx(v, **tolerance) for v in (800, 640)]
    assert hole.mean(axis=0).tolist() == [pytest.approx(v, **tolerance) for v in (560, 400)]
    for ring in (outer, hole, rings[1][0]):
        assert ring[0].tolist() == ring[-1].tolist()
    assert tissue_contours(np.full((20, 20, 3), 255, np.uint8), 1.0)["features"] == []


def test_straight_outlines_are_their_corners() -> None:
    mask = np.zeros((40, 50), dtype=bool)
    mask[5:25, 10:40] = True
    (((ring,),),) = [list(outlines(mask, 2.0))]
    assert len(ring) <= 10  # a corner is cut off by half a pixel; the start may lie on a line
    x, y = ring.T
    area = abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2
    assert area == pytest.approx(2.0**2 * (20 * 30 - 4 / 8))


def test_patches_that_are_none_or_lie_elsewhere(tmp_path: Path) -> None:
    centres = hest_root(tmp_path)
    path = tmp_path / "patches" / "TENX1.h5"
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["img"] = np.zeros((2, 3))
    with pytest.raises(DataError, match=r"other\.h5: no patches as HEST-1k writes them"):
        open_slide(tmp_path / "other.h5")
    names = [f"{r:03d}x{c:03d}" for r in range(4) for c in range(5)]
    assert read_spots(row_of(tmp_path, image=path), MPP).n_spots == SPOTS
    with h5py.File(path, "r+") as file:
        file["coords"][:] = centres[:-1].astype(int)
    with pytest.raises(DataError, match=r"patches lie 224 pixels off their spots"):
        read_spots(row_of(tmp_path, image=path), MPP)
    with h5py.File(path, "r+") as file:
        del file["barcode"]
        file["barcode"] = np.array([b"z" + n.encode() for n in names[:-1]])
    with pytest.raises(DataError, match="no patch belongs to a spot"):
        read_spots(row_of(tmp_path, image=path), MPP)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"TENX1\.h5: cannot be read"):
        open_slide(path)


def labelled_store(folder: Path) -> Path:
    """A store with texts, a measurement, a code and a name that AnnData does not allow."""
    row, truth = legacy_slide(folder, "B1")
    lines = ["barcode,kind,activity/one,cluster"]
    lines += [f"{n},{'ab'[i % 2]},{i / 4},{i % 3}" for i, n in enumerate(truth.barcodes)]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    row = replace(row, labels=folder / "labels.csv", outcome="1", tissue="breast", technology="ST")
    report = prepare([row], folder / "stores", patch=PatchConfig(112.0, 224), images="raw")
    assert not report.failed, str(report)
    return folder / "stores"


def test_written_back_and_read_again(tmp_path: Path) -> None:
    stores = labelled_store(tmp_path)
    (sample,) = write_hest(stores, tmp_path / "hest")
    assert (sample.slide_id, sample.n_patches, sample.notes) == ("B1", sample.n_spots, ())
    data = anndata.read_h5ad(tmp_path / "hest" / "st" / "B1.h5ad")
    (row,) = draft_manifest(tmp_path / "hest")
    assert (row.slide_id, row.patient_id, row.tissue, row.technology) == ("B1", "B", "breast", "ST")
    assert row.image == tmp_path / "hest" / "patches" / "B1.h5"
    with SlideStore(stores / "B1.h5") as store, open_slide(row.image) as slide:
        table = read_spots(row, slide.mpp)
        assert (table.counts != store.counts()).nnz == 0
        assert table.barcodes.tolist() == store.barcodes.tolist() == data.obs_names.tolist()
        assert table.gene_names.tolist() == store.gene_names.tolist()
        assert table.gene_ids.tolist() == store.gene_ids.tolist()
        np.testing.assert_array_equal(table.xy_px0, store.xy_px0)
        np.testing.assert_allclose(table.xy_um, store.xy_um)
        np.testing.assert_array_equal(data.obsm["spatial"], store.xy_px0)
        assert table.mpp == store.mpp
        pd.testing.assert_frame_equal(table.labels, store.labels())
        with h5py.File(row.image) as file:
            assert file["img"].shape == (store.n_spots, 224, 224, 3)
            np.testing.assert_array_equal(file["img"][:], store.patches())
            corner = store.xy_px0 - file["img"].attrs["patch_size_src"] / 2
            assert np.abs(file["coords"][:] - corner).max() <= 0.5
            scale = dict(file["coords"].attrs)
            wanted = {"patch_size_target": 224, "pixel_size": store.mpp, "name": "B1"}
            wanted |= {"patch_size_src": 112 / store.mpp, "downsample": 0.5 / store.mpp}
            assert {key: scale[key] for key in wanted} == pytest.approx(wanted)
            assert scale == dict(file["img"].attrs)
        outlines = json.loads((tmp_path / "hest/tissue_seg/B1_contours.geojson").read_text())
        assert outlines["features"]
    report = prepare([row], tmp_path / "again", patch=PatchConfig(112.0, 224), images="raw")
    assert not report.failed, str(report)
    with SlideStore(stores / "B1.h5") as old, SlideStore(tmp_path / "again" / "B1.h5") as new:
        rows = [old.barcodes.tolist().index(name) for name in new.barcodes]
        assert (new.counts() != old.counts()[rows]).nnz == 0
        assert new.n_spots == old.n_spots


def test_what_is_not_as_in_hest_is_said(tmp_path: Path) -> None:
    row, _ = legacy_slide(tmp_path, "A1")
    prepare([row], tmp_path / "stores", patch=PatchConfig(200.0, 16))
    plain = replace(row, slide_id="A2", image=None)
    prepare([plain], tmp_path / "stores")
    first, second = write_hest(tmp_path / "stores", tmp_path / "hest")
    assert first.notes == ("patches are 16 px of 200 um, HEST-1k has 224 px of 112 um",)
    assert (second.n_patches, second.notes) == (0, ())
    assert not (tmp_path / "hest" / "patches" / "A2.h5").exists()
    with pytest.raises(DataError, match="holds no store"):
        write_hest(tmp_path / "hest", tmp_path / "more")
