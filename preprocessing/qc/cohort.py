"""Quality of a cohort: a page a slide, `qc.csv`, and `index.html` that compares the slides."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from preprocessing.errors import DataError
from preprocessing.files import atomic_path
from preprocessing.pages import (
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
from preprocessing.qc.figures import cohort_dots, small_picture
from preprocessing.qc.page import slide_page
from preprocessing.qc.slide import (
    FEWEST,
    MEASURES,
    Limits,
    Measure,
    QcConfig,
    robust_limits,
    shown,
    slide_quality,
)
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in

INDEX, TABLE = "index.html", "qc.csv"

_COLUMNS = (
    *("n_spots", "n_left_out", "depth_median", "genes_median", "mito_median", "tissue_median"),
    *("focus_median", "optical_density", "share_flagged"),
)
_MOST_DOTS = 14


@dataclass
class CohortRow:
    """One slide of the summary.

    Attributes:
        slide_id: the slide.
        patient_id: its patient.
        modality: "rna" or "protein"; slides are compared with those of the same one.
        page: file of its page, in the same folder.
        numbers: measure -> value.
        picture: small JPEG, or b"".
        outliers: measure -> whether the value is above (True) or below (False) the usual range.
    """

    slide_id: str
    patient_id: str
    modality: str
    page: str
    numbers: dict[str, float]
    picture: bytes = b""
    outliers: dict[str, bool] = field(default_factory=dict)


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
    out, rows, failed = Path(out), [], []
    paths = stores_in(stores)
    out.mkdir(parents=True, exist_ok=True)
    for path in tqdm(paths, desc="qc", unit="slide", disable=None):
        try:
            rows.append(_write_slide(path, out, config))
        except DataError as error:
            failed.append((path.name, str(error)))
    mark_outliers(rows)
    write_table(rows, out / TABLE)
    index = out / INDEX
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
        writer.writerow(["slide_id", "patient_id", "modality", *keys, "outliers"])
        for row in rows:
            numbers = [row.numbers.get(key, math.nan) for key in keys]
            texts = [f"{value:.6g}" if math.isfinite(value) else "" for value in numbers]
            outliers = "; ".join(
                f"{key} {'high' if high else 'low'}" for key, high in row.outliers.items()
            )
            writer.writerow([row.slide_id, row.patient_id, row.modality, *texts, outliers])


def cohort_page(rows: Sequence[CohortRow], failed: Sequence[tuple[str, str]] = ()) -> str:
    """Return the summary of a cohort as HTML.

    Args:
        rows: the slides, outliers marked.
        failed: (store, reason) of those without a page.
    """
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
        )


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
    lines = [
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
