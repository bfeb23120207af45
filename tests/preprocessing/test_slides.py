"""Slides: every reader gives the pixels of the file, white outside, and names what it refuses."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import tifffile._imagecodecs
from PIL import Image

from preprocessing.errors import DataError
from preprocessing.slides import OpenSlideSlide, Slide, open_slide
from preprocessing.slides import pixels as slide_pixels
from preprocessing.slides import tiff as slides_plain
from preprocessing.slides.decoders import direct_tiles
from preprocessing.slides.pictures import PlainPicture
from preprocessing.slides.tiff import PlainTiff

DATA = Path(__file__).parents[3] / "shared" / "data"
WIDTH, HEIGHT = 330, 270


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(20, 240, shape, dtype=np.uint8)


def smooth_picture() -> np.ndarray:
    """A picture that JPEG keeps to within a few grey levels: ramps along x, y and both."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 230 // WIDTH, y * 230 // HEIGHT, (x + y) // 3], axis=2).astype(np.uint8)


def write_tiff(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    options.setdefault("photometric", "rgb" if pixels.ndim == 3 else "minisblack")
    tifffile.imwrite(path, pixels, **options)
    return path


def expected_region(pixels: np.ndarray, x: int, y: int, w: int, h: int) -> np.ndarray:
    """Pixel by pixel: the picture where there is one, white elsewhere."""
    out = np.full((h, w, 3), 255, dtype=np.uint8)
    for i in range(h):
        for j in range(w):
            if 0 <= y + i < pixels.shape[0] and 0 <= x + j < pixels.shape[1]:
                out[i, j] = pixels[y + i, x + j]
    return out


REGIONS = [
    (0, 0, 40, 30),
    (100, 60, 70, 90),
    (-7, -9, 30, 30),
    (310, 255, 40, 40),
    (900, 900, 5, 6),
]
TIFFS: dict[str, tuple[dict[str, Any], type[Slide]]] = {
    "mapped": ({}, PlainTiff),
    "one_strip": ({"compression": "deflate", "rowsperstrip": HEIGHT}, PlainTiff),
    "strips": ({"compression": "lzw", "rowsperstrip": 32}, PlainTiff),
    "tiles": ({"tile": (64, 80)}, OpenSlideSlide),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_tiff_regions_equal_the_pixels(kind: str, tmp_path: Path) -> None:
    pixels = noise(HEIGHT, WIDTH, 3)
    path = write_tiff(tmp_path / "a.tif", pixels, **TIFFS[kind][0])
    with open_slide(path) as slide:
        assert type(slide) is TIFFS[kind][1]
        assert slide.level_dimensions == ((WIDTH, HEIGHT),)
        assert (getattr(slide, "_map", None) is not None) == (kind == "mapped")
        for x, y, w, h in REGIONS:
            got = slide.read_region((x, y), 0, (w, h))
            np.testing.assert_array_equal(got, expected_region(pixels, x, y, w, h))


def test_tiles_by_the_plain_reader_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(HEIGHT, WIDTH, 3)
    path = write_tiff(tmp_path / "a.tif", pixels, tile=(64, 80), compression="deflate")
    monkeypatch.setattr(slides_plain, "CACHE_BYTES", 2 * 3 * 64 * 80)
    with PlainTiff(path) as slide:
        for x, y, w, h in REGIONS * 2:
            got = slide.read_region((x, y), 0, (w, h))
            np.testing.assert_array_equal(got, expected_region(pixels, x, y, w, h))
        assert slide._levels[0].segment.cache_info().currsize <= 2


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_and_transparent_pictures(suffix: str, tmp_path: Path) -> None:
    grey = noise(50, 60)
    rgba = noise(50, 60, 4)
    rgba[:10, :, 3], rgba[10:20, :, 3] = 0, 255
    for name, array in (("grey", grey), ("rgba", rgba)):
        if suffix == "png":
            Image.fromarray(array).save(tmp_path / f"{name}.png")
        else:
            extra = {"extrasamples": ["unassalpha"]} if name == "rgba" else {}
            write_tiff(tmp_path / f"{name}.tif", array, compression="deflate", **extra)
    with open_slide(tmp_path / f"grey.{suffix}") as slide:
        got = slide.read_region((0, 0), 0, (60, 50))
        np.testing.assert_array_equal(got, np.dstack([grey] * 3))
    with open_slide(tmp_path / f"rgba.{suffix}") as slide:
        got = slide.read_region((0, 0), 0, (60, 50))
    share = rgba[..., 3:] / 255.0
    assert (got[:10] == 255).all()
    np.testing.assert_array_equal(got[10:20], rgba[10:20, :, :3])
    np.testing.assert_allclose(got, rgba[..., :3] * share + 255 * (1 - share), atol=0.51)


def test_jpeg_levels_are_the_reduced_picture(tmp_path: Path) -> None:
    pixels = smooth_picture()
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, dpi=(300, 300))
    with open_slide(tmp_path / "a.jpg") as slide:
        assert isinstance(slide, PlainPicture)
        assert slide.mpp is None  # dpi says nothing about the specimen
        assert slide.level_downsamples == (1.0, 2.0, 4.0, 8.0)
        assert slide.level_dimensions == ((330, 270), (165, 135), (83, 68), (42, 34))
        for level in range(4):
            down = 2**level
            got = slide.read_region((80, 64), level, (16, 12)).astype(float)
            block = pixels[64 : 64 + 12 * down, 80 : 80 + 16 * down].astype(float)
            mean = block.reshape(12, down, 16, down, 3).mean(axis=(1, 3))
            assert np.abs(got - mean).max() < 8


def test_small_jpeg_has_one_level(tmp_path: Path) -> None:
    Image.new("RGB", (5, 3), "red").save(tmp_path / "a.jpg")
    with open_slide(tmp_path / "a.jpg") as slide:
        assert slide.level_dimensions == ((5, 3),)
        assert slide.read_region((0, 0), 0, (5, 3))[..., 0].min() > 240


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        ({"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"resolution": (25400, 25400), "resolutionunit": "INCH"}, 1.0),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),  # a print resolution
        ({}, None),
    ],
)
@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_mpp_of_a_tiff(
    options: dict[str, Any], mpp: float | None, tile: Any, tmp_path: Path
) -> None:
    path = write_tiff(tmp_path / "a.tif", noise(100, 120, 3), tile=tile, **options)
    with open_slide(path) as slide:
        assert isinstance(slide, PlainTiff if tile is None else OpenSlideSlide)
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp))


