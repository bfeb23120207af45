"""A first manifest from a folder: finds the published layouts of slides, spots and cells."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from preprocessing.errors import DataError
from preprocessing.files import folder_part, plain_name
from preprocessing.manifest import BINS_UM, HD_CELLS, IMAGE_ONLY, SlideRow
from preprocessing.readers import h5ad, loom
from preprocessing.readers.cosmx import KEYS, find_cosmx_files, mpp_of_frame
from preprocessing.readers.hd_cells import SEGMENTED, find_cell_files
from preprocessing.readers.hest import (
    METADATA,
    ST,
    image_file,
    metadata_file,
    patient_of,
    read_metadata,
)
from preprocessing.readers.spatialdata import is_spatialdata
from preprocessing.readers.tables import read_header, read_table, require_columns
from preprocessing.readers.visium_hd import DEFAULT_BIN_UM, bin_folders
from preprocessing.readers.xenium import find_xenium_files

_HAS_CELLS: dict[str, Callable[[Path], bool]] = {"h5ad": h5ad.has_cells, "loom": loom.has_cells}


def _row(name: str, counts: Path, form: str, technology: str, mpp: float | None = None) -> SlideRow:
    slide = plain_name(name)
    return SlideRow(slide, slide, counts, form, mpp=mpp, technology=technology)


def _xenium(folder: Path) -> list[SlideRow]:
    """A folder with cell_feature_matrix(.h5) and cells.*."""
    try:
        find_xenium_files(folder)
    except DataError:
        return []
    return [_row(folder.resolve().name, folder, "xenium", "Xenium")]


def _cosmx(folder: Path) -> list[SlideRow]:
    """A folder with CosMx flat files; mpp by the width of the fields of view, where it is known."""
    files = find_cosmx_files(folder)
    if files is None:
        return []
    try:
        headers = [read_header(files[role]).names for role in ("counts", "spots")]
    except DataError:
        return []
    if not all(set(KEYS) <= set(names) for names in headers):
        return []
    mpp = mpp_of_frame(files["fields"]) if "fields" in files else None
    return [_row(folder.resolve().name, folder, "cosmx", "CosMx", mpp)]


def _hdf5_files(folder: Path) -> list[SlideRow]:
    """AnnData and loom files that hold a matrix and coordinates."""
    return [
        _row(path.stem, path, path.suffix[1:], "")
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix[1:] in _HAS_CELLS and _worth_a_row(path)
    ]


def _worth_a_row(path: Path) -> bool:
    try:
        return _HAS_CELLS[path.suffix[1:]](path)
    except DataError:  # a damaged file is drafted, so that `prepare` says what is wrong with it
        return True


CELL_LAYOUTS: tuple[Callable[[Path], list[SlideRow]], ...] = (_xenium, _cosmx, _hdf5_files)

SLIDE_SUFFIXES = (".svs", ".ndpi", ".scn", ".mrxs", ".bif", ".vms", ".vmu", ".svslide")

_SCALED = ("tissue_hires_image.png", "tissue_lowres_image.png")


def hest_samples(folder: Path) -> list[SlideRow]:
    """The samples of a root of HEST-1k: st/*.h5ad beside wsis/, patches/ or metadata/."""
    beside = any((folder / name).is_dir() for name in ("wsis", "patches", METADATA))
    files = sorted((folder / ST).glob("*.h5ad")) if beside else []
    return [_hest_row(st) for st in files]


def _hest_row(st: Path) -> SlideRow:
    try:
        known = read_metadata(metadata_file(st))
    except DataError:  # `prepare` says what is wrong with it
        known = {}
    own = known.get("hibio")
    own = own if isinstance(own, dict) else {}
    slide = plain_name(st.stem)
    row = SlideRow(
        slide_id=slide,
        patient_id=folder_part(patient_of(known, slide)),
        counts=st,
        format="hest",
        image=image_file(st),
        tissue=_text(known, "organ") or _text(known, "tissue"),
        organism=_text(known, "species"),
        technology=_text(known, "st_technology"),
    )
    modality, outcome = _text(own, "modality"), _text(own, "outcome")
    return replace(row, modality=modality or row.modality, outcome=outcome)


def _text(known: dict[str, object], name: str) -> str:
    value = known.get(name)
    return " ".join(value.split()) if isinstance(value, str) else ""


def visium_hd(folder: Path) -> list[SlideRow]:
    """A Visium HD sample: binned_outputs/square_XXXum; 8 um, or the finest that is there."""
    folders = bin_folders(folder)
    if not folders:
        return []
    bin_um = DEFAULT_BIN_UM if DEFAULT_BIN_UM in folders else min(folders)
    pictures = (folders[bin_um] / "spatial" / name for name in _SCALED)
    parts = folder.resolve().parts
    name = next((p for p in reversed(parts) if p not in ("outs", "binned_outputs")), "slide")
    return [
        SlideRow(
            slide_id=plain_name(name),
            patient_id=plain_name(name),
            counts=folder,
            format="visium_hd",
            image=next((p for p in pictures if p.is_file()), None),
            technology="Visium HD",
            bin_um=bin_um,
        )
    ]


def visium_hd_cells(folder: Path) -> list[SlideRow]:
    """Segmented cells of Space Ranger 4 whose sample has no bins beside them."""
    try:
        files = find_cell_files(folder)
    except DataError:
        return []
    pictures = (files.matrix.parent / "spatial" / name for name in _SCALED)
    parts = folder.resolve().parts
    name = plain_name(next((p for p in reversed(parts) if p not in ("outs", SEGMENTED)), "slide"))
    return [
        SlideRow(
            slide_id=name,
            patient_id=name,
            counts=folder,
            format=HD_CELLS,
            image=next((p for p in pictures if p.is_file()), None),
            technology="Visium HD",
        )
    ]


def spatialdata(folder: Path) -> list[SlideRow]:
    """A SpatialData zarr folder with a table."""
    if not is_spatialdata(folder):
        return []
    name = plain_name(folder.resolve().name.removesuffix(".zarr"))
    return [SlideRow(name, name, folder, "spatialdata")]


def slide_images(folder: Path, used: set[Path]) -> Iterator[SlideRow]:
    """Whole-slide images that no other row names, as slides without counts."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SLIDE_SUFFIXES and path.is_file() and path not in used:
            name = plain_name(path.stem)
            yield SlideRow(name, name, None, IMAGE_ONLY, image=path)


#: Tried first; a folder that is one of these is not looked into any further.
WHOLE_LAYOUTS: tuple[Callable[[Path], list[SlideRow]], ...] = (
    hest_samples,
    visium_hd,
    visium_hd_cells,
    spatialdata,
)

ST_PITCH_UM = 200.0  # 1,000-spot arrays: neighbouring array positions

CHECKERBOARD_PITCH_UM = 100.0  # every other position used: diagonal neighbours 141 um apart

_MAX_DEPTH = 6

_COUNTS = re.compile(r"(?P<id>[A-Za-z0-9][A-Za-z0-9._-]*?)\.tsv(\.gz)?")

_IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".svs", ".ndpi")


def draft_manifest(folder: str | Path) -> list[SlideRow]:
    """Find slides below a folder and describe them as manifest rows.

    Known layouts: her2st as shared here (counts/, spotfiles/, images/, pathologist_labels/,
    sections.csv); a clone of almaan/her2st (data/ST-cnts, ST-spotfiles, ST-imgs, ST-pat/lbl);
    counts beside ``alignment_table_<id>.tsv``; Space Ranger folders (spatial/ beside
    filtered_feature_bc_matrix); Visium HD (binned_outputs/); roots of HEST-1k (st/ beside wsis/,
    patches/ or metadata/); SpatialData zarr; Xenium and CosMx folders; AnnData and loom files with
    coordinates; whole-slide images that belong to none of them (mpp stays empty where the files do
    not state it: fill it in). The patient is the slide id without its trailing number (legacy),
    what the metadata say (HEST-1k) or the slide id (others): correct it where slides share one.

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
    rows, places = [], []
    for place, whole in _folders(folder):
        places.append(place)
        rows += whole or [row for find in _LAYOUTS for row in find(place)]
    used = {row.image for row in rows if row.image is not None}
    rows += [row for place in places for row in slide_images(place, used)]
    if not rows:
        raise DataError(
            f"{folder} holds no known layout: looked for counts/ + spotfiles/, ST-cnts/ + "
            "ST-spotfiles/, alignment_table_*.tsv, spatial/ + filtered_feature_bc_matrix, "
            "binned_outputs/, HEST-1k (st/ + wsis/), SpatialData zarr, Xenium and CosMx folders, "
            ".h5ad and .loom files with coordinates, whole-slide images; "
            "write the manifest by hand (columns: slide_id, patient_id, counts, format, ...)"
        )
    return sorted(_unique_ids(rows), key=lambda row: row.slide_id)


def _folders(top: Path) -> Iterator[tuple[Path, list[SlideRow]]]:
    """Every folder, and its rows where it is a data set as a whole (then nothing below it)."""
    for place, below, _ in os.walk(top):
        here = Path(place)
        whole = next((rows for find in WHOLE_LAYOUTS if (rows := find(here))), [])
        below[:] = sorted(d for d in below if not d.startswith("."))
        if whole or len(here.relative_to(top).parts) >= _MAX_DEPTH:
            below.clear()
        yield here, whole


def _unique_ids(rows: list[SlideRow]) -> list[SlideRow]:
    ids = [row.slide_id for row in rows]
    named = [
        replace(row, slide_id=plain_name(f"{_study(row)}_{row.slide_id}"))
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
    layout = {row.slide_id, "outs", "counts", "ST-cnts", "data", "st"}
    place = row.image if row.counts is None else row.counts
    parents = () if place is None else place.resolve().parents
    return next((p.name for p in parents if p.name not in layout), "")


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
        slide_id=plain_name(slide),
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
                patient_id=folder_part(known.get("patient") or row.patient_id),
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
    """A folder with spatial/ and filtered_feature_bc_matrix(.h5); bins of Visium HD by scale."""
    spatial, matrix = folder / "spatial", folder / "filtered_feature_bc_matrix"
    has_matrix = matrix.is_dir() or _first(folder, "*filtered_feature_bc_matrix.h5") is not None
    if not has_matrix or _first(spatial, "*tissue_positions*") is None:
        return []
    binned = _bin_um(spatial / "scalefactors_json.json")
    slide = plain_name(
        folder.resolve().parent.name if folder.name == "outs" else folder.resolve().name
    )
    images = (spatial / name for name in _SCALED)
    return [
        SlideRow(
            slide_id=slide,
            patient_id=slide,
            counts=folder,
            format="visium" if binned is None else "visium_hd",
            image=next((p for p in images if p.is_file()), None),
            labels=_first(folder, "*labels*.csv", "*labels*.tsv"),
            technology="Visium" if binned is None else "Visium HD",
            bin_um=binned,
        )
    ]


def _bin_um(path: Path) -> float | None:
    """Size of the bins by the scale factors; None: no bins, or no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig")).get("bin_size_um")
    except (OSError, ValueError, AttributeError, RecursionError):  # `prepare` tells what is wrong
        return None
    return float(found) if found in BINS_UM else None


_LAYOUTS: tuple[Callable[[Path], list[SlideRow]], ...] = (
    _her2st,
    _her2st_clone,
    _alignment_tables,
    _space_ranger,
    *CELL_LAYOUTS,
)
