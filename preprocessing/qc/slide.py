"""Quality of one slide: numbers with limits, flagged spots and patches; nothing is removed.

A limit is the median -+ 3 MAD of the slide's own spots, except where a fixed share says what a
patch is (glass, pen). Shapes: S spots.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from preprocessing.modality import PROTEIN
from preprocessing.qc.counts import store_count_quality
from preprocessing.qc.limits import robust_limits
from preprocessing.qc.patches import PatchQuality, patch_quality
from preprocessing.store import SlideStore

BLANK, PEN, BLUR = "blank patch", "pen mark", "out of focus"
LOW_DEPTH, FEW_GENES, HIGH_MITO = "low depth", "few genes", "high mitochondrial share"
LITTLE_TISSUE = "little tissue"
PICTURE_FLAGS = (BLANK, PEN, BLUR)


@dataclass(frozen=True)
class QcConfig:
    """What is flagged.

    Attributes:
        min_tissue: tissue fraction of a patch below which a spot is flagged, 0..1.
        blank: share of glass from which a patch is blank, 0..1.
        pen: share of ink from which a patch has a pen mark, 0..1.
        n_mads: MADs from the slide's median that count as unusual (depth, genes, mitochondrial
            share, focus).
    """

    min_tissue: float = 0.25
    blank: float = 0.9
    pen: float = 0.1
    n_mads: float = 3.0


@dataclass(frozen=True)
class Flag:
    """Spots that stand out for one reason.

    Attributes:
        spots: (S,) bool.
        column: the measurement that decides.
        limit: its limit, in the unit of the measurement; NaN where none could be set.
        low: whether values below the limit are flagged; else those above.
    """

    spots: NDArray[np.bool_]
    column: str
    limit: float
    low: bool

    @property
    def count(self) -> int:
        """Number of flagged spots."""
        return int(self.spots.sum())


@dataclass(frozen=True)
class SlideQuality:
    """Everything that a page shows of a slide, except pictures.

    Attributes:
        slide_id: the slide.
        modality: "rna" or "protein".
        spots: (S, columns) measurements: tissue, depth, n_genes, mito_fraction, glass, pen, focus;
            only those that the slide allows.
        flags: reason -> spots that stand out.
        patches: summary of the pictures; None without image.
        numbers: measure -> value, what `qc.csv` holds; NaN where the slide has none.
    """

    slide_id: str
    modality: str
    spots: pd.DataFrame
    flags: dict[str, Flag]
    patches: PatchQuality | None
    numbers: dict[str, float]


def slide_quality(store: SlideStore, config: QcConfig | None = None) -> SlideQuality:
    """Measure a slide; reads counts and patches a block at a time.

    Raises:
        DataError: the store is damaged.
    """
    config = config or QcConfig()
    parts: list[pd.DataFrame] = []
    if store.has_counts:
        parts.append(store_count_quality(store))
    patches = patch_quality(store) if store.has_image else None
    if patches is not None:
        tissue = pd.DataFrame({"tissue": store.tissue_fraction.astype(np.float64)})
        parts += [tissue, patches.spots]
    spots = pd.concat(parts, axis=1) if parts else pd.DataFrame(index=range(store.n_spots))
    flags = slide_flags(spots, config, protein=store.modality == PROTEIN)
    numbers = _numbers(store, spots, flags, patches)
    return SlideQuality(store.slide_id, store.modality, spots, flags, patches, numbers)


def slide_flags(
    spots: pd.DataFrame, config: QcConfig | None = None, *, protein: bool = False
) -> dict[str, Flag]:
    """Flag spots by their measurements.

    Args:
        spots: (S, columns), see `SlideQuality`.
        config: the limits.
        protein: intensities; their sum depends on exposure, so low ones are not flagged.

    Returns:
        Reason -> flag, for every measurement that is there, also where no spot is flagged.
    """
    config = config or QcConfig()
    flags: dict[str, Flag] = {}
    if "depth" in spots and not protein:
        flags[LOW_DEPTH] = _unusual(spots, "depth", config, log=True)
        flags[FEW_GENES] = _unusual(spots, "n_genes", config, log=True)
    if "mito_fraction" in spots and spots["mito_fraction"].notna().any():
        flags[HIGH_MITO] = _unusual(spots, "mito_fraction", config, low=False)
    if "tissue" in spots:
        flags[LITTLE_TISSUE] = _beyond(spots, "tissue", config.min_tissue, low=True)
    if "focus" in spots:
        flags[BLANK] = _beyond(spots, "glass", config.blank, low=False)
        flags[PEN] = _beyond(spots, "pen", config.pen, low=False)
        flags[BLUR] = _unusual(spots, "focus", config, log=True, among=~flags[BLANK].spots)
    return flags


def _beyond(spots: pd.DataFrame, column: str, limit: float, *, low: bool) -> Flag:
    """Flag what is below a limit, or at or above it."""
    values = spots[column].to_numpy(dtype=np.float64)
    return Flag(values < limit if low else values >= limit, column, limit, low)


def _unusual(
    spots: pd.DataFrame,
    column: str,
    config: QcConfig,
    *,
    log: bool = False,
    low: bool = True,
    among: NDArray[np.bool_] | None = None,
) -> Flag:
    """Flag what is far from the median of the slide (of the spots ``among``)."""
    values = spots[column].to_numpy(dtype=np.float64)
    among = np.ones(len(values), dtype=bool) if among is None else among
    limits = robust_limits(values[among], log=log, n_mads=config.n_mads)
    flagged = limits.below(values) if low else limits.above(values)
    return Flag(flagged & among, column, limits.low if low else limits.high, low)


def _numbers(
    store: SlideStore,
    spots: pd.DataFrame,
    flags: dict[str, Flag],
    patches: PatchQuality | None,
) -> dict[str, float]:
    """The measures of a slide by their keys in `qc_measures.MEASURES`."""
    dropped = store.attrs.get("dropped", {})
    numbers = {
        "n_spots": float(store.n_spots),
        "n_left_out": float(sum(dropped.values())),
        "n_genes_panel": float(len(store.gene_ids)),
        "mpp": store.mpp if store.has_image else np.nan,
    }
    for key, column in (
        ("depth_median", "depth"),
        ("genes_median", "n_genes"),
        ("mito_median", "mito_fraction"),
        ("tissue_median", "tissue"),
        ("focus_median", "focus"),
    ):
        values = spots[column].dropna().to_numpy() if column in spots else np.empty(0)
        numbers[key] = float(np.median(values)) if len(values) else np.nan
    for reason, flag in flags.items():
        numbers[f"share_{reason.replace(' ', '_')}"] = flag.count / max(len(flag.spots), 1)
    flagged = [flag.spots for flag in flags.values()]
    numbers["share_flagged"] = float(np.any(flagged, axis=0).mean()) if flagged else np.nan
    return numbers | _stain_numbers(patches)


def _stain_numbers(patches: PatchQuality | None) -> dict[str, float]:
    """Colour, optical density and stain vectors as single numbers."""
    if patches is None:
        return {}
    numbers = {"optical_density": patches.density}
    for channel, mean, sd in zip(
        ("red", "green", "blue"), patches.rgb_mean, patches.rgb_sd, strict=True
    ):
        numbers |= {f"{channel}_mean": float(mean), f"{channel}_sd": float(sd)}
    if patches.stains is not None:
        pairs = (
            ("hematoxylin", patches.stains.hematoxylin),
            ("eosin", patches.stains.eosin),
        )
        for name, vector in pairs:
            for channel, part in zip(("red", "green", "blue"), vector, strict=True):
                numbers[f"{name}_{channel}"] = float(part)
    return numbers
