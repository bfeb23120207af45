"""The format of a slide's files, where the manifest does not say it; looks at names, not inside."""

import gzip
from collections.abc import Callable
from pathlib import Path

_MATRIX = "filtered_feature_bc_matrix"


_CELL_MATRIX = "filtered_feature_cell_matrix"


_TEXTS = (".csv", ".tsv", ".txt")


_LEGACY = ("pixel_x", "pixel_y")  # columns of a legacy ST spot table


_HEAD = 4096


def detect_format(counts: Path | None, image: Path | None, spots: Path | None) -> str | None:
    """Tell the format of a manifest row.

    Args:
        counts: its counts; None: there are none.
        image: its slide image.
        spots: its spot table.

    Returns:
        A name of `manifest_row.FORMATS`, or None where nothing fits (or the files are missing).
    """
    if counts is None:
        return None if image is None else "image"
    try:
        return _folder(counts) if counts.is_dir() else _file(counts, spots)
    except (OSError, ValueError):  # a name the system cannot hold, or no permission
        return None


def _folder(counts: Path) -> str | None:
    return next((name for name, fits in _FOLDERS if fits(counts)), None)


def _file(counts: Path, spots: Path | None) -> str | None:
    name = counts.name.lower().removesuffix(".gz")
    if name.endswith(".h5ad"):
        return "hest" if _is_hest(counts.parent.parent) and counts.parent.name == "st" else "h5ad"
    if name.endswith(".loom"):
        return "loom"
    if name.endswith(f"{_CELL_MATRIX}.h5"):
        return "visium_hd_cells"
    if name.endswith(".h5"):
        return _space_ranger(counts.parent)
    if not name.endswith(_TEXTS) or not counts.is_file():
        return None
    legacy = spots is not None and all(column in _head(spots) for column in _LEGACY)
    return "legacy_st" if legacy else "csv"


def _space_ranger(folder: Path) -> str:
    factors = folder / "spatial" / "scalefactors_json.json"
    return "visium_hd" if "bin_size_um" in _head(factors) else "visium"


def _head(path: Path) -> str:
    """The beginning of a text, gzipped or not; "" where it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEAD)
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as text:
                data = text.read(_HEAD)
    except (OSError, EOFError):
        return ""
    return data.decode("utf-8", "replace")


def _is_hest(folder: Path) -> bool:
    beside = any((folder / name).is_dir() for name in ("wsis", "patches", "metadata"))
    return beside and (folder / "st").is_dir()


def _is_hd(folder: Path) -> bool:
    places = (folder, folder / "binned_outputs", folder / "outs" / "binned_outputs")
    if any(any(place.glob("square_*um")) for place in places):
        return True
    return _is_visium(folder) and _space_ranger(folder) == "visium_hd"


def _is_hd_cells(folder: Path) -> bool:
    places = (folder, folder / "segmented_outputs", folder / "outs" / "segmented_outputs")
    return any(
        any(place.glob(f"{_CELL_MATRIX}*")) and any(place.glob("*cell_segmentations.geojson*"))
        for place in places
    )


def _is_visium(folder: Path) -> bool:
    names = (f"*{_MATRIX}", f"*{_MATRIX}.h5", f"outs/{_MATRIX}", f"outs/{_MATRIX}.h5")
    return any(any(folder.glob(name)) for name in (*names, "matrix.mtx*"))


def _is_xenium(folder: Path) -> bool:
    return any(folder.glob("cell_feature_matrix*")) and any(folder.glob("cells.*"))


def _is_cosmx(folder: Path) -> bool:
    return any(folder.glob("*_exprMat_file.csv*")) or any(folder.glob("cell_by_gene.csv*"))


def _is_zarr(folder: Path) -> bool:
    root = folder.parent.parent if folder.parent.name in ("tables", "table") else folder
    return any((root / name).is_dir() for name in ("tables", "table"))


_FOLDERS: tuple[tuple[str, Callable[[Path], bool]], ...] = (
    ("hest", _is_hest),
    ("visium_hd", _is_hd),
    ("visium_hd_cells", _is_hd_cells),
    ("xenium", _is_xenium),
    ("cosmx", _is_cosmx),
    ("visium", _is_visium),
    ("spatialdata", _is_zarr),
)
