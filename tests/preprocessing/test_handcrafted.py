"""Hand-made features: against scikit-image and slow loops, invariance, blank patches, errors."""

import numpy as np
import pytest
from scipy import ndimage
from skimage import measure
from skimage.color import rgb2hed
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

from preprocessing import handcrafted
from preprocessing.errors import DataError
from preprocessing.handcrafted import FEATURE_NAMES, handcrafted_batch


def tissue_like(n: int = 6, size: int = 64, seed: int = 0) -> np.ndarray:
    """Purple blobs on pink with noise, as H&E is."""
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.normal(size=(n, size, size)), (0, 2.5, 2.5)) * 6
    share = 1 / (1 + np.exp(-4 * blobs))[..., None]
    colour = share * np.array([90, 50, 140]) + (1 - share) * np.array([230, 180, 215])
    return (colour + rng.normal(0, 8, (n, size, size, 3))).clip(0, 255).astype(np.uint8)


def handcrafted_features(patch: np.ndarray) -> np.ndarray:
    return handcrafted_batch(patch[None])[0]


def column(features: np.ndarray, name: str) -> np.ndarray:
    return features[..., FEATURE_NAMES.index(name)]


def luminance(patches: np.ndarray) -> np.ndarray:
    weights = np.rint(handcrafted.LUMA * 2**16).astype(int)
    return (patches.astype(int) @ weights >> 16).astype(np.uint8)


def test_names_are_unique_and_shapes_fit() -> None:
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES)
    features = handcrafted_batch(tissue_like())
    assert features.shape == (6, len(FEATURE_NAMES))
    assert features.dtype == np.float32
    assert handcrafted_batch(tissue_like()[:0]).shape == (0, len(FEATURE_NAMES))


def test_colour_statistics_against_numpy() -> None:
    patches = tissue_like()
    features = handcrafted_batch(patches)
    hed = rgb2hed(patches)
    top, low = patches.max(axis=3) / 255.0, patches.min(axis=3) / 255.0
    planes = {
        "red": patches[..., 0] / 255.0,
        "blue": patches[..., 2] / 255.0,
        "haematoxylin": hed[..., 0],
        "eosin": hed[..., 1],
        "residual": hed[..., 2],
        "saturation": (top - low) / top,
        "value": top,
    }
    for name, plane in planes.items():
        flat = plane.reshape(6, -1)
        np.testing.assert_allclose(column(features, f"{name}_mean"), flat.mean(1), atol=1e-4)
        np.testing.assert_allclose(column(features, f"{name}_sd"), flat.std(1), atol=1e-4)
        for share in (10, 50, 90):
            expected = np.percentile(flat, share, axis=1, method="nearest")
            np.testing.assert_allclose(column(features, f"{name}_p{share}"), expected, atol=1e-4)


def test_local_binary_pattern_against_skimage() -> None:
    """With four neighbours on whole pixels skimage computes the same thing."""
    grey = luminance(tissue_like())
    ring = ((0, 1), (-1, 0), (0, -1), (1, 0))
    got = handcrafted._pattern_histogram(grey, ring)
    for picture, histogram in zip(grey, got, strict=True):
        code = local_binary_pattern(picture, 4, 1, method="uniform")[1:-1, 1:-1].astype(int)
        expected = np.bincount(code.ravel(), minlength=6) / code.size
        np.testing.assert_allclose(histogram, expected, atol=1e-12)


def test_local_binary_pattern_against_a_loop() -> None:
    patch = tissue_like(1, 16)
    grey = luminance(patch)[0].astype(int)
    counts = np.zeros(10)
    ring = handcrafted.RINGS[3]
    for y in range(3, 13):
        for x in range(3, 13):
            bits = [int(grey[y + dy, x + dx] >= grey[y, x]) for dy, dx in ring]
            changes = sum(bits[k] != bits[k - 1] for k in range(8))
            counts[sum(bits) if changes <= 2 else 9] += 1
    features = handcrafted_features(patch[0])
    got = [column(features, f"lbp3_{k}") for k in range(10)]
    np.testing.assert_allclose(got, counts / 100, atol=1e-6)


