"""Hand-made colour, texture and nucleus features of a patch: the image baseline without a network.

They need no weights, run on a CPU, and nearly ignore rotation and mirroring, as tissue has no
upright: local binary patterns count by rotation class, co-occurrence is averaged over the four
angles, gradients enter by length. Every feature is a fixed function of the one patch (no fitted
threshold), finite also for a blank patch, and fits float16.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import hed_from_rgb

from preprocessing.errors import DataError

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
CHANNELS = ("red", "green", "blue", "haematoxylin", "eosin", "residual", "saturation", "value")
STATISTICS = ("mean", "sd", "p10", "p50", "p90")
RINGS = {  # neighbours in order of angle, on whole pixels: a 90 degree turn only shifts the list
    1: ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)),
    3: ((0, 3), (-2, 2), (-3, 0), (-2, -2), (0, -3), (2, -2), (3, 0), (2, 2)),
}
GREY_LEVELS = 16
DISTANCES = (1, 3)
ANGLES = ((0, 1), (1, 1), (1, 0), (1, -1))
COOCCURRENCE = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "entropy")
BLURS = (3, 7, 15)  # edges of the box filters whose differences give the band energies
NUCLEUS = 0.06  # haematoxylin density (scale of skimage's rgb2hed) above which a pixel is nucleus
STEPS = 2**15  # the density is kept in whole steps of 1/STEPS, so that sums do not depend on order
PALE = (0.10, 0.80)  # glass, lumen and fat: saturation below, value above
LUMA = np.array([0.2125, 0.7154, 0.0721])
CHUNK = 64  # patches worked on at once: their planes stay in the processor's cache
MIN_EDGE = 16

FEATURE_NAMES: tuple[str, ...] = (
    *(f"{channel}_{statistic}" for channel in CHANNELS for statistic in STATISTICS),
    "hue_cos",
    "hue_sin",
    *(f"lbp{radius}_{k}" for radius, ring in RINGS.items() for k in range(len(ring) + 2)),
    *(f"glcm{distance}_{name}" for distance in DISTANCES for name in COOCCURRENCE),
    "gradient_mean",
    "gradient_sd",
    "gradient_p90",
    "gradient_coherence",
    *(f"band{blur}_sd" for blur in BLURS),
    "grey_entropy",
    "nucleus_fraction",
    "nucleus_count",
    "nucleus_area_mean",
    "nucleus_area_sd",
    "nucleus_largest_fraction",
    "nucleus_density_mean",
    "nucleus_density_sd",
    "haematoxylin_local_sd",
    "pale_fraction",
    "pale_largest_fraction",
)


def handcrafted_batch(patches: NDArray[np.uint8]) -> Float:
    """Features of many patches of one size.

    Args:
        patches: uint8 (n, h, w, 3), RGB, h and w at least 16; 64 px is the usual size.

    Returns:
        float32 (n, F), in the order of `FEATURE_NAMES`; a row depends on its patch only.

    Raises:
        DataError: another shape or type.
    """
    patches = np.asarray(patches)
    misfit = patches.ndim != 4 or patches.shape[3] != 3 or min(patches.shape[1:3]) < MIN_EDGE
    if misfit or patches.dtype != np.uint8:
        raise DataError(
            f"patches are {patches.dtype} {patches.shape}; expected uint8 (n, h, w, 3) with h and "
            f"w at least {MIN_EDGE}: read them with preprocessing.patches"
        )
    features = np.zeros((len(patches), len(FEATURE_NAMES)), dtype=np.float32)
    for start in range(0, len(patches), CHUNK):
        features[start : start + CHUNK] = _chunk_features(patches[start : start + CHUNK])
    return features


def _chunk_features(patches: NDArray[np.uint8]) -> Float:
    rgb = patches.astype(np.float32) / np.float32(255)
    density = _stain_density(patches)
    red, green, blue = colours = np.ascontiguousarray(np.moveaxis(rgb, 3, 0))
    brightest = np.maximum(red, np.maximum(green, blue))
    darkest = np.minimum(red, np.minimum(green, blue))
    saturation = (brightest - darkest) / np.maximum(brightest, np.float32(1 / 255))
    stains = density.astype(np.float32) / np.float32(STEPS)
    planes = [*colours, *stains, saturation, brightest]
    grey = (patches @ np.rint(LUMA * 2**16).astype(np.int64) >> 16).astype(np.uint8)
    luma = grey.astype(np.float32) / np.float32(255)
    pale = (saturation < PALE[0]) & (brightest > PALE[1])
    parts: list[NDArray[Any]] = [
        *(_statistics(plane) for plane in planes),
        _hue(rgb),
        *(_pattern_histogram(grey, ring) for ring in RINGS.values()),
        *(_cooccurrence(grey, distance) for distance in DISTANCES),
        _gradients(luma),
        _bands(luma),
        _entropy(_histogram(grey >> 3, 32))[:, None],
        _nuclei(density[0]),
        np.stack([pale.mean(axis=(1, 2)), _blobs(pale)[2]], axis=1),
    ]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def _stain_density(patches: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Colour deconvolution as skimage's rgb2hed, by table -> (3, n, h, w) in steps of 1/STEPS."""
    level = np.maximum(np.arange(256) / 255.0, 1e-6)
    table = (np.log(level) / np.log(1e-6))[:, None, None] * hed_from_rgb  # (256, colour, stain)
    whole = np.rint(table * STEPS).astype(np.int32)
    red, green, blue = np.moveaxis(patches, 3, 0)
    return np.stack(
        [np.maximum(whole[red, 0, k] + whole[green, 1, k] + whole[blue, 2, k], 0) for k in range(3)]
    )


