"""Quality pages: one a slide, `qc.csv`, and `index.html` that compares the slides."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
from scipy.spatial import cKDTree
from tqdm import tqdm

from preprocessing.errors import DataError
from preprocessing.files import atomic_path, refuse_others, spreadsheet_text
from preprocessing.image_transform import moved
from preprocessing.pages import (
    Beside,
    Bullets,
    Cell,
    Heading,
    Line,
    Part,
    Picture,
    Section,
    Table,
    Text,
    render,
)
from preprocessing.qc.figures import (
    Ground,
    Panel,
    cohort_dots,
    flag_maps,
    histograms,
    patch_strip,
    small_picture,
    spot_maps,
    two_places,
)
from preprocessing.qc.patches import PENS
from preprocessing.qc.slide import (
    BLANK,
    BLUR,
    FEW_GENES,
    FEWEST,
    HIGH_MITO,
    LITTLE_TISSUE,
    LOW_DEPTH,
    MEASURES,
    PEN,
    PICTURE_FLAGS,
    Flag,
    Limits,
    Measure,
    QcConfig,
    SlideQuality,
    robust_limits,
    shown,
    slide_quality,
)
from preprocessing.registration import UNKNOWN, Registration
from preprocessing.spot_table import PROTEIN
from preprocessing.stain import stain_colour
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in

INDEX, TABLE = "index.html", "qc.csv"
SHOWN_PATCHES = 8
_LONE_SPOT_UM = 100.0
_FACTS = ("patient_id", "tissue", "organism", "technology", "modality")

#: column -> (title, unit of the histogram, logarithmic, flag whose limit is drawn)
_PANELS = {
    "depth": ("depth", "counts a spot", True, LOW_DEPTH),
    "n_genes": ("genes", "genes a spot", True, FEW_GENES),
    "mito_fraction": ("mitochondrial share", "share of the counts", False, HIGH_MITO),
    "tissue": ("tissue", "share of the patch", False, LITTLE_TISSUE),
    "glass": ("glass", "share of the patch", False, BLANK),
    "focus": ("focus", "variance of the Laplacian", True, BLUR),
}
_PROTEIN_PANELS = {
    "depth": ("sum of intensities", "a cell", True, ""),
    "n_genes": ("proteins with a signal", "proteins a cell", False, ""),
}
_COLUMNS = (
    "n_spots", "n_left_out", "depth_median", "genes_median", "mito_median", "tissue_median",
    "focus_median", "optical_density", "share_flagged",
)  # fmt: skip
_MOST_DOTS = 14


def slide_page(store: SlideStore, quality: SlideQuality) -> str:
    """Return the page of a slide as HTML; ``quality`` is what was measured of this store."""
    ground = slide_ground(store)
    panels = _panels(quality)
    parts: list[Part] = [Text(_facts(store), "soft")]
    parts += [Heading("What stands out"), Bullets(_findings(store, quality))]
    parts += _fit(store, ground, quality)
    parts += _pictures(ground, quality, panels)
    parts += [Heading("Numbers"), Beside([_flag_table(quality), _number_table(quality)])]
    if quality.patches is not None:
        parts += [Heading("Stain"), *_stain(quality)]
        parts += [Heading("Patches"), *_galleries(store, quality)]
    notes = list(store.attrs.get("notes", []))
    if notes:
        parts += [Heading("Notes of the reader"), Bullets(notes)]
    return render(f"Quality of {quality.slide_id}", [Section(parts)])


def _fit(store: SlideStore, ground: Ground, quality: SlideQuality) -> list[Part]:
    """Whether the image is the picture of the spots, and where they fit if it is not."""
    found = quality.registration
    if not (store.has_image and store.has_counts):
        return []
    words = [f"{'WARN: ' if found.warns else ''}{found.message}"]
    words += [found.fix] if found.fix else []
    if store.correction:
        words.append(f"prepare --fix-registration corrected the places by {store.correction}")
    parts: list[Part] = [Heading("Is this the picture of these spots?"), Bullets(words)]
    if found.matrix is not None:
        there_um = moved(store.xy_px0, found.matrix) * store.mpp
        caption = "Left: the spots as they are stored. Right: where counts and outline fit better."
        parts.append(Picture(two_places(ground, there_um), "the spots at two places", caption))
    return parts


def slide_ground(store: SlideStore) -> Ground:
    """Return what the spots of a store are drawn on: its thumbnail, or nothing."""
    small, downsample = store.thumbnail, store.thumbnail_downsample
    xy_um = store.xy_um
    if small is None or downsample is None:
        return Ground(xy_um, _pitch(xy_um))
    xy_um = store.xy_px0 * store.mpp
    step = downsample * store.mpp
    return Ground(xy_um, _pitch(xy_um), small, (small.shape[1] * step, small.shape[0] * step))


def _pitch(xy_um: np.ndarray) -> float:
    """Median distance to the nearest spot, micrometres."""
    if len(xy_um) < 2:
        return _LONE_SPOT_UM
    nearest = cKDTree(xy_um).query(xy_um, k=2)[0][:, 1]
    return float(np.median(nearest)) or _LONE_SPOT_UM


def _panels(quality: SlideQuality) -> list[Panel]:
    """The measurements that the slide has, in the order of the page."""
    words = _PANELS | (_PROTEIN_PANELS if quality.modality == PROTEIN else {})
    panels = []
    for column, (title, unit, log, reason) in words.items():
        if column not in quality.spots or quality.spots[column].isna().all():
            continue
        values = quality.spots[column].to_numpy(dtype=np.float64)
        limit = quality.flags[reason].limit if reason in quality.flags else math.nan
        panels.append(Panel(title, values, unit, log, limit))
    return panels


def _facts(store: SlideStore) -> str:
    """One line on what the slide is."""
    facts = [str(store.attrs[key]) for key in _FACTS if store.attrs.get(key)]
    facts.append(f"{store.n_spots:,} spots, {len(store.gene_ids):,} genes")
    if store.has_image:
        size = f"{float(store.attrs['patch_um']):g} µm = {int(store.attrs['patch_px'])} px"
        facts.append(f"patches of {size}")
    return " · ".join(facts)


def _findings(store: SlideStore, quality: SlideQuality) -> list[str]:
    """Sentences on the flagged spots, then on those that prepare left out."""
    total = len(quality.spots)
    flagged = [
        f"{reason}: {flag.count:,} of {total:,} spots ({flag.count / total:.1%}), {_limit(flag)}"
        for reason, flag in quality.flags.items()
        if flag.count
    ]
    lines = [*map(str, store.warnings), *(flagged or ["No spot is flagged."])]
    dropped = store.attrs.get("dropped", {})
    lines += [f"left out by prepare: {count:,} spots, {why}" for why, count in dropped.items()]
    lines.append("Flagged spots are only counted and shown; all of them stay in the store.")
    return lines


def _limit(flag: Flag) -> str:
    """Words for the limit of a flag."""
    if not math.isfinite(flag.limit):
        return "no limit (too few spots, or all alike)"
    share = flag.column in ("tissue", "glass", "pen", "mito_fraction")
    size = f"{flag.limit:.1%}" if share else f"{flag.limit:,.{0 if flag.limit >= 100 else 1}f}"
    at_least = flag.column in ("glass", "pen")
    return f"{'below' if flag.low else 'at least' if at_least else 'above'} {size}"


def _pictures(ground: Ground, quality: SlideQuality, panels: list[Panel]) -> list[Part]:
    flags = {reason: flag.spots for reason, flag in quality.flags.items()}
    caption = "The slide, and the spots that stand out, one picture a reason."
    parts: list[Part] = [
        Heading("Where"),
        Picture(flag_maps(ground, flags), "flagged spots", caption),
    ]
    if panels:
        caption = (
            "Each spot by its measurement; colours run from the 1st to the 99th percentile. "
            "Grey: nothing measured."
        )
        parts.append(Picture(spot_maps(ground, panels), "measurements of the spots", caption))
        caption = (
            "Dashed: the limit, 3 MAD (times 1.4826) from the slide's median, on the logarithm for "
            "counts and focus; fixed for tissue and glass."
        )
        parts.append(Picture(histograms(panels), "histograms", caption))
    return parts


def _flag_table(quality: SlideQuality) -> Table:
    flags = quality.flags.items()
    rows = [Line((reason, f"{flag.count:,}", _limit(flag))) for reason, flag in flags]
    return Table(("flag", "spots", "limit"), rows)


def _number_table(quality: SlideQuality) -> Table:
    rows = [
        Line((m.label, f"{shown(value, m)} {'' if m.unit == '%' else m.unit}".strip()))
        for m in MEASURES
        if not m.key.startswith(("share_", "hematoxylin", "eosin", "red", "green", "blue"))
        and math.isfinite(value := quality.numbers.get(m.key, math.nan))
    ]
    return Table(("measure", "value"), rows)


def _stain(quality: SlideQuality) -> list[Part]:
    """Colour and stain vectors of the pixels that are not glass."""
    patches = quality.patches
    if patches is None or not np.isfinite(patches.rgb_mean).all():
        return [Text("All patches are glass; there is no stain to measure.")]
    mean, sd = patches.rgb_mean, patches.rgb_sd
    colour = (int(mean[0]), int(mean[1]), int(mean[2]))
    rows = [
        Line([Cell("mean colour, 0..255", colour=colour), *(f"{v:.1f}" for v in mean)]),
        Line(["standard deviation", *(f"{v:.1f}" for v in sd)]),
    ]
    words = "Pixels of the patches that are not glass. "
    if patches.stains is None:
        words += "Too few stained pixels for the vectors of hematoxylin and eosin."
    else:
        for name in ("hematoxylin", "eosin"):
            vector = getattr(patches.stains, name)
            label = Cell(f"{name}, optical density", colour=stain_colour(vector))
            rows.append(Line([label, *(f"{v:.3f}" for v in vector)]))
        words += (
            "The vectors are estimated as by Macenko et al. (2009), for this report only: nothing "
            "is normalised. They mean little on a slide that is not stained with both."
        )
    return [Table(("", "red", "green", "blue"), rows), Text(words, "soft")]


def _galleries(store: SlideStore, quality: SlideQuality) -> list[Part]:
    """Some patches of every picture flag, the worst first, and some usual ones to compare."""
    parts: list[Part] = []
    rng = np.random.default_rng(0)
    usual = ~np.any([flag.spots for flag in quality.flags.values()], axis=0)
    if usual.any():
        number = min(SHOWN_PATCHES, int(usual.sum()))
        some = np.sort(rng.choice(np.flatnonzero(usual), number, replace=False))
        parts.append(_gallery(store, some, "Not flagged, drawn at random."))
    for reason in PICTURE_FLAGS:
        flag = quality.flags[reason]
        if not flag.count:
            parts.append(Text(f"{reason}: none."))
            continue
        values = quality.spots[flag.column].to_numpy()
        order = np.argsort(values if flag.low else -values, kind="stable")
        worst = order[flag.spots[order]][:SHOWN_PATCHES]
        words = f"{reason}: {flag.count:,} patches, the worst {len(worst)} shown, {_limit(flag)}."
        if reason == PEN:
            words += f" {_inks(quality, flag)}"
        parts.append(_gallery(store, worst, words))
    return parts


def _inks(quality: SlideQuality, flag: Flag) -> str:
    counts = {ink: int((quality.spots[f"pen_{ink}"][flag.spots] > 0).sum()) for ink in PENS}
    return "Ink: " + ", ".join(f"{ink} in {count:,}" for ink, count in counts.items() if count)


def _gallery(store: SlideStore, index: np.ndarray, words: str) -> Picture:
    return Picture(patch_strip(store.patches(index)), words, words)


@dataclass
class CohortRow:
    """One slide of the summary.

    Attributes:
        modality: "rna" or "protein"; slides are compared with those of the same one.
        page: file of its page, in the same folder.
        numbers: measure -> value.
        picture: small JPEG, or b"".
        outliers: measure -> whether the value is above (True) or below (False) the usual range.
        registration: verdict on whether the image is the picture of the spots.
        warnings: what may be wrong with the slide.
    """

    slide_id: str
    patient_id: str
    modality: str
    page: str
    numbers: dict[str, float]
    picture: bytes = b""
    outliers: dict[str, bool] = field(default_factory=dict)
    registration: str = UNKNOWN
    warnings: tuple[str, ...] = ()


def qc_folder(stores: str | Path, out: str | Path, config: QcConfig | None = None) -> Path:
    """Write the quality pages of a folder of stores.

    Args:
        stores: folder that `hibio prepare` wrote.
        out: folder of the pages; made when missing. ``<slide_id>.qc.html``, named like the store,
            ``qc.csv`` (one row a slide) and ``index.html``; older ones are replaced.
        config: what is flagged.

    Returns:
        The index page.

    Raises:
        DataError: no store there, or some could not be read; the pages of the others are written
            before, and the index names the failed ones.
    """
    index, rows, failed = Path(out) / INDEX, [], []
    paths, out = stores_in(stores), Path(out)
    refuse_others({out / TABLE: "slide_id,patient_id"}, [index])
    out.mkdir(parents=True, exist_ok=True)
    for path in tqdm(paths, desc="qc", unit="slide", disable=None):
        try:
            rows.append(_write_slide(path, out, config))
        except DataError as error:
            failed.append((path.name, str(error)))
    mark_outliers(rows)
    write_table(rows, out / TABLE)
    _write(index, cohort_page(rows, failed))
    if failed:
        raise DataError(
            f"{len(failed)} of {len(paths)} stores could not be read: "
            + "; ".join(reason for _, reason in failed)
            + f" (the others are in {index})"
        )
    return index


def mark_outliers(rows: Sequence[CohortRow]) -> None:
    """Mark, in each row, the measures that lie outside median -+ 3 MAD of its modality."""
    for modality in {row.modality for row in rows}:
        group = [row for row in rows if row.modality == modality]
        for measure in MEASURES:
            if not measure.compared:
                continue
            values, limits = _values(group, measure)
            for row, low, high in zip(
                group, limits.below(values), limits.above(values), strict=True
            ):
                if low or high:
                    row.outliers[measure.key] = bool(high)


def write_table(rows: Sequence[CohortRow], path: Path) -> None:
    """Write one row a slide: ids, all measures (empty where there is none), outliers in words."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        keys = [measure.key for measure in MEASURES]
        head = ["slide_id", "patient_id", "modality", "registration"]
        writer.writerow([*head, *keys, "outliers", "warnings"])
        for row in rows:
            numbers = [row.numbers.get(key, math.nan) for key in keys]
            texts = [f"{value:.6g}" if math.isfinite(value) else "" for value in numbers]
            outliers = "; ".join(
                f"{key} {'high' if high else 'low'}" for key, high in row.outliers.items()
            )
            ids = map(spreadsheet_text, (row.slide_id, row.patient_id, row.modality))
            warnings = spreadsheet_text("; ".join(row.warnings))
            writer.writerow([*ids, row.registration, *texts, outliers, warnings])


