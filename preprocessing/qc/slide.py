"""Quality of one slide: numbers with limits, flagged spots and patches; nothing is removed.

Rows are read a block at a time, so memory does not grow with the section. A limit is the median
-+ 3 MAD of the slide's own spots, except where a fixed share says what a patch is (glass, pen).
Shapes: S spots, G genes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.qc.patches import PatchQuality, patch_quality
from preprocessing.registration import Registration, store_registration
from preprocessing.spot_table import PROTEIN, RNA
from preprocessing.store import SlideStore

N_MADS = 3.0
NORMAL = 1.4826  # the MAD of a normal distribution times this is its standard deviation
FEWEST = 5  # values; of fewer no one can be called unusual
LOW_DEPTH, FEW_GENES, HIGH_MITO = "low depth", "few genes", "high mitochondrial share"
LITTLE_TISSUE = "little tissue"
BLANK, PEN, BLUR = "blank patch", "pen mark", "out of focus"
PICTURE_FLAGS = (BLANK, PEN, BLUR)
DASH = "–"
_STAINS, _CHANNELS = ("hematoxylin", "eosin"), ("red", "green", "blue")
_MITOCHONDRIAL = re.compile(r"mt-", re.IGNORECASE)
_ROWS = 4096  # spots whose counts are in memory at once


@dataclass(frozen=True)
class Limits:
    """What is usual: low..high around the median; all NaN where nothing can be said."""

    median: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def below(self, values: np.ndarray) -> np.ndarray:
        """Tell which values lie below; bool like ``values``, False for NaN."""
        return np.asarray(np.asarray(values) < self.low)

    def above(self, values: np.ndarray) -> np.ndarray:
        """Tell which values lie above; bool like ``values``, False for NaN."""
        return np.asarray(np.asarray(values) > self.high)


def robust_limits(
    values: np.ndarray, *, log: bool = False, n_mads: float = N_MADS, least: float = 0.0
) -> Limits:
    """Median -+ ``n_mads`` MAD (times 1.4826) of the finite values.

    Args:
        values: (n,), any unit.
        log: measure on the logarithm (values above 0 only), as for counts, whose spread grows with
            their size.
        n_mads: how far is unusual.
        least: no value nearer to the median than this is unusual, in the unit of the values (of
            the logarithm with ``log``).

    Returns:
        Limits in the unit of the values. Of fewer than 5 values, or where more than half of them
        are equal (MAD 0) and ``least`` is 0, only the median is finite.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    if log:
        values = np.log(values[values > 0])
    if len(values) == 0:
        return Limits()
    median = float(np.median(values))
    spread = max(least, n_mads * NORMAL * float(np.median(np.abs(values - median))))
    if len(values) < FEWEST or spread <= 1e-12 * max(1.0, abs(median)):
        spread = math.nan
    found = np.array([median, median - spread, median + spread])
    with np.errstate(over="ignore"):
        return Limits(*(np.exp(found) if log else found).tolist())


@dataclass(frozen=True)
class Measure:
    """One number a slide.

    Attributes:
        key: column of `qc.csv`.
        label: words for a table.
        unit: "" none, "%" for a share that is shown times 100, else the unit.
        decimals: digits after the point.
        compared: whether a slide far from the others is marked.
        log: compared on the logarithm.
        least: no value nearer to the median than this is marked.
    """

    key: str
    label: str
    unit: str = ""
    decimals: int = 0
    compared: bool = True
    log: bool = False
    least: float = 0.0


def _share(reason: str) -> Measure:
    return Measure(
        f"share_{reason.replace(' ', '_')}", f"share of spots, {reason}", "%", 1, least=0.05
    )


MEASURES: tuple[Measure, ...] = (
    Measure("n_spots", "spots", log=True),
    Measure("n_left_out", "spots left out by prepare", compared=False),
    Measure("n_genes_panel", "genes of the panel", compared=False),
    Measure("mpp", "scale of the image", "um/px", 3, compared=False),
    Measure("depth_median", "depth, median", "a spot", log=True),
    Measure("genes_median", "genes, median", "a spot", log=True),
    Measure("mito_median", "mito. share, median", "%", 1, least=0.02),
    Measure("tissue_median", "tissue in the patch, median", "%", 1, least=0.05),
    Measure("focus_median", "focus, median", "grey²", log=True),
    Measure("registration_z", "picture and counts agree, z", "", 1, compared=False),
    Measure("outline", "outline of the spots on the tissue", "", 2, compared=False),
    Measure("share_flagged", "spots flagged for any reason", "%", 1, least=0.05),
    *map(_share, (LOW_DEPTH, FEW_GENES, HIGH_MITO, LITTLE_TISSUE, *PICTURE_FLAGS)),
    Measure("optical_density", "optical density, mean", "", 3),
    *(
        Measure(f"{channel}_{kind}", f"{channel}, {words}", "of 255", 1)
        for channel in _CHANNELS
        for kind, words in (("mean", "mean"), ("sd", "standard deviation"))
    ),
    *(
        Measure(f"{stain}_{channel}", f"{stain}, {channel}", "", 3)
        for stain in _STAINS
        for channel in _CHANNELS
    ),
)