def _statistics(plane: Float) -> Float:
    """Mean, sd and percentiles 10, 50, 90 of (n, h, w) -> (n, 5)."""
    flat = plane.reshape(len(plane), -1)
    at = [round(share * (flat.shape[1] - 1)) for share in (0.1, 0.5, 0.9)]
    ranked = np.partition(flat, at, axis=1)[:, at]
    return np.concatenate([_mean_sd(flat), ranked], axis=1, dtype=np.float32)


def _mean_sd(flat: Float) -> Float:
    mean = flat.mean(axis=1, dtype=np.float64)
    square = np.einsum("ij,ij->i", flat, flat, dtype=np.float64) / flat.shape[1]
    sd = np.sqrt(np.maximum(square - mean**2, 0.0))
    sd[np.ptp(flat, axis=1) == 0] = 0.0
    return np.stack([mean, sd], axis=1).astype(np.float32)


def _hue(rgb: Float) -> Float:
    """Mean position on the colour circle, weighted by colourfulness -> (n, 2); grey is (0, 0)."""
    red, green, blue = (rgb[..., k].mean(axis=(1, 2)) for k in range(3))
    return np.stack([red - (green + blue) / 2, np.sqrt(0.75) * (green - blue)], axis=1)


def _histogram(codes: NDArray[np.uint8], bins: int) -> NDArray[np.float64]:
    """Relative frequency of the codes below `bins` in each patch (n, ...) -> (n, bins)."""
    n = len(codes)
    flat = codes.reshape(n, -1).astype(np.intp) + np.arange(n)[:, None] * bins
    counts = np.bincount(flat.ravel(), minlength=n * bins).reshape(n, bins)
    share: NDArray[np.float64] = counts / flat.shape[1]
    return share


