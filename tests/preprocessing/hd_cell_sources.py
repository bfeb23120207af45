"""A tiny `segmented_outputs` as Space Ranger 4 writes it."""

import json
from pathlib import Path

import h5py
import numpy as np
from scipy.sparse import csc_matrix

from tests.preprocessing.sources import tissue_image

CELLS, GENES, MPP = 12, 5, 0.25
NAMES = [f"GENE{g}" for g in range(GENES)]
BARCODES = [f"cellid_{i + 3:09d}-1" for i in range(CELLS)]
FACTORS = {
    "microns_per_pixel": MPP,
    "tissue_lowres_scalef": 0.05,
    "fiducial_diameter_fullres": 1206.5,
    "tissue_hires_scalef": 0.5,
    "regist_target_img_scalef": 0.5,
}


def cell_centres() -> np.ndarray:
    """(CELLS, 2) x and y in pixels of the microscope image."""
    x, y = np.meshgrid(np.arange(4) * 90.0 + 80, np.arange(3) * 110.0 + 90)
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def square(centre: np.ndarray, half: float = 8.0) -> list[list[float]]:
    """A closed ring around a place."""
    corners = [(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]
    return [[float(centre[0] + half * a), float(centre[1] + half * b)] for a, b in corners]


def feature(number: object, coordinates: object, kind: str = "Polygon") -> dict[str, object]:
    """A shape with its number."""
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": {"cell_id": number}}


def write_outlines(path: Path, features: list[dict[str, object]]) -> Path:
    """A FeatureCollection."""
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def segmented_folder(folder: Path) -> np.ndarray:
    """Write the folder; returns counts (CELLS, GENES). The outlines are in another order."""
    counts = np.random.default_rng(3).integers(0, 5, (CELLS, GENES)) + np.eye(
        CELLS, GENES, dtype=int
    )
    (folder / "spatial").mkdir(parents=True)
    matrix = csc_matrix(counts.T)
    with h5py.File(folder / "filtered_feature_cell_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(matrix, key)
        group["shape"] = matrix.shape
        group["barcodes"] = np.array(BARCODES, dtype="S")
        group["features/id"] = np.array([f"ENSG{g}" for g in range(GENES)], dtype="S")
        group["features/name"] = np.array(NAMES, dtype="S")
        group["features/feature_type"] = np.array(["Gene Expression"] * GENES, dtype="S")
    order = np.random.default_rng(4).permutation(CELLS)
    shapes = [feature(int(i) + 3, [square(cell_centres()[i])]) for i in order]
    write_outlines(folder / "cell_segmentations.geojson", shapes)
    write_outlines(folder / "nucleus_segmentations.geojson", shapes[:-1])
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(FACTORS))
    tissue_image(folder / "spatial" / "tissue_hires_image.png", 260, 220)
    return counts
