"""Channels, depth and formats of pictures: right colours, or a command that leads to them."""

import json
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from skimage.color import rgb2lab, rgb2ycbcr

from preprocessing.errors import DataError
from preprocessing.slides import OpenSlideSlide, open_slide
from preprocessing.slides.channels import full_light
from preprocessing.slides.decoders import direct_tiles
from tests.preprocessing.test_slides import noise, write_tiff

WIDTH, HEIGHT = 96, 80
WHOLE = ((0, 0), 0, (WIDTH, HEIGHT))
RGB = noise(HEIGHT, WIDTH, 3)
RGB[:8] = 246  # bright background
MORE = noise(HEIGHT, WIDTH, 2)
COLOURMAP = np.random.default_rng(2).integers(0, 256, (3, 256)).astype(np.uint16) * 257
GREY = RGB[..., 0]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"compression": "zlib", "rowsperstrip": 16},
    "tiled": {"compression": "zlib", "tile": (32, 48)},
    "ome": {"compression": "zlib", "tile": (32, 48), "ome": True},
    "big-endian": {"byteorder": ">"},
}


def write(path: Path, pixels: np.ndarray, form: str = "plain", **more: Any) -> Path:
    """A TIFF; as OME-TIFF its name ends in .ome.tif."""
    options = FORMS[form] | more
    if options.get("ome"):
        options["metadata"] = {"axes": "YXS" if pixels.ndim == 3 else "YX"}
    return write_tiff(path, pixels, **options)


def pixels_of(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    with direct_tiles(open_slide(path)) as slide:
        assert slide.level_dimensions[0] == (WIDTH, HEIGHT)
        return slide.read_region(*WHOLE), slide.notes


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0, 90])
def test_an_undeclared_channel_is_no_opacity(form: str, value: int, tmp_path: Path) -> None:
    extra = np.full((HEIGHT, WIDTH, 1), value, np.uint8)
    for pixels in (np.dstack([RGB, extra]), np.dstack([RGB, MORE])):
        undeclared = ["unspecified"] * (pixels.shape[2] - 3)
        path = write(tmp_path / "a.tif", pixels, form, extrasamples=undeclared)
        got, notes = pixels_of(path)
        np.testing.assert_array_equal(got, RGB)
        assert notes[0].startswith(f"{len(undeclared)} extra channels")


@pytest.mark.parametrize("form", ["plain", "tiled", "ome"])
def test_declared_opacity_is_used_wherever_it_stands(form: str, tmp_path: Path) -> None:
    alpha = MORE[..., 0]
    true = over_white(RGB.astype(float), alpha)
    straight = np.dstack([RGB, alpha])
    lit = np.rint(RGB * (alpha[..., None] / 255.0)).astype(np.uint8)
    for name, pixels, codes in (
        ("straight", straight, ["unassalpha"]),
        ("premultiplied", np.dstack([lit, alpha]), ["assocalpha"]),
        ("second", np.dstack([RGB, MORE[..., 1], alpha]), ["unspecified", "unassalpha"]),
    ):
        path = write(tmp_path / f"{name}.tif", pixels, form, extrasamples=codes)
        off = np.abs(pixels_of(path)[0] - true).max()
        assert off <= (2.0 if form == "tiled" and name != "second" else 1.01), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", [0, 4, 6, 8])