def shown(value: float, measure: Measure) -> str:
    """Return a value of a measure with its unit as plain text; a dash where there is none."""
    if not math.isfinite(value):
        return DASH
    if measure.unit == "%":
        return f"{100 * value:.{measure.decimals}f}%"
    digits = measure.decimals if measure.decimals or abs(value) >= 10 else 1
    digits = 0 if float(value).is_integer() and not measure.decimals else digits
    return f"{value:,.{digits}f}"


def count_quality(counts: csr_matrix, gene_names: np.ndarray, modality: str = RNA) -> pd.DataFrame:
    """Quality of every spot.

    Args:
        counts: (S, G) raw counts, or intensities of proteins.
        gene_names: (G,) symbols.
        modality: "rna" or "protein".

    Returns:
        (S, 3): depth (counts; proteins: sum of intensities), n_genes (genes with a count),
        mito_fraction (share of counts in genes named MT-... or mt-..., 0..1; NaN for proteins and
        where the panel has none or the depth is 0).
    """
    if counts.shape[1] != len(gene_names):
        raise DataError(f"{len(gene_names)} gene names for {counts.shape[1]} columns of counts")
    depth = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    mito = np.array([_MITOCHONDRIAL.match(str(g)) is not None for g in gene_names], dtype=bool)
    share = np.full(len(depth), np.nan)
    if mito.any() and modality == RNA:
        inside = counts @ mito.astype(np.float64)
        np.divide(inside, depth, out=share, where=depth > 0)
    n_genes = np.asarray((counts != 0).sum(axis=1)).ravel()
    return pd.DataFrame({"depth": depth, "n_genes": n_genes, "mito_fraction": share})


def store_count_quality(store: SlideStore) -> pd.DataFrame:
    """`count_quality` of a store, read a block of spots at a time.

    Raises:
        DataError: the store has no counts, or damaged ones.
    """
    if not store.has_counts:
        raise DataError(f"{store.path} has no counts (image only); nothing to measure")
    names = store.gene_names
    frames = [count_quality(block, names, store.modality) for block in _blocks(store)]
    return pd.concat(frames, ignore_index=True)


def _blocks(store: SlideStore) -> Iterator[csr_matrix]:
    for start in range(0, store.n_spots, _ROWS):
        yield store.counts(slice(start, min(start + _ROWS, store.n_spots)))


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
    n_mads: float = N_MADS


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
        spots: (S, columns) measurements: tissue, depth, n_genes, mito_fraction, glass, pen, focus;
            only those that the slide allows.
        flags: reason -> spots that stand out.
        patches: summary of the pictures; None without image.
        numbers: measure -> value, what `qc.csv` holds; NaN where the slide has none.
        registration: whether the image is the picture of the spots.
    """

    slide_id: str
    modality: str
    spots: pd.DataFrame
    flags: dict[str, Flag]
    patches: PatchQuality | None
    numbers: dict[str, float]
    registration: Registration


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
    fit = store_registration(store)
    numbers = _numbers(store, spots, flags, patches)
    numbers |= {"registration_z": fit.z, "outline": fit.outline}
    return SlideQuality(store.slide_id, store.modality, spots, flags, patches, numbers, fit)


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
    store: SlideStore, spots: pd.DataFrame, flags: dict[str, Flag], patches: PatchQuality | None
) -> dict[str, float]:
    """The measures of a slide by their keys in `MEASURES`."""
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
    for channel, mean, sd in zip(_CHANNELS, patches.rgb_mean, patches.rgb_sd, strict=True):
        numbers |= {f"{channel}_mean": float(mean), f"{channel}_sd": float(sd)}
    if patches.stains is not None:
        for stain in _STAINS:
            vector = getattr(patches.stains, stain)
            for channel, part in zip(_CHANNELS, vector, strict=True):
                numbers[f"{stain}_{channel}"] = float(part)
    return numbers
