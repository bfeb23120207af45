"""Samples of HEST-1k where they lie: their files, their metadata, and format `hest`.

A sample <id> is st/<id>.h5ad (counts, obsm spatial in pixels), wsis/<id>.tif, patches/<id>.h5 and
metadata/<id>.json below one root.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from preprocessing.errors import DataError, did_you_mean
from preprocessing.files import files_in, folder_part, plain_name
from preprocessing.readers.cells import OWN_PLACES, Cells, cell_format, cell_table
from preprocessing.readers.coordinates import VISIUM_LATTICE, VISIUM_PITCH_UM
from preprocessing.readers.format import NO_BINS, file_name
from preprocessing.readers.h5ad import h5ad_cells, scale_factor
from preprocessing.readers.hdf5 import open_hdf5
from preprocessing.readers.tables import read_json_object
from preprocessing.scale import Statement, hexagonal_spacing, stated
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.slides.hest import hest_coordinates
from preprocessing.spot_table import SpotTable

ST, WSIS, PATCHES, METADATA = "st", "wsis", "patches", "metadata"
OWN = "hibio"  # key of the metadata with what HEST-1k has no field for
_IMAGES = (".tif", ".tiff", ".svs")
_OFF_PX = 2.0  # HEST-1k cuts patches at whole pixels
_MPP = ("pixel_size_um_estimated", "pixel_size_um_embedded")


def st_file(counts: Path, slide_id: str) -> Path:
    """Return the counts of a sample.

    Args:
        counts: the root of HEST-1k, or st/<id>.h5ad itself.
        slide_id: the sample, where the root is given.

    Raises:
        DataError: there is no such sample; names the nearest.
    """
    if counts.is_file():
        return counts
    found = counts / ST / f"{slide_id}.h5ad"
    if found.is_file():
        return found
    there = [path.stem for path in files_in(counts / ST, "*.h5ad")]
    found_ids = f"found {', '.join(there[:6]) or 'none'}"
    hint = did_you_mean(slide_id, there, "did you mean", otherwise=found_ids)
    raise DataError(
        f"{counts} has no {ST}/{slide_id}.h5ad ({hint}); the slide_id must be the id of a sample "
        "of HEST-1k, or counts the path of its .h5ad file"
    )


def metadata_file(st: Path) -> Path | None:
    """The metadata of the sample whose counts are ``st``, if they are there."""
    path = st.parent.parent / METADATA / f"{st.stem}.json"
    return path if path.is_file() else None


def image_file(st: Path) -> Path | None:
    """The slide image of a sample, else its patches; None: neither is there."""
    root = st.parent.parent
    places = [root / WSIS / f"{st.stem}{ending}" for ending in _IMAGES]
    places.append(root / PATCHES / f"{st.stem}.h5")
    return next((path for path in places if path.is_file()), None)


def read_metadata(path: Path | None) -> dict[str, Any]:
    """Read the metadata of a sample; fields that are NaN or null are left out.

    Raises:
        DataError: not a JSON object.
    """
    if path is None:
        return {}
    what = "with the metadata of a HEST-1k sample"
    content = read_json_object(path, what, "download it again")
    return {key: value for key, value in content.items() if not _is_missing(value)}


def pixel_sizes(known: Mapping[str, Any], path: Path) -> tuple[Statement, ...]:
    """Um per pixel: estimated by HEST-1k, then embedded in the picture it got, where given.

    Raises:
        DataError: not a positive number.
    """
    found: list[Statement] = []
    for name in _MPP:
        value = known.get(name)
        if value is None:
            continue
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        if not usable or not (math.isfinite(value) and value > 0):
            raise DataError(f"{path}: {name} is {value!r}; expected um per pixel, a number above 0")
        found += stated(float(value), f"{name} of the metadata", replaced=bool(found))
    return tuple(found)


def _lattice(known: Mapping[str, Any], xy: np.ndarray) -> tuple[Statement, ...]:
    """Um per pixel by the lattice of a Visium slide; xy (S, 2) in pixels."""
    technology = str(known.get("st_technology", "")).lower()
    if "visium" not in technology or "hd" in technology:
        return ()
    spacing = hexagonal_spacing(xy)
    return stated(spacing and VISIUM_PITCH_UM / spacing, VISIUM_LATTICE)


def patient_of(known: Mapping[str, Any], slide_id: str) -> str:
    """The patient; HEST-1k numbers them anew in each data set, so its title stands in front."""
    patient = str(known.get("patient", "")).strip()
    if not patient:
        return slide_id
    title = str(known.get("dataset_title", "")).strip()
    return f"{title}: {patient}" if title else patient


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _sources(row: SlideRow) -> dict[str, Path]:
    st = st_file(row.counts_path, row.slide_id)
    metadata = metadata_file(st)
    return {"counts": st} | ({} if metadata is None else {"metadata": metadata})


def read_hest(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one sample; spots outside the tissue (in_tissue 0) are left out.

    mpp: the manifest, pixel_size_um_estimated, pixel_size_um_embedded, then as for AnnData files.
    Labels are chosen as for them, or are those that the metadata name (written by `write_hest`).
    """
    files = _sources(row)
    st = files["counts"]
    known = read_metadata(files.get("metadata"))
    cells, scale = h5ad_cells(st, row.modality, row.layer, row.section)
    notes: list[str] = []
    cells = cells.in_tissue(str(st))
    sizes = pixel_sizes(known, files.get("metadata", st))
    known_lattice = any(one.source == VISIUM_LATTICE for one in scale.said)
    lattice = () if known_lattice else _lattice(known, cells.xy)
    scale = replace(scale, said=(*sizes, *scale.said, *lattice), before_image=bool(sizes))
    if row.image is not None and row.image.suffix == ".h5":
        _check_patches(row.image, cells)
    own = _own_labels(known, cells, st)
    if own is not None:
        cells = replace(cells, columns=pd.DataFrame(index=pd.RangeIndex(len(cells.barcodes))))
    table = cell_table(replace(row, counts=st), cells, scale, image_mpp)
    if own is not None:
        kept = own.drop(columns=[name for name in own.columns if name in table.labels.columns])
        table = replace(table, labels=pd.concat([kept, table.labels], axis=1))
    with open_hdf5(st, "an AnnData file (.h5ad)") as file:
        diameter = scale_factor(file, "spot_diameter_fullres")
    per_pixel = row.image_scale or 1.0
    return replace(
        table,
        diameter_um=None if diameter is None else diameter * per_pixel * table.mpp,
        notes=(*table.notes, *notes),
    )


