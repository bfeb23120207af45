"""The optional slide back ends give the levels and pixels of the readers that HiBio brings."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing import SlideStore, prepare
from preprocessing.errors import DataError
from preprocessing.patches import PatchConfig, read_patch
from preprocessing.slide_row import SlideRow
from preprocessing.slides import BACKENDS, OpenSlideSlide, open_slide
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA
from tests.preprocessing.test_slides import REGIONS, noise, write_tiff
from tests.preprocessing.test_slides_ome import write_ome

OTHERS = [name for name in BACKENDS if name not in ("auto", "openslide")]


def installed(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the slide back end {name} is not installed")
    return name


def made(kind: str, folder: Path) -> Path:
    pixels = noise(270, 330, 3)
    if kind == "ome":
        return write_ome(folder / "a.ome.tif", pixels, 3, compression="deflate")
    if kind == "tiles":
        return write_tiff(folder / "a.tif", pixels, tile=(64, 80), compression="deflate")
    if kind == "strips":
        return write_tiff(folder / "a.tif", pixels, rowsperstrip=32, compression="lzw")
    path = folder / f"a.{kind}"
    Image.fromarray(noise(270, 330, 3)).save(path)
    return path


def assert_same(path: Path, backend: str, tolerance: int = 0) -> None:
    with open_slide(path) as own, open_slide(path, backend=backend) as other:
        assert other.level_dimensions == own.level_dimensions
        assert other.level_downsamples == own.level_downsamples
        assert other.mpp == own.mpp
        for level, down in enumerate(own.level_downsamples):
            if down % 1:  # OpenSlide interpolates there
                continue
            for x, y, w, h in REGIONS:
                corner = (round(x * down), round(y * down))
                expected = own.read_region(corner, level, (w, h)).astype(int)
                found = other.read_region(corner, level, (w, h)).astype(int)
                assert np.abs(found - expected).max() <= tolerance
        patches = [read_patch(s, (150.3, 120.7), 0.5, 40.0, 32) for s in (own, other)]
        assert np.abs(patches[0].astype(int) - patches[1]).max() <= tolerance


@pytest.mark.parametrize("kind", ["ome", "tiles", "strips"])
def test_pyvips_gives_equal_pixels(kind: str, tmp_path: Path) -> None:
    assert_same(made(kind, tmp_path), installed("pyvips"))


def test_cucim_gives_equal_pixels(tmp_path: Path) -> None:
    assert_same(made("tiles", tmp_path), installed("cucim"))


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
@pytest.mark.parametrize("backend", OTHERS)
def test_real_jpeg_slide(backend: str) -> None:
    assert_same(REAL_DATA / "slides" / "CMU-1-Small-Region.svs", installed(backend))


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_real_jpeg_2000_slide_with_a_fractional_level() -> None:
    path = REAL_DATA / "slides" / "TCGA-CR-7395-01A-01-TS1.svs"
    assert_same(path, installed("cucim"), tolerance=1)
    with open_slide(path) as own, open_slide(path, backend="cucim") as other:
        regions = [s.read_region((1000, 1000), 1, (256, 256)) for s in (own, other)]
    assert np.corrcoef(regions[0].ravel(), regions[1].ravel())[0, 1] > 0.95


@pytest.mark.parametrize("backend", OTHERS)
def test_what_is_missing_is_named(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(DataError, match=rf"slide back end {backend} is not installed: pip install"):
        open_slide(made("tiles", tmp_path), backend=backend)


def test_unknown_back_end(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'vips' is unknown \(did you mean 'pyvips'"):
        open_slide(made("tiles", tmp_path), backend="vips")
    with pytest.raises(DataError, match="choose auto, openslide, pyvips, cucim"):
        open_slide(made("tiles", tmp_path), backend="xyz")


def test_openslide_alone_gives_equal_pixels(tmp_path: Path) -> None:
    path = made("tiles", tmp_path)
    assert_same(path, "openslide")
    with open_slide(path, backend="openslide") as slide:
        assert isinstance(slide, OpenSlideSlide)


@pytest.mark.parametrize("backend", ["openslide", *OTHERS])
def test_prepare_with_a_back_end(backend: str, tmp_path: Path) -> None:
    if backend != "openslide":
        installed(backend)
    pixels = np.full((300, 300, 3), 255, dtype=np.uint8)
    pixels[40:-40, 40:-40] = (180, 90, 160) + noise(220, 220, 3) // 8
    image = write_tiff(tmp_path / "a.tif", pixels, tile=(64, 64), compression="deflate")
    rows = [SlideRow("s", "p", None, "image", image=image, mpp=1.0)]
    patch = PatchConfig(50.0, 32)
    for name in ("auto", backend):
        report = prepare(rows, tmp_path / name, patch=patch, backend=name)
        assert not report.failed, str(report)
    stores = [SlideStore(tmp_path / name / "s.h5") for name in ("auto", backend)]
    np.testing.assert_array_equal(*(store.patches() for store in stores))
    assert "backend" not in stores[0].attrs["settings"]
    assert stores[1].attrs["settings"]["backend"] == backend
    for store in stores:
        store.close()
    assert prepare(rows, tmp_path / "auto", patch=patch).rows[0].status == "skipped"
    assert prepare(rows, tmp_path / "auto", patch=patch, backend=backend).rows[0].status == "done"
    with pytest.raises(DataError, match="back end 'xyz' is unknown"):
        prepare(rows, tmp_path / "none", patch=patch, backend="xyz")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("backend", ["openslide", *OTHERS])
def test_files_it_does_not_read(backend: str, tmp_path: Path) -> None:
    if backend != "openslide":
        installed(backend)
    with pytest.raises(DataError, match=r"a\.png.*use the slide back end 'auto'"):
        open_slide(made("png", tmp_path), backend=backend)
