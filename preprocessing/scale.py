"""What several sources say of the scale of a slide, compared in one place (docs/data.md, Scale).

A file of the image, the scale factors, the array of the spots, the metadata and the manifest each
state um per pixel; of two that differ one is wrong, and with it every micrometre of the slide.
Shapes: S spots.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from preprocessing.errors import DataError
from preprocessing.findings import SlideWarning

SAME, FAR = 0.02, 0.10  # parts by which two statements may differ without a word, at all
MPP = (0.05, 40.0)  # um per pixel of pictures of tissue: 100x oil to a slide of 2,000 pixels
SPACING_UM = (0.3, 600.0)  # nearest neighbours: bins of Stereo-seq to arrays of 500 um
LEAST_PATCH_PX = 4.0  # level-0 pixels across a patch; of fewer nothing is seen
COARSE_PATCH_PX = 16.0
IMAGE_FILE = "the image file"
_QUERIED = 2000  # spots whose nearest neighbour is looked up


@dataclass(frozen=True)
class Statement:
    """One source's word on the scale.

    Attributes:
        mpp: um per level-0 pixel of the image; of a slide without one, per coordinate unit.
        source: where it is said, in words.
        of_image: it is about the pixels of the image file; else about those of the coordinates,
            so that it changes with an `image_transform` that enlarges.
        decides: it is a column of the manifest, which goes before what files say.
        replaced: its source was corrected by the first statement; it may differ from that one if
            any third one agrees with it.
    """

    mpp: float
    source: str
    of_image: bool = False
    decides: bool = False
    replaced: bool = False


def stated(mpp: float | None, source: str, **more: bool) -> tuple[Statement, ...]:
    """One statement, or none where ``mpp`` is None; ``more`` as for `Statement`."""
    return () if mpp is None else (Statement(mpp, source, **more),)


def require_scale(statements: Iterable[Statement], unknown: str) -> tuple[Statement, ...]:
    """Return the statements, of which the first is taken.

    Raises:
        DataError: there is none; says ``unknown``.
    """
    found = tuple(statements)
    if not found:
        raise DataError(f"mpp is unknown: {unknown}")
    return found


def compare_scale(statements: Sequence[Statement]) -> list[SlideWarning]:
    """Compare what was said of the scale; the first statement is the one taken.

    Returns:
        A warning where two differ by 2 to 10 percent, or the manifest by more from a file.

    Raises:
        DataError: two differ by more than 10 percent and no manifest column decides; shows all.
    """
    if len(statements) < 2:
        return []
    first = statements[0]
    told = "; ".join(f"{one.mpp:.4g} by {one.source}" for one in statements)
    agreed = any(_apart((first, one)) <= FAR for one in statements[1:] if not one.replaced)
    bound = [one for one in statements if not (one.replaced and agreed)]
    fix = "write the right one into the manifest column mpp, which decides"
    if first.decides:
        bound = [one for one in statements if one.decides]
        fix = "these are columns of the manifest: correct one, or leave it empty"
    if _apart(bound) > FAR:
        raise DataError(f"the statements of the scale contradict each other: mpp {told}; {fix}")
    if _apart(statements) <= SAME:
        return []
    if first.decides:
        fix = "correct or empty this column of the manifest if it is wrong"
    far = f"mpp: its sources differ by {_apart(statements):.0%}, the first is taken: {told}"
    return [SlideWarning(far, fix)]


def _apart(statements: Sequence[Statement]) -> float:
    """By which part the largest is above the smallest."""
    values = [one.mpp for one in statements]
    return max(values) / min(values) - 1 if values else 0.0


def check_ranges(
    mpp: float | None, xy_um: NDArray[np.float64], statements: Sequence[Statement]
) -> list[SlideWarning]:
    """Compare the scale with what slides and spots can be.

    Args:
        mpp: um per level-0 pixel of the image; None: the slide has no image.
        xy_um: (S, 2) places of the spots, micrometres.
        statements: what was said of the scale, the one taken first.

    Returns:
        A warning where the manifest says something that is out of range.

    Raises:
        DataError: something is out of range, and the manifest does not say so.
    """
    found = []
    if mpp is not None and not MPP[0] <= mpp <= MPP[1]:
        found.append(f"{mpp:.4g} um per pixel, expected {MPP[0]:g} to {MPP[1]:g}")
    spacing = spacing_um(xy_um)
    if spacing is not None and not SPACING_UM[0] <= spacing <= SPACING_UM[1]:
        low, high = SPACING_UM
        found.append(f"neighbouring spots {spacing:.4g} um apart, expected {low:g} to {high:g}")
    if not found:
        return []
    told = "; ".join(f"{one.mpp:.4g} by {one.source}" for one in statements)
    message = f"the scale is not plausible: {', '.join(found)}" + f" (mpp: {told})" * bool(told)
    if any(one.decides for one in statements):
        return [SlideWarning(message, "correct mpp and pitch_um in the manifest if they are wrong")]
    raise DataError(f"{message}; the manifest column mpp decides (um per pixel or coordinate unit)")


def check_patch(patch_um: float, mpp: float) -> list[SlideWarning]:
    """Say where a patch covers so few pixels of the picture that little can be seen in it.

    Raises:
        DataError: fewer than `LEAST_PATCH_PX`.
    """
    across = patch_um / mpp
    if across >= COARSE_PATCH_PX:
        return []
    told = f"a patch of {patch_um:g} um is {across:.1f} pixels of the image ({mpp:.4g} um each)"
    if across < LEAST_PATCH_PX:
        raise DataError(f"{told}; give a finer image, or correct mpp or --patch-um")
    return [SlideWarning(f"{told}: little can be seen in it", "give a finer image if there is one")]


def spacing_um(xy: NDArray[np.float64]) -> float | None:
    """Median distance of a spot to its nearest neighbour at another place, in the unit of ``xy``.

    Args:
        xy: (S, 2); of more than 2,000 spots as many are asked, evenly over the order of the file.

    Returns:
        None of fewer than 2 spots, or where all lie at one place.
    """
    if len(xy) < 2 or not np.isfinite(xy).all():
        return None
    asked = xy[np.linspace(0, len(xy) - 1, min(len(xy), _QUERIED)).astype(np.int64)]
    near = cKDTree(xy).query(asked, k=min(len(xy), 4))[0]
    near = np.where(near > 0, near, math.inf).min(axis=1)
    near = near[np.isfinite(near)]
    return float(np.median(near)) if len(near) else None


def hexagonal_spacing(xy: NDArray[np.float64]) -> float | None:
    """Centre-to-centre distance of a hexagonal lattice, in the unit of ``xy``; None: it is none.

    Inside such a lattice the six nearest neighbours are equally far (within 5 percent), which
    holds for at least a quarter of its spots; of scattered cells or of a square grid for none.

    Args:
        xy: (S, 2).
    """
    if len(xy) < 20 or not np.isfinite(xy).all():
        return None
    asked = xy[np.linspace(0, len(xy) - 1, min(len(xy), _QUERIED)).astype(np.int64)]
    near = cKDTree(xy).query(asked, k=7)[0][:, 1:]
    inside = (near[:, 0] > 0) & (near[:, 5] <= 1.05 * near[:, 0])
    return float(np.median(near[inside])) if inside.mean() >= 0.25 else None