def _own_labels(known: dict[str, Any], cells: Cells, st: Path) -> pd.DataFrame | None:
    """The labels that `write_hest` noted, (S, columns), with their types; None: none are noted."""
    own = known.get(OWN)
    names = own.get("labels") if isinstance(own, dict) else None
    if not isinstance(names, dict):
        return None
    missing = [str(name) for name in names if name not in cells.columns.columns]
    if missing:
        raise DataError(
            f"{st}: the columns {', '.join(missing)} of obs are missing, which its metadata name; "
            "write the sample again"
        )
    frame = cells.columns[list(names)].reset_index(drop=True)
    numbers = [name for name in names if frame[name].dtype.kind in "iufb"]
    frame = frame.astype(dict.fromkeys(numbers, np.float64))
    return frame.rename(columns={name: str(label) for name, label in names.items()})


def _check_patches(path: Path, cells: Cells) -> None:
    """Patches must lie around their spots; older files may give centres as (y, x)."""
    names, centres = hest_coordinates(path)
    found = pd.Index(cells.barcodes).get_indexer(pd.Index(names))
    if len(names) != len(centres) or not (found >= 0).any():
        raise DataError(f"{path}: no patch belongs to a spot of the sample; give its own patches")
    gap = np.abs(centres[found >= 0] - cells.xy[found[found >= 0]]).max(axis=1)
    if np.median(gap) > _OFF_PX:
        raise DataError(
            f"{path}: the patches lie {np.median(gap):.0f} pixels off their spots; expected coords "
            "to be left upper corners (x, y); give the image of wsis/ instead"
        )


def _is_root(folder: Path) -> bool:
    beside = any((folder / name).is_dir() for name in (WSIS, PATCHES, METADATA))
    return beside and (folder / ST).is_dir()


def _detect(counts: Path, spots: Path | None) -> bool:
    if counts.is_dir():
        return _is_root(counts)
    is_st = counts.parent.name == ST and file_name(counts).endswith(".h5ad")
    return is_st and _is_root(counts.parent.parent)


def _discover(folder: Path) -> list[SlideRow]:
    """The samples of a root of HEST-1k: st/*.h5ad beside wsis/, patches/ or metadata/."""
    files = files_in(folder / ST, "*.h5ad") if _is_root(folder) else []
    return [_drafted(st) for st in files]


def _drafted(st: Path) -> SlideRow:
    try:
        known = read_metadata(metadata_file(st))
    except DataError:  # `prepare` says what is wrong with it
        known = {}
    own = known.get(OWN)
    own = own if isinstance(own, dict) else {}
    row = drafted_row(
        st.stem,
        st,
        "hest",
        patient_id=folder_part(patient_of(known, plain_name(st.stem))),
        image=image_file(st),
        tissue=_text(known, "organ") or _text(known, "tissue"),
        organism=_text(known, "species"),
        technology=_text(known, "st_technology"),
        outcome=_text(own, "outcome"),
        role=_text(own, "role"),
    )
    return replace(row, modality=_text(own, "modality") or row.modality)


def _text(known: Mapping[str, Any], name: str) -> str:
    value = known.get(name)
    return " ".join(value.split()) if isinstance(value, str) else ""


FORMAT = cell_format(
    "hest",
    read_hest,
    sources=_sources,
    detect=_detect,
    discover=_discover,
    layout="HEST-1k (st/ + wsis/)",
    whole=True,
    cells=False,
    forbids={**OWN_PLACES, "pitch_um": "holds spots already", **NO_BINS},
)
