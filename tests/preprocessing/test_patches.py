"""Patches: centred on the spot at every scale and level, white outside, errors that name spots."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocessing import patches
from preprocessing.errors import DataError
from preprocessing.image_transform import image_matrix, moved
from preprocessing.patches import (
    PatchConfig,
    iter_patches,
    measured_pitch_um,
    patch_window,
    read_patch,
)
from preprocessing.slides import Slide, open_slide
from preprocessing.slides.decoders import direct_tiles

SIGMA = 12.0  # level-0 pixels of a painted spot
SPOTS = np.array([[150.3, 140.8], [420.0, 160.5], [700.6, 150.2], [160.9, 450.1], [690.4, 455.7]])
SIZE = (860, 600)


def painted(spots: np.ndarray, size: tuple[int, int], down: int = 1) -> np.ndarray:
    """White with a dark Gaussian per spot; pixel i covers [i, i + 1) level-0 pixels times down."""
    x = (np.arange(size[0] // down) + 0.5) * down
    y = (np.arange(size[1] // down) + 0.5) * down
    ink = np.zeros((len(y), len(x)))
    for sx, sy in spots:
        ink += np.exp(-((x[None] - sx) ** 2 + (y[:, None] - sy) ** 2) / (2 * SIGMA**2))
    return np.repeat((255 - 200 * ink).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides")
    Image.fromarray(painted(SPOTS, SIZE)).save(path / "plain.png")
    Image.fromarray(painted(SPOTS, SIZE)).save(path / "plain.jpg", quality=95)
    with tifffile.TiffWriter(path / "pyramid.tif") as tiff:
        for level, down in enumerate((1, 2, 4)):
            tiff.write(
                painted(SPOTS, SIZE, down),
                tile=(64, 64),
                photometric="rgb",
                subfiletype=bool(level),
            )
    return path


def ink_centre(patch: np.ndarray) -> np.ndarray:
    """Centre of mass (x, y) of the darkness, in patch pixels from the left upper corner."""
    ink = 255.0 - patch.mean(axis=2)
    ink[ink < 20] = 0
    y, x = np.indices(ink.shape) + 0.5
    return np.array([(ink * x).sum(), (ink * y).sum()]) / ink.sum()


@pytest.mark.parametrize("name", ["plain.png", "plain.jpg", "pyramid.tif"])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.1])
@pytest.mark.parametrize("um_per_px", [0.5, 1.75])
def test_patch_centre_maps_back_to_the_spot(
    folder: Path, name: str, mpp: float, um_per_px: float
) -> None:
    um = 100.0 * mpp  # 100 level-0 pixels, so that a patch holds one spot
    px = round(um / um_per_px)
    with open_slide(folder / name) as slide:
        for i, patch in iter_patches(slide, SPOTS, mpp, um, px):
            assert patch.shape == (px, px, 3)
            scale = um / px / mpp  # level-0 pixels per patch pixel
            off = (ink_centre(patch) - px / 2) * scale
            window = patch_window(slide, (SPOTS[i, 0], SPOTS[i, 1]), mpp, um, px)
            half = 0.5 if window.box is None else 0.25  # cut on whole pixels, or resampled
            assert np.abs(off).max() <= half * max(1.0, scale) + 0.02  # the ink is rounded
            if window.level == 0:
                assert np.abs(off).max() <= 0.52
            back = SPOTS[i] + off
            assert np.hypot(*(back - SPOTS).T).argmin() == i


def test_centre_is_exact_when_resampled(folder: Path) -> None:
    with open_slide(folder / "pyramid.tif") as slide:
        for spot in SPOTS:
            patch = read_patch(
                slide, tuple(spot), 0.5, 60.0, 50
            )  # 2.4 level-0 pixels each: level 1
            assert np.abs(ink_centre(patch) - 25).max() * 2.4 < 0.1


def test_levels_agree(folder: Path) -> None:
    """The same patch from the pyramid and from level 0 alone."""
    with open_slide(folder / "pyramid.tif") as pyramid, open_slide(folder / "plain.png") as plain:
        for um, px, level in ((100.0, 200, 0), (100.0, 95, 1), (100.0, 50, 2)):
            assert patch_window(pyramid, (420.0, 160.5), 0.5, um, px).level == level
            one = read_patch(pyramid, (420.0, 160.5), 0.5, um, px).astype(float)
            two = read_patch(plain, (420.0, 160.5), 0.5, um, px).astype(float)
            assert np.abs(one - two).mean() < 1.5


def test_same_scale_is_cut_without_resampling(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        patch = read_patch(slide, (150.0, 120.0), 0.499, 50.0, 100)
    np.testing.assert_array_equal(patch, noise[70:170, 100:200])


def test_whole_number_reduction_is_local_average(tmp_path: Path) -> None:
    """A ramp stays the same ramp: closed form for every patch pixel."""
    ramp = np.repeat(np.arange(240, dtype=np.uint8)[None], 240, axis=0)
    Image.fromarray(np.dstack([ramp] * 3)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        patch = read_patch(slide, (120.0, 120.0), 1.0, 90.0, 30)
    expected = 75 + 3 * (np.arange(30) + 0.5) - 0.5
    assert np.abs(patch[..., 0] - expected).max() <= 0.51


def test_padding_is_white(tmp_path: Path) -> None:
    Image.new("RGB", (200, 200), (90, 60, 120)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        for um, px in ((100.0, 100), (100.0, 40)):  # cut, resampled
            patch = read_patch(slide, (0.0, 200.0), 1.0, um, px)
            half = px // 2
            assert (patch[: half - 1, half + 1 :] == (90, 60, 120)).all()
            assert (patch[:, : half - 1] == 255).all()
            assert (patch[half + 1 :] == 255).all()


def test_every_spot_once(folder: Path) -> None:
    rng = np.random.default_rng(2)
    xy = rng.uniform(0, 1, (40, 2)) * SIZE
    with open_slide(folder / "plain.png") as slide:
        found = dict(iter_patches(slide, xy, 0.5, 20.0, 16))
        assert sorted(found) == list(range(40))
        for i in (0, 7, 39):
            np.testing.assert_array_equal(
                found[i], read_patch(slide, (xy[i, 0], xy[i, 1]), 0.5, 20.0, 16)
            )


def test_centres_outside_are_named(folder: Path) -> None:
    xy = np.array([[10.0, 10], [861, 5], [5, 601], [-1, 5], [np.nan, 5]])
    with open_slide(folder / "plain.png") as slide:
        with pytest.raises(
            DataError, match=r"4 of 5 .*860 x 600.*: B, C, D, \.\.\.;.*861.0.*image_"
        ):
            iter_patches(slide, xy, 0.5, 112.0, 224, barcodes=list("ABCDE"))
        with pytest.raises(DataError, match=r"1 of 2 .*: spot 1; .*image_scale"):
            iter_patches(slide, xy[:2], 0.5, 112.0, 224)
        with pytest.raises(DataError, match=r"shape \(5,\)"):
            iter_patches(slide, xy[:, 0], 0.5, 112.0, 224)


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (lambda xy: xy[:, ::-1], "transpose"),
        (lambda xy: xy * [1, -1], "affine:1 0 0 0 -1 0"),
        (lambda xy: xy * [-1, 1], "affine:-1 0 0 0 1 0"),
    ],
)
def test_axes_that_are_swapped_or_turned_are_named_with_what_mends_them(folder, turn, said) -> None:
    xy = np.array([[800.0, 20], [10, 590], [850, 595]])
    with open_slide(folder / "plain.png") as slide:
        with pytest.raises(DataError, match=f"with '{said}' in the manifest column image_transfo"):
            iter_patches(slide, turn(xy), 0.5, 112.0, 224)
        back = moved(turn(xy), image_matrix(said, slide.level_dimensions[0]))
    assert np.array_equal(back, xy)


@pytest.mark.parametrize(
    ("mpp", "um", "px", "words"),
    [
        (0.0, 112.0, 224, "mpp is 0"),
        (float("nan"), 112.0, 224, "mpp is nan"),
        (0.5, -1.0, 224, "patch_um is -1"),
        (0.5, 112.0, 0, "patch_px is 0"),
        (0.0005, 112.0, 224, "224000 pixels across.*check mpp"),
    ],
)
def test_senseless_scales(folder: Path, mpp: float, um: float, px: int, words: str) -> None:
    with open_slide(folder / "plain.png") as slide, pytest.raises(DataError, match=words):
        list(iter_patches(slide, SPOTS, mpp, um, px))


def test_config_checks_itself() -> None:
    assert PatchConfig() == PatchConfig(None, 224)
    for um in (0, -1.0, 1e12, float("nan"), float("inf")):
        with pytest.raises(DataError, match=f"patch_um is {um}; expected micrometres above 0"):
            PatchConfig(patch_um=um)
        with pytest.raises(DataError, match=f"context_um is {um}"):
            PatchConfig(context_um=um)
    with pytest.raises(DataError, match=r"patch_px is 9000; expected 1 to 8,192"):
        PatchConfig(patch_px=9000)
    with pytest.raises(DataError, match="patch_px is 0"):
        PatchConfig(patch_px=0)
    with pytest.raises(DataError, match=r"call PatchConfig\.on_array first"):
        _ = PatchConfig().um


@pytest.mark.parametrize(
    ("pitch", "um"), [(200.0, 200.0), (100.0, 100.0), (55.0, 55.0), (8.0, 112.0), (None, 112.0)]
)
def test_the_patch_is_as_wide_as_the_pitch_of_the_array(pitch: float | None, um: float) -> None:
    assert PatchConfig().on_array(pitch).um == um
    assert PatchConfig(64.0).on_array(pitch).um == 64.0  # what was asked for stays


def test_a_context_narrower_than_the_array_is_refused() -> None:
    with pytest.raises(DataError, match=r"context_um is 150\.0, patch_um 200"):
        PatchConfig(context_um=150.0).on_array(200.0)


def _lattice(kind: str, pitch: float) -> np.ndarray:
    row, column = (axis.ravel() for axis in np.mgrid[:14, :16].astype(float))
    if kind == "hexagonal":
        return pitch * np.column_stack([column + row % 2 / 2, row * np.sqrt(3) / 2])
    return pitch * np.column_stack([column, row])


@pytest.mark.parametrize(("kind", "pitch"), [("square", 200.0), ("hexagonal", 100.0)])
def test_the_pitch_is_measured_through_jitter_holes_and_turns(kind: str, pitch: float) -> None:
    """HER2ST's spots lie about 8 % of the pitch off their place; the nearest one is at .93."""
    rng = np.random.default_rng(0)
    xy = _lattice(kind, pitch)[rng.random(224) > 0.1]
    turn = np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    jittered = (xy + rng.normal(0.0, 0.04 * pitch, xy.shape)) @ turn
    assert measured_pitch_um(jittered) == pitch
    slow = []
    for one in jittered:  # the median of the four nearest, one spot after the other
        distance = sorted(float(np.linalg.norm(one - other)) for other in jittered)
        slow.append((distance[2] + distance[3]) / 2)
    assert round(float(np.median(slow)) / 10) * 10 == pitch


