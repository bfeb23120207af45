"""What `embed` writes is drawn by the field's own programs as it is (where they are installed)."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from eval.embed import lay_out, region_names
from preprocessing.hdf5 import write_h5ad
from preprocessing.hest_layout import obs_columns
from preprocessing.patches import PatchConfig
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable
from preprocessing.store import SlidePicture, SlideStore, write_store

LABELS = ["a b", "A_b", "_index", "__own", "kind/deep", "..", "slide_id", "größe µm"]


@pytest.fixture(params=[True, False], ids=["image", "counts only"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SlideStore:
    """A slide of 12 spots, 50 level-0 pixels apart, with labels of every odd name."""
    across, down = np.meshgrid(np.arange(4), np.arange(3))
    xy = 50.0 * np.stack([across.ravel(), down.ravel()], axis=1) + 25
    table = SpotTable(
        csr_matrix(np.ones((12, 2), dtype=np.int32)),
        np.array(["g1", "g2"], dtype=object),
        np.array(["G1", "G2"], dtype=object),
        np.array([f"s{i}" for i in range(12)], dtype=object),
        xy,
        xy * 2.0,
        2.0,
        labels=pd.DataFrame({name: ["x"] * 12 for name in LABELS}),
        diameter_um=60.0,
    )
    patches = picture = None
    if request.param:
        small = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        patches = ((i, np.zeros((8, 8, 3), np.uint8)) for i in range(12))
        picture = SlidePicture((200, 150), small, 5.0)
    row, patch = SlideRow("s", "p", None, "h5ad"), PatchConfig(100.0, 8)
    write_store(tmp_path / "s.h5", table, row, patches=patches, patch=patch, picture=picture)
    with SlideStore(tmp_path / "s.h5") as opened:
        yield opened


def written(store: SlideStore, path: Path) -> anndata.AnnData:
    labels = obs_columns(store, taken=("slide_id",))
    obs = store.labels().set_axis(list(labels), axis=1).set_axis(pd.Index(store.barcodes), axis=0)
    adata = anndata.AnnData(store.counts(), obs, pd.DataFrame(index=pd.Index(store.gene_names)))
    lay_out(adata, store)
    adata.obs["region"] = region_names("s", np.arange(12)[::-1])
    adata.uns["hibio"] = {"labels": labels}
    write_h5ad(path, adata)
    return anndata.read_h5ad(path)


def test_columns_are_valid_and_their_labels_are_kept(store: SlideStore, tmp_path: Path):
    adata = written(store, tmp_path / "a.h5ad")
    assert set(adata.uns["hibio"]["labels"].values()) == set(LABELS)
    columns = list(adata.uns["hibio"]["labels"])
    assert all(c.replace("_", "").replace(".", "").replace("-", "").isalnum() for c in columns)
    lower = [column.lower() for column in adata.obs]
    assert len(set(lower)) == len(lower)
    assert not {"_index", ".", ".."} & set(lower)
    assert not [column for column in columns if column.startswith("__")]


def test_regions_are_named_in_order():
    regions = region_names("A1", np.array([10, 2, 0, 2]))
    assert list(regions) == ["A1:10", "A1:02", "A1:00", "A1:02"]
    assert list(regions.categories) == ["A1:00", "A1:02", "A1:10"]
    assert regions.max() == "A1:10"


def test_the_clients_draw_it(store: SlideStore, tmp_path: Path):
    squidpy = pytest.importorskip("squidpy", reason="squidpy is not installed")
    scanpy = pytest.importorskip("scanpy", reason="scanpy is not installed")
    models = pytest.importorskip("spatialdata.models", reason="spatialdata is not installed")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    adata = written(store, tmp_path / "a.h5ad")
    pictured = "spatial" in adata.uns
    asked = {} if pictured else {"shape": None}  # spots without a picture have no drawn size
    squidpy.pl.spatial_scatter(adata, color=["region", "G1"], **asked)
    assert {axes.get_title() for axes in plt.gcf().axes} >= {"region", "G1"}
    if pictured:
        drawn = scanpy.pl.spatial(adata, color="region", show=False)
        assert [axes.get_title() for axes in drawn] == ["region"]
    assert models.TableModel.parse(adata).n_obs == adata.n_obs
