"""Tissue: thumbnails keep the picture, the mask finds stained areas, fractions are exact areas."""

import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from preprocessing import tissue
from preprocessing.errors import DataError
from preprocessing.slides import OpenSlideSlide, open_slide, tiff
from preprocessing.slides.tiff import PlainTiff
from preprocessing.tissue import (
    TissueMask,
    has_black_background,
    thumbnail,
    tissue_fraction,
    tissue_mask,
)

DATA = Path(__file__).parents[3] / "shared" / "data"
PINK, GLASS = (200, 130, 180), (240, 239, 241)


def section(size: int = 400, background: tuple[int, int, int] = GLASS) -> np.ndarray:
    """A noisy square section (100..300) on a noisy background."""
    picture = np.full((size, size, 3), background, dtype=np.int16)
    picture[size // 4 : size * 3 // 4, size // 4 : size * 3 // 4] = PINK
    noise = np.random.default_rng(0).integers(-6, 7, (size, size, 1))
    return (picture + noise * (picture > 0)).clip(0, 255).astype(np.uint8)


def save(path: Path, picture: np.ndarray) -> Path:
    Image.fromarray(picture).save(path)
    return path


def test_thumbnail_is_the_block_mean(tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 255, (120, 200, 3), dtype=np.uint8)
    with open_slide(save(tmp_path / "a.png", picture)) as slide:
        small, downsample = thumbnail(slide, 50)
        same, one = thumbnail(slide, 1024)
    assert (small.shape, downsample) == ((30, 50, 3), 4.0)
    mean = picture.reshape(30, 4, 50, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - mean).max() <= 1.0
    assert one == 1.0
    np.testing.assert_array_equal(same, picture)


@pytest.mark.parametrize("max_px", [64, 45])
def test_thumbnail_does_not_depend_on_bands_or_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_px: int
) -> None:
    y, x = np.mgrid[:192, :256]
    picture = np.dstack([x % 256, y, (x + y) // 2]).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for level in range(3):
            down = 2**level
            block = picture.reshape(192 // down, down, 256 // down, down, 3).mean(axis=(1, 3))
            tiff.write(
                block.astype(np.uint8), tile=(64, 64), photometric="rgb", subfiletype=bool(level)
            )
    with open_slide(save(tmp_path / "a.png", picture)) as slide:
        whole, downsample = thumbnail(slide, max_px)
        monkeypatch.setattr(tissue, "BAND_PIXELS", 256 * 13)
        banded, _ = thumbnail(slide, max_px)
    with open_slide(tmp_path / "a.tif") as slide:
        assert len(slide.level_downsamples) == 3
        pyramid, same = thumbnail(slide, max_px)
    assert same == downsample
    assert np.abs(whole.astype(int) - banded).max() <= 1
    assert np.abs(whole.astype(int) - pyramid).max() <= 5


@pytest.mark.parametrize("kind", ["ome", "plain", "openslide"])
@pytest.mark.parametrize("band", [256 * 40, 256 * 150])
def test_thumbnail_reads_every_tile_once_and_holds_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, band: int
) -> None:
    """Bands lower than a tile, and those that would end within one."""
    picture = np.random.default_rng(2).integers(0, 255, (250, 256, 3), dtype=np.uint8)
    path = tmp_path / ("a.ome.tif" if kind == "ome" else "a.tif")
    tifffile.imwrite(path, picture, tile=(64, 32), photometric="rgb", ome=kind == "ome")
    with open_slide(save(tmp_path / "a.png", picture)) as slide:
        whole, _ = thumbnail(slide, 45)
    monkeypatch.setattr(tissue, "BAND_PIXELS", band)
    monkeypatch.setattr(tiff, "CACHE_BYTES", 0)  # a tile is kept
    asked = []
    with PlainTiff(path) if kind == "plain" else open_slide(path) as slide:
        read = slide.read_region
        monkeypatch.setattr(slide, "read_region", lambda *a: (asked.append(a), read(*a))[1])
        found, _ = thumbnail(slide, 45)
        assert slide.tile(0) == (64, 32)
        assert isinstance(slide, OpenSlideSlide) == (kind == "openslide")
        if not isinstance(slide, OpenSlideSlide):
            assert slide._levels[0].segment.cache_info().misses == 4 * 8  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found, whole)
    assert all(x % 32 == y % 64 == 0 for (x, y), _, _ in asked)
    assert sum(w * h for _, _, (w, h) in asked) == 250 * 256
    assert max(w * h for _, _, (w, h) in asked) <= band


def test_thumbnail_of_high_tiles_takes_a_part_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.random.default_rng(3).integers(0, 255, (250, 256, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", picture, tile=(128, 128), photometric="rgb")
    monkeypatch.setattr(tissue, "BAND_PIXELS", 256 * 10)
    monkeypatch.setattr(tissue, "TILE_ROW_PIXELS", 256 * 50)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert max(map(len, tissue._rows(slide, 0))) == 10
        rows = np.concatenate([rows.copy() for rows in tissue._rows(slide, 0)])
    np.testing.assert_array_equal(rows, picture)


def test_thumbnail_of_a_sliver_and_a_bad_size(tmp_path: Path) -> None:
    with open_slide(save(tmp_path / "a.png", np.zeros((2, 900, 3), dtype=np.uint8))) as slide:
        assert thumbnail(slide, 90)[0].shape == (1, 90, 3)
        with pytest.raises(DataError, match="max_px is 0"):
            thumbnail(slide, 0)


def test_black_background_is_told(tmp_path: Path) -> None:
    black = save(tmp_path / "black.png", section(background=(0, 0, 0)))
    glass = save(tmp_path / "glass.png", section())
    with open_slide(black) as slide:
        assert has_black_background(slide)
    with open_slide(black, black_is_background=True) as slide:
        assert not has_black_background(slide)
    with open_slide(glass) as slide:
        assert not has_black_background(slide)


@pytest.mark.parametrize("background", [GLASS, (0, 0, 0), (225, 212, 222)])
def test_mask_finds_the_section(tmp_path: Path, background: tuple[int, int, int]) -> None:
    path = save(tmp_path / "a.png", section(background=background))
    with open_slide(path) as slide:
        found = tissue_mask(slide)
    truth = np.zeros((400, 400), dtype=bool)
    truth[100:300, 100:300] = True
    assert found.cue == "saturation"
    assert (found.mask == truth).mean() > 0.985


def test_mask_fills_pin_holes_and_drops_specks(tmp_path: Path) -> None:
    picture = section()
    picture[200:203, 200:203] = GLASS
    picture[20:22, 20:22] = PINK
    picture[150:180, 150:180] = GLASS  # a lumen stays
    with open_slide(save(tmp_path / "a.png", picture)) as slide:
        mask = tissue_mask(slide).mask
    assert mask[201, 201]
    assert not mask[15:28, 15:28].any()
    assert not mask[155:175, 155:175].any()


def test_grey_picture_by_darkness(tmp_path: Path) -> None:
    picture = np.repeat(section()[..., 1:2], 3, axis=2)
    with open_slide(save(tmp_path / "a.png", picture)) as slide:
        found = tissue_mask(slide)
    assert found.cue == "darkness"
    assert found.mask[110:290, 110:290].all()
    assert found.mask.mean() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(("colour", "share"), [(GLASS, 0), (PINK, 1), ((0, 0, 0), 0)])
def test_one_coloured_pictures(tmp_path: Path, colour: tuple[int, int, int], share: float) -> None:
    picture = np.full((100, 100, 3), colour, dtype=np.uint8)
    with open_slide(save(tmp_path / "a.png", picture)) as slide:
        found = tissue_mask(slide)
    assert found.mask.mean() == share
    assert math.isfinite(found.threshold)


def brute_fraction(mask: TissueMask, x: float, y: float, side: float) -> float:
    """Overlap of the square with every mask pixel, one by one."""
    total, d = 0.0, mask.downsample
    for i, j in zip(*np.nonzero(mask.mask), strict=True):
        across = min(x + side / 2, (j + 1) * d) - max(x - side / 2, j * d)
        down = min(y + side / 2, (i + 1) * d) - max(y - side / 2, i * d)
        total += max(across, 0.0) * max(down, 0.0)
    return total / side**2


@pytest.mark.parametrize("um", [0.4, 6.0, 55.0])
def test_fraction_is_the_exact_area(um: float) -> None:
    rng = np.random.default_rng(3)
    mask = TissueMask(rng.random((18, 25)) < 0.5, 2.7)
    xy = rng.uniform(-5, 75, (40, 2))
    got = tissue_fraction(mask, xy, um, 0.5)
    expected = [brute_fraction(mask, x, y, um / 0.5) for x, y in xy]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == np.float32


def test_fraction_in_closed_form_and_in_error() -> None:
    mask = TissueMask(np.arange(20)[None].repeat(20, axis=0) >= 10, 10.0)  # tissue from x = 100
    xy = np.array([[50.0, 100], [100, 100], [110, 100], [150, 100], [200, 100], [900, 900]])
    np.testing.assert_allclose(tissue_fraction(mask, xy, 20.0, 0.5), [0, 0.5, 0.75, 1, 0.5, 0])
    assert tissue_fraction(mask, np.empty((0, 2)), 20.0, 0.5).shape == (0,)
    with pytest.raises(DataError, match="mpp is 0"):
        tissue_fraction(mask, xy, 20.0, 0.0)


def test_real_masked_section() -> None:
    path = DATA / "her2st" / "images" / "A1_masked_lowres.png"
    if not path.exists():
        pytest.skip("needs the shared data file her2st/images/A1_masked_lowres.png")
    with open_slide(path) as slide:
        assert has_black_background(slide)
        found = tissue_mask(slide)
        small, _ = thumbnail(slide, 2048)
    black = (small <= 8).all(axis=2)
    assert not (found.mask & black).any()
    assert 0.25 < found.mask.mean() < 0.55