def test_scattered_cells_and_a_handful_of_spots_are_no_array() -> None:
    rng = np.random.default_rng(1)
    assert measured_pitch_um(rng.uniform(0.0, 3000.0, (400, 2))) is None
    assert measured_pitch_um(_lattice("square", 100.0)[:8]) is None


class _Geometry(Slide):
    """A slide without pixels, for the geometry alone."""

    def __init__(self, downsamples: tuple[float, ...]) -> None:
        self.path, self.mpp, self.level_downsamples = Path("none"), None, downsamples
        self.level_dimensions = tuple((round(9000 / d), round(7000 / d)) for d in downsamples)


@settings(max_examples=200, deadline=None)
@given(
    x=st.floats(0, 9000),
    y=st.floats(0, 7000),
    mpp=st.floats(0.1, 2.0),
    um=st.floats(20, 400),
    px=st.integers(16, 256),
    second=st.floats(1.9, 4.1),
)
def test_window_geometry(x: float, y: float, mpp: float, um: float, px: int, second: float) -> None:
    slide = _Geometry((1.0, second, second**2))
    window = patch_window(slide, (x, y), mpp, um, px)
    down, scale = slide.level_downsamples[window.level], um / px / mpp
    assert window.level == 0 or down <= scale * 1.01
    box = window.box or (0, 0, window.size, window.size)
    assert min(box) >= 0
    assert max(box) <= window.size
    for axis, centre in ((0, x), (1, y)):
        middle = window.corner_px0[axis] + (box[axis] + box[axis + 2]) / 2 * down
        slack = 1e-6 if window.box else 0.5 * down + (0.5 if down > 1 else 0) + 1e-6
        assert abs(middle - centre) <= slack
        side_um = (box[axis + 2] - box[axis]) * down * mpp
        assert side_um == pytest.approx(um, abs=1e-6 if window.box else 0.51 * down * mpp)


