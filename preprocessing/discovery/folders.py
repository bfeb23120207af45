"""Folders that are one data set, as manifest rows: HEST-1k, Visium HD, SpatialData, slides."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from preprocessing.errors import DataError
from preprocessing.hest_files import (
    METADATA,
    ST,
    image_file,
    metadata_file,
    patient_of,
    read_metadata,
)
from preprocessing.manifest import IMAGE_ONLY, SlideRow
from preprocessing.manifest_row import HD_CELLS
from preprocessing.plain_names import folder_part, plain_name
from preprocessing.readers.hd_cells import SEGMENTED, find_cell_files
from preprocessing.readers.spatialdata import is_spatialdata
from preprocessing.readers.visium_hd import DEFAULT_BIN_UM, bin_folders

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