def test_sixteen_bits_by_the_bits_in_use(form: str, shift: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", RGB.astype(np.uint16) << shift, form)
    got, notes = pixels_of(path)
    assert np.abs(got.astype(int) - RGB).max() <= 1
    assert f"of which {8 + shift} are in use" in notes[-1]


def test_full_light_is_that_of_the_smallest_camera() -> None:
    assert [full_light(v) for v in (1, 255, 256, 1023, 4095, 4096, 65280)] == [
        255, 255, 511, 1023, 4095, 8191, 65535]  # fmt: skip


def test_a_value_out_of_the_range_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = np.full((HEIGHT, WIDTH, 3), 4000, np.uint16)
    deep[41:43] = 60_000
    path = write(tmp_path / "a.tif", deep, "plain", rowsperstrip=1, compression="zlib")
    monkeypatch.setattr("preprocessing.slides.tiff._PEEKED", 2)
    with open_slide(path) as slide, pytest.raises(DataError, match=r"a value of 60000.*4095"):
        slide.read_region(*WHOLE)


@pytest.mark.parametrize("form", ["plain", "packed", "tiled", "ome"])
def test_other_colours_become_rgb(form: str, tmp_path: Path) -> None:
    black = MORE[..., :1]
    cmyk = np.dstack([255 - RGB, black])
    printed = np.rint(RGB * ((255 - black) / 255.0)).astype(int)
    palette = (COLOURMAP.T // 257)[GREY].astype(int)
    inverted = np.dstack([255 - GREY.astype(int)] * 3)
    for name, pixels, true in (
        ("separated", cmyk, printed),
        ("palette", GREY, palette),
        ("miniswhite", GREY, inverted),
    ):
        more = {"colormap": COLOURMAP} if name == "palette" else {}
        path = write(tmp_path / f"{name}.tif", pixels, form, photometric=name, **more)
        got, notes = pixels_of(path)
        assert np.abs(got.astype(int) - true).max() <= 1, name
        assert notes, name


@pytest.mark.parametrize("codec", ["webp", "zstd", "jpegxl", "jpeg2000", "lerc"])
@pytest.mark.parametrize("tile", [None, (32, 48)])
def test_codecs_of_tiff(codec: str, tile: Any, tmp_path: Path) -> None:
    exact = {"webp": {"lossless": True}, "jpegxl": {"lossless": True}}.get(codec, {})
    options = {"compressionargs": exact} | ({"tile": tile} if tile else {})
    path = write(tmp_path / "a.tif", RGB, compression=codec, **options)
    np.testing.assert_array_equal(pixels_of(path)[0], RGB)


@pytest.mark.parametrize("compression", [None, "zlib", "jpeg", "webp"])
def test_descriptions_do_not_decide(compression: str | None, tmp_path: Path) -> None:
    """A pyramid that vips made of a picture of tifffile keeps its {'shape': ...} on every page."""
    big = np.kron(RGB, np.ones((4, 4, 1), np.uint8))
    path = tmp_path / "a.tif"
    text = json.dumps({"shape": [*big.shape, 7]})
    with tifffile.TiffWriter(path, shaped=False) as tiff:
        for level in range(3):
            tiff.write(np.ascontiguousarray(big[:: 2**level, :: 2**level]), tile=(64, 64),
                       photometric="rgb", compression=compression, subfiletype=level > 0,
                       description=text, metadata=None)  # fmt: skip
    with direct_tiles(open_slide(path)) as slide:
        assert slide.level_dimensions == ((384, 320), (192, 160), (96, 80))
        for level in range(3):
            got = slide.read_region((0, 0), level, (40, 30)).astype(int)
            true = big[:: 2**level, :: 2**level][:30, :40]
            assert np.abs(got - true).mean() < (35 if compression in ("jpeg", "webp") else 0.01)


def test_the_largest_page_is_the_picture(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(noise(20, 30, 3), photometric="rgb")  # a label
        tiff.write(RGB, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
        tiff.write(np.zeros((10, 50, 3), np.uint8), photometric="rgb")
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp == pytest.approx(0.5)
        np.testing.assert_array_equal(slide.read_region(*WHOLE), RGB)


def run(message: str, *, as_command: bool = False) -> None:
    """Run the command that stands in a message; here, or as a command of its own."""
    (command,) = re.findall(r"`(python .*)`", message, re.S)
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    if as_command:
        subprocess.run([sys.executable, option, code], check=True, capture_output=True)
    else:
        exec(code, {})


LAB = rgb2lab(RGB / 255.0)
REFUSED: dict[str, tuple[np.ndarray, dict[str, Any], np.ndarray, str]] = {
    "stack": (np.moveaxis(RGB, 2, 0), {"photometric": "minisblack"}, RGB, "3 pictures"),
    "imagej": (np.moveaxis(RGB, 2, 0), {"imagej": True, "photometric": None}, RGB, "3 pictures"),
    "depth": (np.stack([RGB, MORE[..., [0, 0, 0]]]), {}, RGB, "2 pictures"),
    "five": (np.stack([GREY] * 5), {"photometric": "minisblack"}, np.dstack([GREY] * 3), "5 pict"),
    "ome-depth": (np.stack([GREY] * 5), {"photometric": "minisblack", "ome": True,
                  "metadata": {"axes": "ZYX"}}, np.dstack([GREY] * 3), "axes ZYX"),
    "float": (RGB.astype(np.float32) / RGB.max(), {}, RGB * (255 / RGB.max()), "float32"),
    "double": (RGB / RGB.max(), {}, RGB * (255 / RGB.max()), "float64"),
    "deeper": (RGB.astype(np.uint32) * 65536, {}, RGB * (255 / RGB.max()), "uint32"),
    "bits": (GREY > 100, {"photometric": "minisblack"}, np.dstack([GREY > 100] * 3) * 255, "1 bit"),
    "ycbcr": (rgb2ycbcr(RGB), {}, RGB, "YCbCr without JPEG"),
    "cielab": (LAB, {}, RGB, "CIELAB"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_remedy_leads_to_the_right_colours(name: str, tmp_path: Path) -> None:
    pixels, options, true, words = REFUSED[name]
    path = tmp_path / ("a.ome.tif" if options.get("ome") else "a b.tif")
    if name == "ycbcr":
        pixels = np.rint((pixels - [16, 128, 128]) * 255 / [219, 224, 224] + [0, 128, 128])
        options = {"photometric": "ycbcr"}
        pixels = pixels.clip(0, 255).astype(np.uint8)
    if name == "cielab":
        parts = [np.rint(LAB[..., :1] * 2.55), np.rint(LAB[..., 1:]).astype(np.int8).view(np.uint8)]
        pixels, options = np.dstack(parts).astype(np.uint8), {"photometric": "cielab"}
    if options.get("photometric", "") is None:
        tifffile.imwrite(path, pixels, imagej=True, metadata={"axes": "CYX"})
    else:
        write_tiff(path, pixels, **({"photometric": "rgb"} | options))
    with pytest.raises(DataError, match=words) as error:
        open_slide(path)
    assert "damaged" not in str(error.value)
    run(str(error.value), as_command=name == "stack")
    (made,) = tmp_path.glob("*_rgb.tif")
    off = np.abs(pixels_of(made)[0].astype(float) - true)
    assert off.max() <= (16 if name in ("ycbcr", "cielab") else 1)
    assert off.mean() < 2


def test_an_imagej_stack_with_one_directory_is_seen(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.stack([GREY] * 4), photometric="minisblack",
                     metadata={"axes": "ZYX"}, contiguous=True, truncate=True)  # fmt: skip
    with pytest.raises(DataError, match="4 pictures of 96 x 80"):
        open_slide(tmp_path / "a.tif")


@pytest.mark.parametrize("backend", ["openslide", "pyvips", "cucim"])
def test_other_back_ends_refuse_what_they_would_misread(backend: str, tmp_path: Path) -> None:
    if backend != "openslide":
        pytest.importorskip(backend)
    deep = write(tmp_path / "deep.tif", RGB.astype(np.uint16) * 257, "tiled")
    four = np.dstack([RGB, MORE[..., :1]])
    infrared = write(tmp_path / "four.tif", four, "tiled", extrasamples=["unspecified"])
    webp = write(tmp_path / "webp.tif", RGB, "tiled", compression="webp")
    for path in (deep, infrared, *([webp] if backend == "openslide" else [])):
        with pytest.raises(DataError, match="use the slide back end 'auto'"):
            open_slide(path, backend=backend)
    with open_slide(write(tmp_path / "rgb.tif", RGB, "tiled"), backend="openslide") as slide:
        assert isinstance(slide, OpenSlideSlide)


# Pictures ---------------------------------------------------------------------------------------


def test_webp_and_jpeg_2000(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.webp", lossless=True)
    Image.fromarray(RGB).save(tmp_path / "a.jp2")
    (tmp_path / "a.j2k").write_bytes(imagecodecs.jpeg2k_encode(RGB, codecformat="j2k", level=0))
    for name in ("a.webp", "a.jp2", "a.j2k"):
        got, notes = pixels_of(tmp_path / name)
        np.testing.assert_array_equal(got, RGB)
        assert not notes
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"{name}: .*damaged or cut off"):
            open_slide(tmp_path / name)


def test_opacity_of_webp_and_jpeg_2000(tmp_path: Path) -> None:
    alpha = MORE[..., 0]
    clear = np.dstack([RGB, alpha])
    Image.fromarray(clear).save(tmp_path / "a.webp", lossless=True, exact=True)
    np.testing.assert_allclose(
        pixels_of(tmp_path / "a.webp")[0], over_white(RGB.astype(float), alpha), atol=0.51
    )
    data = imagecodecs.jpeg2k_encode(clear, codecformat="j2k", level=0)
    (tmp_path / "a.j2k").write_bytes(data)  # a codestream cannot declare it
    got, notes = pixels_of(tmp_path / "a.j2k")
    np.testing.assert_array_equal(got, RGB)
    assert "not declared as opacity" in notes[0]
    Image.fromarray(clear).save(tmp_path / "a.jp2")
    whole = (tmp_path / "a.jp2").read_bytes()
    if b"cdef" in whole:
        true = over_white(RGB.astype(float), alpha)
        np.testing.assert_allclose(pixels_of(tmp_path / "a.jp2")[0], true, atol=0.51)
        at = whole.index(b"cdef") + 6
        entries = [list(e) for e in struct.iter_unpack(">3H", whole[at : at + 24])]
        plain = b"".join(struct.pack(">3H", n, 65535 * (k == 1), where) for n, k, where in entries)
        (tmp_path / "a.jp2").write_bytes(whole[:at] + plain + whole[at + 24 :])
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.jp2")[0], RGB)


@pytest.mark.parametrize("shift", [2, 4, 8])
@pytest.mark.parametrize("kind", ["png", "j2k", "jp2", "grey png"])
def test_deep_pictures(kind: str, shift: int, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind.split()[-1]}"
    deep = (GREY if "grey" in kind else RGB).astype(np.uint16) << shift
    if path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(deep))
    else:
        path.write_bytes(imagecodecs.jpeg2k_encode(deep, codecformat=path.suffix[1:], level=0))
    got, notes = pixels_of(path)
    true = np.dstack([GREY] * 3) if "grey" in kind else RGB
    assert np.abs(got.astype(int) - true).max() <= 1
    assert f"of which {8 + shift} are in use" in notes[0]


def test_several_pictures_in_one_file(tmp_path: Path) -> None:
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="2 pictures in one file"):
        open_slide(tmp_path / "a.webp")


def test_a_czi_that_openslide_does_not_read_names_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        detect_format = staticmethod(lambda path: "zeiss")

        def __init__(self, path: Path) -> None:
            raise openslide.OpenSlideError("Compression 4 is not supported")

    path = write(tmp_path / "a.tif", RGB, "tiled")
    monkeypatch.setattr(openslide, "OpenSlide", Fake)
    monkeypatch.setitem(sys.modules, "pylibCZIrw", None)
    with pytest.raises(DataError, match=r"Compression 4.*pip install .hibio\[czi\].*OME-TIFF"):
        open_slide(path)


@pytest.mark.parametrize("planes", [1, 2])
def test_czi(planes: int, tmp_path: Path) -> None:
    czi = pytest.importorskip("pylibCZIrw.czi", reason="pylibCZIrw is not installed")
    big = np.kron(RGB, np.ones((8, 8, 1), np.uint8))
    path = tmp_path / "a.czi"
    with czi.create_czi(str(path), compression_options="zstd1:ExplicitLevel=2") as file:
        for z in range(planes):
            bgr = np.ascontiguousarray(big[..., ::-1])
            file.write(data=bgr, plane={"C": 0, "Z": z, "T": 0}, location=(1000, -50))
        file.write_metadata(document_name="a", scale_x=0.5e-6, scale_y=0.5e-6)
    if planes > 1:
        with pytest.raises(DataError, match=r"2 Z planes; expected one plane"):
            open_slide(path)
        return
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5)
        assert slide.level_dimensions == ((768, 640), (384, 320))
        for level, down in enumerate((1, 2)):
            got = slide.read_region((16 * down, 8 * down), level, (40, 30)).astype(int)
            true = big[::down, ::down][8:38, 16:56]
            assert np.abs(got - true).max() <= (0 if level == 0 else 2)
        assert (slide.read_region((760, 636), 0, (20, 20))[4:] == 255).all()