def cohort_page(rows: Sequence[CohortRow], failed: Sequence[tuple[str, str]] = ()) -> str:
    """Return the summary of slides whose outliers are marked as HTML; ``failed``: store, reason."""
    patients = len({row.patient_id for row in rows})
    parts: list[Part] = [Text(f"{len(rows)} slides of {patients} patients.", "soft")]
    if failed:
        parts.append(Heading("Could not be read"))
        parts.append(Bullets([f"{name}: {reason}" for name, reason in failed]))
    parts += [Heading("What stands out"), _told(rows)]
    if rows:
        parts += [Heading("Slides"), _slide_table(rows), *_dots(rows)]
    parts += [
        Heading("How to read this"),
        Text(
            "A value is marked where it lies more than 3 MAD (median absolute deviation, times "
            "1.4826) from the median of all slides of its modality, on the logarithm for spots, "
            "depth, genes and focus; shares by at least 5 points (mitochondrial: 2). Focus "
            "can only be compared between slides of one scale (um/px) and one scanner. With fewer "
            f"than {FEWEST} slides nothing is marked. Unusual is not wrong: look at the page. "
            "Nothing was removed. All numbers are in qc.csv."
        ),
    ]
    return render("Quality of the cohort", [Section(parts)])


def _write_slide(path: Path, out: Path, config: QcConfig | None) -> CohortRow:
    with SlideStore(path) as store:
        quality = slide_quality(store, config)
        page = out / f"{path.stem}.qc.html"
        _write(page, slide_page(store, quality))
        small = store.thumbnail
        return CohortRow(
            quality.slide_id,
            store.patient_id,
            quality.modality,
            page.name,
            quality.numbers,
            b"" if small is None else small_picture(small),
            registration=quality.registration.verdict,
            warnings=_warnings(store, quality.registration),
        )


