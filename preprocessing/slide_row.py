"""What is known of one slide before anything is read: a row of the manifest."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from preprocessing.errors import DataError
from preprocessing.files import plain_name
from preprocessing.spot_table import RNA

IMAGE_ONLY = "image"  # the format of a slide without counts
PATH_COLUMNS = ("counts", "image", "spots", "labels")
ROLES = TRAIN, TEST = "train", "test"
#: Columns that say what a slide is for: a store takes them over anew without being prepared again.
SAID = ("patient_id", "role", "outcome")
#: Names that machines and archives give to folders and files: they name no slide and no patient.
LAYOUT = frozenset(
    (
        *("outs", "binned_outputs", "segmented_outputs", "spatial", "visium", "visium_hd"),
        *("xenium", "cosmx", "merscope", "st", "st-cnts", "data", "counts", "output", "outputs"),
        *("results", "raw", "processed", "spaceranger", "adata", "slide", "sample", "image"),
        *("images", "wsis"),
    )
)


@dataclass(frozen=True)
class SlideRow:
    """One slide of a manifest; the columns of the CSV carry the same names.

    Attributes:
        slide_id: plain name [A-Za-z0-9._-]; names the store file.
        patient_id: splits are made by patient.
        counts: Space Ranger folder or matrix (visium, visium_hd, visium_hd_cells), output folder
            (xenium, cosmx), zarr folder (spatialdata), root of HEST-1k or its st/<id>.h5ad (hest),
            or one file (legacy_st, h5ad, loom, csv); None (image).
        format: a key of `preprocessing.readers.READERS` (empty in the manifest: as the files
            show); "csv" is any table of cells x genes, "image" a slide without counts: its spots
            are a square grid of windows over the tissue.
        image: slide image (image: required); None gives a counts-only store.
        spots: spot table (legacy_st: required; visium: instead of spatial/tissue_positions*);
            table of cells with coordinates (csv).
        labels: table with labels or measurements per spot.
        mpp: um per level-0 pixel of the image file named; without image um per coordinate unit.
        image_scale: image pixels per coordinate pixel; None: 1, or for Space Ranger by the names
            tissue_hires_image / tissue_lowres_image.
        image_transform: what takes the places so found to the picture (`image_transform`): words,
            or a file of a matrix; "": they are the picture's, or a file beside it says more.
        pitch_um: centre-to-centre distance in um of one array step (legacy ST: 200 or 100), of
            the grid (image; None: as wide as a patch), or of the square pseudo-spots into which
            cells are summed (tables of cells; None: cells stay).
        tissue: free text.
        organism: free text, such as "human".
        technology: free text, such as "Visium".
        modality: "rna" (counts, integers) or "protein" (intensities from 0 on).
        outcome: a class such as "1", or a survival time "34.5;1" (time;event); "" unknown; the
            same on all slides of a patient.
        bin_um: edge of the bins to read in um (visium_hd: 2, 8 or 16, None: 8; stereoseq: 50).
        layer: the matrix of an AnnData, loom or SpatialData table that holds the counts: a name of
            its layers, "X" or "raw.X"; "": the first that holds counts.
        section: "COLUMN=VALUE": of several sections in the files the one to read ("suffix=2": the
            barcodes that end in -2); "": they hold one.
        role: "test": never trained on, and measured by every checkpoint, also one that was trained
            on other slides of the patient (marked "seen patient" there); "train": never held out;
            "": as the folds say.
    """

    slide_id: str
    patient_id: str
    counts: Path | None
    format: str
    image: Path | None = None
    spots: Path | None = None
    labels: Path | None = None
    mpp: float | None = None
    image_scale: float | None = None
    image_transform: str | Path = ""
    pitch_um: float | None = None
    tissue: str = ""
    organism: str = ""
    technology: str = ""
    modality: str = RNA
    outcome: str = ""
    bin_um: float | None = None
    layer: str = ""
    role: str = ""
    section: str = ""

    @property
    def counts_path(self) -> Path:
        """The counts, for the readers of formats that have some; DataError where there are none."""
        if self.counts is None:
            raise DataError(f"format {self.format} needs the column 'counts'; it is empty")
        return self.counts


_BINS = re.compile(r"square_\d+um")
COLUMNS = tuple(f.name for f in fields(SlideRow))


def says(name: str) -> bool:
    """Whether a folder's name says more than which machine or archive made it."""
    return bool(name) and name.lower() not in LAYOUT and not _BINS.fullmatch(name)


def drafted_row(name: str, counts: Path | None, form: str, **known: Any) -> SlideRow:
    """A row of a slide found in a folder: its own patient, until somebody says more.

    A name of `LAYOUT` says nothing: the nearest folder above that has another one stands for it.
    """
    if not says(name):
        place = counts or known.get("image") or Path()
        name = next((p.name for p in place.resolve().parents if says(p.name)), "slide1")
    slide = plain_name(name)
    return SlideRow(**{"slide_id": slide, "patient_id": slide, **known}, counts=counts, format=form)
