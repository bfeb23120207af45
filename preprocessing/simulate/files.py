"""Writing a simulated slide as instruments do: pyramid, 10x matrix, position and label tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.atomic import atomic_path
from preprocessing.simulate.layout import Lattice
from preprocessing.store.hdf5_write import hdf5_writer

_TILE = 256
_SMALLEST_LEVEL_PX = 400
_JPEG_QUALITY = 90
_SPOT_DIAMETER_UM = 55.0
_BARCODE_SPACE = 4**16
_BARCODE_STEP = 2_654_435_769


def write_pyramid(path: Path, picture: NDArray[np.uint8], mpp: float) -> None:
    """Tiled JPEG pyramid that OpenSlide opens, with micrometres per pixel in its resolution.

    Args:
        path: Target ``.tif``.
        picture: (H, W, 3) level 0; every further level halves it, while its short side stays above
            400 px, and at least once.
        mpp: Micrometres per level-0 pixel.
    """
    levels = [picture]
    while len(levels) < 2 or min(levels[-1].shape[:2]) > 2 * _SMALLEST_LEVEL_PX:
        levels.append(_halve(levels[-1]))
    with atomic_path(path) as part, tifffile.TiffWriter(part) as writer:
        for number, level in enumerate(levels):
            per_cm = 1e4 / (mpp * 2**number)
            writer.write(
                level,
                tile=(_TILE, _TILE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": _JPEG_QUALITY},
                subfiletype=1 if number else 0,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def _halve(level: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mean of 2 x 2 pixels; an odd last row or column is left out."""
    height, width = level.shape[0] // 2 * 2, level.shape[1] // 2 * 2
    even = level[:height, :width].astype(np.uint16)
    total = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


def barcodes(lattice: Lattice) -> NDArray[np.str_]:
    """(L,) barcodes of 16 bases and ``-1``; as on a Visium array, they depend on the position only.

    Multiplication by an odd number modulo 4^16 is one-to-one, so they are unique.
    """
    position = lattice.array_row.astype(np.uint64) * np.uint64(65_536)
    position = position + lattice.array_col.astype(np.uint64) + np.uint64(77_777)
    code = (position * np.uint64(_BARCODE_STEP)) % np.uint64(_BARCODE_SPACE)
    digits = (code[:, None] >> (2 * np.arange(16, dtype=np.uint64))) & np.uint64(3)
    letters = np.array(list("ACGT"))[digits.astype(np.int64)]
    return np.array(["".join(row) + "-1" for row in letters])


def write_matrix(
    path: Path,
    counts: sparse.csr_matrix,
    barcode: NDArray[np.str_],
    gene_ids: NDArray[np.str_],
    gene_names: NDArray[np.str_],
) -> None:
    """``filtered_feature_bc_matrix.h5`` in the 10x v3 layout: genes x spots, compressed columns.

    Args:
        path: Target ``.h5``.
        counts: (S, G) integers.
        barcode: (S,) barcodes.
        gene_ids: (G,) identifiers.
        gene_names: (G,) symbols.
    """
    counts = counts.tocsr()
    counts.sort_indices()
    n_genes = len(gene_ids)
    with atomic_path(path) as part, hdf5_writer(part) as (file, _):
        matrix = file.create_group("matrix")
        arrays: dict[str, Any] = {
            "barcodes": barcode.astype("S"),
            "data": counts.data.astype(np.int32),
            "indices": counts.indices.astype(np.int64),
            "indptr": counts.indptr.astype(np.int64),
        }
        for name, array in arrays.items():
            matrix.create_dataset(name, data=array, compression="gzip", compression_opts=4)
        matrix.create_dataset("shape", data=np.array([n_genes, len(barcode)], dtype=np.int32))
        features = matrix.create_group("features")
        columns = {
            "id": gene_ids.astype("S"),
            "name": gene_names.astype("S"),
            "feature_type": np.full(n_genes, b"Gene Expression"),
            "genome": np.full(n_genes, b"SIM"),
        }
        for name, column in columns.items():
            features.create_dataset(name, data=column, compression="gzip", compression_opts=4)
        features.create_dataset("_all_tag_keys", data=np.array([b"genome"]))


def write_spatial(folder: Path, lattice: Lattice, barcode: NDArray[np.str_], mpp: float) -> None:
    """``tissue_positions.csv`` (all lattice positions) and ``scalefactors_json.json``."""
    pixel = np.round(lattice.xy_um / mpp, 3)
    positions = pd.DataFrame(
        {
            "barcode": barcode,
            "in_tissue": lattice.in_tissue.astype(int),
            "array_row": lattice.array_row,
            "array_col": lattice.array_col,
            "pxl_row_in_fullres": pixel[:, 1],
            "pxl_col_in_fullres": pixel[:, 0],
        }
    )
    write_table(folder / "tissue_positions.csv", positions)
    longest_px = max(lattice.size_um) / mpp
    write_json(
        folder / "scalefactors_json.json",
        {
            "tissue_hires_scalef": min(1.0, 2000 / longest_px),
            "tissue_lowres_scalef": min(1.0, 600 / longest_px),
            "spot_diameter_fullres": _SPOT_DIAMETER_UM / mpp,
            "fiducial_diameter_fullres": 1.6 * _SPOT_DIAMETER_UM / mpp,
        },
    )


def write_table(path: Path, table: pd.DataFrame) -> None:
    """A CSV without row numbers."""
    with atomic_path(path) as part:
        table.to_csv(part, index=False, lineterminator="\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, indented."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