def test_squares_follow_the_first_spot_of_each(tmp_path: Path) -> None:
    """Spots along a curve stay along it: whole squares, as the curve meets them."""
    Image.new("L", (6000, 3000), 255).save(tmp_path / "a.png")
    xy = np.array([[5000, 2500], [100, 100], [5010, 2500], [3000, 100], [110, 100], [5020, 2510]])
    with open_slide(tmp_path / "a.png") as slide:
        order = [i for i, _ in iter_patches(slide, xy.astype(float), 0.5, 20.0, 40)]
    assert order == [0, 2, 5, 1, 4, 3]


@pytest.mark.parametrize(("um", "px"), [(50.0, 100), (50.0, 30), (90.0, 50)])
def test_blocks_give_the_pixels_of_single_patches(folder: Path, um: float, px: int) -> None:
    rng = np.random.default_rng(3)
    xy = rng.uniform(0, 1, (150, 2)) * SIZE  # close together: read as one block
    for name in ("pyramid.tif", "plain.jpg"):
        with open_slide(folder / name) as slide:
            for i, patch in iter_patches(slide, xy, 0.5, um, px):
                one = read_patch(slide, (xy[i, 0], xy[i, 1]), 0.5, um, px)
                np.testing.assert_array_equal(patch, one)


@pytest.mark.parametrize("down", [2.0005, 3.997])
def test_blocks_of_a_level_that_is_no_whole_number_smaller(
    folder: Path, monkeypatch: pytest.MonkeyPatch, down: float
) -> None:
    """The centres stay within half a level-0 pixel."""
    size = tuple(round(edge / down) for edge in SIZE)
    small = Image.fromarray(painted(SPOTS, SIZE)).resize(size, Image.Resampling.BOX)
    with tifffile.TiffWriter(folder / "odd.tif") as tiff:
        for level, picture in enumerate((painted(SPOTS, SIZE), np.asarray(small))):
            tiff.write(picture, tile=(64, 64), photometric="rgb", subfiletype=bool(level))
    steps = np.array([(dx, dy) for dx in (-3, 0, 3) for dy in (-3, 0, 3)])
    near = np.concatenate([SPOTS + step for step in steps])
    px = round(100 / down)
    with direct_tiles(open_slide(folder / "odd.tif")) as slide:
        monkeypatch.setattr(patches, "BLOCK_PIXELS", 10**9)
        for i, patch in iter_patches(slide, near, 0.5, 50.0, px):
            off = (ink_centre(patch) - px / 2) * 100 / px
            assert np.abs(off - (SPOTS[i % len(SPOTS)] - near[i])).max() < 0.5 + 0.5 * down
