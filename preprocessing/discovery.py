"""A first manifest from a folder: finds the layouts of legacy ST and of Space Ranger."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from preprocessing.errors import DataError
from preprocessing.manifest import SlideRow
from preprocessing.readers.text_table import read_table, require_columns

ST_PITCH_UM = 200.0  # 1,000-spot arrays: neighbouring array positions
CHECKERBOARD_PITCH_UM = 100.0  # every other position used: diagonal neighbours 141 um apart
_MAX_DEPTH = 6
_COUNTS = re.compile(r"(?P<id>[A-Za-z0-9][A-Za-z0-9._-]*?)\.tsv(\.gz)?")
_IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".svs", ".ndpi")
_SCALED = ("tissue_hires_image.png", "tissue_lowres_image.png")


def draft_manifest(folder: str | Path) -> list[SlideRow]:
    """Find slides below a folder and describe them as manifest rows.

    Known layouts: her2st as shared here (counts/, spotfiles/, images/, pathologist_labels/,
    sections.csv); a clone of almaan/her2st (data/ST-cnts, ST-spotfiles, ST-imgs, ST-pat/lbl);
    counts beside ``alignment_table_<id>.tsv``; Space Ranger folders (spatial/ beside
    filtered_feature_bc_matrix). The patient is the slide id without its trailing number (legacy)
    or the slide id (Space Ranger): correct it where slides share a patient.

    Args:
        folder: where to look, up to six folders deep.

    Returns:
        Rows sorted by slide id; ids found twice get their parent folder's name in front.

    Raises:
        DataError: no folder, or none of the layouts.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder that holds the data")
    rows = [row for place in _folders(folder) for find in _LAYOUTS for row in find(place)]
    if not rows:
        raise DataError(
            f"{folder} holds no known layout: looked for counts/ + spotfiles/, ST-cnts/ + "
            "ST-spotfiles/, alignment_table_*.tsv, and spatial/ + filtered_feature_bc_matrix; "
            "write the manifest by hand (columns: slide_id, patient_id, counts, format, ...)"
        )
    return sorted(_unique_ids(rows), key=lambda row: row.slide_id)


def _folders(top: Path) -> Iterator[Path]:
    for place, below, _ in os.walk(top):
        here = Path(place)
        below[:] = sorted(d for d in below if not d.startswith("."))
        if len(here.relative_to(top).parts) >= _MAX_DEPTH:
            below.clear()
        yield here


def _unique_ids(rows: list[SlideRow]) -> list[SlideRow]:
    ids = [row.slide_id for row in rows]
    named = [
        replace(row, slide_id=_plain(f"{_study(row)}_{row.slide_id}"))
        if ids.count(row.slide_id) > 1
        else row
        for row in rows
    ]
    twice = {r.slide_id for r in named if [n.slide_id for n in named].count(r.slide_id) > 1}
    if twice:
        raise DataError(
            f"slides with the same name: {', '.join(sorted(twice))}; draft the "
            "manifests of their folders one by one"
        )
    return named


def _study(row: SlideRow) -> str:
    """Name of the nearest folder above the counts that says more than the layout."""
    layout = {row.slide_id, "outs", "counts", "ST-cnts", "data"}
    return next((p.name for p in row.counts_path.resolve().parents if p.name not in layout), "")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-") or "slide"


def _count_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    found = ((_COUNTS.fullmatch(p.name), p) for p in sorted(folder.iterdir()) if p.is_file())
    return {match["id"]: p for match, p in found if match}


def _first(folder: Path, *patterns: str) -> Path | None:
    for pattern in patterns:
        found = sorted(p for p in folder.glob(pattern) if p.is_file())
        if found:
            return found[0]
    return None


def _legacy(slide: str, counts: Path, spots: Path, pitch_um: float) -> SlideRow:
    patient = slide.rstrip("0123456789") or slide
    return SlideRow(
        slide_id=_plain(slide),
        patient_id=patient,
        counts=counts,
        format="legacy_st",
        spots=spots,
        pitch_um=pitch_um,
        technology="Spatial Transcriptomics",
    )


def _her2st(folder: Path) -> list[SlideRow]:
    """The folder counts/ + spotfiles/ (+ images/, pathologist_labels/, sections.csv)."""
    rows = []
    sections = _sections(folder / "sections.csv")
    for slide, counts in _count_files(folder / "counts").items():
        spots = _first(folder / "spotfiles", f"{slide}_selection.tsv*")
        if spots is None:
            continue
        row = _legacy(slide, counts, spots, ST_PITCH_UM)
        known = sections.get(slide, {})
        image = _first(folder / "images", *(f"{slide}{ending}" for ending in _IMAGES))
        if known.get("image"):
            image = folder / known["image"]
        scale = known.get("image_over_fullres_scale", "")
        rows.append(
            replace(
                row,
                patient_id=known.get("patient") or row.patient_id,
                image=image,
                image_scale=float(scale) if image is not None and scale else None,
                labels=_first(folder / "pathologist_labels", f"{slide}_labeled_coordinates.tsv*"),
            )
        )
    return rows


def _sections(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    frame: pd.DataFrame = read_table(path)
    require_columns(frame, ("section", "patient"), path)
    records = frame.to_dict("records")
    return {str(r["section"]): {str(k): str(v) for k, v in r.items()} for r in records}


def _her2st_clone(folder: Path) -> list[SlideRow]:
    """The folder ``data`` of a clone of almaan/her2st."""
    rows = []
    for slide, counts in _count_files(folder / "ST-cnts").items():
        spots = _first(folder / "ST-spotfiles", f"{slide}_selection.tsv*")
        if spots is None:
            continue
        pictures = folder / "ST-imgs" / slide[0] / slide
        image = _first(pictures, *(f"*{ending}" for ending in _IMAGES))
        labels = _first(folder / "ST-pat" / "lbl", f"{slide}_labeled_coordinates.tsv*")
        row = _legacy(slide, counts, spots, ST_PITCH_UM)
        rows.append(replace(row, image=image, labels=labels))
    return rows


def _alignment_tables(folder: Path) -> list[SlideRow]:
    """Counts ``<id>.tsv(.gz)``, ``alignment_table_<id>.tsv`` and ``<id>.jpg`` in one folder."""
    rows = []
    for slide, counts in _count_files(folder).items():
        spots = _first(folder, f"alignment_table_{slide}.tsv*")
        if spots is not None:
            image = _first(folder, *(f"{slide}{ending}" for ending in _IMAGES))
            row = _legacy(slide, counts, spots, CHECKERBOARD_PITCH_UM)
            rows.append(replace(row, image=image))
    return rows


def _space_ranger(folder: Path) -> list[SlideRow]:
    """A folder with spatial/ and filtered_feature_bc_matrix(.h5)."""
    spatial, matrix = folder / "spatial", folder / "filtered_feature_bc_matrix"
    has_matrix = matrix.is_dir() or matrix.with_suffix(".h5").is_file()
    if not has_matrix or _first(spatial, "tissue_positions*") is None:
        return []
    slide = _plain(folder.resolve().parent.name if folder.name == "outs" else folder.resolve().name)
    images = (spatial / name for name in _SCALED)
    return [
        SlideRow(
            slide_id=slide,
            patient_id=slide,
            counts=folder,
            format="visium",
            image=next((p for p in images if p.is_file()), None),
            labels=_first(folder, "*labels*.csv", "*labels*.tsv"),
            technology="Visium",
        )
    ]


_LAYOUTS: tuple[Callable[[Path], list[SlideRow]], ...] = (
    _her2st,
    _her2st_clone,
    _alignment_tables,
    _space_ranger,
)
