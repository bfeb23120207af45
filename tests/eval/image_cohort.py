"""A tiny model trained on a simulated cohort that has image-only slides beside the paired ones."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from hibio.config.run import RunConfig
from hibio.config.schema import build_section
from hibio.run import train_all
from pathways import load_pathways
from preprocessing import SlideStore, SpotTable, prepare, read_manifest
from preprocessing.files import files_in
from preprocessing.patches import PatchConfig
from preprocessing.simulate import SimulateConfig, simulate_cohort
from preprocessing.slide_row import SlideRow
from preprocessing.store import SlidePicture, write_store

PATCH = PatchConfig(112.0, 16)
EMPTY = np.empty(0, dtype=object)


@dataclass(frozen=True)
class Cohort:
    """A trained checkpoint and its stores; ``images`` holds the image-only ones alone."""

    stores: Path
    images: Path
    checkpoint: Path
    printed: str


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Three paired slides, the grid over one of them, and one of them without its counts."""
    root = tmp_path_factory.mktemp("image_only")
    database = load_pathways("default")
    programmes = {name: list(database.genes_of(name)) for name in database.names}
    size = SimulateConfig(n_slides=3, n_patients=3, n_spots=120, n_genes=300, n_programmes=8)
    rows = read_manifest(simulate_cohort(root / "cohort", programmes, size))
    grid = SlideRow("grid", rows[2].patient_id, None, "image", image=rows[2].image)
    report = prepare([*rows, grid], root / "stores", patch=PATCH)
    assert not report.failed, str(report)
    (root / "images").mkdir()
    (root / "images" / "grid.h5").hardlink_to(root / "stores" / "grid.h5")
    without_counts(root / "stores" / f"{rows[2].slide_id}.h5", root / "images" / "bare.h5")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *text, **_: lines.append(" ".join(map(str, text))))
        (checkpoint,) = train_all(tiny_run(root, rows[2].patient_id))
    return Cohort(root / "stores", root / "images", checkpoint, "\n".join(lines))


def tiny_run(root: Path, fold: str) -> RunConfig:
    both = {"spot/contrastive": 1.0, "image/expression": 1.0}
    return build_section(
        RunConfig,
        {
            "out": str(root / "run"),
            "data": {"stores": str(root / "stores")},
            "folds": [fold],
            "genes": {"keyword_genes": 16, "rank": 6, "min_spots": 5, "target_genes": 20},
            "model": {
                "embed_dim": 16,
                "vision": {"width": 32},
                "omics": {"width": 16, "layers": 1, "heads": 2},
            },
            "regions": {"diameters_um": [300.0, 600.0]},
            "sampler": {"batch_spots": 120},
            "stages": [{"name": "spot", "epochs": 3, "lr": 2e-3, "weights": both}],
        },
        (),
    )


def without_counts(paired: Path, bare: Path) -> None:
    """The same spots, patches and features as a store, written as an image-only one."""
    with SlideStore(paired) as store:
        table = SpotTable(
            csr_matrix((store.n_spots, 0), dtype=np.int32),
            EMPTY,
            EMPTY,
            store.barcodes,
            store.xy_px0,
            store.xy_um,
            store.mpp,
            image_only=True,
        )
        assert store.thumbnail is not None
        assert store.thumbnail_downsample is not None
        size = tuple(store.attrs["slide_size_px0"])
        write_store(
            bare,
            table,
            SlideRow("bare", store.patient_id, None, "image"),
            patches=enumerate(store.patches()),
            patch=PATCH,
            features={"handcrafted": store.features("handcrafted")},
            tissue_fraction=store.tissue_fraction,
            picture=SlidePicture(size, store.thumbnail, store.thumbnail_downsample),
        )


def picture(cohort: Cohort) -> Path:
    """One of the pictures that the cohort was made of."""
    return next(
        p
        for p in files_in(cohort.stores.parent / "cohort", "**/*")
        if p.suffix in (".tif", ".tiff", ".png", ".jpg")
    )
