"""OME-TIFF: levels in SubIFDs, RGB side by side and in planes, scale in every unit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preprocessing.errors import DataError
from preprocessing.slides import OpenSlideSlide, open_slide
from preprocessing.slides.tiff import OmeTiff, PlainTiff
from tests.preprocessing.test_slides import REGIONS, expected_region, noise

WIDTH, HEIGHT = 330, 270


def write_ome(path: Path, pixels: np.ndarray, levels: int = 2, **options: Any) -> Path:
    """A pyramid in SubIFDs; each level is the finer one, every second pixel."""
    metadata: dict[str, Any] = {"axes": "YXS"} | options.pop("metadata", {})
    options = {"photometric": "rgb", "tile": (64, 80)} | options
    rows = metadata["axes"].index("Y")
    step = [slice(None)] * pixels.ndim
    step[rows] = step[rows + 1] = slice(None, None, 2)
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(pixels, subifds=levels - 1, metadata=metadata, **options)
        for _ in range(levels - 1):
            pixels = np.ascontiguousarray(pixels[tuple(step)])
            tiff.write(pixels, subfiletype=1, metadata=None, **options)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "deflate"},
        {"tile": None, "rowsperstrip": 16, "compression": "lzw"},
        {"planarconfig": "separate", "compression": "deflate"},
        {"planarconfig": "separate", "tile": None},
    ],
)
def test_levels_are_the_pixels(options: dict[str, Any], tmp_path: Path) -> None:
    pixels = noise(HEIGHT, WIDTH, 3)
    planar = "planarconfig" in options
    given_axes = {"metadata": {"axes": "SYX"}} if planar else {}
    stored = np.moveaxis(pixels, 2, 0) if planar else pixels
    path = write_ome(tmp_path / "a.ome.tif", stored, 3, **options, **given_axes)
    with open_slide(path) as slide:
        assert isinstance(slide, OmeTiff)
        assert slide.level_dimensions == ((330, 270), (165, 135), (83, 68))
        assert slide.level_downsamples[1] == 2.0
        for level in range(3):
            own = pixels[:: 2**level, :: 2**level]
            for x, y, w, h in REGIONS:
                got = slide.read_region((x * 2**level, y * 2**level), level, (w, h))
                np.testing.assert_array_equal(got, expected_region(own, x, y, w, h))


def test_three_grey_pages_are_red_green_blue(tmp_path: Path) -> None:
    pixels = noise(90, 100, 3)
    stored = np.moveaxis(pixels, 2, 0)
    options = {"photometric": "minisblack", "metadata": {"axes": "CYX"}}
    with open_slide(write_ome(tmp_path / "a.tif", stored, **options)) as slide:
        np.testing.assert_array_equal(slide.read_region((0, 0), 0, (100, 90)), pixels)
    options["metadata"] = {"axes": "CYX", "Channel": {"Name": ["DAPI", "CD3", "CD8"]}}
    with pytest.raises(DataError, match=r"stain\.tif: three channels DAPI, CD3, CD8"):
        open_slide(write_ome(tmp_path / "stain.tif", stored, **options))


@pytest.mark.parametrize(
    ("size", "unit", "mpp"),
    [
        (0.25, "µm", 0.25),
        (250.0, "nm", 0.25),
        (0.00025, "mm", 0.25),
        (0.25, None, 0.25),
        (2500.0, "Å", 0.25),
        (1.0, "pixel", None),
        (72.0, "µm", None),
    ],
)
def test_scale(size: float, unit: str | None, mpp: float | None, tmp_path: Path) -> None:
    units = {} if unit is None else {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    known = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size} | units
    with open_slide(write_ome(tmp_path / "a.tif", noise(90, 100, 3), metadata=known)) as slide:
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp))


def test_the_largest_picture_is_read(tmp_path: Path) -> None:
    label, pixels = noise(40, 60, 3), noise(120, 200, 3)
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=True) as tiff:
        for picture, size in ((label, 9.0), (pixels, 0.5)):
            known = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size}
            tiff.write(picture, photometric="rgb", metadata=known)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.level_dimensions == ((200, 120),)
        assert slide.mpp == 0.5
        np.testing.assert_array_equal(slide.read_region((0, 0), 0, (200, 120)), pixels)


def test_refused(tmp_path: Path) -> None:
    stack = {"metadata": {"axes": "ZYX"}, "photometric": "minisblack"}
    write_ome(tmp_path / "stack.tif", noise(5, 80, 90), **stack)
    uneven = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}
    write_ome(tmp_path / "uneven.tif", noise(80, 90, 3), metadata=uneven)
    bomb = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bb">]><OME>&b;</OME>'
    tifffile.imwrite(tmp_path / "bomb.tif", noise(80, 90, 3), description=bomb, metadata=None)
    for name, words in {
        "stack.tif": r"axes ZYX, shape \(5, 80, 90\)",
        "uneven.tif": "0.5 and 0.25 um per pixel",
        "bomb.tif": "declares entities",
    }.items():
        with pytest.raises(DataError, match=rf"{name}: .*{words}"):
            open_slide(tmp_path / name)


@pytest.mark.parametrize("compression", ["deflate", "jpeg", None])
def test_cut_off_files_are_refused_when_opened(tmp_path: Path, compression: str | None) -> None:
    path = write_ome(tmp_path / "a.tif", noise(HEIGHT, WIDTH, 3), compression=compression)
    open_slide(path).close()
    whole = path.read_bytes()
    for share in (0.3, 0.6, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=r"a\.tif: "):
            open_slide(path)


def test_damaged_tiles_are_refused_when_opened(tmp_path: Path) -> None:
    """The last and the fullest are decoded; the file is as long as it was."""
    path = write_ome(tmp_path / "a.tif", noise(HEIGHT, WIDTH, 3), compression="deflate")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        at, count = page.dataoffsets[-1], page.databytecounts[-1]
    data = bytearray(path.read_bytes())
    data[at : at + count] = bytes(count)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tif: cannot be read .*damaged"):
        open_slide(path)


def test_planar_tiff_without_ome(tmp_path: Path) -> None:
    pixels = noise(90, 100, 3)
    planes = np.moveaxis(pixels, 2, 0)
    for name, options in (
        ("mapped", {}),
        ("lzw", {"compression": "lzw"}),
        ("t", {"tile": (64, 64)}),
    ):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate", **options)
        with open_slide(path) as slide:
            assert isinstance(slide, OpenSlideSlide if name == "t" else PlainTiff)
            np.testing.assert_array_equal(slide.read_region((0, 0), 0, (100, 90)), pixels)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    size=st.tuples(st.integers(16, 90), st.integers(16, 90)),
    tile=st.sampled_from([(16, 16), (32, 16), (48, 64)]),
    corner=st.tuples(st.integers(-20, 100), st.integers(-20, 100)),
    window=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    planar=st.booleans(),
)
def test_any_window_of_any_size(
    size: tuple[int, int], tile: Any, corner: Any, window: Any, planar: bool, tmp_path: Path
) -> None:
    pixels = noise(size[1], size[0], 3)
    options: dict[str, Any] = {"tile": tile, "compression": "deflate"}
    if planar:
        options |= {"planarconfig": "separate", "metadata": {"axes": "SYX"}}
    stored = np.moveaxis(pixels, 2, 0) if planar else pixels
    with open_slide(write_ome(tmp_path / "h.tif", stored, 1, **options)) as slide:
        got = slide.read_region(corner, 0, window)
    np.testing.assert_array_equal(got, expected_region(pixels, *corner, *window))
