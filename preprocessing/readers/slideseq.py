"""Slide-seq pucks: a table of genes x beads and the places of the beads."""

from pathlib import Path

from preprocessing.errors import DataError
from preprocessing.readers.cells import cell_format, cell_table, read_joined
from preprocessing.readers.coordinates import Scale
from preprocessing.readers.format import first_file
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable

_COUNTS = ("*MappedDGEForR.csv*", "*digital_expression*.txt*", "*digital_expression*.csv*")
_BEADS = ("*BeadLocationsForR.csv*", "*bead_locations*.csv*", "*BeadLocations*.csv*")
_HINT = "; Slide-seq says its coordinates in pixels of the microscope, whose size its files lack"


def find_slideseq_files(folder: Path) -> dict[str, Path] | None:
    """The table of counts and that of beads; None: not both."""
    counts, beads = first_file(folder, *_COUNTS), first_file(folder, *_BEADS)
    return None if counts is None or beads is None else {"counts": counts, "spots": beads}


def _sources(row: SlideRow) -> dict[str, Path]:
    files = find_slideseq_files(row.counts_path)
    if files is None:
        raise DataError(
            f"{row.counts_path} has no {_COUNTS[0]} or {_COUNTS[1]} beside {_BEADS[0]} or "
            f"{_BEADS[1]}; give the folder of one puck"
        )
    return files


def read_slideseq(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one puck; xcoord and ycoord are pixels, so that the manifest's mpp is needed."""
    files = _sources(row)
    cells, in_um, keys = read_joined(files["counts"], files["spots"])
    return cell_table(row, cells, Scale(in_um, hint=_HINT), image_mpp, keys)


def _discover(folder: Path) -> list[SlideRow]:
    if find_slideseq_files(folder) is None:
        return []
    return [drafted_row(folder.resolve().name, folder, "slideseq", technology="Slide-seq")]


FORMAT = cell_format(
    "slideseq",
    read_slideseq,
    sources=_sources,
    detect=lambda counts, spots: find_slideseq_files(counts) is not None,
    discover=_discover,
    layout="Slide-seq pucks",
)
