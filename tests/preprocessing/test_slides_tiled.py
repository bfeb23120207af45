"""Tiles decoded directly: the same pixels as OpenSlide's, or OpenSlide itself."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from preprocessing.errors import DataError
from preprocessing.slides import OpenSlideSlide, open_slide
from preprocessing.slides.decoders import TiledSlide, direct_tiles
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA

SLIDES = REAL_DATA / "slides"


def picture(height: int = 700, width: int = 900) -> np.ndarray:
    """Smooth colours with noise, (height, width, 3)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 // width, y * 255 // height, (x + y) // 2 % 256], axis=-1)
    return np.clip(smooth + rng.integers(-20, 20, smooth.shape), 0, 255).astype(np.uint8)


def write(path: Path, levels: tuple[int, ...] = (1, 2, 4), **options: object) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        for level in levels:
            small = np.ascontiguousarray(picture()[::level, ::level])
            given = {"tile": (128, 128), "photometric": "rgb", "compression": "jpeg"} | options
            tiff.write(small, subfiletype=level > 1, metadata=None, **given)  # type: ignore[arg-type]
    return path


def assert_equal_pixels(path: Path, levels: tuple[int, ...], black: bool = False) -> None:
    with open_slide(path, black) as plain, direct_tiles(open_slide(path, black), black) as tiled:
        assert isinstance(plain, OpenSlideSlide)
        assert isinstance(tiled, TiledSlide)
        assert (tiled.level_dimensions, tiled.mpp) == (plain.level_dimensions, plain.mpp)
        width, height = plain.level_dimensions[0]
        rng = np.random.default_rng(1)
        for level in levels:
            down = plain.level_downsamples[level]
            for _ in range(6):
                at = rng.integers(-200, (width, height)) // down * down
                corner, size = (int(at[0]), int(at[1])), (310, 170)
                one, two = (s.read_region(corner, level, size) for s in (plain, tiled))
                np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("compression", ["jpeg", "deflate", "lzw", None])
def test_tiled_tiff(tmp_path: Path, compression: str | None) -> None:
    assert_equal_pixels(write(tmp_path / "a.tif", compression=compression), (0, 1, 2))


def test_half_colours_and_painted_background(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", compressionargs={"level": 80}, subsampling=(2, 2))
    assert_equal_pixels(path, (0, 1))
    assert_equal_pixels(path, (0,), black=True)


@pytest.mark.skipif(not SLIDES.is_dir(), reason=NO_REAL_DATA)
@pytest.mark.parametrize(
    "name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"], ids=["jpeg", "jpeg2000"]
)
def test_real_slides(name: str) -> None:
    assert_equal_pixels(SLIDES / name, (0,))


def test_what_is_not_known_to_be_equal_stays_with_openslide(tmp_path: Path) -> None:
    grey = picture()[..., 0]
    tifffile.imwrite(tmp_path / "grey.tif", grey, tile=(128, 128), photometric="minisblack")
    gap = write(tmp_path / "gap.tif", levels=(1,))
    with tifffile.TiffFile(gap, mode="r+") as tiff:
        counts = list(tiff.pages[0].databytecounts)  # type: ignore[union-attr]
        tiff.pages[0].tags["TileByteCounts"].overwrite([0, *counts[1:]])  # type: ignore[union-attr]
    for path in (tmp_path / "grey.tif", gap):
        with direct_tiles(open_slide(path)) as slide:
            assert isinstance(slide, OpenSlideSlide)


def test_more_pixels_claimed_than_there_are_tiles(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", levels=(1,))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["ImageWidth"].overwrite(60_000)  # type: ignore[union-attr]
        tiff.pages[0].tags["ImageLength"].overwrite(60_000)  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"60000 x 60000 pixels are 219961 tiles, but it has 48"):
        direct_tiles(open_slide(path))