def _warnings(store: SlideStore, found: Registration) -> tuple[str, ...]:
    """All that may be wrong with a slide: what prepare found, and its registration."""
    told = [warning.message for warning in store.warnings]
    return (*told, found.message) if found.warns else tuple(told)


def _write(path: Path, content: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _values(rows: Sequence[CohortRow], measure: Measure) -> tuple[np.ndarray, Limits]:
    """One measure of all slides, and its usual range."""
    values = np.array([row.numbers.get(measure.key, math.nan) for row in rows])
    limits = robust_limits(values, log=measure.log, least=measure.least)
    if measure.unit == "%":
        limits = replace(limits, low=max(limits.low, 0.0), high=min(limits.high, 1.0))
    return values, limits


def _told(rows: Sequence[CohortRow]) -> Part:
    """Sentences on the slides with outliers."""
    label = {measure.key: measure.label for measure in MEASURES}
    lines = [f"{row.slide_id}: WARN: {told}" for row in rows for told in row.warnings]
    lines += [
        f"{row.slide_id}: "
        + "; ".join(f"{label[k]} {'high' if high else 'low'}" for k, high in row.outliers.items())
        for row in rows
        if row.outliers
    ]
    return Bullets(lines) if lines else Text("No slide is far from the others.")


def _slide_table(rows: Sequence[CohortRow]) -> Table:
    measures = [m for key in _COLUMNS for m in MEASURES if m.key == key]
    head = ["slide", "", "patient", *(m.label for m in measures), "marked"]
    return Table(head, [Line(_slide_cells(row, measures)) for row in rows])


def _slide_cells(row: CohortRow, measures: Sequence[Measure]) -> list[Cell | str]:
    link = Cell(row.slide_id, link="./" + quote(row.page))
    cells: list[Cell | str] = [link, Cell(picture=row.picture), row.patient_id]
    for measure in measures:
        words = shown(row.numbers.get(measure.key, math.nan), measure)
        if measure.key in row.outliers:
            arrow = "▲" if row.outliers[measure.key] else "▼"
            cells.append(Cell(f"{words} {arrow}", strong="far"))
        else:
            cells.append(words)
    return [*cells, str(len(row.outliers))]


def _dots(rows: Sequence[CohortRow]) -> list[Part]:
    """Dots of the measures of each modality: those with outliers first."""
    parts: list[Part] = []
    for modality in sorted({row.modality for row in rows}):
        group = [row for row in rows if row.modality == modality]
        drawn = []
        for measure in MEASURES:
            values, limits = _values(group, measure)
            if measure.compared and np.isfinite(values).any() and np.ptp(values[~np.isnan(values)]):
                far = any(measure.key in row.outliers for row in group)
                drawn.append((not far, measure.label, values, limits, measure.log))
        drawn = sorted(drawn, key=lambda one: one[0])[:_MOST_DOTS]
        if not drawn:
            continue
        data = cohort_dots([one[1:] for one in drawn], [row.slide_id for row in group])
        caption = (
            f"Slides of {modality}: one dot a slide, in the order of the table from below; line: "
            "median; band: usual range."
        )
        parts.append(Picture(data, f"measures of {modality} slides", caption))
    return parts
