"""Small stores for the tests of the quality pages, written without any source file."""

from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from preprocessing.patches import PatchConfig
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable
from preprocessing.store import SlidePicture, write_store

GENES = ("MT-ND1", "mt-Co1", "ACTB", "MTOR", "TP53")


def draw_counts(n_spots: int, seed: int = 0) -> np.ndarray:
    """Counts (n_spots, 5); the genes MT-ND1 and mt-Co1 hold about a third."""
    rng = np.random.default_rng(seed)
    return rng.poisson([20, 10, 30, 20, 10], (n_spots, len(GENES))) + 1


def write_slide(
    folder: Path,
    name: str,
    *,
    n_spots: int = 0,
    counts: np.ndarray | None = None,
    patches: np.ndarray | None = None,
    tissue: np.ndarray | None = None,
    image_only: bool = False,
    encoding: str = "raw",
    **row: str,
) -> Path:
    """Write a store of spots on a square grid of 100 um.

    Args:
        folder: where to.
        name: slide.
        n_spots: S, unless patches or counts say it.
        counts: (S, 5); None: `draw_counts`.
        patches: uint8 (S, px, px, 3); None: counts only.
        tissue: (S,) tissue fraction; None: 1.
        image_only: no genes.
        encoding: of the patches.
        **row: further columns of the manifest.
    """
    if counts is None:
        counts = draw_counts(len(patches) if patches is not None else n_spots)
    size = len(counts)
    side = int(np.ceil(np.sqrt(size)))
    xy_um = 100.0 * np.stack([np.arange(size) % side, np.arange(size) // side], axis=1) + 100
    genes = np.array([] if image_only else GENES, dtype=object)
    matrix = csr_matrix((size, 0), dtype=np.int32) if image_only else csr_matrix(counts)
    barcodes = np.array([f"spot{i}" for i in range(size)], dtype=object)
    table = SpotTable(
        matrix, genes, genes, barcodes, xy_um / 0.5, xy_um, 0.5,
        image_only=image_only, modality=row.get("modality", "rna"),
        notes=("3 spots <b>left out</b>",),
    )  # fmt: skip
    picture = None
    if patches is not None:
        edge = int(xy_um.max() / 0.5 / 10) + 20
        small = np.full((edge, edge, 3), 200, dtype=np.uint8)
        picture = SlidePicture((edge * 10, edge * 10), small, 10.0)
        tissue = np.ones(size, dtype=np.float32) if tissue is None else tissue
    path = folder / f"{name}.h5"
    values = {"patient_id": f"p{name}", "tissue": "<script>alert(1)</script>"} | row
    write_store(
        path,
        table,
        SlideRow(slide_id=name, counts=None, format="image" if image_only else "h5ad", **values),
        patches=None if patches is None else enumerate(patches),
        patch=PatchConfig(112.0, 64 if patches is None else patches.shape[1]),
        tissue_fraction=tissue,
        encoding=encoding,
        picture=picture,
        dropped={"off tissue": 2},
    )
    return path
