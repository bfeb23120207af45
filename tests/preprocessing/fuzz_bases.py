"""Small valid inputs of every kind, which `fuzz_cases` then damages."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from preprocessing import prepare
from preprocessing.patches import PatchConfig
from preprocessing.slide_row import COLUMNS
from tests.preprocessing import cell_sources
from tests.preprocessing.hd_cell_sources import segmented_folder
from tests.preprocessing.sources import legacy_slide, tissue_image, visium_folder

PATCH = PatchConfig(100.0, 16)


def manifest(folder: Path, *rows: dict[str, str]) -> None:
    """Write m.csv."""
    with (folder / "m.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({"slide_id": "s1", "patient_id": "p1", **row} for row in rows)


def _tissue(size: int = 260) -> np.ndarray:
    rng = np.random.default_rng(7)
    picture = np.full((size, size, 3), 255, dtype=np.uint8)
    picture[20:-20, 20:-20] = np.clip(
        np.array([190, 110, 170]) + rng.integers(-30, 30, (size - 40, size - 40, 1)), 0, 255
    )
    return picture


def _legacy(folder: Path) -> None:
    legacy_slide(folder, "A1", 4, 4)
    manifest(
        folder,
        {"counts": "A1.tsv.gz", "format": "legacy_st", "spots": "A1_selection.tsv",
         "image": "A1.png", "pitch_um": "200"},
    )  # fmt: skip


def _visium(folder: Path, *, h5: bool = True) -> None:
    visium_folder(folder / "V", h5=h5)
    tissue_image(folder / "V/spatial/tissue_hires_image.png", 300, 220)
    labels = "barcode,layer\n" + "".join(f"BC{i:04d}-1,L{i % 3}\n" for i in range(40))
    (folder / "labels.csv").write_text(labels)
    manifest(
        folder,
        {"counts": "V", "format": "visium", "image": "V/spatial/tissue_hires_image.png",
         "labels": "labels.csv"},
    )  # fmt: skip


def _h5ad(folder: Path) -> None:
    cell_sources.write_h5ad(folder, cell_sources.toy_anndata())
    manifest(folder, {"counts": "a.h5ad", "format": "h5ad", "mpp": "0.5"})


def _loom(folder: Path) -> None:
    cell_sources.write_loom(folder / "a.loom")
    manifest(folder, {"counts": "a.loom", "format": "loom", "mpp": "0.5"})


def _csv(folder: Path) -> None:
    cell_sources.csv_pair(folder)
    manifest(folder, {"counts": "counts.csv", "format": "csv", "spots": "cells.csv", "mpp": "0.5"})


def _xenium(folder: Path, *, h5: bool = True) -> None:
    cell_sources.xenium_folder(folder / "X", h5=h5)
    manifest(folder, {"counts": "X", "format": "xenium"})


def _cosmx(folder: Path) -> None:
    cell_sources.cosmx_folder(folder / "C")
    manifest(folder, {"counts": "C", "format": "cosmx", "mpp": "0.12"})


def _hd_cells(folder: Path) -> None:
    segmented_folder(folder / "segmented_outputs")
    manifest(folder, {"counts": "segmented_outputs", "format": "visium_hd_cells"})


def _image(folder: Path, name: str) -> None:
    manifest(folder, {"format": "image", "image": name, "mpp": "1"})


def _pyramid(folder: Path, compression: str = "jpeg") -> None:
    with tifffile.TiffWriter(folder / "a.tif") as tiff:
        for level, size in enumerate((512, 256)):
            tiff.write(
                _tissue(size), tile=(128, 128), photometric="rgb", compression=compression,
                subfiletype=bool(level), metadata=None,
            )  # fmt: skip
    _image(folder, "a.tif")


def _ome(folder: Path) -> None:
    tifffile.imwrite(
        folder / "a.ome.tif", _tissue(), tile=(64, 64), photometric="rgb", compression="deflate",
        metadata={"axes": "YXS", "PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0},
    )  # fmt: skip
    _image(folder, "a.ome.tif")


def _strips(folder: Path) -> None:
    tifffile.imwrite(folder / "a.tif", _tissue(), rowsperstrip=16, compression="lzw")
    _image(folder, "a.tif")


def _jpeg(folder: Path) -> None:
    Image.fromarray(_tissue()).save(folder / "a.jpg", quality=90)
    _image(folder, "a.jpg")


def _png(folder: Path) -> None:
    Image.fromarray(_tissue()).save(folder / "a.png")
    _image(folder, "a.png")


def _store(folder: Path) -> None:
    """A prepared slide, to be checked and to be prepared again over it."""
    _legacy(folder)
    assert not prepare(folder / "m.csv", folder / "out", patch=PATCH).failed


BASES: dict[str, Callable[[Path], None]] = {
    "legacy_st": _legacy,
    "visium h5": _visium,
    "visium mex": lambda folder: _visium(folder, h5=False),
    "h5ad": _h5ad,
    "loom": _loom,
    "csv": _csv,
    "xenium h5": _xenium,
    "xenium mex": lambda folder: _xenium(folder, h5=False),
    "cosmx": _cosmx,
    "hd cells h5": _hd_cells,
    "tiled jpeg": _pyramid,
    "tiled deflate": lambda folder: _pyramid(folder, "deflate"),
    "ome-tiff": _ome,
    "strips": _strips,
    "jpeg": _jpeg,
    "png": _png,
    "store": _store,
}