def _entropy(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shannon entropy in bits along the last axis."""
    bits: NDArray[np.float64] = -(share * np.log2(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return bits


def _shifted(plane: NDArray[np.uint8], dy: int, dx: int, border: int) -> NDArray[np.uint8]:
    """The plane (n, h, w) moved by (dy, dx), without a border."""
    height, width = plane.shape[1:]
    return plane[:, border + dy : height - border + dy, border + dx : width - border + dx]


def _pattern_histogram(
    grey: NDArray[np.uint8], ring: tuple[tuple[int, int], ...]
) -> NDArray[np.float64]:
    """Uniform, rotation-invariant local binary patterns -> (n, len(ring) + 2).

    A neighbour not darker than the centre is a 1. With at most two changes around the ring the
    code is the number of ones, otherwise len(ring) + 1.
    """
    border = max(max(abs(dy), abs(dx)) for dy, dx in ring)
    centre = _shifted(grey, 0, 0, border)
    ones = [(_shifted(grey, dy, dx, border) >= centre) for dy, dx in ring]
    total = np.zeros(centre.shape, dtype=np.uint8)
    changes = np.zeros(centre.shape, dtype=np.uint8)
    for bit, following in zip(ones, ones[1:] + ones[:1], strict=True):
        total += bit
        changes += bit != following
    code = np.where(changes <= 2, total, np.uint8(len(ring) + 1))
    return _histogram(code, len(ring) + 2)


def _cooccurrence(grey: NDArray[np.uint8], distance: int) -> NDArray[np.float64]:
    """Haralick features of the symmetric matrix averaged over four angles -> (n, 6)."""
    level = grey // (256 // GREY_LEVELS)
    height, width = level.shape[1:]
    share = np.zeros((len(level), GREY_LEVELS, GREY_LEVELS))
    for dy, dx in ((dy * distance, dx * distance) for dy, dx in ANGLES):
        first = level[:, : height - dy, max(0, -dx) : width - max(0, dx)]
        second = level[:, dy:, max(0, dx) : width - max(0, -dx)]
        pair = _histogram(first * np.uint8(GREY_LEVELS) + second, GREY_LEVELS**2)
        share += pair.reshape(share.shape)
    share = (share + share.transpose(0, 2, 1)) / (2 * len(ANGLES))
    i, j = np.indices(share.shape[1:])
    apart = np.abs(i - j)
    weights = np.stack([apart**2, apart, 1.0 / (1.0 + apart**2)]).reshape(3, -1)
    flat = share.reshape(len(share), -1)
    mean = flat @ i.ravel()
    variance = np.maximum(flat @ (i.ravel() ** 2) - mean**2, 0.0)
    covariance = flat @ (i * j).ravel() - mean**2
    flat_patch = variance < 1e-9  # as skimage: a constant patch is fully correlated
    correlation = np.where(flat_patch, 1.0, covariance / np.where(flat_patch, 1.0, variance))
    energy = np.sqrt((flat**2).sum(axis=1))
    return np.column_stack([flat @ weights.T, energy, correlation, _entropy(flat)])


def _gradients(luma: Float) -> Float:
    """Length of the central differences (mean, sd, p90), and how far they agree -> (n, 4)."""
    along_x = (luma[:, 1:-1, 2:] - luma[:, 1:-1, :-2]) / 2
    along_y = (luma[:, 2:, 1:-1] - luma[:, :-2, 1:-1]) / 2
    statistics = _statistics(np.sqrt(along_x**2 + along_y**2))
    xx, yy = (along_x**2).mean(axis=(1, 2)), (along_y**2).mean(axis=(1, 2))
    xy = (along_x * along_y).mean(axis=(1, 2))
    coherence = np.sqrt((xx - yy) ** 2 + 4 * xy**2) / np.maximum(xx + yy, np.float32(1e-6))
    return np.column_stack([statistics[:, [0, 1, 4]], coherence])


def _bands(luma: Float) -> Float:
    """Sd of the differences between growing box blurs: fine to coarse texture -> (n, 3)."""
    columns, finer = [], luma
    for blur in BLURS:
        coarser = ndimage.uniform_filter(luma, size=(1, blur, blur), mode="reflect")
        columns.append(_mean_sd((finer - coarser).reshape(len(luma), -1))[:, 1])
        finer = coarser
    return np.stack(columns, axis=1)


def _blobs(mask: Bool) -> Float:
    """Count, mean, largest and sd of the areas of 8-connected parts -> (4, n); as parts of (h, w).

    All patches are labelled in one call: the structure does not connect neighbouring patches.
    """
    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1] = True
    parts, found = ndimage.label(mask, structure)
    pixels = mask[0].size
    area = np.bincount(parts.ravel(), minlength=found + 1)[1:] / pixels
    first = np.zeros(found + 1, dtype=np.intp)
    inside = np.nonzero(mask)
    first[parts[inside]] = inside[0]
    patch_of = first[1:]
    n = len(mask)
    count = np.bincount(patch_of, minlength=n)
    mean = np.bincount(patch_of, area, n) / np.maximum(count, 1)
    square = np.bincount(patch_of, area**2, n) / np.maximum(count, 1)
    largest = np.zeros(n)
    np.maximum.at(largest, patch_of, area)
    sd = np.sqrt(np.maximum(square - mean**2, 0.0))
    return np.stack([count, mean, largest, sd]).astype(np.float32)


def _nuclei(density: NDArray[np.int32]) -> Float:
    """Blobs of haematoxylin, their density, and its local variation -> (n, 8).

    Areas are in thousandths of the patch; the 3 x 3 sums are of whole numbers, hence exact.
    """
    padded = np.pad(density, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    mask = total > 9 * NUCLEUS * STEPS
    count, mean, largest, sd = _blobs(mask)
    value = density.astype(np.float32) / np.float32(STEPS)
    smooth = total.astype(np.float32) / np.float32(9 * STEPS)
    inside = np.maximum(mask.sum(axis=(1, 2)), 1)
    inner = np.where(mask, value, 0).sum(axis=(1, 2), dtype=np.float64) / inside
    apart = np.where(mask, value - inner[:, None, None], 0)
    spread = np.sqrt((apart**2).sum(axis=(1, 2)) / inside)
    local = np.sqrt(((value - smooth) ** 2).mean(axis=(1, 2)))
    areas = (count, 1000 * mean, 1000 * sd, largest)
    columns = (mask.mean(axis=(1, 2)), *areas, inner, spread, local)
    return np.column_stack(columns).astype(np.float32)