def test_black_is_background(tmp_path: Path) -> None:
    pixels = noise(40, 50, 3)
    pixels[:20] = 8
    pixels[20] = (8, 9, 8)
    path = write_tiff(tmp_path / "a.tif", pixels)
    with open_slide(path, black_is_background=True) as slide:
        got = slide.read_region((0, 0), 0, (50, 40))
    assert (got[:20] == 255).all()
    np.testing.assert_array_equal(got[20:], pixels[20:])
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_region((0, 0), 0, (50, 40)), pixels)


def test_refused_pixels(tmp_path: Path) -> None:
    write_tiff(tmp_path / "stack.tif", noise(3, 80, 90), photometric="minisblack")
    write_tiff(tmp_path / "oblong.tif", noise(80, 90, 3), resolution=(20000, 19000),
               resolutionunit="CENTIMETER")  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 90)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "text.png").write_text("no picture at all")
    for name, words in {
        "stack.tif": "3 pictures of 90 x 80 pixels.*expected one",
        "oblong.tif": "0.5 and 0.526316 um per pixel",
        "turned.jpg": "EXIF orientation 6",
        "text.png": "no known image",
        "missing.png": "no such image file",
    }.items():
        with pytest.raises(DataError, match=rf"{name}: .*{words}"):
            open_slide(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "strips.tif", "tiles.tif", "header.jpg"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".tif":
        options = {"tile": (64, 64)} if name == "tiles.tif" else {"rowsperstrip": 16}
        write_tiff(path, noise(HEIGHT, WIDTH, 3), compression="deflate", **options)
    else:
        Image.fromarray(noise(HEIGHT, WIDTH, 3)).save(path)
    whole = path.read_bytes()
    for cut in (20,) if name == "header.jpg" else (len(whole) // 2, len(whole) - 700):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"{name}: cannot be read"):  # before anything is read
            open_slide(path).close() if name != "tiles.tif" else direct_tiles(open_slide(path))


def test_too_large_to_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slide_pixels, "MAX_DECODED_PIXELS", 80 * 90 - 1)
    Image.new("RGB", (80, 90)).save(tmp_path / "a.png")
    write_tiff(tmp_path / "one.tif", noise(80, 90, 3), compression="lzw", rowsperstrip=80)
    for name in ("a.png", "one.tif"):
        with pytest.raises(DataError, match="vips tiffsave"):
            open_slide(tmp_path / name)
    write_tiff(tmp_path / "many.tif", noise(80, 90, 3), compression="lzw", rowsperstrip=10)
    write_tiff(tmp_path / "mapped.tif", noise(80, 90, 3))
    for name in ("many.tif", "mapped.tif"):
        open_slide(tmp_path / name).close()


def test_pillows_size_limit_neither_applies_nor_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (100, 100), "red").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Image.open would refuse the file
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.read_region((0, 0), 0, (100, 100))[..., 0].min() == 255
    assert Image.MAX_IMAGE_PIXELS == 10


def real(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs the shared data file {name}")
    return path


def test_real_svs() -> None:
    with open_slide(real("slides/CMU-1-Small-Region.svs")) as slide:
        assert slide.mpp == pytest.approx(0.499)
        assert slide.level_dimensions == ((2220, 2967),)
        region = slide.read_region((2200, 100), 0, (40, 10))
        assert (region[:, 20:] == 255).all()
        assert not (region[:, :20] == 255).all()


def test_real_svs_without_mpp_and_with_two_levels() -> None:
    with open_slide(real("slides/TCGA-CR-7395-01A-01-TS1.svs")) as slide:
        assert slide.mpp is None
        assert slide.level_downsamples[1] == pytest.approx(2.0, abs=0.01)
        fine = slide.read_region((2000, 1600), 0, (128, 128)).astype(float)
        coarse = slide.read_region((2000, 1600), 1, (64, 64)).astype(float)
        reduced = fine.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.corrcoef(reduced.ravel(), coarse.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("name", ["jpeg.ome.tif", "deep.png"])
def test_a_codec_that_is_not_installed_is_told(name, tmp_path, monkeypatch):
    codecs = pytest.importorskip("imagecodecs")
    picture = noise(80, 90, 3)
    if name == "deep.png":
        (tmp_path / name).write_bytes(codecs.png_encode(picture.astype(np.uint16) * 200))
    else:
        write_tiff(tmp_path / name, picture, compression="jpeg", tile=(64, 64))
    monkeypatch.setattr(tifffile.tifffile, "imagecodecs", tifffile._imagecodecs)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(DataError, match=rf"{name}: .*pip install imagecodecs"):
        open_slide(tmp_path / name, backend="auto").read_region((0, 0), 0, (4, 4))
