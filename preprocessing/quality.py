"""Which spots `hibio prepare` leaves out, and why; `preprocessing.qc.slide` measures the others.

Nothing is overwritten: the functions return masks. Shapes: S spots.
"""

from dataclasses import dataclass

import numpy as np

from preprocessing.errors import DataError
from preprocessing.modality import PROTEIN
from preprocessing.spot_table import SpotTable

ZERO_COUNTS = "zero counts"
NO_SIGNAL = "all intensities are zero"
OFF_TISSUE = "off tissue"


@dataclass(frozen=True)
class QualityConfig:
    """Limits for leaving out spots.

    Attributes:
        min_tissue: smallest part of the patch that must be tissue, 0..1 (only with an image).
        max_dropped: largest part of the spots that may be left out as off tissue; more means that
            the coordinates do not fit the image, or that the image is no stained section.
    """

    min_tissue: float = 0.05
    max_dropped: float = 0.5


def drop_reasons(
    table: SpotTable,
    tissue_fraction: np.ndarray | None = None,
    config: QualityConfig | None = None,
) -> dict[str, np.ndarray]:
    """Find the spots that carry no information: nothing counted (or measured), or off tissue.

    No depth is asked of them: a cell with few counts is kept, and the sum of intensities depends
    on exposure and antibodies, not on how well a cell was measured.

    Args:
        table: the spots of one slide.
        tissue_fraction: (S,) part of each patch that is tissue; None without image.
        config: the limits.

    Returns:
        Reason -> (S,) bool, True: leave out. A spot counts under its first reason only.
    """
    config = config or QualityConfig()
    empty = np.zeros(table.n_spots, dtype=bool)
    if not table.image_only:
        empty = np.asarray(table.counts.sum(axis=1)).ravel() == 0
    reasons = {NO_SIGNAL if table.modality == PROTEIN else ZERO_COUNTS: empty}
    if tissue_fraction is not None:
        reasons[OFF_TISSUE] = (tissue_fraction < config.min_tissue) & ~empty
    return reasons


def drop_mask(
    table: SpotTable,
    tissue_fraction: np.ndarray | None = None,
    config: QualityConfig | None = None,
) -> np.ndarray:
    """Return the (S,) bool mask of the spots to leave out, for any reason of `drop_reasons`.

    Raises:
        DataError: no spot would stay, or more than ``max_dropped`` of them are off tissue.
    """
    config = config or QualityConfig()
    reasons = drop_reasons(table, tissue_fraction, config)
    mask = np.logical_or.reduce(list(reasons.values()))
    found = ", ".join(f"{int(v.sum())} {k}" for k, v in reasons.items())
    off_tissue = reasons.get(OFF_TISSUE, np.zeros(table.n_spots, dtype=bool))
    if off_tissue.mean() > config.max_dropped:
        raise DataError(
            f"{int(off_tissue.sum())} of {table.n_spots} spots are off tissue (less than "
            f"{config.min_tissue:.0%} of the patch is stained); the coordinates do not fit the "
            "image (look at image_scale and mpp), or it is no stained section: then leave the "
            "column image empty for a counts-only store"
        )
    if mask.all():
        raise DataError(f"no spot of {table.n_spots} is left ({found}); check counts and positions")
    return np.asarray(mask, dtype=bool)
