"""Tiny source files for the tests: legacy ST and Space Ranger slides with known content."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import mmwrite
from scipy.sparse import csc_matrix

from preprocessing.slide_row import SlideRow

STEP_PX = 40  # pixels between neighbouring array positions
REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NO_REAL_DATA = "the real data of ../shared/data are not on this machine"


@dataclass(frozen=True)
class Truth:
    """What the files of a slide say: counts (S, G), names, and xy_px (S, 2) full resolution."""

    counts: np.ndarray
    barcodes: list[str]
    genes: list[str]
    xy_px: np.ndarray


def tissue_image(path: Path, width: int, height: int, seed: int = 0) -> None:
    """Write a stained, textured picture with a white margin of 10 px."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 255, dtype=np.uint8)
    noise = rng.integers(-30, 30, (height - 20, width - 20, 1))
    picture[10:-10, 10:-10] = np.clip(np.array([190, 110, 170]) + noise, 0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def draw_counts(spots: int, genes: int, seed: int = 0) -> np.ndarray:
    """Counts (spots, genes), sparse, with at least one count a spot."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.5, (spots, genes))
    counts[:, 0] += 1
    return counts


def write_legacy_counts(path: Path, counts: np.ndarray, names: list[str], genes: list[str]) -> None:
    """Write a counts table as the ST pipeline does, gzipped."""
    lines = ["\t".join(["", *genes])]
    lines += ["\t".join([n, *map(str, row)]) for n, row in zip(names, counts.tolist(), strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))


def legacy_slide(
    folder: Path, name: str = "A1", columns: int = 6, rows: int = 5, *, image: bool = True
) -> tuple[SlideRow, Truth]:
    """Write a legacy ST slide; array positions begin at 3, pixel = 40 * (position - 2)."""
    array = np.array([(x, y) for y in range(3, 3 + rows) for x in range(3, 3 + columns)])
    xy_px = (array - 2.0) * STEP_PX
    names = [f"{x}x{y}" for x, y in array]
    genes = [f"GENE{g}" for g in range(12)]
    counts = draw_counts(len(array), len(genes))
    write_legacy_counts(folder / f"{name}.tsv.gz", counts, names, genes)
    lines = ["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected"]
    lines += [
        f"{x}\t{y}\t{x}\t{y}\t{p}\t{q}\t1" for (x, y), (p, q) in zip(array, xy_px, strict=True)
    ]
    (folder / f"{name}_selection.tsv").write_text("\n".join(lines) + "\n")
    picture = folder / f"{name}.png"
    if image:
        tissue_image(picture, (columns + 1) * STEP_PX, (rows + 1) * STEP_PX)
    row = SlideRow(
        slide_id=name,
        patient_id=name[0],
        counts=folder / f"{name}.tsv.gz",
        format="legacy_st",
        image=picture if image else None,
        spots=folder / f"{name}_selection.tsv",
        pitch_um=200.0,
    )
    return row, Truth(counts, names, genes, xy_px)


def hex_positions(
    rows: int = 6, columns: int = 8, pitch_px: float = 50.0
) -> tuple[np.ndarray, np.ndarray]:
    """Array (row, col) and pixel (x, y) of a hexagonal Visium lattice."""
    array = np.array([(r, c) for r in range(rows) for c in range(r % 2, 2 * columns, 2)])
    xy = np.column_stack([array[:, 1] * pitch_px / 2, array[:, 0] * pitch_px * np.sqrt(0.75)])
    return array, xy + pitch_px


def visium_folder(
    folder: Path, *, h5: bool = True, header: bool = True, hexagonal: bool = True
) -> Truth:
    """Write a Space Ranger folder; the last two spots are outside the tissue (in_tissue 0)."""
    array, xy = hex_positions()
    if not hexagonal:
        array = np.array([(r, c) for r in range(1, 7) for c in range(1, 9)])
        xy = array[:, ::-1] * 50.0
    barcodes = [f"BC{i:04d}-1" for i in range(len(array))]
    inside = np.ones(len(array), dtype=int)
    inside[-2:] = 0
    genes = [f"GENE{g}" for g in range(9)] + ["GENE0"]
    counts = draw_counts(len(array), len(genes) + 1)
    _write_matrix(folder, counts, barcodes, genes, h5)
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    order = np.random.default_rng(1).permutation(len(array))
    lines = ["barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"] * header
    lines += [
        f"{barcodes[i]},{inside[i]},{array[i, 0]},{array[i, 1]},{xy[i, 1]},{xy[i, 0]}"
        for i in order
    ]
    name = "tissue_positions.csv" if header else "tissue_positions_list.csv"
    (spatial / name).write_text("\n".join(lines) + "\n")
    factors = {
        "spot_diameter_fullres": 27.5,
        "tissue_hires_scalef": 0.5,
        "tissue_lowres_scalef": 0.25,
    }
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    return Truth(counts[:-2, :-1], barcodes[:-2], genes, xy[:-2])


def _write_matrix(
    folder: Path, counts: np.ndarray, barcodes: list[str], genes: list[str], h5: bool
) -> None:
    """Write (S, G + 1) counts; the last feature is an antibody."""
    ids = [f"ENSG{g:011d}" for g in range(len(genes))] + ["CD3"]
    names = [*genes, "CD3"]
    types = ["Gene Expression"] * len(genes) + ["Antibody Capture"]
    matrix = csc_matrix(counts.T)
    folder.mkdir(parents=True, exist_ok=True)
    if h5:
        with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
            group = file.create_group("matrix")
            for key in ("data", "indices", "indptr"):
                group[key] = getattr(matrix, key)
            group["shape"] = matrix.shape
            group["barcodes"] = np.array(barcodes, dtype="S")
            for key, values in (("id", ids), ("name", names), ("feature_type", types)):
                group[f"features/{key}"] = np.array(values, dtype="S")
        return
    mex = folder / "filtered_feature_bc_matrix"
    mex.mkdir()
    features = zip(ids, names, types, strict=True)
    (mex / "barcodes.tsv.gz").write_bytes(gzip.compress("\n".join(barcodes).encode()))
    (mex / "features.tsv.gz").write_bytes(
        gzip.compress("\n".join(map("\t".join, features)).encode())
    )
    mmwrite(mex / "matrix.mtx", matrix, field="integer", symmetry="general")


def zarr_group(folder: Path, form: int = 2) -> Any:
    """A new group of that format; the test is skipped where zarr 2 is installed for format 3."""
    zarr = pytest.importorskip("zarr", reason='pip install "hibio[spatialdata]"')
    if hasattr(zarr.Group, "create_array"):
        return zarr.open_group(str(folder), mode="w", zarr_format=form)
    if form == 3:
        pytest.skip("zarr 2 writes its format 2 alone")
    return zarr.open_group(str(folder), mode="w")
