"""Tables of cells in a folder, as manifest rows: Xenium, CosMx, AnnData and loom."""

from collections.abc import Callable
from pathlib import Path

from preprocessing.errors import DataError
from preprocessing.manifest import SlideRow
from preprocessing.plain_names import plain_name
from preprocessing.readers import h5ad, loom
from preprocessing.readers.cosmx import KEYS, find_cosmx_files, mpp_of_frame
from preprocessing.readers.wide_table import read_header
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