@pytest.mark.parametrize("distance", handcrafted.DISTANCES)
def test_cooccurrence_against_skimage(distance: int) -> None:
    patches = tissue_like(3)
    features = handcrafted_batch(patches)
    for row, grey in zip(features, luminance(patches) // 16, strict=True):
        share = np.zeros((16, 16))
        for dy, dx in ((0, 1), (1, 1), (1, 0), (1, -1)):
            y, x = np.mgrid[:64, :64]
            inside = (y + dy * distance < 64) & (x + dx * distance >= 0) & (x + dx * distance < 64)
            pair = np.zeros((16, 16))
            np.add.at(
                pair,
                (grey[y[inside], x[inside]],
                 grey[y[inside] + dy * distance, x[inside] + dx * distance]),
                1,
            )  # fmt: skip
            share += (pair + pair.T) / pair.sum() / 8
        for name in ("contrast", "dissimilarity", "homogeneity", "energy", "correlation"):
            expected = graycoprops(share[:, :, None, None], name)[0, 0]
            np.testing.assert_allclose(column(row, f"glcm{distance}_{name}"), expected, rtol=1e-4)
        entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
        np.testing.assert_allclose(column(row, f"glcm{distance}_entropy"), entropy, rtol=1e-4)


def test_cooccurrence_along_one_axis_is_skimages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handcrafted, "ANGLES", ((0, 1),))
    grey = luminance(tissue_like(1))
    matrix = graycomatrix(grey[0] // 16, [1], [0.0], levels=16, symmetric=True, normed=True)
    got = handcrafted._cooccurrence(grey, 1)[0]
    for k, name in enumerate(handcrafted.COOCCURRENCE[:5]):
        np.testing.assert_allclose(got[k], graycoprops(matrix, name)[0, 0], rtol=1e-9)


def test_blobs_against_skimage() -> None:
    mask = np.random.default_rng(1).random((5, 40, 30)) < 0.25
    mask[3] = False
    mask[4] = True
    count, mean, largest, sd = handcrafted._blobs(mask)
    for k in range(5):
        labels = measure.label(mask[k], connectivity=2)
        area = np.array([r.area for r in measure.regionprops(labels)]) / 1200
        assert count[k] == len(area)
        expected = (area.mean(), area.max(), area.std()) if len(area) else (0, 0, 0)
        np.testing.assert_allclose((mean[k], largest[k], sd[k]), expected, atol=1e-6)


def test_nuclei_of_a_drawn_patch() -> None:
    patch = np.full((64, 64, 3), (235, 190, 220), dtype=np.uint8)
    for y, x in ((10, 10), (10, 40), (40, 20)):
        patch[y : y + 8, x : x + 8] = (80, 50, 140)
    features = handcrafted_features(patch)
    assert column(features, "nucleus_count") == 3
    assert 150 / 4096 <= column(features, "nucleus_fraction") <= 300 / 4096  # 192 were drawn
    area = column(features, "nucleus_area_mean") * 4096 / 1000
    np.testing.assert_allclose(column(features, "nucleus_fraction") * 4096, 3 * area, rtol=1e-4)
    assert column(features, "nucleus_area_sd") == pytest.approx(0, abs=1e-3)
    assert column(features, "pale_fraction") == 0


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("mirror", [False, True])
def test_nearly_invariant_to_turns_and_mirrors(turns: int, mirror: bool) -> None:
    patches = tissue_like()
    moved = np.rot90(patches, turns, axes=(1, 2))
    moved = moved[:, :, ::-1] if mirror else moved
    np.testing.assert_allclose(
        handcrafted_batch(moved), handcrafted_batch(patches), rtol=1e-5, atol=2e-6
    )


def test_rows_do_not_depend_on_their_company(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = tissue_like(9)
    together = handcrafted_batch(patches)
    np.testing.assert_array_equal(together, handcrafted_batch(patches))
    monkeypatch.setattr(handcrafted, "CHUNK", 4)
    np.testing.assert_allclose(handcrafted_batch(patches), together, rtol=1e-6)
    np.testing.assert_allclose(handcrafted_features(patches[7]), together[7], rtol=1e-6)


def test_inputs_are_not_changed_and_details_matter() -> None:
    patches = tissue_like(2)
    kept = patches.copy()
    one = handcrafted_batch(patches)
    np.testing.assert_array_equal(patches, kept)
    shuffled = np.random.default_rng(0).permutation(patches.reshape(2, -1, 3), axis=1)
    two = handcrafted_batch(shuffled.reshape(patches.shape))
    np.testing.assert_allclose(column(one, "red_mean"), column(two, "red_mean"), atol=1e-6)
    assert (column(two, "glcm1_contrast") > 2 * column(one, "glcm1_contrast")).all()
    assert (column(two, "gradient_mean") > column(one, "gradient_mean")).all()


@pytest.mark.parametrize("level", [0, 1, 127, 255])
@pytest.mark.parametrize("size", [16, 64])
def test_constant_patches_are_finite(level: int, size: int) -> None:
    features = handcrafted_features(np.full((size, size, 3), level, dtype=np.uint8))
    assert np.isfinite(features.astype(np.float16)).all()
    for name, value in zip(FEATURE_NAMES, features, strict=True):
        if name.endswith("_sd") and not name.startswith("nucleus"):
            assert value == pytest.approx(0, abs=1e-3), name
    assert column(features, "lbp1_8") == 1
    assert column(features, "glcm1_contrast") == 0
    assert column(features, "pale_fraction") == float(level == 255)


def test_stripes_are_coherent_and_noise_is_not() -> None:
    stripes = np.tile(np.arange(64)[None, :, None] % 8 * 30, (64, 1, 3)).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 1), dtype=np.uint8).repeat(3, 2)
    assert column(handcrafted_features(stripes), "gradient_coherence") > 0.99
    assert column(handcrafted_features(noise), "gradient_coherence") < 0.1


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 64, 64, 3)),
        np.zeros((64, 64, 3), dtype=np.uint8),
        np.zeros((2, 64, 64, 4), dtype=np.uint8),
        np.zeros((2, 15, 64, 3), dtype=np.uint8),
    ],
)
def test_misfits_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"expected uint8 \(n, h, w, 3\)"):
        handcrafted_batch(bad)
